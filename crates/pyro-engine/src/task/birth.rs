//! How a task gets its supervisor: lock and socket are made here and handed over open, so that there is no moment in
//! which the task seems dead, or refuses a caller.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{OwnedFd, RawFd};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use pyro_image::Environment;
use pyro_net::Outbound;
use pyro_net::secret::HeldSecret;
use pyro_process::Spawn;
use pyro_vmm::{DiskCache, Isolation};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::engine::{Engine, EngineConfig};
use crate::error::{Error, ErrorKind};
use crate::files;
use crate::network::secrets_of;
use crate::observe::{Observer, Phase};
use crate::record::VmState;
use crate::registry::{Registry, now, this_process};
use crate::spec::VmSpec;
use crate::task::file::{LAYOUT_VERSION, TaskFile, boot_id, boottime};
use crate::task::{TaskDirectory, TaskRecord, owner, socket};
use crate::template::NO_TEMPLATE;

/// The numbers under which a supervisor finds what it is handed.
pub(crate) const LOCK_FD: RawFd = 3;
pub(crate) const CONTROL_FD: RawFd = 4;
pub(crate) const READY_FD: RawFd = 5;

/// How long a supervisor may take to report: longer than a guest may take to be restored, and to boot after that.
const REPORTED: Duration = Duration::from_secs(200);

/// Why a supervisor is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Kind {
    /// For a task that is not there yet: when it does not come up, or its caller goes away, nothing stays.
    Create,
    /// For a machine that is kept ready, for so long if nobody claims it: it reports once it is the owner, and when its guest
    /// does not come up, nothing stays.
    Keep(Duration),
    /// For a task that is stopped: when it does not come up, it stays stopped.
    Start,
}

/// What a supervisor is told on its stdin.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) kind: Kind,
    /// Boot a new task's guest, also where there is a template.
    pub(crate) cold: bool,
    pub(crate) config: OrderConfig,
    pub(crate) file: TaskFile,
    /// The process that gives the order, by which the task's row knows its owner until the supervisor takes over.
    pub(crate) owner: String,
    /// What the guest uses and does not see. It goes through a pipe, and nowhere else.
    pub(crate) secrets: Vec<HeldSecret>,
}

/// The engine's configuration, with paths of any bytes.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct OrderConfig {
    state_dir: OsString,
    cache_dir: OsString,
    apt_sources: Option<OsString>,
    firecracker: Option<OsString>,
    tool_path: OsString,
    backend: Option<String>,
    template_limit_mib: u64,
    unconfined_vmm: bool,
    max_active_vms: u32,
    max_ttl_seconds: u32,
    runtime_dir: Option<OsString>,
    memory_overcommit: f64,
    disk_overcommit: f64,
    outbound: Outbound,
}

/// What a supervisor answers, once.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Report {
    Ready,
    Failed { code: String, message: String, hint: Option<String> },
}

impl From<&EngineConfig> for OrderConfig {
    fn from(config: &EngineConfig) -> Self {
        Self {
            state_dir: config.state_dir.clone().into_os_string(),
            cache_dir: config.cache_dir.clone().into_os_string(),
            apt_sources: config.apt_sources.clone().map(Into::into),
            firecracker: config.firecracker.clone().map(Into::into),
            tool_path: config.tool_path.clone(),
            backend: config.backend.clone(),
            template_limit_mib: config.template_limit_mib,
            unconfined_vmm: config.unconfined_vmm,
            max_active_vms: config.max_active_vms,
            max_ttl_seconds: config.max_ttl_seconds,
            runtime_dir: config.runtime_dir.clone().map(Into::into),
            memory_overcommit: config.memory_overcommit,
            disk_overcommit: config.disk_overcommit,
            outbound: config.outbound.clone(),
        }
    }
}

impl From<OrderConfig> for EngineConfig {
    fn from(config: OrderConfig) -> Self {
        Self {
            state_dir: config.state_dir.into(),
            cache_dir: config.cache_dir.into(),
            apt_sources: config.apt_sources.map(Into::into),
            firecracker: config.firecracker.map(Into::into),
            tool_path: config.tool_path,
            backend: config.backend,
            template_limit_mib: config.template_limit_mib,
            spare: false,
            keep_ready_seconds: 0,
            policies_dir: None,
            unconfined_vmm: config.unconfined_vmm,
            max_active_vms: config.max_active_vms,
            max_ttl_seconds: config.max_ttl_seconds,
            runtime_dir: config.runtime_dir.map(Into::into),
            memory_overcommit: config.memory_overcommit,
            disk_overcommit: config.disk_overcommit,
            outbound: config.outbound,
            supervisor: None,
        }
    }
}

/// A task whose supervisor is not there yet. Dropping it removes what there is.
pub(super) struct Unborn {
    registry: Arc<Registry>,
    id: String,
    lock: Option<File>,
}

impl Unborn {
    /// Another descriptor of its lock, for its supervisor.
    pub(super) fn lock(&self) -> Result<File, Error> {
        let lock = self.lock.as_ref().map(File::try_clone);
        let lock = lock.transpose().map_err(|error| Error::host("a descriptor", &error))?;
        lock.ok_or_else(|| Error::new(ErrorKind::Host, "the task has no lock"))
    }

    /// From here on its supervisor removes it: where nobody waits for the report any more, or it does not come up.
    pub(super) fn is_the_supervisors(&mut self) {
        drop(self.lock.take());
    }
}

impl Drop for Unborn {
    fn drop(&mut self) {
        if let Some(lock) = self.lock.take() {
            // What cannot be removed now is found by the next sweep.
            drop(self.registry.remove_task(&self.id, lock));
        }
    }
}

impl Engine {
    /// Makes a task: its guest runs and `/workspace` exists when this returns. It lives on after this process, until
    /// it is deleted or its time is up.
    ///
    /// # Errors
    /// When a value is outside its limits, the cap is reached, the host lacks room, the environment cannot be had, or
    /// the guest does not boot. Nothing is left then; nor is it when the future is dropped.
    pub async fn create_task(&self, spec: VmSpec, observer: Observer) -> Result<TaskRecord, Error> {
        self.check(&spec)?;
        let ground = self.ground(&spec, DiskCache::Writeback, &observer).await?;
        observer.tell(Phase::Create(spec.environment.clone()));
        let mut file = self.new_file(&spec, ground.as_ref().map(|(isolation, env)| (*isolation, env)))?;
        if let Some((_, environment)) = &ground {
            self.describe_template(environment, &spec, &mut file.metadata);
        }
        let (mut unborn, file) = self.bear(file).await?;
        let id = file.task_id.clone();
        observer.tell(Phase::Start(id.clone()));
        let lock = unborn.lock()?;
        let report = self.spawn_supervisor(lock, Kind::Create, spec.cold, file, spec.secrets)?;
        unborn.is_the_supervisors();
        self.hear(report, &id).await?;
        // The environment stays leased until the supervisor has its own lease.
        drop(ground);
        let record = self.status_task(&id).await?;
        if let Some(reason) = record.metadata.get("cold_reason").filter(|reason| *reason != NO_TEMPLATE) {
            observer.tell(Phase::Warning(reason.clone()));
        }
        Ok(record)
    }

    /// The record of a task that has no id yet, on an environment or, without one, on the host.
    pub(super) fn new_file(
        &self,
        spec: &VmSpec,
        ground: Option<(Isolation, &Environment)>,
    ) -> Result<TaskFile, Error> {
        let created_at = now();
        Ok(TaskFile {
            layout_version: LAYOUT_VERSION,
            task_id: String::new(),
            environment: spec.environment.clone(),
            environment_version: ground.map_or_else(String::new, |(_, env)| env.version.clone()),
            environment_digest: ground.map_or_else(String::new, |(_, env)| env.digest.clone()),
            vcpu_count: spec.vcpu_count,
            mem_mib: spec.mem_mib,
            disk_mib: spec.disk_mib,
            ttl_seconds: spec.ttl_seconds,
            allow_host_compat: spec.allow_host_compat && spec.require_isolation.is_none(),
            created_at,
            expires_at: created_at + f64::from(spec.ttl_seconds),
            boot_id: boot_id().to_owned(),
            expires_at_boottime: boottime() + f64::from(spec.ttl_seconds),
            machine_id: files::random_hex(16).map_err(|error| Error::host("random numbers", &error))?,
            state: VmState::Created,
            execution_mode: "pending".to_owned(),
            isolation: ground.map_or("none", |(isolation, _)| isolation.as_str()).to_owned(),
            start_mode: "cold".to_owned(),
            network: spec.network.clone(),
            ports: spec.publish.clone(),
            secrets: spec.secrets.iter().map(|held| (held.name.clone(), held.secret.clone())).collect(),
            require_isolation: spec.require_isolation.map(|tier| tier.as_str().to_owned()),
            kept: None,
            metadata: std::collections::BTreeMap::new(),
            last_error: None,
        })
    }

    /// Gives a task its id, its slot and its directory.
    pub(super) async fn bear(&self, mut file: TaskFile) -> Result<(Unborn, TaskFile), Error> {
        let engine = self.clone();
        self.blocking(move || {
            let inner = &engine.inner;
            let cap = inner.config.max_active_vms;
            let lease = engine.before_spare(|| inner.registry.bear_task(cap, file.promise()))?;
            let directory = TaskDirectory::new(lease.dir.clone());
            let unborn = Unborn {
                registry: Arc::clone(&inner.registry),
                id: lease.id.clone(),
                lock: Some(lease.lock),
            };
            directory.furnish().map_err(|error| Error::state(directory.path(), &error))?;
            file.task_id = lease.id;
            Ok((unborn, file))
        })
        .await
    }

    /// Gives a stopped task a new supervisor, which boots its guest.
    pub(super) async fn revive(&self, lock: File, file: TaskFile) -> Result<(), Error> {
        let id = file.task_id.clone();
        // Their values are on no disk: this process must have them, as the one that made the task had.
        let secrets = secrets_of(&file)?;
        crate::budget::check(self.inner.registry.state_dir(), file.mem_mib)?;
        let (engine, cap) = (self.clone(), self.inner.config.max_active_vms);
        self.blocking({
            let id = id.clone();
            move || engine.before_spare(|| engine.inner.registry.readmit_task(cap, &id))
        })
        .await?;
        let report = self.spawn_supervisor(lock, Kind::Start, false, file, secrets);
        let heard = match report {
            Ok(report) => self.hear(report, &id).await,
            Err(error) => Err(error),
        };
        if heard.is_err() {
            // Where the supervisor is gone, so is its slot.
            let (engine, id) = (self.clone(), id.clone());
            drop(self.blocking(move || engine.inner.registry.lock_task(&id)).await);
        }
        heard
    }

    pub(super) fn spawn_supervisor(
        &self,
        lock: File,
        kind: Kind,
        cold: bool,
        file: TaskFile,
        secrets: Vec<HeldSecret>,
    ) -> Result<File, Error> {
        let inner = &self.inner;
        let program = inner.config.supervisor.as_deref().ok_or_else(|| {
            Error::new(ErrorKind::Host, "this engine has no supervisor program, so it makes no tasks")
        })?;
        let id = file.task_id.clone();
        let directory = TaskDirectory::new(inner.registry.state_dir().join("tasks").join(&id));
        let failed = |what: &str, error: &io::Error| Error::host(what, error);
        let listener = socket::bind(&directory).map_err(|error| failed("the task's socket", &error))?;
        let config = OrderConfig::from(&inner.config);
        let order = Order { kind, cold, config, file, owner: this_process(), secrets };
        let order = serde_json::to_vec(&order).map_err(|error| Error::host("the order", &error))?;
        let order = Zeroizing::new(order);
        let (order_read, order_write) = io::pipe().map_err(|error| failed("a pipe", &error))?;
        let (ready_read, ready_write) = io::pipe().map_err(|error| failed("a pipe", &error))?;
        let log = File::create(directory.log()).map_err(|error| Error::state(directory.path(), &error))?;
        let mut spawn = Spawn::new(program, Path::new("/"));
        spawn
            .args(["supervise", &id])
            .stdin(Stdio::from(order_read))
            .stdout(Stdio::null())
            .stderr(Stdio::from(log))
            .fd(lock.into(), LOCK_FD)
            .fd(listener.into(), CONTROL_FD)
            .fd(OwnedFd::from(ready_write), READY_FD);
        spawn.spawn_detached().map_err(|error| {
            Error::host("the task's supervisor could not be started", &error)
                .hint(format!("check that '{}' can be run", program.display()))
        })?;
        // It mostly fits into the pipe (64 KiB), and the supervisor reads it first of all.
        let mut order_write = File::from(OwnedFd::from(order_write));
        // Where it died already, its report says so.
        drop(order_write.write_all(&order));
        Ok(File::from(OwnedFd::from(ready_read)))
    }
}

impl Engine {
    /// Waits for the supervisor's report. One that is stopped or stuck is killed: what it has left is put in order by the next
    /// look at the task.
    pub(super) async fn hear(&self, report: File, id: &str) -> Result<(), Error> {
        let Ok(heard) = tokio::time::timeout(REPORTED, hear(report, id)).await else {
            let directory = self.inner.registry.task_path(id);
            let (engine, id) = (self.clone(), id.to_owned());
            return self
                .blocking(move || {
                    let error = owner::silent(&directory, REPORTED, false);
                    owner::kill(&directory)?;
                    drop(engine.inner.registry.lock_task(&id));
                    Err(error)
                })
                .await;
        };
        heard
    }
}

/// Waits for the supervisor's report.
async fn hear(report: File, id: &str) -> Result<(), Error> {
    let mut report = tokio::net::unix::pipe::Receiver::from_file(report)
        .map_err(|error| Error::host("the supervisor's pipe", &error))?;
    let mut bytes = Vec::new();
    let read = tokio::io::AsyncReadExt::read_to_end(&mut report, &mut bytes).await;
    match serde_json::from_slice(&bytes) {
        Ok(Report::Ready) => Ok(()),
        Ok(Report::Failed { code, message, hint }) => Err(Error::told(&code, message, hint)),
        Err(_) => {
            let why = read.err().map_or_else(String::new, |error| format!(": {error}"));
            let text = format!("the supervisor of task '{id}' ended before its guest was up{why}");
            Err(Error::new(ErrorKind::Host, text).hint("try again; if it ends again, run: pyro doctor"))
        }
    }
}

/// Reads the order that a supervisor is given.
pub(crate) fn read_order(from: impl io::Read) -> io::Result<Order> {
    const MOST_BYTES: u64 = 1 << 20;
    let mut bytes = Zeroizing::new(Vec::new());
    BufReader::new(from.take(MOST_BYTES)).read_until(0, &mut bytes)?;
    serde_json::from_slice(&bytes).map_err(io::Error::other)
}
