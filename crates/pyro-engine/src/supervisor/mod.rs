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
//! it. One lock (`gate`) makes starts, stops and removals happen one after another. Commands run at the same time.

mod body;
mod command;
mod commands;
mod footprint;
mod serve;
mod unsettled;

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pyro_image::Environment;
use tokio::sync::watch;

use self::body::Body;
use self::commands::Commands;
use self::unsettled::Unsettled;
use crate::engine::{Engine, EngineConfig};
use crate::error::Error;
use crate::record::{Fault, VmState};
use crate::task::journal::Journal;
use crate::task::{CONTROL_FD, Kind, LOCK_FD, READY_FD, Report, TaskDirectory, TaskFile, read_order};

/// What the process is handed open.
struct Handed {
    lock: File,
    listener: UnixListener,
    ready: File,
}

/// All that the supervisor of one task knows.
pub(crate) struct Supervisor {
    engine: Engine,
    id: String,
    directory: TaskDirectory,
    journal: Journal,
    unsettled: Arc<Unsettled>,
    file: Mutex<TaskFile>,
    /// Kept installed for as long as the task's disk lies upon it; none for a task on the host.
    environment: Option<Environment>,
    body: Mutex<Body>,
    commands: Commands,
    /// Held over each change of `body`.
    gate: tokio::sync::Mutex<()>,
    lock: Mutex<Option<File>>,
    /// Whether commands can be run now.
    runs: watch::Sender<bool>,
    /// Boot the guest of a new task, also where there is a template.
    cold: bool,
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
    let supervisor = match Supervisor::open(config, order.file, order.cold, lock).await {
        Ok(supervisor) => Arc::new(supervisor),
        Err((error, lock)) => {
            abandon(&state_dir, &id, kind, lock);
            return report(ready, &failed(&error));
        }
    };
    let up = supervisor.boot().await;
    let told = match &up {
        Ok(()) => report(ready, &Report::Ready),
        Err(error) => report(ready, &failed(error)),
    };
    if up.is_err() || (told.is_err() && kind == Kind::Create) {
        // It did not come up, or whoever asked for it is gone: it never was.
        supervisor.clone().give_up(kind).await;
        return Ok(());
    }
    footprint::release_boot_code();
    serve::until_gone(supervisor, listener).await
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
    if kind == Kind::Create {
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
    async fn open(
        config: EngineConfig,
        file: TaskFile,
        cold: bool,
        lock: File,
    ) -> Result<Self, (Error, File)> {
        let opened = Self::prepare(config, &file);
        let (engine, directory, environment, last) = match opened {
            Ok(opened) => opened,
            Err(error) => return Err((error, lock)),
        };
        Ok(Self {
            engine,
            id: file.task_id.clone(),
            journal: directory.journal(),
            unsettled: Unsettled::of(directory.journal()),
            directory,
            file: Mutex::new(file),
            environment,
            body: Mutex::new(Body::None),
            commands: Commands::after(last),
            gate: tokio::sync::Mutex::new(()),
            lock: Mutex::new(Some(lock)),
            runs: watch::Sender::new(false),
            cold,
            gone: watch::Sender::new(false),
        })
    }

    fn prepare(
        config: EngineConfig,
        file: &TaskFile,
    ) -> Result<(Engine, TaskDirectory, Option<Environment>, u64), Error> {
        let engine = Engine::open_as_is(config)?;
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

    /// Takes back what did not come up.
    async fn give_up(self: Arc<Self>, kind: Kind) {
        match kind {
            Kind::Create => drop(self.remove(Fault::Cancelled, false).await),
            Kind::Start => {
                self.take_body().end().await;
                drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner).take());
            }
        }
    }

    /// Ends all commands and removes every trace of the task.
    async fn remove(self: &Arc<Self>, fault: Fault, expired: bool) -> Result<(), Error> {
        let _gate = self.gate.lock().await;
        // Nothing begins any more; what runs has its guest until it has ended.
        let body = self.take_body();
        self.commands.all_end_because("the task was deleted");
        self.commands.end_all(fault).await;
        body.end().await;
        let lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner).take();
        // None: somebody else has removed it meanwhile, which is what was asked for.
        if let Some(lock) = lock {
            let supervisor = Arc::clone(self);
            let again = lock.try_clone();
            let removed = self
                .engine
                .blocking(move || {
                    let registry = &supervisor.engine.inner.registry;
                    if expired {
                        registry.expire_task(&supervisor.id, lock)
                    } else {
                        registry.remove_task(&supervisor.id, lock)
                    }
                })
                .await;
            if let Err(error) = removed {
                *self.lock.lock().unwrap_or_else(PoisonError::into_inner) = again.ok();
                return Err(error);
            }
        }
        self.gone.send_replace(true);
        Ok(())
    }

    /// Waits for a moment in which a full disk may have room again, which has no event; false once the task is gone.
    async fn may_have_room(&self) -> bool {
        const AGAIN: Duration = Duration::from_secs(2);
        let mut gone = self.gone.subscribe();
        tokio::time::timeout(AGAIN, gone.wait_for(|gone| *gone)).await.is_err()
    }

    fn state(&self) -> VmState {
        self.file().state
    }

    fn file(&self) -> MutexGuard<'_, TaskFile> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn body(&self) -> MutexGuard<'_, Body> {
        self.body.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
