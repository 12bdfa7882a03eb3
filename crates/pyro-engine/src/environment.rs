//! The environment variables of pyro, read here and nowhere else, on behalf of a front: an engine itself reads none.

use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};

use etcetera::BaseStrategy;
use etcetera::base_strategy::Xdg;
use pyro_net::Outbound;

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
        let base = Base::find();
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
            state_dir: match path("PYRO_STATE_DIR")? {
                Some(dir) => dir,
                None => base.state_dir()?,
            },
            cache_dir: match path("PYRO_ENVIRONMENT_CACHE_DIR")? {
                Some(dir) => dir,
                None => base.cache_dir()?,
            },
            policies_dir: base.policies_dir(),
            apt_sources: path("PYRO_APT_SOURCES")?,
            tool_path,
            backend: text("PYRO_BACKEND")?,
            firecracker: path_or_address("PYRO_FIRECRACKER")?,
            template_limit_mib: number("PYRO_TEMPLATE_LIMIT_MIB", 4096, 0)?.into(),
            spare: false,
            keep_ready_seconds: number("PYRO_KEEP_READY", 0, 0)?,
            unconfined_vmm: number("PYRO_UNCONFINED_VMM", 0, 0)? != 0,
            max_active_vms: number("PYRO_MAX_ACTIVE_VMS", 4, 1)?,
            max_ttl_seconds: number("PYRO_MAX_TTL_SECONDS", 3600, 1)?,
            runtime_dir: Some(path("PYRO_RUNTIME_DIR")?.unwrap_or_else(runtime_dir)),
            memory_overcommit: factor("PYRO_MEMORY_OVERCOMMIT", 1.0)?,
            disk_overcommit: factor("PYRO_DISK_OVERCOMMIT", 100.0)?,
            outbound: outbound()?,
            supervisor,
        })
    }
}

/// The proxies and certificates that programs on this host use.
fn outbound() -> Result<Outbound, Error> {
    let mut outbound = Outbound::from_variables(|name| std::env::var_os(name));
    if let Some(roots) = &outbound.roots {
        outbound.roots = Some(absolute_path(roots)?);
    }
    Ok(outbound)
}

/// A path from a user as every process of pyro must understand it, whatever its working directory: `~` is the user's
/// home, and what is relative begins in this process's working directory.
///
/// # Errors
/// When there is no home or working directory, or the path names the home of another user.
pub fn absolute_path(path: &Path) -> Result<PathBuf, Error> {
    let shown = path.display();
    let path = match path.components().next() {
        Some(Component::Normal(first)) if first == "~" => {
            let home = home().ok_or_else(|| {
                Error::new(
                    ErrorKind::InvalidValue,
                    format!("'{shown}' needs a home directory, and there is none"),
                )
                .hint("set HOME, or give an absolute path")
            })?;
            home.join(path.strip_prefix("~").unwrap_or(path))
        }
        Some(Component::Normal(first)) if first.as_encoded_bytes().starts_with(b"~") => {
            let text = format!("'{shown}' names the home of another user");
            return Err(
                Error::new(ErrorKind::InvalidValue, text).hint("give an absolute path, or ./~ for a file")
            );
        }
        _ => path.to_owned(),
    };
    std::path::absolute(&path).map_err(|error| {
        Error::host(&format!("'{shown}' cannot be made absolute"), &error).hint("give an absolute path")
    })
}

/// Directories of the user, where they can be told.
struct Base(Option<Xdg>);

impl Base {
    fn find() -> Self {
        Self(Xdg::new().ok().filter(|base| base.home_dir().is_absolute()))
    }

    fn state_dir(&self) -> Result<PathBuf, Error> {
        let base = self.known()?;
        let dir = base.state_dir().unwrap_or_else(|| base.home_dir().join(".local/state"));
        Ok(dir.join("pyro"))
    }

    fn cache_dir(&self) -> Result<PathBuf, Error> {
        Ok(self.known()?.cache_dir().join("pyro/environments"))
    }

    /// Returns the folder of the user's network policies, or `None` without a home directory.
    fn policies_dir(&self) -> Option<PathBuf> {
        self.0.as_ref().map(|base| base.config_dir().join("pyro/policies"))
    }

    fn known(&self) -> Result<&Xdg, Error> {
        self.0.as_ref().ok_or_else(|| {
            let user = rustix::process::geteuid().as_raw();
            let text =
                format!("no home directory: HOME is not set, and user {user} has no entry in /etc/passwd");
            Error::new(ErrorKind::Host, text)
                .hint("set HOME, or both PYRO_STATE_DIR and PYRO_ENVIRONMENT_CACHE_DIR")
        })
    }
}

fn home() -> Option<PathBuf> {
    Base::find().0.map(|base| base.home_dir().to_owned())
}

/// A variable that is set; an empty one is not, since many programs that start others cannot unset one.
fn variable(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

fn path(name: &str) -> Result<Option<PathBuf>, Error> {
    variable(name).map(|value| absolute_path(Path::new(&value))).transpose()
}

/// A path, or the address of something to fetch.
fn path_or_address(name: &str) -> Result<Option<PathBuf>, Error> {
    let is_address = |value: &OsString| value.to_string_lossy().contains("://");
    match variable(name).filter(is_address) {
        Some(address) => Ok(Some(address.into())),
        None => path(name),
    }
}

fn text(name: &str) -> Result<Option<String>, Error> {
    let text = variable(name).map(OsString::into_string).transpose();
    text.map_err(|value| {
        Error::new(ErrorKind::InvalidValue, format!("{name} is not UTF-8: '{}'", value.to_string_lossy()))
    })
}

/// A directory of this user that lasts until the host goes down. The first that is there, whatever session asks, so that all
/// processes of the user agree on one.
fn runtime_dir() -> PathBuf {
    let user = rustix::process::geteuid().as_raw();
    let session = PathBuf::from(format!("/run/user/{user}"));
    let given = || {
        let dir = variable("XDG_RUNTIME_DIR").map(PathBuf::from);
        dir.filter(|dir| dir.is_absolute() && dir.is_dir())
    };
    match Some(session).filter(|dir| dir.is_dir()).or_else(given) {
        Some(dir) => dir.join("pyro"),
        None => PathBuf::from(format!("/tmp/pyro-{user}")),
    }
}

fn factor(name: &'static str, default: f64) -> Result<f64, Error> {
    let Some(text) = text(name)? else { return Ok(default) };
    text.parse().ok().filter(|factor: &f64| factor.is_finite() && *factor > 0.0).ok_or_else(|| {
        Error::new(ErrorKind::InvalidValue, format!("{name} must be a number above 0, not '{text}'"))
    })
}

fn number(name: &str, default: u32, least: u32) -> Result<u32, Error> {
    let Some(text) = text(name)? else { return Ok(default) };
    text.parse().ok().filter(|number| *number >= least).ok_or_else(|| {
        let words = if least == 0 { "" } else { " above 0" };
        Error::new(ErrorKind::InvalidValue, format!("{name} must be a whole number{words}, not '{text}'"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relative_path_and_one_with_a_tilde_are_made_absolute_when_they_are_read() {
        let (home, here) = (home().expect("a home"), std::env::current_dir().expect("here"));
        for (given, expected) in [
            ("/abs/x", PathBuf::from("/abs/x")),
            ("rel/x", here.join("rel/x")),
            ("./~x", here.join("~x")),
            ("~", home.clone()),
            ("~/x y", home.join("x y")),
            ("a/~", here.join("a/~")),
        ] {
            assert_eq!(absolute_path(Path::new(given)).expect(given), expected, "{given}");
        }
        let error = absolute_path(Path::new("~nobody/x")).expect_err("not ours");
        assert_eq!(error.to_string(), "'~nobody/x' names the home of another user");
    }
}
