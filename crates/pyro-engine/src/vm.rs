//! VMs of one process: made, started, used once, ended. They never outlive the engine that made them.

mod machine;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pyro_image::Environment;
use pyro_net::{Network, Settings};
use pyro_vmm::DiskCache;

use self::machine::{VmExec, VmMachine};
use crate::budget::Promise;
use crate::ending::{Ending, Noun};
use crate::engine::{Engine, Ground};
use crate::error::{Error, ErrorKind};
use crate::execute::{Cancel, Limit, Output, Subject, carry_out, ended_by, millis};
use crate::guest::Identity;
use crate::live::{Boot, Fresh, Live, OVERLAY, StartTimes};
use crate::network::{self, NetworkInfo};
use crate::observe::{Observer, Phase};
use crate::owner::{self, Mailbox, Message};
use crate::place::{Place, Terms};
use crate::ports;
use crate::record::{Cleanup, Deleted, ExecResult, Fault, Timings, VmRecord};
use crate::registry::now;
use crate::room;
use crate::spare::Slot;
use crate::spec::{ExecSpec, VmSpec};

/// The VMs of an engine. Dropping them ends them.
#[derive(Debug, Default)]
pub(crate) struct Machines {
    vms: Mutex<HashMap<String, Arc<Vm>>>,
    pub(crate) spare: Mutex<Slot>,
}

/// A VM as its callers hold it. Its owner holds the rest.
#[derive(Debug)]
struct Vm {
    mailbox: Mailbox<VmMachine>,
    live: Shelf,
}

/// Where the machine of a VM is between two changes. Its owner alone changes it; whoever drops the machine's last user
/// takes it from here, and so ends it at once.
#[derive(Clone, Debug, Default)]
struct Shelf(Arc<Mutex<Option<Live>>>);

/// Ends what is on a shelf when the future that uses it is dropped.
#[derive(Default)]
struct EndOnDrop(Shelf);

/// What comes of an admission: a slot and a directory.
#[derive(Debug)]
pub(crate) struct Admitted {
    pub(crate) record: VmRecord,
    pub(crate) environment: Option<Environment>,
    pub(crate) live: Live,
}

impl Shelf {
    fn get(&self) -> MutexGuard<'_, Option<Live>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        drop(self.0.get().take());
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        drop(self.live.get().take());
    }
}

impl Machines {
    fn vms(&self) -> MutexGuard<'_, HashMap<String, Arc<Vm>>> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Engine {
    /// Makes a machine, runs one command in it, and removes every trace, however it ends. Dropping the future
    /// does the same.
    ///
    /// # Errors
    /// When the machine cannot be had or the connection to it broke; a command that fails is a result.
    pub async fn run(&self, vm: VmSpec, exec: ExecSpec, observer: Observer) -> Result<ExecResult, Error> {
        exec.check()?;
        let began = Instant::now();
        let ground = self.check_and_ground(&vm, &observer).await?;
        let bound = ports::bind(&vm.publish)?;
        let spare = ground.as_ref().and_then(|(_, environment)| self.take_spare(&vm, environment));
        let Admitted { mut record, environment, mut live } = match spare {
            Some(spare) => spare,
            None => self.admit_on(&vm, ground, &observer).await?,
        };
        let prepare = began.elapsed();
        observer.tell(Phase::Start(record.vm_id.clone()));
        let times = if live.place.is_none() {
            match self.start_live(&vm, &mut record, environment.as_ref(), &mut live).await {
                Ok(times) => times,
                Err(error) => {
                    // What cannot be removed the next sweep finds; the caller is to hear why there is no machine.
                    drop(live.remove().await);
                    return Err(error);
                }
            }
        } else {
            StartTimes::default()
        };
        if let Err(error) = live.place.publish(bound) {
            drop(live.remove().await);
            return Err(error);
        }
        if let Some(warning) = live.place.warning() {
            observer.tell(Phase::Warning(warning.to_owned()));
        }
        observer.tell(Phase::Execute(record.vm_id.clone()));
        let result = execute(&live.place, &live.dir(), &record, exec, &observer, Cancel::default()).await;
        let cleaning = Instant::now();
        let removed = live.remove().await;
        self.keep_spare(&vm);
        let mut result = result?;
        result.timings = Timings {
            prepare: millis(prepare),
            start: millis(times.start),
            handshake: millis(times.handshake),
            execute: result.timings.execute,
            cleanup: millis(cleaning.elapsed()),
        };
        result.cleanup = Some(Cleanup {
            vm_id: record.vm_id,
            // What could not be removed has no owner any more: the next command of any process removes it.
            deleted: removed.is_ok(),
            reason: Fault::cleanup_reason(result.fault),
        });
        Ok(result)
    }

    /// Makes a machine; it is not started.
    ///
    /// # Errors
    /// When a value is outside its limits, the cap is reached or the environment cannot be had.
    pub async fn create_vm(&self, spec: VmSpec, observer: Observer) -> Result<VmRecord, Error> {
        let Admitted { record, environment, live } = self.admit(&spec, &observer).await?;
        let life = Duration::from_secs(u64::from(record.ttl_seconds));
        let shelf = Shelf::default();
        *shelf.get() = Some(live);
        let (mailbox, inbox) = owner::mailbox(Ending::Stopped(Noun::Vm), Some(life));
        let vm = Arc::new(Vm { mailbox, live: shelf.clone() });
        self.machines.vms().insert(record.vm_id.clone(), vm);
        let machine = VmMachine::new(self, spec, environment, record.clone(), shelf);
        drop(tokio::spawn(owner::own(machine, inbox)));
        Ok(record)
    }

    /// Boots a VM that is created or stopped. The boot goes on when the future is dropped.
    ///
    /// # Errors
    /// When it is in another state, does not boot, or is stopped or deleted meanwhile.
    pub async fn start_vm(&self, vm_id: &str) -> Result<VmRecord, Error> {
        let start = async || {
            let started = self.own(vm_id)?.mailbox.start(()).await;
            started.unwrap_or_else(|| Err(self.gone(vm_id)))
        };
        match start().await {
            Err(error) if self.gives_way(&error) || self.ready_gives_way(&error).await => start().await,
            started => started,
        }
    }

    /// Powers a VM off cleanly; its disk is kept. From any state; a running command is ended.
    ///
    /// # Errors
    /// When there is no such VM.
    pub async fn stop_vm(&self, vm_id: &str) -> Result<VmRecord, Error> {
        let stopped = self.own(vm_id)?.mailbox.stop(None).await;
        stopped.unwrap_or_else(|| Err(self.gone(vm_id)))
    }

    /// Runs one command in a started VM, then deletes the VM, whatever came of it. Dropping the future does the same.
    ///
    /// # Errors
    /// When the VM is not started, or the connection to it broke.
    pub async fn exec_vm(
        &self,
        vm_id: &str,
        exec: ExecSpec,
        observer: Observer,
    ) -> Result<ExecResult, Error> {
        exec.check()?;
        let vm = self.own(vm_id)?;
        let used = EndOnDrop::default();
        let shelf = used.0.clone();
        let result = vm.mailbox.ask(|reply| Message::Exec(VmExec { exec, observer, shelf, reply })).await;
        result.unwrap_or_else(|| Err(self.gone(vm_id)))
    }

    /// The machine's record.
    ///
    /// # Errors
    /// When there is no such machine, or its time was up.
    pub fn status_vm(&self, vm_id: &str) -> Result<VmRecord, Error> {
        self.inner.registry.get(vm_id)
    }

    /// The machine's network.
    ///
    /// # Errors
    /// As [`Engine::status_vm`].
    pub fn network_info_vm(&self, vm_id: &str) -> Result<NetworkInfo, Error> {
        let record = self.status_vm(vm_id)?;
        Ok(NetworkInfo::of(record.vm_id, &record.network_policy))
    }

    /// Ends a machine, in any state, and removes every trace. A running command is ended first.
    ///
    /// # Errors
    /// When there is no such machine in this process.
    pub async fn delete_vm(&self, vm_id: &str) -> Result<Deleted, Error> {
        self.own(vm_id)?.mailbox.remove(Ending::Deleted(Noun::Vm)).await?;
        Ok(Deleted { vm_id: vm_id.to_owned(), deleted: true, reason: "explicit_delete" })
    }

    /// Ends all VMs of this process, those with a running command included; tasks live on.
    pub async fn end_vms(&self) {
        let ids: Vec<String> = self.machines.vms().keys().cloned().collect();
        for id in ids {
            // One that another call has ended meanwhile is gone; what cannot be removed the next sweep finds.
            drop(self.delete_vm(&id).await);
        }
        self.end_spare();
    }

    /// Checks, builds and takes a slot: all that comes before a start.
    pub(crate) async fn admit(&self, spec: &VmSpec, observer: &Observer) -> Result<Admitted, Error> {
        let ground = self.check_and_ground(spec, observer).await?;
        self.admit_on(spec, ground, observer).await
    }

    async fn check_and_ground(&self, spec: &VmSpec, observer: &Observer) -> Result<Option<Ground>, Error> {
        self.check(spec)?;
        self.ground(spec, DiskCache::Unsafe, observer).await
    }

    async fn admit_on(
        &self,
        spec: &VmSpec,
        ground: Option<Ground>,
        observer: &Observer,
    ) -> Result<Admitted, Error> {
        observer.tell(Phase::Create(spec.environment.clone()));
        let (engine, spec) = (self.clone(), spec.clone());
        self.blocking(move || {
            let inner = &engine.inner;
            let isolation = ground.as_ref().map_or("none", |(isolation, _)| isolation.as_str());
            let version = ground.as_ref().map_or("", |(_, environment)| environment.version.as_str());
            let digest = ground.as_ref().map(|(_, environment)| environment.digest.clone());
            let admit = || {
                let promise = ground.as_ref().map_or_else(Promise::default, |_guest| spec.promise());
                inner.registry.admit(inner.config.max_active_vms, promise, |id| {
                    let mut record = VmRecord::new(id, &spec, version, isolation, now());
                    let digest = digest.clone().map(|digest| ("environment_digest".to_owned(), digest));
                    record.metadata.extend(digest);
                    if let Some((_, environment)) = &ground {
                        engine.describe_template(environment, &spec, &mut record.metadata);
                    }
                    record
                })
            };
            let (lease, record) = engine.before_spare(admit)?;
            let live = Live::new(Arc::clone(&inner.registry), lease);
            Ok(Admitted { record, environment: ground.map(|(_, environment)| environment), live })
        })
        .await
    }

    /// Starts a machine that is at hand, and says so in its record.
    pub(crate) async fn start_live(
        &self,
        spec: &VmSpec,
        record: &mut VmRecord,
        environment: Option<&Environment>,
        live: &mut Live,
    ) -> Result<StartTimes, Error> {
        let (place, times) = self.start_in(live.dir(), spec, &record.vm_id, environment).await?;
        note_place(record, &place);
        live.place = place;
        Ok(times)
    }

    /// Starts a VM in its directory.
    async fn start_in(
        &self,
        dir: std::path::PathBuf,
        spec: &VmSpec,
        id: &str,
        environment: Option<&Environment>,
    ) -> Result<(Place, StartTimes), Error> {
        let has_disk = dir.join(OVERLAY).exists();
        let blank = match environment {
            Some(_) => self.inner.store.overlay_template(spec.disk_mib)?,
            None => std::path::PathBuf::new(),
        };
        let fresh = Fresh { blank: &blank, disk_mib: spec.disk_mib, cold: spec.cold };
        let identity = Identity::fresh(id)?;
        let workspace = dir.join("workspace");
        let network = Settings {
            policy: spec.network.clone(),
            names: Some(dir.join(network::NAMES)),
            log: None,
            secrets: spec.secrets.clone(),
            outbound: self.inner.config.outbound.clone(),
        };
        let boot = environment.map(|environment| Boot {
            dir,
            environment,
            vcpus: spec.vcpu_count,
            memory_mib: spec.mem_mib,
            disk: DiskCache::Unsafe,
            fresh: (!has_disk).then_some(fresh),
            identity,
            network,
        });
        self.hand_out(boot, workspace, Terms::of(spec)).await
    }

    fn own(&self, vm_id: &str) -> Result<Arc<Vm>, Error> {
        {
            let mut vms = self.machines.vms();
            match vms.get(vm_id) {
                Some(vm) if !vm.mailbox.is_closed() => return Ok(Arc::clone(vm)),
                // The runtime that it belonged to has ended.
                _ => drop(vms.remove(vm_id)),
            }
        }
        // It is told apart whether it is unknown, expired, or another process's.
        self.inner.registry.get(vm_id)?;
        let text = format!("vm '{vm_id}' belongs to another process");
        Err(Error::new(ErrorKind::WrongState, text).hint("use the process that created it"))
    }

    /// What a caller is told whose VM went away before it came to the call.
    fn gone(&self, vm_id: &str) -> Error {
        self.inner.registry.missing("vm", vm_id)
    }
}

/// Puts where a VM's commands run into its record.
fn note_place(record: &mut VmRecord, place: &Place) {
    place.describe(&mut record.metadata);
    if let Some(manner) = place.manner() {
        manner.execution_mode.clone_into(&mut record.execution_mode);
        manner.isolation.clone_into(&mut record.isolation);
    }
    record.start_mode = match place {
        Place::Guest(running) => Some(running.start_mode().to_owned()),
        Place::None | Place::Host(_) => None,
    };
    if let Some(ports) = place.ports() {
        record.ports = ports.list();
    }
}

/// Runs a command in a VM whose directory is `dir`. How it ran is told by the place, not by the record.
pub(crate) async fn execute(
    place: &Place,
    dir: &Path,
    record: &VmRecord,
    exec: ExecSpec,
    observer: &Observer,
    cancel: Cancel,
) -> Result<ExecResult, Error> {
    let began = Instant::now();
    let limit = Limit { asked: exec.timeout_seconds, left: record.seconds_left() };
    let command = (exec.command.display(), exec.command.words());
    let manner = place.manner().ok_or_else(|| not_started(&record.vm_id))?;
    let mut output = Output::spilling(observer, dir);
    let mut cut = cancel.clone();
    let network = place.network();
    let mark = network.map_or(0, Network::mark);
    let outcome = tokio::select! {
        outcome = carry_out(place, exec, limit, &mut output, cancel, false) => outcome?.0,
        // What is given up here ends with its machine.
        () = room::until_low(dir, || true) => ended_by(Ending::HostDiskFull, 137),
    };
    let subject = Subject {
        vm_id: Some(record.vm_id.clone()),
        task_id: None,
        environment: record.environment.clone(),
        environment_version: record.environment_version.clone(),
        execution_mode: manner.execution_mode.to_owned(),
        isolation: manner.isolation.to_owned(),
        start_mode: manner.start_mode.to_owned(),
    };
    let duration_ms = millis(began.elapsed());
    // The command has ended; its reader may need longer, but not longer than the machine is there.
    tokio::select! {
        () = output.drain() => {}
        _ = cut.asked() => {}
    }
    let mut result = output.result(subject, command, outcome, duration_ms).await;
    result.notes = network::notes(network, mark);
    Ok(result)
}

/// A VM that is not started has nowhere to run a command.
fn not_started(vm_id: &str) -> Error {
    let text = format!("vm {vm_id} must be in 'started' state before execution");
    Error::new(ErrorKind::WrongState, text)
}
