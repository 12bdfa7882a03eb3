//! The environment variables of pyro, read here and nowhere else, on behalf of a front: an engine itself reads none.

use std::ffi::OsString;
use std::path::PathBuf;

use etcetera::BaseStrategy;

use crate::engine::EngineConfig;
use crate::error::{Error, ErrorKind};

const TOOL_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

impl EngineConfig {
    /// The configuration that this process's environment asks for: `PYRO_STATE_DIR`, `PYRO_ENVIRONMENT_CACHE_DIR` and
    /// the like, and the directories of the XDG specification below the user's home. `supervisor` is the `pyro` program.
    ///
    /// # Errors
    /// When there is no home directory, or a variable holds no number where one is wanted.
    pub fn from_environment(supervisor: Option<PathBuf>) -> Result<Self, Error> {
        let base = etcetera::base_strategy::Xdg::new()
            .map_err(|error| Error::host("no home directory", &error).hint("set HOME, or PYRO_STATE_DIR"))?;
        let tool_path = std::env::var_os("PATH").map_or_else(
            || OsString::from(TOOL_PATH),
            |mut path| {
                // mke2fs and the like are in directories that an ordinary user's PATH lacks.
                path.push(":");
                path.push(TOOL_PATH);
                path
            },
        );
        Ok(Self {
            state_dir: path("PYRO_STATE_DIR")
                .or_else(|| base.state_dir().map(|dir| dir.join("pyro")))
                .unwrap_or_else(|| base.home_dir().join(".local/state/pyro")),
            cache_dir: path("PYRO_ENVIRONMENT_CACHE_DIR")
                .unwrap_or_else(|| base.cache_dir().join("pyro/environments")),
            apt_sources: path("PYRO_APT_SOURCES"),
            tool_path,
            backend: std::env::var("PYRO_BACKEND").ok().filter(|name| !name.is_empty()),
            firecracker: path("PYRO_FIRECRACKER"),
            template_limit_mib: number("PYRO_TEMPLATE_LIMIT_MIB", 4096, 0)?.into(),
            spare: false,
            max_active_vms: number("PYRO_MAX_ACTIVE_VMS", 4, 1)?,
            max_ttl_seconds: number("PYRO_MAX_TTL_SECONDS", 3600, 1)?,
            runtime_dir: Some(path("PYRO_RUNTIME_DIR").unwrap_or_else(runtime_dir)),
            memory_overcommit: factor("PYRO_MEMORY_OVERCOMMIT", 1.0)?,
            disk_overcommit: factor("PYRO_DISK_OVERCOMMIT", 100.0)?,
            supervisor,
        })
    }
}

/// A directory of this user that lasts until the host goes down. The first that is there, whatever session asks, so that all
/// processes of the user agree on one.
fn runtime_dir() -> PathBuf {
    let user = rustix::process::geteuid().as_raw();
    let session = PathBuf::from(format!("/run/user/{user}"));
    let given = || path("XDG_RUNTIME_DIR").filter(|dir| dir.is_absolute() && dir.is_dir());
    match Some(session).filter(|dir| dir.is_dir()).or_else(given) {
        Some(dir) => dir.join("pyro"),
        None => PathBuf::from(format!("/tmp/pyro-{user}")),
    }
}

fn factor(name: &'static str, default: f64) -> Result<f64, Error> {
    let Some(text) = std::env::var(name).ok().filter(|text| !text.is_empty()) else { return Ok(default) };
    text.parse().ok().filter(|factor: &f64| factor.is_finite() && *factor > 0.0).ok_or_else(|| {
        Error::new(ErrorKind::InvalidValue, format!("{name} must be a number above 0, not '{text}'"))
    })
}

fn path(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

fn number(name: &'static str, default: u32, least: u32) -> Result<u32, Error> {
    let Ok(text) = std::env::var(name) else { return Ok(default) };
    text.parse().ok().filter(|number| *number >= least).ok_or_else(|| {
        let words = if least == 0 { "" } else { " above 0" };
        Error::new(ErrorKind::InvalidValue, format!("{name} must be a whole number{words}, not '{text}'"))
    })
}
