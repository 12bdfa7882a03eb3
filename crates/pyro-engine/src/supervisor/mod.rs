//! The supervisor of one task: a process of its own that owns the VMM, the guest channel, the journal and the clock
//! of the task's life, and answers whoever connects to its socket.
//!
//! ```text
//!   order ──► booting ──► started ◄──► stopped
//!                │            │            │
//!                └──► ended ◄─┴────────────┘    deleted, expired, or never up
//! ```
//!
//! It holds the lock of the task's directory for life, so that a free lock means that it is gone; the VMM dies with
//! it. The task's owner (`crate::owner`) does starts, stops and the removal, one after another. Commands run at the same
//! time.

mod clock;
mod command;
mod commands;
mod machine;
mod ready;
mod serve;
mod unsettled;

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyro_image::Environment;
use pyro_net::secret::HeldSecret;
use tokio::sync::{Semaphore, watch};

use self::commands::Commands;
use self::machine::TaskMachine;
use self::unsettled::Unsettled;
use crate::ending::{Ending, Noun};
use crate::engine::{Engine, EngineConfig};
use crate::error::{Error, ErrorKind};
use crate::network::{NetworkChange, NetworkPolicy, TaskNetwork};
use crate::owner::{self, Mailbox};
use crate::place::Place;
use crate::ports::{self, PortChange, TaskPorts};
use crate::record::VmState;
use crate::task::journal::Journal;
use crate::task::{CONTROL_FD, Kind, LOCK_FD, READY_FD, Report, TaskDirectory, TaskFile, read_order};

/// What the process is handed open.
struct Handed {
    lock: File,
    listener: UnixListener,
    ready: File,
}

/// What the supervisor was ordered to look after.
struct Ordered {
    file: TaskFile,
    /// The process that gave the order.
    owner: String,
    cold: bool,
    secrets: Vec<HeldSecret>,
}

/// All that the supervisor of one task knows.
pub(crate) struct Supervisor {
    engine: Engine,
    id: String,
    directory: TaskDirectory,
    journal: Journal,
    unsettled: Arc<Unsettled>,
    /// The right to listen to a command that has ended.
    later_outputs: Arc<Semaphore>,
    file: Mutex<TaskFile>,
    /// Kept installed for as long as the task's disk lies upon it; none for a task on the host.
    environment: Option<Environment>,
    /// Where commands run now. Only the owner changes it.
    place: watch::Sender<Place>,
    commands: Commands,
    owner: Mailbox<TaskMachine>,
    /// Held while the policy of the network changes, and while a guest that was started with the one before is handed out.
    network_changes: tokio::sync::Mutex<()>,
    /// Boot the guest of a new task, also where there is a template.
    cold: bool,
    /// What the guest uses and does not see.
    secrets: Vec<HeldSecret>,
    /// True once a machine that is kept ready has an owner.
    claimed: watch::Sender<bool>,
    /// True once the task is gone.
    gone: watch::Sender<bool>,
}

/// Serves one task until it is gone. `pyro supervise` is this and nothing else.
///
/// # Errors
/// When it was not started by an engine. Whatever else fails is told to the engine that started it.
pub async fn supervise() -> io::Result<()> {
    let order = read_order(io::stdin())?;
    let Handed { lock, listener, ready } = take_over();
    let (kind, id) = (order.kind, order.file.task_id.clone());
    let config = EngineConfig::from(order.config);
    let state_dir = config.state_dir.clone();
    let what = Ordered { file: order.file, owner: order.owner, cold: order.cold, secrets: order.secrets };
    let supervisor = match Supervisor::open(config, what, lock) {
        Ok(supervisor) => supervisor,
        Err((error, lock)) => {
            abandon(&state_dir, &id, kind, lock);
            return report(ready, &failed(&error));
        }
    };
    let mut ready = Some(ready);
    if matches!(kind, Kind::Keep(_)) {
        // The process that made it does not wait for the guest, and may be gone by then.
        drop(ready.take().map(|ready| report(ready, &Report::Ready)));
    }
    // Callers are answered while the guest comes up: a stop or a removal cuts that short.
    let unclaimed = match kind {
        Kind::Keep(unclaimed) => Some(unclaimed),
        Kind::Create | Kind::Start => None,
    };
    let mut serving = std::pin::pin!(serve::until_gone(Arc::clone(&supervisor), listener, unclaimed));
    let up = tokio::select! {
        biased;
        up = supervisor.start(None) => up,
        // It was told to end by a signal.
        served = &mut serving => return served,
    };
    let told = match (ready, &up) {
        (None, _) => Ok(()),
        (Some(ready), Ok(())) => report(ready, &Report::Ready),
        (Some(ready), Err(error)) => report(ready, &failed(error)),
    };
    if up.is_err() || (told.is_err() && kind == Kind::Create) {
        if kind != Kind::Start {
            // It did not come up, or its maker is gone: nothing of it stays. What cannot be removed the next sweep finds.
            drop(supervisor.owner.remove(Ending::Cancelled).await);
        }
        return Ok(());
    }
    if unclaimed.is_some() {
        tokio::select! {
            biased;
            served = &mut serving => return served,
            () = supervisor.make_ready() => {}
        }
    }
    serving.await
}

fn failed(error: &Error) -> Report {
    Report::Failed {
        code: error.kind().code().to_owned(),
        message: error.to_string(),
        hint: error.remedy().map(str::to_owned),
    }
}

/// Tells whoever started this process, who may be gone by now.
fn report(mut ready: File, report: &Report) -> io::Result<()> {
    ready.write_all(&serde_json::to_vec(report).map_err(io::Error::other)?)
}

/// Without an engine there is only the task's directory to put in order; the next sweep does the rest.
fn abandon(state_dir: &std::path::Path, id: &str, kind: Kind, lock: File) {
    if kind != Kind::Start {
        drop(fs_err::remove_dir_all(state_dir.join("tasks").join(id)));
    }
    drop(lock);
}

#[expect(unsafe_code, reason = "descriptors under fixed numbers")]
fn take_over() -> Handed {
    let take = |number| {
        // SAFETY: whoever starts `pyro supervise` hands exactly these over, open and ours alone. A number that is
        // not open gives errors at its first use, and nothing else of this process can have it yet: stdin, stdout
        // and stderr are all that was opened before.
        let fd = unsafe { OwnedFd::from_raw_fd(number) };
        // The VMM and whatever else is started here must not keep the task's lock.
        _ = rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC);
        fd
    };
    Handed { lock: take(LOCK_FD).into(), listener: take(CONTROL_FD).into(), ready: take(READY_FD).into() }
}

impl Supervisor {
    /// Makes the supervisor and its owner. On failure the lock comes back.
    fn open(
        config: EngineConfig,
        Ordered { file, owner: former, cold, secrets }: Ordered,
        lock: File,
    ) -> Result<Arc<Self>, (Error, File)> {
        let (engine, directory, environment, last) = match Self::prepare(config, &file, &former) {
            Ok(opened) => opened,
            Err(error) => return Err((error, lock)),
        };
        // Its life ends by the boot clock, which runs on while the host sleeps: see `serve`.
        let (owner, inbox) = owner::mailbox(Ending::Stopped(Noun::Task), None);
        let supervisor = Arc::new(Self {
            engine,
            id: file.task_id.clone(),
            journal: directory.journal(),
            unsettled: Unsettled::of(directory.journal()),
            directory,
            later_outputs: Arc::new(Semaphore::new(pyro_proto::limits::LATER_OUTPUTS)),
            file: Mutex::new(file),
            environment,
            place: watch::Sender::new(Place::None),
            commands: Commands::after(last),
            owner,
            network_changes: tokio::sync::Mutex::default(),
            cold,
            secrets,
            claimed: watch::Sender::new(false),
            gone: watch::Sender::new(false),
        });
        let machine = TaskMachine::new(Arc::clone(&supervisor), lock);
        drop(tokio::spawn(owner::own(machine, inbox)));
        Ok(supervisor)
    }

    fn prepare(
        config: EngineConfig,
        file: &TaskFile,
        former: &str,
    ) -> Result<(Engine, TaskDirectory, Option<Environment>, u64), Error> {
        let engine = Engine::open_as_is(config)?;
        // From here on the task dies with this process, and not with the one that made it.
        engine.inner.registry.adopt(&file.task_id, former)?;
        let path: PathBuf = engine.inner.registry.state_dir().join("tasks").join(&file.task_id);
        let directory = TaskDirectory::new(path);
        let failed = |error: io::Error| Error::state(directory.path(), &error);
        let environment = if file.environment_digest.is_empty() {
            None
        } else {
            Some(engine.inner.store.lease(&file.environment, &file.environment_digest)?)
        };
        directory.journal().take_over().map_err(failed)?;
        let last = directory.journal().last_sequence().map_err(failed)?;
        Ok((engine, directory, environment, last))
    }

    /// Changes the record, on disk first, then in the registry.
    fn write(&self, change: impl FnOnce(&mut TaskFile)) -> Result<(), Error> {
        let mut file = self.file().clone();
        change(&mut file);
        file.write(&self.directory).map_err(|error| Error::state(self.directory.path(), &error))?;
        let state = file.state.as_str();
        *self.file() = file;
        self.engine.inner.registry.set_task_state(&self.id, state)
    }

    /// Says whether the memory of this process may be looked at and dumped, where it holds secrets.
    fn allow_dumps(&self, allow: bool) {
        use rustix::process::{DumpableBehavior, set_dumpable_behavior};
        if self.secrets.is_empty() {
            return;
        }
        let behavior = if allow { DumpableBehavior::Dumpable } else { DumpableBehavior::NotDumpable };
        if let Err(error) = set_dumpable_behavior(behavior) {
            serve::complain(&format!("this process, which holds secrets, can be dumped: {error}"));
        }
    }

    /// Starts the guest; with a cap, a slot is taken for it first.
    async fn start(&self, cap: Option<u32>) -> Result<(), Error> {
        self.owner.start(cap).await.unwrap_or_else(|| Err(self.missing()))
    }

    /// Ends all commands and powers the guest off; the disk is kept.
    async fn stop(&self, why: Option<&'static str>) -> Result<(), Error> {
        self.owner.stop(why).await.unwrap_or_else(|| Err(self.missing()))
    }

    /// Changes what the guest may reach, on disk first: a task that is started again has the policy that it had last.
    async fn change_network(&self, change: &NetworkChange) -> Result<TaskNetwork, Error> {
        let _one_at_a_time = self.network_changes.lock().await;
        let place = self.place.borrow().clone();
        let old = self.file().network.clone();
        let mut answer = TaskNetwork {
            task_id: self.id.clone(),
            network_policy: NetworkPolicy::from(&old),
            old_digest: None,
            new_digest: None,
            closed_connections: None,
            counts: place.network().map(|network| network.counts().into()),
        };
        if change.is_empty() {
            return Ok(answer);
        }
        let new = change.applied(&old)?;
        self.write(|file| file.network = new.clone())?;
        answer.network_policy = NetworkPolicy::from(&new);
        answer.old_digest = Some(old.digest());
        answer.new_digest = Some(new.digest());
        let changed = place.network().map(|network| network.set_policy(new));
        answer.closed_connections = Some(changed.map_or(0, |changed| changed.closed_connections));
        Ok(answer)
    }

    /// Publishes ports of the guest, or publishes them no more.
    async fn change_ports(&self, change: &PortChange) -> Result<TaskPorts, Error> {
        let _one_at_a_time = self.network_changes.lock().await;
        let place = self.place.borrow().clone();
        let now = self.file().ports.clone();
        let task_id = self.id.clone();
        if change.is_empty() {
            return Ok(TaskPorts { task_id, ports: now });
        }
        let ports = match (place.ports(), &place) {
            (Some(ports), _) => ports.change(change)?,
            (None, Place::Host(_)) => {
                let text = format!("task {task_id} runs on this host: its ports are the host's own");
                return Err(Error::new(ErrorKind::WrongState, text));
            }
            (None, _) => {
                let (left, add) = change.applied(&now)?;
                let ports = [left, add].concat();
                ports::check(&ports)?;
                ports
            }
        };
        self.write(|file| file.ports.clone_from(&ports))?;
        Ok(TaskPorts { task_id, ports })
    }

    fn missing(&self) -> Error {
        Error::new(ErrorKind::NotFound, format!("task '{}' does not exist", self.id))
    }

    /// Waits for a moment in which a full disk may have room again, which has no event; false once the task is gone.
    async fn may_have_room(&self) -> bool {
        let mut gone = self.gone.subscribe();
        tokio::time::timeout(machine::AGAIN, gone.wait_for(|gone| *gone)).await.is_err()
    }

    fn state(&self) -> VmState {
        self.file().state
    }

    fn file(&self) -> MutexGuard<'_, TaskFile> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
