//! What this machine can do, and what to mend: each part is looked at for itself, so that a report comes also from a
//! machine on which nothing works.

use std::path::Path;
use std::time::Instant;

use pyro_image::Check;
use pyro_vmm::host::{HostFacts, KvmProbe};
use pyro_vmm::{Driver, Element, Vmm};
use serde::Serialize;

use crate::budget::free_disk_mib;
use crate::engine::{Engine, EngineConfig};
use crate::error::Error;

/// A report about this machine. Sizes are bytes where not said otherwise.
#[derive(Clone, Debug, Serialize)]
#[expect(missing_docs, reason = "the keys are those of the public contract, section 9")]
pub struct Diagnosis {
    pub platform: String,
    /// Whether a guest can be run: a VMM is there, and an environment is installed or can be.
    pub runtime_ok: bool,
    /// The tier that run will use, or `none`.
    pub isolation: String,
    pub kvm: Kvm,
    pub vmm: Option<VmmFacts>,
    /// The Firecracker that is used where KVM works.
    pub firecracker: Option<FirecrackerFacts>,
    pub capabilities: Capabilities,
    pub networking: Networking,
    pub environment_cache: EnvironmentCache,
    pub state: State,
    /// What dead owners had left, and is removed now.
    pub orphans: Vec<String>,
    pub checks: Vec<Check>,
    pub issues: Vec<Issue>,
    pub duration_ms: f64,
}

/// Something to mend.
#[derive(Clone, Debug, Serialize)]
pub struct Issue {
    /// What is wrong.
    pub issue: String,
    /// What to do.
    pub remedy: String,
}

/// `/dev/kvm`, and whether it is any good, proven by running guest code.
#[derive(Clone, Debug, Serialize)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Kvm {
    pub exists: bool,
    pub readable: bool,
    pub writable: bool,
    pub usable: bool,
    pub why: String,
}

/// The VMM that is used.
#[derive(Clone, Debug, Serialize)]
#[expect(missing_docs, reason = "the names say it")]
pub struct VmmFacts {
    pub name: String,
    pub version: String,
    pub binary: String,
    /// The elements that each launch must show. Empty if the VMM was told to run unconfined.
    pub confinement: Vec<String>,
}

/// A Firecracker that is installed, whether or not it can be used here.
#[derive(Clone, Debug, Serialize)]
#[expect(missing_docs, reason = "the names say it")]
pub struct FirecrackerFacts {
    pub version: String,
    pub binary: String,
    /// How it was found: `named`, `store` (installed by pyro) or `path`.
    pub origin: String,
}

/// What machines can do here.
#[derive(Clone, Debug, Serialize)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Capabilities {
    pub guests: bool,
    pub tasks: bool,
    pub guest_network: bool,
    pub snapshots: bool,
    pub host_compat: bool,
}

/// What a network for guests would need of this host.
#[derive(Clone, Debug, Serialize)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Networking {
    pub tun_available: bool,
    pub ip_forward_enabled: bool,
}

/// Where environments are kept.
#[derive(Clone, Debug, Serialize)]
#[expect(missing_docs, reason = "the names say it")]
pub struct EnvironmentCache {
    pub dir: String,
    pub installed: Vec<String>,
    pub free_mib: Option<u64>,
}

/// Where machines and tasks are kept.
#[derive(Clone, Debug, Serialize)]
#[expect(missing_docs, reason = "the names say it")]
pub struct State {
    pub dir: String,
    pub free_mib: Option<u64>,
    pub live_vms: Option<u32>,
    pub max_active_vms: u32,
    pub tasks: usize,
    /// What all tasks take on this disk now, in bytes.
    pub task_disk_bytes: u64,
}

impl Diagnosis {
    /// Looks at this machine. What cannot be looked at becomes an issue.
    pub fn make(config: &EngineConfig) -> Self {
        let began = Instant::now();
        let (mut issues, mut is_confinable) = (Vec::new(), true);
        let engine = Engine::open(config.clone());
        let engine = match engine {
            Ok(engine) => Some(engine),
            Err(error) => {
                issues.push(Issue::of(&error));
                None
            }
        };
        let facts = match &engine {
            Some(engine) => engine.host_facts(),
            // Nowhere to keep it.
            None => HostFacts::load(Path::new("/nonexistent/host.json")),
        };
        let vmm = engine.as_ref().and_then(|engine| match engine.vmm() {
            Ok(vmm) => Some(vmm),
            Err(error) => {
                issues.push(Issue::of(&error));
                None
            }
        });
        let firecracker = engine.as_ref().and_then(|engine| match engine.known_firecracker() {
            Ok(found) => found,
            Err(error) => {
                // The same is said where it is the one that was asked for.
                if vmm.is_some() {
                    issues.push(Issue::of(&error));
                }
                None
            }
        });
        if let (Some(engine), Some(vmm)) = (&engine, &vmm)
            && let Err(error) = engine.probe_confinement(vmm)
        {
            issues.push(Issue::of(&error));
            is_confinable = false;
        }
        let guest_network = vmm.as_ref().is_some_and(|vmm| match crate::network::probe(vmm) {
            Ok(()) => true,
            Err(error) => {
                issues.push(Issue::of(&error));
                false
            }
        });
        let isolation = vmm.as_ref().map(|vmm| vmm.capabilities().isolation.as_str());
        let cache = EnvironmentCache::look(engine.as_ref(), config, &mut issues);
        let checks = engine.as_ref().map(|engine| engine.environments().doctor()).unwrap_or_default();
        let buildable = !checks.is_empty() && checks.iter().all(|check| check.ok);
        for check in checks.iter().filter(|check| !check.ok) {
            issues.push(Issue {
                issue: format!("{}: {}", check.name, check.detail),
                remedy: check.remedy.clone().unwrap_or_else(|| "see the message".to_owned()),
            });
        }
        let found = engine.as_ref().map(Engine::found_at_open).unwrap_or_default();
        for problem in found.problems {
            issues.push(Issue {
                issue: problem,
                remedy: "remove what it names, or mend its owner and mode".to_owned(),
            });
        }
        let runtime_ok = vmm.is_some() && is_confinable && (buildable || !cache.installed.is_empty());
        Self {
            platform: format!("{}-{}", std::env::consts::OS, std::env::consts::ARCH),
            runtime_ok,
            isolation: isolation.unwrap_or("none").to_owned(),
            kvm: Kvm::from(facts.kvm),
            vmm: vmm.as_ref().map(VmmFacts::of),
            firecracker: firecracker.map(|(found, version)| FirecrackerFacts {
                version,
                binary: found.firecracker.display().to_string(),
                origin: found.origin.to_owned(),
            }),
            capabilities: Capabilities {
                guests: vmm.is_some(),
                tasks: vmm.is_some() && config.supervisor.is_some(),
                guest_network,
                snapshots: vmm.as_ref().is_some_and(|vmm| vmm.capabilities().snapshot),
                host_compat: true,
            },
            networking: Networking {
                tun_available: Path::new("/dev/net/tun").exists(),
                ip_forward_enabled: fs_err::read("/proc/sys/net/ipv4/ip_forward")
                    .is_ok_and(|text| text.starts_with(b"1")),
            },
            environment_cache: cache,
            state: State::look(engine.as_ref(), config),
            orphans: found.vm_ids.into_iter().chain(found.task_ids).collect(),
            checks,
            issues,
            duration_ms: crate::execute::millis(began.elapsed()),
        }
    }
}

impl VmmFacts {
    fn of(driver: &Driver) -> Self {
        let (binary, confine) = match driver {
            Driver::Firecracker(driver) => (&driver.config().binary, &driver.config().confine),
            Driver::Qemu(driver) => (&driver.config().binary, &driver.config().confine),
        };
        Self {
            name: driver.kind().as_str().to_owned(),
            version: driver.version().to_owned(),
            binary: binary.display().to_string(),
            confinement: confine.required().into_iter().map(Element::as_str).map(str::to_owned).collect(),
        }
    }
}

impl Issue {
    fn of(error: &Error) -> Self {
        Self { issue: error.to_string(), remedy: error.remedy().unwrap_or("see the message").to_owned() }
    }
}

impl From<KvmProbe> for Kvm {
    fn from(probe: KvmProbe) -> Self {
        Self {
            exists: probe.exists,
            readable: probe.readable,
            writable: probe.writable,
            usable: probe.usable,
            why: probe.why,
        }
    }
}

impl EnvironmentCache {
    fn look(engine: Option<&Engine>, config: &EngineConfig, issues: &mut Vec<Issue>) -> Self {
        let entries = engine.map(|engine| engine.environments().list().map_err(Error::from));
        let installed = match entries {
            Some(Ok(entries)) => {
                entries.into_iter().filter(|entry| entry.installed).map(|entry| entry.name).collect()
            }
            Some(Err(error)) => {
                issues.push(Issue::of(&error));
                Vec::new()
            }
            None => Vec::new(),
        };
        let dir = config.cache_dir.display().to_string();
        Self { dir, installed, free_mib: free_disk_mib(&config.cache_dir) }
    }
}

impl State {
    fn look(engine: Option<&Engine>, config: &EngineConfig) -> Self {
        let ids = engine.map(|engine| engine.inner.registry.task_ids()).unwrap_or_default();
        let directories = ids
            .iter()
            .filter_map(|id| engine.and_then(|engine| engine.inner.registry.task_directory(id).ok()));
        Self {
            dir: config.state_dir.display().to_string(),
            free_mib: free_disk_mib(&config.state_dir),
            live_vms: engine.and_then(|engine| engine.live_vms().ok()),
            max_active_vms: config.max_active_vms,
            tasks: ids.len(),
            task_disk_bytes: directories.map(|directory| directory.disk_bytes()).sum(),
        }
    }
}
