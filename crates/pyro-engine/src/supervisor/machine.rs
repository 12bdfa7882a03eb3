//! What the owner of a task does for each message, and when the guest ends by itself.

use std::convert::Infallible;
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use pyro_net::Settings;
use pyro_vmm::{DiskCache, Isolation, MachineEnd, MachineExit};

use super::Supervisor;
use super::serve::complain;
use crate::ending::{Ending, Noun};
use crate::error::{Error, ErrorKind};
use crate::guest::Identity;
use crate::live::{Boot, Fresh, OVERLAY};
use crate::network;
use crate::owner::{Inbox, Owned};
use crate::place::{Place, Terms};
use crate::ports;
use crate::record::VmState;
use crate::room;
use crate::task::TaskFile;

/// Between two attempts at a full disk, which has no event for having room again.
pub(super) const AGAIN: Duration = Duration::from_secs(2);

/// A task in the hands of its owner.
pub(super) struct TaskMachine {
    supervisor: Arc<Supervisor>,
    /// The lock of the task's directory; none once the task is gone.
    lock: Option<File>,
    /// That the task is stopped is not on the disk yet; why it was.
    unwritten: Option<Option<String>>,
    /// Whether the guest waits for room on the host's disk.
    is_paused: bool,
}

/// What happens to a task by itself.
pub(super) enum Event {
    GuestEnded(MachineExit),
    /// The host's disk is nearly full.
    DiskIsLow,
    /// It has room again for a guest that waits for it.
    DiskHasRoom,
    /// It may have room again for a record that could not be written.
    DiskMayHaveRoom,
}

impl TaskMachine {
    pub(super) fn new(supervisor: Arc<Supervisor>, lock: File) -> Self {
        Self { supervisor, lock: Some(lock), unwritten: None, is_paused: false }
    }

    /// Leaves the task without a place where a command could begin.
    fn take_place(&self) -> Place {
        self.supervisor.place.send_replace(Place::None)
    }

    /// Writes down that the task is stopped, now or once the disk has room for it.
    fn note_stopped(&mut self, why: Option<String>) -> Result<(), Error> {
        let written = self.supervisor.write(|file| {
            file.state = VmState::Stopped;
            file.last_error.clone_from(&why);
        });
        if let Err(error) = &written {
            complain(&format!("that the task is stopped could not be recorded: {error}"));
        }
        self.unwritten = written.is_err().then_some(why);
        written
    }

    /// What the end of a command said is on the disk when this returns: the host may be about to go down.
    async fn settle_entries(&self) {
        let unsettled = Arc::clone(&self.supervisor.unsettled);
        if let Ok(Err(error)) = tokio::task::spawn_blocking(move || unsettled.settle()).await {
            complain(&format!("the ends of commands are not on the disk yet: {error}"));
        }
    }
}

/// A supervisor whose owner has failed ends, and takes the guest with it: without an owner nobody would stop it.
impl Drop for TaskMachine {
    fn drop(&mut self) {
        self.supervisor.gone.send_replace(true);
    }
}

impl Owned for TaskMachine {
    /// The cap under which a slot is taken; none: the slot was taken for this supervisor.
    type Start = Option<u32>;
    type Record = ();
    /// Commands of a task run beside each other and do not wait for the owner: see [`Supervisor::exec`].
    type Exec = Infallible;
    type Event = Event;

    async fn admit(&mut self, cap: Option<u32>) -> Result<(), Error> {
        let Some(cap) = cap else { return Ok(()) };
        let (id, state) = (&self.supervisor.id, self.supervisor.state());
        if !state.can_start() {
            let text = format!("task {id} cannot be started from state '{}'", state.as_str());
            return Err(Error::new(ErrorKind::WrongState, text));
        }
        let registry = &self.supervisor.engine.inner.registry;
        crate::budget::check(registry.state_dir(), self.supervisor.file().mem_mib)?;
        registry.readmit_task(cap, id)
    }

    async fn boot(&mut self) -> Result<Place, Error> {
        let Supervisor { engine, directory, environment, id, cold, .. } = &*self.supervisor;
        let file = self.supervisor.file().clone();
        let has_disk = directory.path().join(OVERLAY).exists();
        let blank = match environment {
            Some(_) => engine.inner.store.overlay_template(file.disk_mib)?,
            None => std::path::PathBuf::new(),
        };
        let fresh = Fresh { blank: &blank, disk_mib: file.disk_mib, cold: *cold };
        let boot = environment.as_ref().map(|environment| Boot {
            dir: directory.path().to_owned(),
            environment,
            vcpus: file.vcpu_count,
            memory_mib: file.mem_mib,
            // What the guest of a task has synced is kept, also when the host goes down.
            disk: if file.kept.is_some() { DiskCache::Unsafe } else { DiskCache::Writeback },
            fresh: (!has_disk).then_some(fresh),
            network: Settings {
                policy: file.network.clone(),
                names: Some(directory.path().join(network::NAMES)),
                log: Some(directory.path().join(network::LOG)),
                secrets: self.supervisor.secrets.clone(),
                outbound: engine.inner.config.outbound.clone(),
            },
            identity: Identity::new(format!("pyro-{id}"), file.machine_id.clone()),
        });
        // Before there is a guest: a port that is in use is no reason to boot one.
        let bound = ports::bind(&file.ports)?;
        // A process that cannot be dumped cannot make user namespaces for its children.
        self.supervisor.allow_dumps(true);
        let (place, _times) = engine.hand_out(boot, directory.workspace(), terms(&file)?).await?;
        place.publish(bound)?;
        Ok(place)
    }

    async fn started(&mut self, booted: Result<Place, Error>) -> Result<(), Error> {
        self.supervisor.allow_dumps(false);
        let recorded = booted.and_then(|place| {
            self.supervisor.write(|file| {
                place.describe(&mut file.metadata);
                if let Some(manner) = place.manner() {
                    manner.execution_mode.clone_into(&mut file.execution_mode);
                    manner.isolation.clone_into(&mut file.isolation);
                    manner.start_mode.clone_into(&mut file.start_mode);
                }
                if let Some(ports) = place.ports() {
                    // Those that were chosen by the host are kept for the next start.
                    file.ports = ports.list();
                }
                file.state = VmState::Started;
                file.last_error = None;
            })?;
            Ok(place)
        });
        match recorded {
            Ok(place) => {
                self.unwritten = None;
                self.supervisor.commands.reopen();
                let _unchanged = self.supervisor.network_changes.lock().await;
                if let Some(network) = place.network() {
                    // It may have changed while the guest booted.
                    network.set_policy(self.supervisor.file().network.clone());
                }
                self.supervisor.place.send_replace(place);
                Ok(())
            }
            Err(error) => {
                // A new task that does not come up is removed; there is nothing to record.
                if self.supervisor.state() != VmState::Created {
                    drop(self.note_stopped(Some(format!("start_failed: {error}"))));
                    let registry = &self.supervisor.engine.inner.registry;
                    // Its slot is free, whatever could be written into its record.
                    if let Err(error) =
                        registry.set_task_state(&self.supervisor.id, VmState::Stopped.as_str())
                    {
                        complain(&format!("the task's slot could not be given back: {error}"));
                    }
                }
                Err(error)
            }
        }
    }

    async fn stop(&mut self, why: Option<&str>) -> Result<(), Error> {
        if self.supervisor.state() == VmState::Stopped {
            self.settle_entries().await;
            return Ok(());
        }
        let place = self.take_place();
        self.supervisor.commands.end_all(Ending::Stopped(Noun::Task)).await;
        if let Place::Guest(running) = &place
            && std::mem::take(&mut self.is_paused)
        {
            // What it has to write now is little.
            running.machine.resume().await.ok();
        }
        place.power_off().await;
        self.settle_entries().await;
        self.note_stopped(why.map(str::to_owned))
    }

    async fn exec(&mut self, exec: Infallible, _: &mut Inbox<Self>) {
        match exec {}
    }

    /// Ends all commands and removes every trace of the task.
    async fn remove(&mut self, ending: Ending) -> Result<(), Error> {
        // Nothing begins any more; what runs has its guest until it has ended.
        let place = self.take_place();
        self.supervisor.commands.end_all(ending).await;
        place.kill().await;
        drop(place);
        // None: somebody else has removed it meanwhile, which is what was asked for.
        if let Some(lock) = self.lock.take() {
            let supervisor = Arc::clone(&self.supervisor);
            let again = lock.try_clone();
            let remove = move || {
                let registry = &supervisor.engine.inner.registry;
                match ending {
                    Ending::TtlExpired => registry.expire_task(&supervisor.id, lock),
                    _ => registry.remove_task(&supervisor.id, lock),
                }
            };
            if let Err(error) = self.supervisor.engine.blocking(remove).await {
                self.lock = again.ok();
                return Err(error);
            }
        }
        self.supervisor.gone.send_replace(true);
        Ok(())
    }

    fn is_gone(&self) -> bool {
        *self.supervisor.gone.borrow()
    }

    async fn event(&self) -> Event {
        let place = self.supervisor.place.borrow().clone();
        let guest_ended = async {
            match &place {
                Place::Guest(running) => running.machine.wait().await,
                Place::None | Place::Host(_) => std::future::pending().await,
            }
        };
        let dir = self.supervisor.directory.path();
        let disk = async {
            match (&place, self.is_paused) {
                (Place::Guest(_), false) => {
                    room::until_low(dir, || !self.supervisor.commands.is_idle()).await;
                    Event::DiskIsLow
                }
                (Place::Guest(_), true) => {
                    room::until_back(dir).await;
                    Event::DiskHasRoom
                }
                (Place::None | Place::Host(_), _) => std::future::pending().await,
            }
        };
        tokio::select! {
            exit = guest_ended => Event::GuestEnded(exit),
            event = disk => event,
            () = tokio::time::sleep(AGAIN), if self.unwritten.is_some() => Event::DiskMayHaveRoom,
        }
    }

    async fn take_note(&mut self, event: Event) {
        match event {
            Event::GuestEnded(exit) => {
                self.is_paused = false;
                drop(self.take_place());
                // They are in the journal before the task says stopped; also those whose callers do not read.
                self.supervisor.commands.end_all(Ending::GuestLost).await;
                let name = match exit.reason {
                    MachineEnd::PoweredOff => "guest_powered_off",
                    MachineEnd::Panicked => "guest_crashed",
                    MachineEnd::Crashed | MachineEnd::Killed => "vmm_lost",
                };
                drop(self.note_stopped(Some(format!("{name}: {}", exit.status))));
            }
            Event::DiskIsLow => {
                complain("the disk of the host is nearly full: commands are ended, and the guest waits");
                let place = self.supervisor.place.borrow().clone();
                if let Place::Guest(running) = &place {
                    // First of all the guest stops writing: a command that is ended leaves it with much that is not on its
                    // disk yet. A guest that is gone meanwhile is the next event.
                    running.machine.pause().await.ok();
                    self.is_paused = true;
                }
                self.supervisor.commands.end_all(Ending::HostDiskFull).await;
            }
            Event::DiskHasRoom => {
                let place = self.supervisor.place.borrow().clone();
                if let Place::Guest(running) = &place {
                    running.machine.resume().await.ok();
                }
                self.is_paused = false;
                self.supervisor.commands.reopen();
            }
            Event::DiskMayHaveRoom => {
                if let Some(why) = self.unwritten.take() {
                    drop(self.note_stopped(why));
                }
            }
        }
    }
}

/// What a task's guest must satisfy. A tier that this version does not know is more than it can give.
pub(super) fn terms(file: &TaskFile) -> Result<Terms, Error> {
    let isolation = file.require_isolation.as_deref().map(|name| {
        Isolation::named(name).ok_or_else(|| {
            let text = format!("isolation '{name}' was required, which this pyro does not know");
            Error::new(ErrorKind::IsolationUnavailable, text).hint("use the newer pyro that made the task")
        })
    });
    Ok(Terms {
        isolation: isolation.transpose()?,
        allow_host: file.allow_host_compat,
        network: file.network.has_nic(),
        ports: !file.ports.is_empty(),
    })
}
