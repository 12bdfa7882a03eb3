//! What keeps a VMM apart from the host, read from the kernel's own account of the process: never from what was asked
//! for.

use std::collections::BTreeSet;
use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::cgroup::{GROUPS, PARENT};

/// One thing that keeps a process apart from the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Element {
    /// A control group of its own, with limits.
    Cgroup,
    /// Inter-process communication of its own.
    IpcNamespace,
    /// Few open files, and no core dumps.
    Limits,
    /// Mounts of its own.
    MountNamespace,
    /// A network of its own, with nothing in it.
    NetworkNamespace,
    /// Not one capability on the host.
    NoCapabilities,
    /// No program that it starts has more privileges than itself.
    NoNewPrivileges,
    /// A user that owns nothing else on the host.
    OwnUser,
    /// Processes of its own.
    PidNamespace,
    /// A root directory with nothing in it but what it needs.
    Root,
    /// A filter of system calls, in every thread.
    Seccomp,
    /// Users of its own.
    UserNamespace,
    /// A host name of its own.
    UtsNamespace,
}

impl Element {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::Cgroup,
        Self::IpcNamespace,
        Self::Limits,
        Self::MountNamespace,
        Self::NetworkNamespace,
        Self::NoCapabilities,
        Self::NoNewPrivileges,
        Self::OwnUser,
        Self::PidNamespace,
        Self::Root,
        Self::Seccomp,
        Self::UserNamespace,
        Self::UtsNamespace,
    ];

    /// The name that records use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cgroup => "cgroup",
            Self::IpcNamespace => "ipc_namespace",
            Self::Limits => "limits",
            Self::MountNamespace => "mount_namespace",
            Self::NetworkNamespace => "network_namespace",
            Self::NoCapabilities => "no_capabilities",
            Self::NoNewPrivileges => "no_new_privileges",
            Self::OwnUser => "own_user",
            Self::PidNamespace => "pid_namespace",
            Self::Root => "root",
            Self::Seccomp => "seccomp",
            Self::UserNamespace => "user_namespace",
            Self::UtsNamespace => "uts_namespace",
        }
    }

    /// The file of `/proc/PID/ns` that tells about it.
    fn namespace(self) -> Option<&'static str> {
        match self {
            Self::IpcNamespace => Some("ipc"),
            Self::MountNamespace => Some("mnt"),
            Self::NetworkNamespace => Some("net"),
            Self::PidNamespace => Some("pid"),
            Self::UserNamespace => Some("user"),
            Self::UtsNamespace => Some("uts"),
            _ => None,
        }
    }
}

/// What a process was found to be kept apart by.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Confinement {
    elements: BTreeSet<Element>,
    /// Landlock, of which the kernel gives no account: what was asked of it.
    landlock: bool,
    /// Whether it was started without a jail, because the user has asked for that.
    unconfined: bool,
}

/// The most files that a process may have open to count as limited.
pub(crate) const FILES_MAX: u64 = 1024;
/// The longest core file, in bytes, that counts as none. Where the kernel hands cores to a program, a limit of none is not
/// heeded; this one is, as it marks the program's own crash.
pub(crate) const CORE_MAX: u64 = 1;

impl Confinement {
    /// Looks at a process; what cannot be read counts as not there.
    pub fn observed(pid: u32) -> Self {
        let process = Process { dir: PathBuf::from(format!("/proc/{pid}")) };
        let elements = Element::ALL.into_iter().filter(|element| process.has(*element)).collect();
        Self { elements, landlock: false, unconfined: false }
    }

    /// Notes that Landlock was applied; the kernel tells nobody.
    pub(crate) fn with_landlock(mut self, applied: bool) -> Self {
        self.landlock = applied;
        self
    }

    /// Notes that it was started without a jail.
    pub(crate) fn with_unconfined(mut self, unconfined: bool) -> Self {
        self.unconfined = unconfined;
        self
    }

    /// Whether it was started without a jail, because the user has asked for that.
    pub fn is_unconfined(&self) -> bool {
        self.unconfined
    }

    /// Whether it has this element.
    pub fn has(&self, element: Element) -> bool {
        self.elements.contains(&element)
    }

    /// The names of what is expected and not there; none where nothing is missing.
    pub fn lacks(&self, expected: &[Element]) -> Option<String> {
        let missing: Vec<&str> = expected
            .iter()
            .filter(|element| !self.elements.contains(element))
            .map(|element| element.as_str())
            .collect();
        (!missing.is_empty()).then(|| missing.join(", "))
    }
}

impl fmt::Display for Confinement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut names: Vec<&str> = self.elements.iter().map(|element| element.as_str()).collect();
        names.extend(self.landlock.then_some("landlock"));
        f.write_str(if names.is_empty() { "none" } else { "" })?;
        f.write_str(&names.join(","))
    }
}

/// A process in `/proc`.
struct Process {
    dir: PathBuf,
}

impl Process {
    fn has(&self, element: Element) -> bool {
        if let Some(name) = element.namespace() {
            let of = |dir: &std::path::Path| fs_err::read_link(dir.join("ns").join(name)).ok();
            let (its, own) = (of(&self.dir), of("/proc/self".as_ref()));
            return its.is_some() && its != own;
        }
        match element {
            Element::Root => {
                let id = |meta: std::fs::Metadata| (meta.dev(), meta.ino());
                let its = fs_err::metadata(self.dir.join("root")).ok().map(id);
                its.is_some() && its != fs_err::metadata("/").ok().map(id)
            }
            Element::OwnUser => {
                let own = rustix::process::geteuid().as_raw().to_string();
                let users = self.status("Uid:");
                let users: Vec<&str> =
                    users.iter().flat_map(|users| users.split_ascii_whitespace()).collect();
                !users.is_empty() && users.iter().all(|user| *user != "0" && *user != own)
            }
            Element::NoNewPrivileges => self.status("NoNewPrivs:").as_deref() == Some("1"),
            Element::NoCapabilities => ["CapEff:", "CapPrm:", "CapInh:", "CapAmb:"]
                .iter()
                .all(|set| self.status(set).is_some_and(|bits| bits.chars().all(|bit| bit == '0'))),
            Element::Seccomp => self.every_thread_is_filtered(),
            Element::Limits => {
                let limits = fs_err::read_to_string(self.dir.join("limits")).unwrap_or_default();
                let hard = |name: &str| {
                    let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
                    line.split_ascii_whitespace().nth(1)?.parse::<u64>().ok()
                };
                hard("Max open files").is_some_and(|files| files <= FILES_MAX)
                    && hard("Max core file size").is_some_and(|core| core <= CORE_MAX)
            }
            Element::Cgroup => {
                let groups = fs_err::read_to_string(self.dir.join("cgroup")).unwrap_or_default();
                groups.lines().filter_map(|line| line.strip_prefix("0::/")).any(|group| {
                    let dir = Path::new(GROUPS).join(group);
                    let parent = dir.parent().and_then(Path::file_name);
                    let limits = |name: &str| {
                        let limit = fs_err::read_to_string(dir.join(name)).unwrap_or_default();
                        limit.starts_with(|first: char| first.is_ascii_digit())
                    };
                    let time_is_limited = !dir.join("cpu.max").exists() || limits("cpu.max");
                    parent == Some(PARENT.as_ref())
                        && limits("memory.max")
                        && limits("pids.max")
                        && time_is_limited
                })
            }
            _ => false,
        }
    }

    fn status(&self, field: &str) -> Option<String> {
        let status = fs_err::read_to_string(self.dir.join("status")).ok()?;
        status.lines().find_map(|line| line.strip_prefix(field)).map(|value| value.trim().to_owned())
    }

    fn every_thread_is_filtered(&self) -> bool {
        let Ok(threads) = fs_err::read_dir(self.dir.join("task")) else { return false };
        let mut threads = threads.flatten().peekable();
        threads.peek().is_some()
            && threads.all(|thread| Self { dir: thread.path() }.status("Seccomp:").as_deref() == Some("2"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_not_confined_against_itself() {
        let own = Confinement::observed(std::process::id());
        for element in [Element::PidNamespace, Element::Root, Element::OwnUser, Element::Cgroup] {
            assert!(!own.has(element), "{element:?}");
        }
        assert_eq!(own.lacks(&[Element::Root, Element::OwnUser]).as_deref(), Some("root, own_user"));
        assert_eq!(own.lacks(&[]), None);
    }

    #[test]
    fn a_process_that_is_gone_has_nothing() {
        assert_eq!(Confinement::observed(u32::MAX).to_string(), "none");
    }
}
