//! The engine: one state directory, one cache of environments, one VMM; and what comes before any machine.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyro_image::{Environment, Pruned, Pulled, Store, StoreConfig};
use pyro_net::Outbound;
use pyro_vmm::host::HostFacts;
use pyro_vmm::{DiskCache, Isolation, Vmm};
use serde::Serialize;

use crate::error::{Error, ErrorKind};
use crate::observe::{Building, CancelOnDrop, Observer, Phase};
use crate::place::Terms;
use crate::registry::{Bounds, Registry, Swept};
use crate::spec::{Command, ExecSpec, VmSpec};
use crate::template::TemplateFailures;
use crate::vm::Machines;

/// Everything that the engine needs to know; it reads nothing else.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// The user's own folder of network policies, which are found there by name.
    pub policies_dir: Option<PathBuf>,
    /// Registry, machines and tasks; made with mode 0700.
    pub state_dir: PathBuf,
    /// Environments; made with mode 0700.
    pub cache_dir: PathBuf,
    /// The apt sources file that environments are built from; none: the host's own.
    pub apt_sources: Option<PathBuf>,
    /// Directories in which tools such as QEMU are looked for, as in `PATH`.
    pub tool_path: OsString,
    /// The VMM to use, `firecracker` or `qemu`; none: the strongest that works.
    pub backend: Option<String>,
    /// Where Firecracker is: the program, its directory, or the archive that `Engine::install_firecracker` takes it
    /// from; none: where it was installed to, or in `tool_path`.
    pub firecracker: Option<PathBuf>,
    /// What the templates of the cache may take together, in MiB; 0: machines always boot.
    pub template_limit_mib: u64,
    /// Keep one machine running for the next command of the kind that was run last: right for a process that lives long
    /// and runs many.
    pub spare: bool,
    /// For how long `pyro run` keeps a machine ready for the next one, in seconds; 0: it keeps none.
    pub keep_ready_seconds: u32,
    /// Run VMMs with nothing that keeps them apart from the host, for hosts that refuse what a jail needs. Records say so.
    pub unconfined_vmm: bool,
    /// Live machines and tasks on this state directory at the most.
    pub max_active_vms: u32,
    /// The longest life that may be asked for, in seconds.
    pub max_ttl_seconds: u32,
    /// Where all engines of this user write down what they have promised to machines, so that their sum is looked at; made
    /// with mode 0700. None: this state directory counts for itself.
    pub runtime_dir: Option<PathBuf>,
    /// How many times the host's memory may be promised to machines.
    pub memory_overcommit: f64,
    /// How many times the free space of the state directory may be promised to disks, which are sparse.
    pub disk_overcommit: f64,
    /// The way to the internet: proxies, and whose certificates are trusted.
    pub outbound: Outbound,
    /// The `pyro` program, which serves as the supervisor of tasks; none: this engine makes none.
    pub supervisor: Option<PathBuf>,
}

/// What a reaping has removed.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Reaped {
    /// Machines whose time was up or whose owner was dead.
    pub deleted_vm_ids: Vec<String>,
    /// Tasks whose time was up, or that never came to be.
    pub deleted_task_ids: Vec<String>,
    /// Both together.
    pub count: usize,
    /// What could not be mended, one sentence each.
    pub problems: Vec<String>,
}

/// The tier that a machine will have, and its files.
pub(crate) type Ground = (Isolation, Environment);

/// Machines, tasks, commands and environments of one state directory. Cheap to clone; all methods may be called at
/// the same time. Machines that it made end with it; tasks do not.
#[derive(Clone, Debug)]
pub struct Engine {
    pub(crate) inner: Arc<Inner>,
    /// They end when the last engine that its user holds is dropped.
    pub(crate) machines: Arc<Machines>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) config: EngineConfig,
    pub(crate) store: Store,
    pub(crate) registry: Arc<Registry>,
    /// What was found and removed when this engine was opened.
    swept: Mutex<Swept>,
    pub(crate) template_failures: Mutex<TemplateFailures>,
}

impl Engine {
    /// Opens the state and the environments, and removes what dead owners have left.
    ///
    /// # Errors
    /// When a directory cannot be made, or holds a layout of a newer pyro.
    pub fn open(config: EngineConfig) -> Result<Self, Error> {
        let engine = Self::open_as_is(config)?;
        let swept = engine.inner.registry.sweep();
        *engine.swept() = swept;
        Ok(engine)
    }

    /// As [`Engine::open`], without looking at what others have left.
    pub(crate) fn open_as_is(config: EngineConfig) -> Result<Self, Error> {
        crate::backend::check_name(config.backend.as_deref())?;
        // The state directory comes first: what a cache that can only be read has no place for goes there.
        let registry = Arc::new(Registry::open(&config.state_dir, Bounds::from(&config))?);
        let store = open_store(&config)?;
        Ok(Self::over(config, registry, store))
    }

    fn over(config: EngineConfig, registry: Arc<Registry>, store: Store) -> Self {
        Self {
            inner: Arc::new(Inner {
                config,
                store,
                registry,
                swept: Mutex::default(),
                template_failures: Mutex::default(),
            }),
            machines: Arc::default(),
        }
    }

    /// The same engine for a task of its own, which keeps no machine of this one alive.
    pub(crate) fn worker(&self) -> Self {
        Self { inner: Arc::clone(&self.inner), machines: Arc::default() }
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

    /// Machines and tasks on this state directory that count towards the cap.
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
        self.with_store(name, observer, |store, name, building| store.ensure(name, building)).await
    }

    /// Installs an environment, or verifies every byte of it where it is installed.
    ///
    /// # Errors
    /// As [`Engine::prepare`].
    pub async fn pull(&self, name: &str, observer: &Observer) -> Result<Pulled, Error> {
        self.with_store(name, observer, |store, name, building| store.pull(name, building)).await
    }

    /// Has all guests boot with a kernel of the caller's from now on. Where an environment is installed, a machine tries it
    /// first; until that machine has run a command, and where it fails, all others boot as before. Returns the kernel's
    /// digest and its release.
    ///
    /// # Errors
    /// When the file is no kernel, or the machine that tries it does not run.
    pub async fn use_kernel(&self, image: &Path, observer: &Observer) -> Result<(String, String), Error> {
        let store = &self.inner.store;
        let added = store.add_kernel(image)?;
        let installed = store.list()?.into_iter().find(|entry| entry.installed);
        if let Some(entry) = installed {
            observer.tell(Phase::Environment(
                "trying".to_owned(),
                format!("{} with {}", entry.name, added.release),
            ));
            let trying = open_store(&self.inner.config)?.trying(&added);
            let (config, registry) = (self.inner.config.clone(), Arc::clone(&self.inner.registry));
            let engine = Self::over(config, registry, trying);
            let spec = VmSpec { cold: true, ..VmSpec::new(entry.name) };
            let tried = engine.run(spec, ExecSpec::new(Command::argv(["true"])), Observer::none()).await;
            let failed = match tried {
                Ok(result) if result.exit_code == 0 => None,
                Ok(result) => {
                    let text = format!("with this kernel, `true` has ended with {}", result.exit_code);
                    Some(Error::new(ErrorKind::Environment, text))
                }
                Err(error) => Some(error),
            };
            if let Some(error) = failed {
                return Err(error.hint("it is not used; build one of kernel/config: make kernel"));
            }
        }
        store.use_kernel(&added)?;
        Ok((added.digest, added.release))
    }

    /// Removes all environments that no machine, no task and no build uses.
    ///
    /// # Errors
    /// When the cache cannot be read or written.
    pub fn prune(&self) -> Result<Pruned, Error> {
        // A task without a supervisor holds no lock, and still needs the image that its disk lies upon.
        let mut leases = Vec::new();
        for file in self.task_files() {
            leases.extend(self.inner.store.lease(&file.environment, &file.environment_digest));
        }
        Ok(self.inner.store.prune()?)
    }

    /// Removes what dead owners have left, and tells what was removed since this engine was opened. Machines with a
    /// living owner are ended by it when their time is up.
    pub fn reap_expired(&self) -> Reaped {
        let mut found = std::mem::take(&mut *self.swept());
        let again = self.inner.registry.sweep();
        found.vm_ids.extend(again.vm_ids);
        found.task_ids.extend(again.task_ids);
        let count = found.vm_ids.len() + found.task_ids.len();
        Reaped {
            deleted_vm_ids: found.vm_ids,
            deleted_task_ids: found.task_ids,
            count,
            problems: again.problems,
        }
    }

    /// True once for each state directory and topic: whether something should be told that is told only once.
    pub fn tells_first(&self, topic: &str) -> bool {
        let safe = !topic.is_empty() && topic.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-');
        safe && std::fs::File::create_new(self.inner.registry.state_dir().join(format!("told-{topic}")))
            .is_ok()
    }

    /// The user's own folder of network policies.
    pub fn policies_dir(&self) -> Option<&Path> {
        self.inner.config.policies_dir.as_deref()
    }

    /// Checks what can be checked before anything is made.
    pub(crate) fn check(&self, spec: &VmSpec) -> Result<(), Error> {
        spec.check(self.inner.config.max_ttl_seconds)?;
        self.inner.store.check_name(&spec.environment)?;
        let Some(required) = spec.require_isolation else { return Ok(()) };
        // Refused before anything is made; what is handed out later is checked again.
        match self.isolation() {
            Ok(given) => Terms::of(spec).check_isolation(given),
            Err(error) => {
                let text = format!("isolation '{required}' was required; this host gives none: {error}");
                Err(Error::new(ErrorKind::IsolationUnavailable, text)
                    .hint("run `pyro doctor` to see why, or require less"))
            }
        }
    }

    /// The tier that a machine will have, and the files that it needs; none of the latter where no guest can be had
    /// and the caller has opted into the host.
    pub(crate) async fn ground(
        &self,
        spec: &VmSpec,
        disk: DiskCache,
        observer: &Observer,
    ) -> Result<Option<Ground>, Error> {
        match self.isolation() {
            Ok(isolation) => {
                crate::budget::check(self.inner.registry.state_dir(), spec.mem_mib)?;
                let environment = self.prepare(&spec.environment, observer).await?;
                self.prepare_template(&environment, spec, disk, observer).await;
                Ok(Some((isolation, environment)))
            }
            Err(error) if may_use_host(spec, &error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn host_cache(&self) -> PathBuf {
        self.inner.registry.state_dir().join("host.json")
    }

    /// Works in the store on a thread of its own. When the caller goes away, a build ends too.
    async fn with_store<T: Send + 'static>(
        &self,
        name: &str,
        observer: &Observer,
        work: impl FnOnce(&Store, &str, &Building) -> Result<T, pyro_image::ImageError> + Send + 'static,
    ) -> Result<T, Error> {
        let (engine, name, observer) = (self.clone(), name.to_owned(), observer.clone());
        let cancelled = Arc::new(AtomicBool::new(false));
        let guard = CancelOnDrop(Arc::clone(&cancelled));
        let done = self
            .blocking(move || Ok(work(&engine.inner.store, &name, &Building { observer, cancelled })?))
            .await;
        drop(guard);
        done
    }

    /// Runs what may wait for a disk or a lock on a thread of its own.
    pub(crate) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        tokio::task::spawn_blocking(work).await.map_err(|error| Error::host("a thread", &error))?
    }

    fn swept(&self) -> MutexGuard<'_, Swept> {
        self.inner.swept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was found when this engine was opened: machines and tasks without an owner, and what could not be
    /// mended.
    pub(crate) fn found_at_open(&self) -> Swept {
        self.swept().clone()
    }
}

/// Whether an error leaves the host as a place for a command, which its caller has allowed.
pub(crate) fn may_use_host(spec: &VmSpec, error: &Error) -> bool {
    error.kind() == ErrorKind::GuestUnavailable && Terms::of(spec).may_use_host()
}

fn open_store(config: &EngineConfig) -> Result<Store, Error> {
    let store = Store::open(StoreConfig {
        cache_dir: config.cache_dir.clone(),
        private_dir: config.state_dir.join("cache"),
        apt_sources: config.apt_sources.clone(),
        tool_path: config.tool_path.clone(),
        agent: crate::AGENT.into(),
        agent_digest: crate::AGENT_DIGEST.into(),
        template_limit_mib: config.template_limit_mib,
        catalog_version: crate::VERSION.to_owned(),
    })?;
    Ok(store)
}
