//! What a task's commands run in: its guest, or the host where its caller has opted into that. Its start, its stop,
//! and its end when nobody asked for it.

use std::sync::Arc;

use pyro_vmm::{DiskCache, Isolation, MachineEnd, MachineExit};

use super::Supervisor;
use crate::error::{Error, ErrorKind};
use crate::guest::Identity;
use crate::live::{Boot, Fresh, OVERLAY, Running};
use crate::record::{Fault, VmState};
use crate::task::TaskFile;

/// What runs the commands now.
#[derive(Clone)]
pub(super) enum Body {
    /// Nothing: the task is stopped.
    None,
    Guest(Arc<Running>),
    Host,
}

impl Supervisor {
    /// Boots the guest and says so in the record.
    pub(super) async fn boot(self: &Arc<Self>) -> Result<(), Error> {
        let (body, mode) = match self.boot_guest().await {
            Ok(running) => {
                let mode = running.execution_mode;
                (Body::Guest(Arc::new(running)), mode)
            }
            Err(error) if error.kind() == ErrorKind::GuestUnavailable && self.file().allow_host_compat => {
                self.make_workspace()?;
                let reason = error.to_string();
                self.file().metadata.insert("host_compat_reason".to_owned(), reason);
                Running::forget_in(&mut self.file().metadata);
                "none".clone_into(&mut self.file().isolation);
                (Body::Host, "host_compat")
            }
            Err(error) => {
                let why = format!("start_failed: {error}");
                if self.file().state == VmState::Stopped {
                    // A record that cannot be written now only misses the reason.
                    drop(self.write(|file| file.last_error = Some(why)));
                }
                return Err(error);
            }
        };
        self.write(|file| {
            file.state = VmState::Started;
            mode.clone_into(&mut file.execution_mode);
            file.last_error = None;
        })?;
        if let Body::Guest(running) = &body {
            let (supervisor, running) = (Arc::clone(self), Arc::clone(running));
            drop(tokio::spawn(async move {
                let exit = running.machine.wait().await;
                supervisor.guest_has_ended(&running, &exit).await;
            }));
        }
        *self.body() = body;
        self.commands.reopen();
        self.runs.send_replace(true);
        Ok(())
    }

    async fn boot_guest(&self) -> Result<Running, Error> {
        let Some(environment) = &self.environment else {
            return Err(crate::live::unavailable("no VMM is installed"));
        };
        let file = self.file().clone();
        let has_disk = self.directory.path().join(OVERLAY).exists();
        let blank = self.engine.inner.store.overlay_template(file.disk_mib)?;
        let boot = Boot {
            dir: self.directory.path().to_owned(),
            environment,
            vcpus: file.vcpu_count,
            memory_mib: file.mem_mib,
            // What the guest has synced is kept, also when the host goes down.
            disk: DiskCache::Writeback,
            fresh: (!has_disk).then_some(Fresh { blank: &blank, disk_mib: file.disk_mib, cold: self.cold }),
            identity: Identity { hostname: format!("pyro-{}", self.id), machine_id: file.machine_id.clone() },
        };
        let required = file.require_isolation.as_deref().map(required).transpose()?;
        let (running, _times) = self.engine.boot(&boot, required).await?;
        let mut file = self.file();
        file.metadata.remove("host_compat_reason");
        running.isolation.as_str().clone_into(&mut file.isolation);
        running.start_mode().clone_into(&mut file.start_mode);
        running.describe(&mut file.metadata);
        drop(file);
        Ok(running)
    }

    fn make_workspace(&self) -> Result<(), Error> {
        match fs_err::create_dir(self.directory.workspace()) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                Err(Error::host("the workspace", &error))
            }
            _ => Ok(()),
        }
    }

    /// Boots the guest of a stopped task.
    pub(super) async fn start(self: &Arc<Self>, cap: u32) -> Result<(), Error> {
        let _gate = self.gate.lock().await;
        let state = self.state();
        if self.lock.lock().unwrap_or_else(std::sync::PoisonError::into_inner).is_none() {
            return Err(Error::new(ErrorKind::NotFound, format!("task '{}' does not exist", self.id)));
        }
        if !state.can_start() {
            let text = format!("task {} cannot be started from state '{}'", self.id, state.as_str());
            return Err(Error::new(ErrorKind::WrongState, text));
        }
        let registry = &self.engine.inner.registry;
        crate::budget::check(registry.state_dir(), self.file().mem_mib)?;
        registry.readmit_task(cap, &self.id)?;
        let booted = self.boot().await;
        if let Err(error) = &booted {
            if self.state() == VmState::Started {
                // The record was written and its row was not: nothing runs all the same.
                drop(self.note_stopped(Some(format!("start_failed: {error}"))));
            }
            registry.set_task_state(&self.id, VmState::Stopped.as_str())?;
        }
        booted
    }

    /// Ends all commands and powers the guest off; its disk is kept.
    pub(super) async fn stop(self: &Arc<Self>, why: Option<&str>) -> Result<(), Error> {
        let _gate = self.gate.lock().await;
        if self.state() == VmState::Stopped {
            self.settle_entries().await;
            return Ok(());
        }
        let body = self.take_body();
        self.commands.all_end_because("the task was stopped");
        self.commands.end_all(Fault::Cancelled).await;
        if let Body::Guest(running) = body {
            running.power_off().await;
        }
        self.settle_entries().await;
        self.note_stopped(why.map(str::to_owned))
    }

    /// What was told to have ended is on the disk when this returns: the host may be about to go down.
    async fn settle_entries(&self) {
        let unsettled = Arc::clone(&self.unsettled);
        if let Ok(Err(error)) = tokio::task::spawn_blocking(move || unsettled.settle()).await {
            super::serve::complain(&format!("the ends of commands are not on the disk yet: {error}"));
        }
    }

    /// Leaves the task without anything that could run a command.
    pub(super) fn take_body(&self) -> Body {
        self.runs.send_replace(false);
        std::mem::replace(&mut *self.body(), Body::None)
    }

    /// Writes down that the task is stopped, now or once the disk has room for it.
    fn note_stopped(self: &Arc<Self>, why: Option<String>) -> Result<(), Error> {
        let stopped = |file: &mut TaskFile, why: &Option<String>| {
            file.state = VmState::Stopped;
            file.last_error.clone_from(why);
        };
        let written = self.write(|file| stopped(file, &why));
        if let Err(error) = &written {
            super::serve::complain(&format!("that the task is stopped could not be recorded: {error}"));
            let supervisor = Arc::clone(self);
            drop(tokio::spawn(async move {
                while supervisor.may_have_room().await {
                    let _gate = supervisor.gate.lock().await;
                    let is_stopped = matches!(&*supervisor.body(), Body::None);
                    if !is_stopped || supervisor.write(|file| stopped(file, &why)).is_ok() {
                        return;
                    }
                }
            }));
        }
        written
    }

    /// Nobody asked for the end of this guest.
    async fn guest_has_ended(self: &Arc<Self>, ended: &Arc<Running>, exit: &MachineExit) {
        let _gate = self.gate.lock().await;
        let was_ours = matches!(&*self.body(), Body::Guest(running) if Arc::ptr_eq(running, ended));
        if !was_ours {
            return;
        }
        drop(self.take_body());
        // They are in the journal before the task says stopped; also those whose callers do not read.
        self.commands.end_all(Fault::GuestLost).await;
        let name = match exit.reason {
            MachineEnd::PoweredOff => "guest_powered_off",
            MachineEnd::Panicked => "guest_crashed",
            MachineEnd::Crashed | MachineEnd::Killed => "vmm_lost",
        };
        drop(self.note_stopped(Some(format!("{name}: {}", exit.status))));
    }
}

/// The tier that a record names. A name that this version does not know is more than it can give.
fn required(name: &str) -> Result<Isolation, Error> {
    Isolation::named(name).ok_or_else(|| {
        let text = format!("isolation '{name}' was required, which this pyro does not know");
        Error::new(ErrorKind::IsolationUnavailable, text).hint("use the newer pyro that made the task")
    })
}

impl Body {
    /// Ends the guest at once, if there is one.
    pub(super) async fn end(self) {
        if let Self::Guest(running) = self {
            running.machine.kill().await;
        }
    }
}
