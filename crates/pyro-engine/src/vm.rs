//! Machines of one process: made, started, used once, ended. They never outlive the engine that made them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pyro_image::Environment;
use pyro_vmm::DiskCache;
use tokio::sync::watch;

use crate::boot_clock::Alarm;
use crate::engine::{Engine, Ground, may_use_host};
use crate::error::{Error, ErrorKind};
use crate::execute::{Cancel, Limit, Output, Place, Subject, carry_out, millis};
use crate::live::{Live, Running, StartTimes, unavailable};
use crate::observe::{Observer, Phase};
use crate::record::{Cleanup, Deleted, ExecResult, Fault, NetworkInfo, Timings, VmRecord, VmState};
use crate::registry::now;
use crate::spec::{ExecSpec, VmSpec};

/// A machine of this process.
#[derive(Debug)]
pub(crate) struct Vm {
    spec: VmSpec,
    record: Mutex<VmRecord>,
    /// None: no guest can be had, and commands run on the host.
    environment: Option<Environment>,
    live: tokio::sync::Mutex<Option<Live>>,
    /// Ends what holds `live`.
    cancel: watch::Sender<Option<Fault>>,
}

/// What comes of an admission: a slot and a directory.
#[derive(Debug)]
pub(crate) struct Admitted {
    pub(crate) record: VmRecord,
    pub(crate) environment: Option<Environment>,
    pub(crate) live: Live,
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
        let spare = ground.as_ref().and_then(|(_, environment)| self.take_spare(&vm, environment));
        let Admitted { mut record, environment, mut live } = match spare {
            Some(spare) => spare,
            None => self.admit_on(&vm, ground, &observer).await?,
        };
        let prepare = began.elapsed();
        observer.tell(Phase::Start(record.vm_id.clone()));
        let started = match live.running() {
            Some(_) => Ok(StartTimes::default()),
            None => self.start_live(&vm, &mut record, environment.as_ref(), &mut live).await,
        };
        let times = match started {
            Ok(times) => times,
            Err(error) => {
                live.remove().await?;
                return Err(error);
            }
        };
        if let Some(warning) = live.running().and_then(Running::warning) {
            observer.tell(Phase::Warning(warning.to_owned()));
        }
        observer.tell(Phase::Execute(record.vm_id.clone()));
        let result = execute(&live, &record, exec, &observer, Cancel::default()).await;
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
        let vm = Arc::new(Vm {
            spec,
            record: Mutex::new(record.clone()),
            environment,
            live: tokio::sync::Mutex::new(Some(live)),
            cancel: watch::Sender::new(None),
        });
        self.vms().insert(record.vm_id.clone(), vm);
        self.expire_in_time(&record);
        Ok(record)
    }

    /// Boots a machine that is created or stopped.
    ///
    /// # Errors
    /// When it is in another state, or does not boot.
    pub async fn start_vm(&self, vm_id: &str) -> Result<VmRecord, Error> {
        let vm = self.own(vm_id)?;
        let mut live = vm.live.lock().await;
        let mut record = vm.record();
        if !record.state.can_start() {
            let state = record.state.as_str();
            let text = format!("vm {vm_id} cannot be started from state '{state}'");
            return Err(Error::new(ErrorKind::WrongState, text));
        }
        let machine = live.as_mut().ok_or_else(|| gone(vm_id))?;
        // Whatever cuts this short, the row says again what the record says.
        let mut row = Row { engine: self, record: &record.clone(), kept: false };
        if record.state == VmState::Stopped {
            self.inner.registry.readmit(self.inner.config.max_active_vms, vm_id)?;
        }
        let mut cancel = Cancel::new(vm.cancel.subscribe());
        let started = tokio::select! {
            started = self.start_live(&vm.spec, &mut record, vm.environment.as_ref(), machine) => started,
            _ = cancel.asked() => Err(Error::new(ErrorKind::Cancelled, format!("vm {vm_id} was ended while it started"))),
        };
        match &started {
            Ok(_) => {
                record.state = VmState::Started;
                record.last_error = None;
                row.kept = true;
            }
            Err(error) => record.last_error = Some(error.to_string()),
        }
        drop(row);
        self.save(&vm, &record)?;
        started.map(|_times| record)
    }

    /// Powers a machine off cleanly; its disk is kept. From any state; a running command is ended.
    ///
    /// # Errors
    /// When there is no such machine.
    pub async fn stop_vm(&self, vm_id: &str) -> Result<VmRecord, Error> {
        let vm = self.own(vm_id)?;
        vm.cancel.send_replace(Some(Fault::Cancelled));
        let mut live = vm.live.lock().await;
        vm.cancel.send_replace(None);
        let machine = live.as_mut().ok_or_else(|| gone(vm_id))?;
        let mut record = vm.record();
        record.state = VmState::Stopped;
        machine.stop().await;
        self.save(&vm, &record)?;
        Ok(record)
    }

    /// Runs one command in a started machine, then deletes the machine, whatever came of it.
    ///
    /// # Errors
    /// When the machine is not started, or the connection to it broke.
    pub async fn exec_vm(
        &self,
        vm_id: &str,
        exec: ExecSpec,
        observer: Observer,
    ) -> Result<ExecResult, Error> {
        exec.check()?;
        let vm = self.own(vm_id)?;
        let mut guard = vm.live.lock().await;
        let record = vm.record();
        let Some(live) = guard.take_if(|_| record.state == VmState::Started) else {
            let text = format!("vm {vm_id} must be in 'started' state before execution");
            return Err(Error::new(ErrorKind::WrongState, text));
        };
        // From here on the machine goes with this future.
        let forget = Forget { engine: self, vm_id };
        let result = execute(&live, &record, exec, &observer, Cancel::new(vm.cancel.subscribe())).await;
        let fault = result.as_ref().ok().and_then(|result| result.fault);
        let removed =
            if fault == Some(Fault::TtlExpired) { live.expire().await } else { live.remove().await };
        drop(forget);
        let mut result = result?;
        result.cleanup = Some(Cleanup {
            vm_id: record.vm_id,
            deleted: removed.is_ok(),
            reason: Fault::cleanup_reason(fault),
        });
        Ok(result)
    }

    /// The machine's record.
    ///
    /// # Errors
    /// When there is no such machine, or its time was up.
    pub fn status_vm(&self, vm_id: &str) -> Result<VmRecord, Error> {
        self.inner.registry.get(vm_id)
    }

    /// The machine's network: it has none.
    ///
    /// # Errors
    /// As [`Engine::status_vm`].
    pub fn network_info_vm(&self, vm_id: &str) -> Result<NetworkInfo, Error> {
        let record = self.status_vm(vm_id)?;
        Ok(NetworkInfo {
            vm_id: record.vm_id,
            network_enabled: false,
            outbound_connectivity_expected: false,
            reason: "network is disabled for this VM".to_owned(),
        })
    }

    /// Ends a machine, in any state, and removes every trace. A running command is ended first.
    ///
    /// # Errors
    /// When there is no such machine in this process.
    pub async fn delete_vm(&self, vm_id: &str) -> Result<Deleted, Error> {
        let vm = self.own(vm_id)?;
        vm.cancel.send_replace(Some(Fault::Cancelled));
        let forget = Forget { engine: self, vm_id };
        // None: the command that was ended has taken the machine with it.
        if let Some(live) = vm.live.lock().await.take() {
            live.remove().await?;
        }
        drop(forget);
        Ok(Deleted { vm_id: vm_id.to_owned(), deleted: true, reason: "explicit_delete" })
    }

    /// Ends all machines of this process, those with a running command included; tasks live on.
    pub async fn end_vms(&self) {
        let ids: Vec<String> = self.vms().keys().cloned().collect();
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
                inner.registry.admit(inner.config.max_active_vms, |id| {
                    let mut record = VmRecord::new(id, &spec, version, isolation, now());
                    let digest = digest.clone().map(|digest| ("environment_digest".to_owned(), digest));
                    record.metadata.extend(digest);
                    if let Some((_, environment)) = &ground {
                        engine.describe_template(environment, &spec, &mut record.metadata);
                    }
                    record
                })
            };
            let (lease, record) = match admit() {
                // A machine that is asked for comes before one that waits for somebody to ask.
                Err(error) if error.kind() == ErrorKind::CapReached && engine.end_spare() => admit()?,
                admitted => admitted?,
            };
            let live = match &ground {
                Some(_) => Live::new(Arc::clone(&inner.registry), lease),
                None => Live::on_host(Arc::clone(&inner.registry), lease)?,
            };
            Ok(Admitted { record, environment: ground.map(|(_, environment)| environment), live })
        })
        .await
    }

    /// Boots a machine; where that fails and the caller has opted into the host, the host takes its place.
    pub(crate) async fn start_live(
        &self,
        spec: &VmSpec,
        record: &mut VmRecord,
        environment: Option<&Environment>,
        live: &mut Live,
    ) -> Result<StartTimes, Error> {
        let booted = match environment {
            Some(environment) => live.start(self, environment, spec).await,
            None => Err(unavailable("no VMM is installed")),
        };
        match booted {
            Ok(times) => {
                if let Some(running) = live.running() {
                    running.execution_mode.clone_into(&mut record.execution_mode);
                    running.isolation.as_str().clone_into(&mut record.isolation);
                    record.start_mode = Some(running.start_mode().to_owned());
                    running.describe(&mut record.metadata);
                }
                Ok(times)
            }
            Err(error) if may_use_host(spec, &error) => {
                live.move_to_host()?;
                "host_compat".clone_into(&mut record.execution_mode);
                record.start_mode = None;
                Running::forget_in(&mut record.metadata);
                "none".clone_into(&mut record.isolation);
                record.metadata.insert("host_compat_reason".to_owned(), error.to_string());
                Ok(StartTimes::default())
            }
            Err(error) => Err(error),
        }
    }

    /// Ends the machine when its time is up, whether or not anyone calls.
    fn expire_in_time(&self, record: &VmRecord) {
        let (engine, id) = (Arc::downgrade(&self.inner), record.vm_id.clone());
        let life = Duration::from_secs(u64::from(record.ttl_seconds));
        drop(tokio::spawn(async move {
            match Alarm::after(life) {
                Ok(alarm) => drop(alarm.wait().await),
                // Without a descriptor for the clock that runs on while the host sleeps, this one does.
                Err(_) => tokio::time::sleep(life).await,
            }
            let Some(inner) = engine.upgrade() else { return };
            let engine = Self { inner };
            let Some(vm) = engine.vms().get(&id).cloned() else { return };
            vm.cancel.send_replace(Some(Fault::TtlExpired));
            let live = vm.live.lock().await.take();
            let forget = Forget { engine: &engine, vm_id: &id };
            if let Some(live) = live {
                // A failure here leaves a directory whose lock is free: the next sweep removes it.
                drop(live.expire().await);
            }
            drop(forget);
        }));
    }

    fn own(&self, vm_id: &str) -> Result<Arc<Vm>, Error> {
        if let Some(vm) = self.vms().get(vm_id) {
            return Ok(Arc::clone(vm));
        }
        // It is told apart whether it is unknown, expired, or another process's.
        self.inner.registry.get(vm_id)?;
        let text = format!("vm '{vm_id}' belongs to another process");
        Err(Error::new(ErrorKind::WrongState, text).hint("use the process that created it"))
    }

    fn vms(&self) -> MutexGuard<'_, std::collections::HashMap<String, Arc<Vm>>> {
        self.inner.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn save(&self, vm: &Vm, record: &VmRecord) -> Result<(), Error> {
        vm.record.lock().unwrap_or_else(PoisonError::into_inner).clone_from(record);
        self.inner.registry.update(record)
    }
}

impl Vm {
    fn record(&self) -> VmRecord {
        self.record.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Runs a command where the machine's commands run.
pub(crate) async fn execute(
    live: &Live,
    record: &VmRecord,
    exec: ExecSpec,
    observer: &Observer,
    cancel: Cancel,
) -> Result<ExecResult, Error> {
    let began = Instant::now();
    let limit = Limit { asked: exec.timeout_seconds, left: record.seconds_left() };
    let command = exec.command.display();
    let place = live.running().map_or_else(|| Place::Host(live.workspace()), Place::Guest);
    let mut output = Output::new(observer);
    let outcome = carry_out(place, exec, limit, &mut output, cancel).await?;
    let subject = Subject {
        vm_id: Some(record.vm_id.clone()),
        task_id: None,
        environment: record.environment.clone(),
        environment_version: record.environment_version.clone(),
        execution_mode: record.execution_mode.clone(),
        isolation: record.isolation.clone(),
        start_mode: record.start_mode.clone().unwrap_or_else(|| "cold".to_owned()),
    };
    Ok(output.result(subject, command, outcome, millis(began.elapsed())).await)
}

/// Takes a machine out of the map of this process's machines when it is gone.
struct Forget<'a> {
    engine: &'a Engine,
    vm_id: &'a str,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.engine.vms().remove(self.vm_id);
    }
}

/// Sets a machine's row back to a record unless a start has succeeded.
struct Row<'a> {
    engine: &'a Engine,
    record: &'a VmRecord,
    kept: bool,
}

impl Drop for Row<'_> {
    fn drop(&mut self) {
        if !self.kept {
            // The row of a machine that is gone meanwhile is not made again.
            drop(self.engine.inner.registry.update(self.record));
        }
    }
}

fn gone(vm_id: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("vm '{vm_id}' does not exist"))
}
