//! What a build needs of this machine, checked one by one.

use serde::Serialize;

use super::Store;
use crate::catalog::CATALOG;
use crate::debian::{self, Sources};
use crate::tool::{self, remedy};

/// One check of the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was checked.
    pub name: String,
    /// Whether it is as it should be.
    pub ok: bool,
    /// What was found, for people.
    pub detail: String,
    /// What to do when it is not.
    pub remedy: Option<String>,
}

impl Check {
    fn passed(name: &str, detail: impl Into<String>) -> Self {
        Self { name: name.to_owned(), ok: true, detail: detail.into(), remedy: None }
    }

    fn failed(name: &str, detail: impl Into<String>, remedy: Option<String>) -> Self {
        Self { name: name.to_owned(), ok: false, detail: detail.into(), remedy }
    }
}

impl Store {
    pub(super) fn checks(&self) -> Vec<Check> {
        let mut checks: Vec<Check> = ["mmdebstrap", "apt-get", "mke2fs", "unshare"]
            .into_iter()
            .map(|tool| self.check_tool(tool))
            .collect();
        checks.push(self.check_sources());
        checks.push(check_keyring());
        if !rustix::process::geteuid().is_root() {
            checks.push(self.check_tool("newuidmap"));
            checks.push(match debian::check_subordinate_ids() {
                Ok(()) => Check::passed("subordinate ids", "/etc/subuid and /etc/subgid list this user"),
                Err(error) => Check::failed("subordinate ids", error.to_string(), error.hint()),
            });
        }
        checks.push(self.check_namespaces());
        checks.push(self.check_disk());
        checks
    }

    fn check_tool(&self, tool: &'static str) -> Check {
        match self.tools.find(tool) {
            Ok(path) => Check::passed(tool, path.display().to_string()),
            Err(error) => Check::failed(tool, error.to_string(), Some(remedy(tool))),
        }
    }

    fn check_sources(&self) -> Check {
        match Sources::find(self.config.0.apt_sources.as_deref()) {
            Ok(sources) => Check::passed("package sources", sources.path().display().to_string()),
            Err(error) => Check::failed("package sources", error.to_string(), error.hint()),
        }
    }

    /// Namespaces may be forbidden by the host or by a container around us, so they are tried.
    fn check_namespaces(&self) -> Check {
        const NAME: &str = "namespaces";
        let tried = self
            .tools
            .confined("true", self.paths.root())
            .and_then(|spawn| tool::run("unshare", spawn, &mut |_line| {}, &|| false));
        match tried {
            Ok(()) => Check::passed(NAME, "process and mount namespaces can be made"),
            Err(error) => {
                let hint = match &error {
                    tool::ToolError::Failed { .. } => {
                        "allow user namespaces: sysctl kernel.unprivileged_userns_clone=1, or run as root"
                            .to_owned()
                    }
                    other => other.hint().unwrap_or_else(|| "run as root".to_owned()),
                };
                Check::failed(NAME, error.to_string(), Some(hint))
            }
        }
    }

    fn check_disk(&self) -> Check {
        const NAME: &str = "disk space";
        let needed = CATALOG.first().map_or(0, |definition| definition.build_mib);
        match self.free_mib() {
            Ok(free) => {
                let detail =
                    format!("{free} MiB free in '{}', {needed} MiB needed", self.paths.root().display());
                if free >= needed {
                    Check::passed(NAME, detail)
                } else {
                    Check::failed(
                        NAME,
                        detail,
                        Some("free some disk space, or run: pyro env prune".to_owned()),
                    )
                }
            }
            Err(error) => Check::failed(NAME, error.to_string(), error.hint()),
        }
    }
}

fn check_keyring() -> Check {
    const NAME: &str = "archive keyring";
    const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
    match fs_err::metadata(KEYRING) {
        Ok(_) => Check::passed(NAME, KEYRING),
        Err(error) => Check::failed(NAME, error.to_string(), Some(remedy("debian-archive-keyring"))),
    }
}
