//! A machine that is ready for the command line: kept by a supervisor of its own, for the next one-shot command of the kind that
//! was run last.
//!
//! It is a task that no list shows: it has a row, a lock and a time to live, counts towards the cap, and is removed like any
//! task whose supervisor is gone. It leaves one slot free, gives way to machines that are asked for, and ends by itself
//! when nobody has claimed it for some time. The process that claims it owns it: when that one goes away, so does the machine.

use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use pyro_image::Environment;
use pyro_vmm::DiskCache;
use serde::{Deserialize, Serialize};

use super::client::{Claim, Client};
use super::{Kind, TaskFile};
use crate::engine::{Engine, EngineConfig};
use crate::error::{Error, ErrorKind};
use crate::execute::millis;
use crate::files;
use crate::lock;
use crate::observe::{Observer, Phase};
use crate::record::{Cleanup, ExecResult, Fault, Timings};
use crate::registry::is_id;
use crate::spec::{ExecSpec, VmSpec};

/// How long a supervisor may take to hand its machine out, or to give way. It has nothing else to do.
const ANSWERS: Duration = Duration::from_secs(2);
/// The longest note of which machine is ready, in bytes.
const MOST_NOTE: u64 = 64 << 10;

/// How far a machine that is kept ready has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Kept {
    /// It starts, and learns its first command.
    Starting,
    /// The next caller may have it.
    Ready,
    /// Somebody has it, or it is about to end.
    Claimed,
}

/// What two commands must have in common, so that a machine made for one serves the other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Shape {
    /// Of pyro: another version may start machines otherwise.
    version: String,
    environment_digest: String,
    kernel_digest: String,
    vcpu_count: u8,
    mem_mib: u32,
    disk_mib: u32,
    /// The digest of the network's policy.
    network: String,
    backend: Option<String>,
    unconfined_vmm: bool,
}

/// What a caller asks of a machine that is ready.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Wish {
    pub(crate) shape: Shape,
    pub(crate) ttl_seconds: u32,
    pub(crate) require_isolation: Option<String>,
}

/// Which machine is ready, as a file of the state directory says. It is a hint: the machine itself decides.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    task_id: String,
    shape: Shape,
}

impl Shape {
    pub(crate) fn of(file: &TaskFile, environment: &Environment, config: &EngineConfig) -> Self {
        Self {
            version: crate::VERSION.to_owned(),
            environment_digest: environment.digest.clone(),
            kernel_digest: environment.kernel_digest.clone(),
            vcpu_count: file.vcpu_count,
            mem_mib: file.mem_mib,
            disk_mib: file.disk_mib,
            network: file.network.digest(),
            backend: config.backend.clone(),
            unconfined_vmm: config.unconfined_vmm,
        }
    }
}

impl Engine {
    /// As [`Engine::run`], in a machine that an earlier call has kept ready, where there is one of this kind; another is made
    /// ready for the next call, and ends when nobody has used it for `keep`.
    ///
    /// # Errors
    /// As [`Engine::run`].
    pub async fn run_keeping_ready(
        &self,
        vm: VmSpec,
        exec: ExecSpec,
        observer: Observer,
        keep: Duration,
    ) -> Result<ExecResult, Error> {
        // Secrets and ports are a machine's from its start; who wants it cold wants it new.
        if vm.cold || !vm.secrets.is_empty() || !vm.publish.is_empty() {
            return self.run(vm, exec, observer).await;
        }
        exec.check()?;
        let began = Instant::now();
        self.check(&vm)?;
        let Some((_, environment)) = self.ground(&vm, DiskCache::Unsafe, &observer).await? else {
            return self.run(vm, exec, observer).await;
        };
        let shape = self.shape(&vm, &environment)?;
        let wish = Wish {
            shape: shape.clone(),
            ttl_seconds: vm.ttl_seconds,
            require_isolation: vm.require_isolation.map(|tier| tier.as_str().to_owned()),
        };
        let Some((id, claim)) = self.claim(&wish).await else {
            let result = self.run(vm.clone(), exec, observer).await;
            // The next command goes without where this fails.
            drop(self.keep_ready(&vm, &environment, shape, keep, None).await);
            return result;
        };
        let id = id.as_str();
        observer.tell(Phase::Create(vm.environment.clone()));
        observer.tell(Phase::Start(id.to_owned()));
        let prepare = began.elapsed();
        observer.tell(Phase::Execute(id.to_owned()));
        let result = self.exec_task(id, exec, observer).await;
        let cleaning = Instant::now();
        let next = self.keep_ready(&vm, &environment, shape.clone(), keep, Some(id));
        let (removed, kept) = tokio::join!(self.delete_task(id), next);
        // Until here its loss would have ended the machine.
        drop(claim);
        if !kept.unwrap_or(true) {
            // Its slot is free now.
            drop(self.keep_ready(&vm, &environment, shape, keep, Some(id)).await);
        }
        let result = result?;
        Ok(ExecResult {
            timings: Timings {
                prepare: millis(prepare),
                cleanup: millis(cleaning.elapsed()),
                ..result.timings
            },
            cleanup: Some(Cleanup {
                vm_id: id.to_owned(),
                deleted: removed.is_ok(),
                reason: Fault::cleanup_reason(result.fault),
            }),
            vm_id: Some(id.to_owned()),
            task_id: None,
            sequence: None,
            cwd: None,
            ..result
        })
    }

    /// Claims the machine that is ready. Without one that serves, the caller starts its own.
    async fn claim(&self, wish: &Wish) -> Option<(String, Claim)> {
        let note = self.read_note()?;
        if note.shape != wish.shape {
            return None;
        }
        let directory = self.inner.registry.task_path(&note.task_id);
        let claim = async { Client::connect(&directory).await.ok()??.claim(wish).await.ok() };
        let claim = tokio::time::timeout(ANSWERS, claim).await.ok()??;
        Some((note.task_id, claim))
    }

    /// Makes a machine ready for the next command of this kind, in its own time; false where there is no slot for it.
    async fn keep_ready(
        &self,
        vm: &VmSpec,
        environment: &Environment,
        shape: Shape,
        keep: Duration,
        used: Option<&str>,
    ) -> Result<bool, Error> {
        let inner = &self.inner;
        // One process does this at a time; another need not wait for it.
        let path = inner.registry.state_dir().join("ready.lock");
        let Ok(_making) = lock::Moment::wait_for(&path, Duration::ZERO) else { return Ok(true) };
        if let Some(note) = self.read_note().filter(|note| used != Some(note.task_id.as_str())) {
            let directory = inner.registry.task_path(&note.task_id);
            let there = tokio::time::timeout(ANSWERS, Client::connect(&directory)).await;
            if let Ok(Ok(Some(client))) = there {
                if note.shape == shape {
                    return Ok(true);
                }
                drop(tokio::time::timeout(ANSWERS, client.release()).await);
            }
        }
        // One slot stays free for the next who asks.
        if self.live_vms()? + 1 >= inner.config.max_active_vms {
            return Ok(false);
        }
        let isolation = self.isolation()?;
        let life =
            inner.config.max_ttl_seconds.saturating_add(u32::try_from(keep.as_secs()).unwrap_or(u32::MAX));
        let spec = VmSpec { ttl_seconds: life, allow_host_compat: false, ..vm.clone() };
        let file =
            TaskFile { kept: Some(Kept::Starting), ..self.new_file(&spec, Some((isolation, environment)))? };
        let (mut unborn, file) = self.bear(file).await?;
        let note = Note { task_id: file.task_id.clone(), shape };
        let lock = unborn.lock()?;
        let report = self.spawn_supervisor(lock, Kind::Keep(keep), false, file, Vec::new())?;
        unborn.is_the_supervisors();
        self.write_note(&note).map_err(|error| Error::state(inner.registry.state_dir(), &error))?;
        // Until it is the owner, it would be taken for a dead process's. It does not wait for its guest.
        self.hear(report, &note.task_id).await?;
        Ok(true)
    }

    /// Ends the machine that is ready where another was refused for want of what it holds; whether there was one.
    pub(crate) async fn ready_gives_way(&self, refused: &Error) -> bool {
        if !matches!(refused.kind(), ErrorKind::CapReached | ErrorKind::HostResources) {
            return false;
        }
        let Some(note) = self.read_note() else { return false };
        let directory = self.inner.registry.task_path(&note.task_id);
        let released = async {
            match Client::connect(&directory).await {
                Ok(Some(client)) => client.release().await.is_ok(),
                Ok(None) | Err(_) => false,
            }
        };
        tokio::time::timeout(ANSWERS, released).await.unwrap_or(false)
    }

    fn shape(&self, vm: &VmSpec, environment: &Environment) -> Result<Shape, Error> {
        let file = self.new_file(vm, None)?;
        Ok(Shape::of(&file, environment, &self.inner.config))
    }

    fn note_path(&self) -> PathBuf {
        self.inner.registry.state_dir().join("ready.json")
    }

    fn read_note(&self) -> Option<Note> {
        let bytes = files::read_or_nothing(&self.note_path(), MOST_NOTE).ok()?;
        serde_json::from_slice::<Note>(&bytes).ok().filter(|note| is_id(&note.task_id))
    }

    /// Not synced: after a loss of power there is no machine that it could name.
    fn write_note(&self, note: &Note) -> io::Result<()> {
        let (path, beside) = (self.note_path(), self.note_path().with_extension("new"));
        fs_err::write(&beside, serde_json::to_vec(note).map_err(io::Error::other)?)?;
        fs_err::rename(beside, path)
    }
}

/// Whether a task is one that lists show.
pub(crate) fn is_listed(file: &TaskFile) -> bool {
    file.kept.is_none()
}
