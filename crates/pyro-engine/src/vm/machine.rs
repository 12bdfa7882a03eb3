//! What the owner of a VM does for each message.

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use pyro_image::Environment;
use tokio::sync::watch;

use super::{Machines, Shelf, execute, not_started, note_place};
use crate::ending::Ending;
use crate::engine::Engine;
use crate::error::{Error, ErrorKind};
use crate::execute::Cancel;
use crate::observe::Observer;
use crate::owner::{Inbox, Owned, Reply, answer};
use crate::place::Place;
use crate::ports;
use crate::record::{Cleanup, ExecResult, Fault, VmRecord, VmState};
use crate::spec::{ExecSpec, VmSpec};

/// A VM in the hands of its owner.
pub(super) struct VmMachine {
    engine: Engine,
    machines: Weak<Machines>,
    spec: VmSpec,
    /// None where no VMM is installed: commands run on the host, if its caller has opted into that.
    environment: Option<Environment>,
    record: VmRecord,
    live: Shelf,
    is_gone: bool,
}

/// A command for a VM, which takes the machine with it.
pub(super) struct VmExec {
    pub(super) exec: ExecSpec,
    pub(super) observer: Observer,
    /// Where the machine is while the command runs; its caller empties it by going away.
    pub(super) shelf: Shelf,
    pub(super) reply: Reply<ExecResult>,
}

impl VmMachine {
    pub(super) fn new(
        engine: &Engine,
        spec: VmSpec,
        environment: Option<Environment>,
        record: VmRecord,
        live: Shelf,
    ) -> Self {
        let machines = Arc::downgrade(&engine.machines);
        Self { engine: engine.worker(), machines, spec, environment, record, live, is_gone: false }
    }

    fn place(&self) -> Place {
        self.live.get().as_ref().map(|live| live.place.clone()).unwrap_or_default()
    }

    fn dir(&self) -> Option<PathBuf> {
        self.live.get().as_ref().map(|live| live.dir())
    }

    /// Sets where commands run; false where the engine was dropped, and the machine with it.
    fn set_place(&self, place: Place) -> bool {
        self.live.get().as_mut().map(|live| live.place = place).is_some()
    }

    fn save(&self) -> Result<(), Error> {
        self.engine.inner.registry.update(&self.record)
    }

    /// The id is unknown from now on; what is left of the machine has no owner.
    fn forget(&mut self) {
        self.is_gone = true;
        if let Some(machines) = self.machines.upgrade() {
            drop(machines.vms().remove(&self.record.vm_id));
        }
    }

    fn missing(&self) -> Error {
        self.engine.inner.registry.missing("vm", &self.record.vm_id)
    }

    /// Runs a command until it ends, something else ends it, or nobody waits for it any more; then there is no result.
    async fn run(
        &self,
        place: &Place,
        dir: &Path,
        exec: ExecSpec,
        observer: &Observer,
        reply: &mut Reply<ExecResult>,
        inbox: &mut Inbox<Self>,
    ) -> Option<Result<ExecResult, Error>> {
        let (cancel, asked) = watch::channel(None);
        let command = execute(place, dir, &self.record, exec, observer, Cancel::new(asked));
        let mut command = std::pin::pin!(command);
        let mut is_ending = false;
        loop {
            tokio::select! {
                biased;
                // A caller that has gone away before the command was sent has it sent no more.
                () = reply.closed() => return None,
                ending = inbox.ending(), if !is_ending => {
                    is_ending = true;
                    cancel.send_replace(Some(ending));
                }
                result = &mut command => return Some(result),
            }
        }
    }
}

/// The owner ends with its runtime, and the machine with it.
impl Drop for VmMachine {
    fn drop(&mut self) {
        drop(self.live.get().take());
    }
}

impl Owned for VmMachine {
    type Start = ();
    type Record = VmRecord;
    type Exec = VmExec;
    type Event = Infallible;

    async fn admit(&mut self, (): ()) -> Result<(), Error> {
        let (id, state) = (self.record.vm_id.clone(), self.record.state);
        if !state.can_start() {
            let text = format!("vm {id} cannot be started from state '{}'", state.as_str());
            return Err(Error::new(ErrorKind::WrongState, text));
        }
        if state == VmState::Stopped {
            let engine = self.engine.clone();
            let cap = engine.inner.config.max_active_vms;
            self.engine.blocking(move || engine.inner.registry.readmit(cap, &id)).await?;
        }
        Ok(())
    }

    async fn boot(&mut self) -> Result<Place, Error> {
        let Some(dir) = self.dir() else { return Err(self.missing()) };
        let bound = ports::bind(&self.spec.publish)?;
        let started = self.engine.start_in(dir, &self.spec, &self.record.vm_id, self.environment.as_ref());
        let (place, _times) = started.await?;
        place.publish(bound)?;
        Ok(place)
    }

    async fn started(&mut self, booted: Result<Place, Error>) -> Result<VmRecord, Error> {
        let before = self.record.clone();
        let recorded = booted.and_then(|place| {
            note_place(&mut self.record, &place);
            self.record.state = VmState::Started;
            self.record.last_error = None;
            self.save()?;
            if self.set_place(place) { Ok(()) } else { Err(self.missing()) }
        });
        match recorded {
            Ok(()) => Ok(self.record.clone()),
            Err(error) => {
                self.record = VmRecord { last_error: Some(error.to_string()), ..before };
                // The row gives its slot back; where it cannot be written, the row goes with the VM. The caller is to
                // hear why the start failed.
                drop(self.save());
                Err(error)
            }
        }
    }

    async fn stop(&mut self, _: Option<&str>) -> Result<VmRecord, Error> {
        self.place().power_off().await;
        self.set_place(Place::None);
        self.record.state = VmState::Stopped;
        self.save()?;
        Ok(self.record.clone())
    }

    async fn exec(&mut self, exec: VmExec, inbox: &mut Inbox<Self>) {
        let VmExec { exec, observer, shelf, mut reply } = exec;
        let place = self.place();
        if place.is_none() {
            return answer(reply, Err(not_started(&self.record.vm_id)));
        }
        let dir = self.dir().unwrap_or_default();
        // From here on the machine goes with the command.
        *shelf.get() = self.live.get().take();
        let result = self.run(&place, &dir, exec, &observer, &mut reply, inbox).await;
        let fault = result.as_ref().and_then(|result| result.as_ref().ok()?.fault);
        let live = shelf.get().take();
        let removed = match live {
            Some(live) if fault == Some(Fault::TtlExpired) => live.expire().await,
            Some(live) => live.remove().await,
            // Its caller went away.
            None => Ok(()),
        };
        self.forget();
        let Some(result) = result else { return };
        let result = result.map(|result| ExecResult {
            cleanup: Some(Cleanup {
                vm_id: self.record.vm_id.clone(),
                deleted: removed.is_ok(),
                reason: Fault::cleanup_reason(fault),
            }),
            ..result
        });
        answer(reply, result);
    }

    async fn remove(&mut self, ending: Ending) -> Result<(), Error> {
        let live = self.live.get().take();
        let removed = match live {
            Some(live) if ending == Ending::TtlExpired => live.expire().await,
            Some(live) => live.remove().await,
            // The engine was dropped, and the machine with it.
            None => Ok(()),
        };
        self.forget();
        removed
    }

    fn is_gone(&self) -> bool {
        self.is_gone
    }

    async fn event(&self) -> Infallible {
        std::future::pending().await
    }

    async fn take_note(&mut self, event: Infallible) {
        match event {}
    }
}
