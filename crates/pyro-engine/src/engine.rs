//! The operations.

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pyro_image::{Environment, Progress, Store, StoreConfig};
use pyro_vmm::host::{HostFacts, find_qemu, qemu_version};
use pyro_vmm::{Accel, Isolation, Qemu, QemuConfig, Vmm};
use serde::Serialize;
use tokio::sync::mpsc;

use crate::error::{Error, ErrorKind};
use crate::execute::{Outcome, Output, execute, millis};
use crate::guest::Chunk;
use crate::host;
use crate::live::{Live, StartTimes, unavailable};
use crate::record::{Cleanup, Deleted, ExecResult, Fault, NetworkInfo, Timings, VmRecord, VmState};
use crate::registry::{Registry, now};
use crate::spec::{Command, ExecSpec, VmSpec};

/// The writable disk of a machine, in MiB: sparse, so only what the guest writes takes room.
const DISK_MIB: u32 = 8192;

/// Everything that the engine needs to know; it reads nothing else.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Registry and machines; made with mode 0700.
    pub state_dir: PathBuf,
    /// Environments; made with mode 0700.
    pub cache_dir: PathBuf,
    /// The apt sources file that environments are built from; none: the host's own.
    pub apt_sources: Option<PathBuf>,
    /// Directories in which tools such as QEMU are looked for, as in `PATH`.
    pub tool_path: OsString,
    /// The VMM to use, `qemu`; none: the best that works.
    pub backend: Option<String>,
    /// Live machines on this state directory at the most.
    pub max_active_vms: u32,
    /// The longest life that may be asked for, in seconds.
    pub max_ttl_seconds: u32,
}

/// Who wants to know what happens during a long operation.
#[derive(Clone, Default)]
pub struct Observer {
    phases: Option<Arc<dyn Fn(Phase) + Send + Sync>>,
    pub(crate) output: Option<mpsc::Sender<Chunk>>,
}

/// A step of a long operation.
#[derive(Clone, Debug)]
pub enum Phase {
    /// The environment is being made; a step of it and its detail.
    Environment(String, String),
    /// The machine is being made, from this environment.
    Create(String),
    /// The machine of this id boots.
    Start(String),
    /// The command runs in the machine of this id.
    Execute(String),
}

/// What a reaping has removed.
#[derive(Clone, Debug, Serialize)]
pub struct Reaped {
    /// Machines whose time was up or whose owner was dead.
    pub deleted_vm_ids: Vec<String>,
    /// Tasks likewise.
    pub deleted_task_ids: Vec<String>,
    /// Both together.
    pub count: usize,
}

impl Observer {
    /// Nobody.
    pub fn none() -> Self {
        Self::default()
    }

    /// Calls `phase` at each step.
    #[must_use]
    pub fn on_phase(mut self, phase: impl Fn(Phase) + Send + Sync + 'static) -> Self {
        self.phases = Some(Arc::new(phase));
        self
    }

    /// Sends output as it arrives; a full channel stops the command, a closed one ends it.
    #[must_use]
    pub fn output(mut self, output: mpsc::Sender<Chunk>) -> Self {
        self.output = Some(output);
        self
    }

    fn tell(&self, phase: Phase) {
        if let Some(phases) = &self.phases {
            phases(phase);
        }
    }
}

impl std::fmt::Debug for Observer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Observer").field("output", &self.output).finish_non_exhaustive()
    }
}

/// Machines, commands and environments of one state directory. Cheap to clone; all methods may be called at
/// the same time. Machines that it made end with it.
#[derive(Clone, Debug)]
pub struct Engine {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: EngineConfig,
    store: Store,
    registry: Arc<Registry>,
    vms: Mutex<HashMap<String, Arc<Vm>>>,
}

/// A machine of this process.
#[derive(Debug)]
struct Vm {
    record: Mutex<VmRecord>,
    environment: Environment,
    live: tokio::sync::Mutex<Option<Live>>,
}

impl Engine {
    /// Opens the state and the environments, and removes what dead owners have left.
    ///
    /// # Errors
    /// When a directory cannot be made, or holds a layout of a newer pyro.
    pub fn open(config: EngineConfig) -> Result<Self, Error> {
        if let Some(backend) = config.backend.as_deref()
            && backend != "qemu"
        {
            return Err(Error::new(ErrorKind::InvalidValue, "invalid backend; expected one of: qemu"));
        }
        let store = Store::open(StoreConfig {
            cache_dir: config.cache_dir.clone(),
            apt_sources: config.apt_sources.clone(),
            tool_path: config.tool_path.clone(),
            agent: crate::AGENT.into(),
            catalog_version: crate::VERSION.to_owned(),
        })?;
        let registry = Arc::new(Registry::open(&config.state_dir)?);
        registry.sweep()?;
        Ok(Self { inner: Arc::new(Inner { config, store, registry, vms: Mutex::default() }) })
    }

    /// What this host can do: its KVM, proven by running guest code, and its TSC.
    pub fn host_facts(&self) -> HostFacts {
        HostFacts::load(&self.host_cache())
    }

    /// The tier that a machine would have now.
    ///
    /// # Errors
    /// When no VMM is there.
    pub fn isolation(&self) -> Result<Isolation, Error> {
        Ok(self.vmm()?.capabilities().isolation)
    }

    /// The environment store.
    pub fn environments(&self) -> &Store {
        &self.inner.store
    }

    /// Machines on this state directory that count towards the cap.
    ///
    /// # Errors
    /// When the registry cannot be read.
    pub fn live_vms(&self) -> Result<u32, Error> {
        self.inner.registry.live()
    }

    /// Makes sure that an environment is installed.
    ///
    /// # Errors
    /// When it is unknown or cannot be made.
    pub async fn prepare(&self, name: &str, observer: &Observer) -> Result<Environment, Error> {
        let (engine, name, observer) = (self.clone(), name.to_owned(), observer.clone());
        // When the caller goes away, the build must end too: the guard outlives this future by nothing.
        let cancelled = Arc::new(AtomicBool::new(false));
        let guard = CancelOnDrop(Arc::clone(&cancelled));
        let build = tokio::task::spawn_blocking(move || {
            engine.inner.store.ensure(&name, &Building { observer, cancelled })
        });
        let environment = build.await.map_err(|error| Error::host("the build", &error))?;
        drop(guard);
        Ok(environment?)
    }

    /// Makes a machine, runs one command in it, and removes every trace, however it ends. Dropping the future
    /// does the same.
    ///
    /// # Errors
    /// When the machine cannot be had or the connection to it broke; a command that fails is a result.
    pub async fn run(&self, vm: VmSpec, exec: ExecSpec, observer: Observer) -> Result<ExecResult, Error> {
        exec.check()?;
        let (command, limit) = (exec.command.clone(), exec.timeout_seconds);
        match self.run_in_guest(&vm, exec, &observer).await {
            Err(error)
                if error.kind() == ErrorKind::GuestUnavailable
                    && vm.allow_host_compat
                    && vm.require_isolation.is_none() =>
            {
                self.run_on_host(&vm, &command, limit, &observer).await
            }
            result => result,
        }
    }

    async fn run_in_guest(
        &self,
        vm: &VmSpec,
        exec: ExecSpec,
        observer: &Observer,
    ) -> Result<ExecResult, Error> {
        let began = Instant::now();
        let (record, environment, mut live) = self.admit(vm, observer).await?;
        let prepare = began.elapsed();
        observer.tell(Phase::Start(record.vm_id.clone()));
        let times = live.start(&self.vmm()?, &environment, vm.vcpu_count, vm.mem_mib).await?;
        observer.tell(Phase::Execute(record.vm_id.clone()));
        let running = live.running().ok_or_else(|| unavailable("the machine is gone"))?;
        let mut result = execute(running, &record, exec, observer).await?;
        let cleaning = Instant::now();
        live.remove().await?;
        result.timings = timings(prepare, times, result.timings.execute, cleaning.elapsed());
        result.cleanup = Some(Cleanup { vm_id: record.vm_id, deleted: true, reason: "post_exec_cleanup" });
        Ok(result)
    }

    /// What the caller has opted into: the command without isolation, where no guest can be had.
    async fn run_on_host(
        &self,
        spec: &VmSpec,
        command: &Command,
        limit: f64,
        observer: &Observer,
    ) -> Result<ExecResult, Error> {
        let (lease, mut record) = self
            .inner
            .registry
            .admit(self.inner.config.max_active_vms, |id| VmRecord::new(id, spec, "", "none", now()))?;
        "host_compat".clone_into(&mut record.execution_mode);
        let (live, workspace) = Live::on_host(Arc::clone(&self.inner.registry), lease)?;
        observer.tell(Phase::Execute(record.vm_id.clone()));
        let began = Instant::now();
        let (sender, mut chunks) = mpsc::channel(4);
        let life = Duration::from_secs_f64(limit.min(f64::from(spec.ttl_seconds)));
        let mut output = Output::default();
        let mut observed = true;
        let run = host::run(&workspace, command, life, sender);
        tokio::pin!(run);
        let end = loop {
            tokio::select! {
                end = &mut run => break end?,
                Some(chunk) = chunks.recv(), if observed => observed = output.take(chunk, observer).await.is_ok(),
            }
            if !observed {
                chunks.close();
            }
        };
        while let Some(chunk) = chunks.recv().await {
            output.take(chunk, observer).await.ok();
        }
        let words = end.timed_out.then(|| format!("command timed out after {limit}s\n"));
        let fault = end.timed_out.then_some(Fault::Timeout);
        let outcome = Outcome { exit_code: end.exit_code, fault, words };
        let mut result = output.result(&record, command.display(), outcome, began.elapsed(), observer).await;
        live.remove().await?;
        result.cleanup = Some(Cleanup { vm_id: record.vm_id, deleted: true, reason: "post_exec_cleanup" });
        Ok(result)
    }

    /// Makes a machine; it is not started.
    ///
    /// # Errors
    /// When a value is outside its limits, the cap is reached or the environment cannot be had.
    pub async fn create_vm(&self, spec: VmSpec, observer: Observer) -> Result<VmRecord, Error> {
        let (record, environment, live) = self.admit(&spec, &observer).await?;
        let vm = Arc::new(Vm {
            record: Mutex::new(record.clone()),
            environment,
            live: tokio::sync::Mutex::new(Some(live)),
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
        if record.state == VmState::Stopped {
            self.inner.registry.readmit(self.inner.config.max_active_vms, &record)?;
        }
        let started = machine.start(&self.vmm()?, &vm.environment, record.vcpu_count, record.mem_mib).await;
        match &started {
            Ok(_) => {
                record.state = VmState::Started;
                "guest_serial".clone_into(&mut record.execution_mode);
                record.last_error = None;
            }
            Err(error) => record.last_error = Some(error.to_string()),
        }
        self.save(&vm, &record)?;
        started.map(|_times| record)
    }

    /// Powers a machine off cleanly; its disk is kept. From any state.
    ///
    /// # Errors
    /// When there is no such machine.
    pub async fn stop_vm(&self, vm_id: &str) -> Result<VmRecord, Error> {
        let vm = self.own(vm_id)?;
        let mut live = vm.live.lock().await;
        live.as_mut().ok_or_else(|| gone(vm_id))?.stop().await;
        let mut record = vm.record();
        record.state = VmState::Stopped;
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
        let running = guard.as_ref().and_then(Live::running).filter(|_| record.state == VmState::Started);
        let Some(running) = running else {
            let text = format!("vm {vm_id} must be in 'started' state before execution");
            return Err(Error::new(ErrorKind::WrongState, text));
        };
        let result = execute(running, &record, exec, &observer).await;
        self.vms().remove(vm_id);
        if let Some(live) = guard.take() {
            live.remove().await?;
        }
        let cleanup = Cleanup { vm_id: record.vm_id, deleted: true, reason: "post_exec_cleanup" };
        result.map(|result| ExecResult { cleanup: Some(cleanup), ..result })
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

    /// Ends a machine, in any state, and removes every trace.
    ///
    /// # Errors
    /// When there is no such machine in this process.
    pub async fn delete_vm(&self, vm_id: &str) -> Result<Deleted, Error> {
        let vm = self.own(vm_id)?;
        let live = vm.live.lock().await.take().ok_or_else(|| gone(vm_id))?;
        self.vms().remove(vm_id);
        live.remove().await?;
        Ok(Deleted { vm_id: vm_id.to_owned(), deleted: true, reason: "explicit_delete" })
    }

    /// Removes what dead owners have left. Machines with a living owner are ended by it when their time is up.
    ///
    /// # Errors
    /// When something cannot be removed.
    pub fn reap_expired(&self) -> Result<Reaped, Error> {
        let deleted_vm_ids = self.inner.registry.sweep()?;
        let count = deleted_vm_ids.len();
        Ok(Reaped { deleted_vm_ids, deleted_task_ids: Vec::new(), count })
    }

    /// Checks, builds, takes a slot and makes the disk: all that comes before a boot.
    async fn admit(
        &self,
        spec: &VmSpec,
        observer: &Observer,
    ) -> Result<(VmRecord, Environment, Live), Error> {
        spec.check(self.inner.config.max_ttl_seconds)?;
        self.inner.store.check_name(&spec.environment)?;
        if spec.network {
            return Err(Error::new(
                ErrorKind::InvalidValue,
                "network=true is not available: guests have no network",
            )
            .hint("leave the network off; files can be given on stdin"));
        }
        let isolation = self.isolation()?;
        if let Some(required) = spec.require_isolation
            && isolation < required
        {
            let text = format!("isolation '{required}' was required; this host gives '{isolation}'");
            return Err(Error::new(ErrorKind::IsolationUnavailable, text)
                .hint("run `pyro doctor` to see why, or require less"));
        }
        let environment = self.prepare(&spec.environment, observer).await?;
        observer.tell(Phase::Create(spec.environment.clone()));
        let blank = self.inner.store.overlay_template(DISK_MIB)?;
        let created_at = now();
        let (lease, record) = self.inner.registry.admit(self.inner.config.max_active_vms, |id| {
            let mut record = VmRecord::new(id, spec, &environment.version, isolation.as_str(), created_at);
            record.metadata.insert("environment_digest".to_owned(), environment.digest.clone());
            record
        })?;
        let live = Live::new(Arc::clone(&self.inner.registry), lease, &blank)?;
        Ok((record, environment, live))
    }

    /// Ends the machine when its time is up, whether or not anyone calls.
    fn expire_in_time(&self, record: &VmRecord) {
        let (engine, id) = (Arc::downgrade(&self.inner), record.vm_id.clone());
        let life = Duration::from_secs(u64::from(record.ttl_seconds));
        drop(tokio::spawn(async move {
            tokio::time::sleep(life).await;
            let Some(inner) = engine.upgrade() else { return };
            let engine = Self { inner };
            let vm = engine.vms().remove(&id);
            if let Some(vm) = vm
                && let Some(live) = vm.live.lock().await.take()
            {
                // A failure here leaves a directory whose lock is free: the next sweep removes it.
                drop(live.expire().await);
            }
        }));
    }

    fn vmm(&self) -> Result<Qemu, Error> {
        let config = &self.inner.config;
        let binary = find_qemu(&config.tool_path).ok_or_else(|| {
            unavailable("qemu-system-x86_64 is not installed").hint("apt-get install qemu-system-x86")
        })?;
        let cache = self.host_cache();
        let version = qemu_version(&binary, &cache).map_err(|error| unavailable(&error.to_string()))?;
        let facts = HostFacts::load(&cache);
        let accel = if facts.kvm.usable { Accel::Kvm } else { Accel::Tcg { tsc_khz: facts.tsc_khz } };
        Ok(Qemu::new(QemuConfig { binary, version: version.version, sandbox: version.sandbox, accel }))
    }

    fn host_cache(&self) -> PathBuf {
        self.inner.config.state_dir.join("host.json")
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

    fn vms(&self) -> MutexGuard<'_, HashMap<String, Arc<Vm>>> {
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

fn gone(vm_id: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("vm '{vm_id}' does not exist"))
}

fn timings(prepare: Duration, times: StartTimes, execute: f64, cleanup: Duration) -> Timings {
    Timings {
        prepare: millis(prepare),
        start: millis(times.start),
        handshake: millis(times.handshake),
        execute,
        cleanup: millis(cleanup),
    }
}

/// Passes the store's progress on.
struct Building {
    observer: Observer,
    cancelled: Arc<AtomicBool>,
}

impl Progress for Building {
    fn phase(&self, phase: &str, detail: &str) {
        self.observer.tell(Phase::Environment(phase.to_owned(), detail.to_owned()));
    }

    fn cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}

struct CancelOnDrop(Arc<AtomicBool>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
