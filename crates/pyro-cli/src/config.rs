//! The environment variables, read here and nowhere else.

use std::ffi::OsString;
use std::path::PathBuf;

use etcetera::BaseStrategy;
use pyro_engine::EngineConfig;

use crate::failure::Failure;

const TOOL_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The engine's configuration from the environment.
pub(crate) fn engine(backend: Option<String>) -> Result<EngineConfig, Failure> {
    let base = etcetera::base_strategy::Xdg::new()
        .map_err(|error| Failure::host("no home directory", &error).hint("set HOME, or PYRO_STATE_DIR"))?;
    let state = path("PYRO_STATE_DIR");
    let cache = path("PYRO_ENVIRONMENT_CACHE_DIR");
    let tool_path = std::env::var_os("PATH").map_or_else(
        || OsString::from(TOOL_PATH),
        |mut path| {
            // mke2fs and the like are in directories that an ordinary user's PATH lacks.
            path.push(":");
            path.push(TOOL_PATH);
            path
        },
    );
    Ok(EngineConfig {
        state_dir: state
            .or_else(|| base.state_dir().map(|dir| dir.join("pyro")))
            .unwrap_or_else(|| base.home_dir().join(".local/state/pyro")),
        cache_dir: cache.unwrap_or_else(|| base.cache_dir().join("pyro/environments")),
        apt_sources: path("PYRO_APT_SOURCES"),
        tool_path,
        backend: backend.or_else(|| std::env::var("PYRO_BACKEND").ok().filter(|name| !name.is_empty())),
        firecracker: path("PYRO_FIRECRACKER"),
        template_limit_mib: limit("PYRO_TEMPLATE_LIMIT_MIB", 4096)?,
        // One command of its own is all that a command-line run has.
        spare: false,
        max_active_vms: number("PYRO_MAX_ACTIVE_VMS", 4)?,
        max_ttl_seconds: number("PYRO_MAX_TTL_SECONDS", 3600)?,
        supervisor: std::env::current_exe().ok(),
    })
}

fn path(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

fn number(name: &'static str, default: u32) -> Result<u32, Failure> {
    parsed(name, u64::from(default), 1).map(|number| u32::try_from(number).unwrap_or(u32::MAX))
}

fn limit(name: &'static str, default: u64) -> Result<u64, Failure> {
    parsed(name, default, 0)
}

fn parsed(name: &'static str, default: u64, least: u64) -> Result<u64, Failure> {
    match std::env::var(name) {
        Err(_unset) => Ok(default),
        Ok(text) => match text.parse() {
            Ok(number) if (least..=u64::from(u32::MAX)).contains(&number) => Ok(number),
            _ => {
                let words = if least == 0 { "" } else { " above 0" };
                Err(Failure::new(
                    "invalid_value",
                    format!("{name} must be a whole number{words}, not '{text}'"),
                ))
            }
        },
    }
}
