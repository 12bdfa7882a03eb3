//! Why a machine did not start, and why one did not obey.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::MachineExit;
use crate::confine::Confine;

/// Why a machine did not start.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The VMM program does not exist.
    #[error("{} does not exist", binary.display())]
    BinaryMissing {
        /// Where it was looked for.
        binary: PathBuf,
    },
    /// The specification cannot work.
    #[error("bad machine specification: {what}")]
    BadSpec {
        /// What is wrong with it.
        what: String,
    },
    /// The host refused a process, a descriptor or a thread.
    #[error("cannot start {}", binary.display())]
    Spawn {
        /// The program.
        binary: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The host refused what was to confine the VMM.
    #[error("the VMM could not be confined: {source}")]
    Confine {
        /// What the host said.
        source: io::Error,
    },
    /// The VMM needs files that a jail cannot hold.
    #[error("a jail cannot hold the VMM: {why}")]
    Unjailable {
        /// What is in the way.
        why: String,
    },
    /// The VMM ended before it had accepted its configuration.
    #[error("the VMM ended at once ({}): {}", exit.status, last_words(exit))]
    ExitedAtOnce {
        /// How it ended, with its last words.
        exit: Box<MachineExit>,
    },
    /// The VMM runs but did not answer on its control channel in time, or answered nonsense.
    #[error("the VMM did not take its configuration")]
    Control {
        /// What went wrong.
        #[source]
        source: ControlError,
    },
    /// The VMM runs without something that was to keep it apart from the host; it was ended.
    #[error("the VMM is not confined as it should be: it lacks {missing}")]
    Unconfined {
        /// What is missing, by name.
        missing: String,
    },
}

impl LaunchError {
    /// What a refused start means: hosts that allow no namespaces refuse what a jail is made of.
    pub(crate) fn of_spawn(confine: &Confine, binary: PathBuf, source: io::Error) -> Self {
        // Forbidden, by two names; and the number of namespaces limited to none.
        let refusals = [libc::EPERM, libc::EACCES, libc::ENOSPC];
        let is_refusal = source.raw_os_error().is_some_and(|number| refusals.contains(&number))
            || source.kind() == io::ErrorKind::PermissionDenied;
        if *confine != Confine::Nothing && is_refusal {
            return Self::Confine { source };
        }
        Self::Spawn { binary, source }
    }

    /// A stable name of the kind of error.
    pub fn code(&self) -> &'static str {
        match self {
            Self::BinaryMissing { .. } => "vmm_missing",
            Self::BadSpec { .. } => "bad_machine_spec",
            Self::Spawn { .. } => "vmm_spawn_failed",
            Self::Confine { .. } | Self::Unjailable { .. } => "vmm_unconfined",
            Self::ExitedAtOnce { .. } => "vmm_exited",
            Self::Control { .. } => "vmm_unresponsive",
            Self::Unconfined { .. } => "vmm_unconfined",
        }
    }

    /// What the user can do about it, where there is something.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::BinaryMissing { binary } if is_qemu(binary) => {
                Some("install QEMU: apt-get install qemu-system-x86")
            }
            Self::BinaryMissing { .. } => Some("install it again: pyro env firecracker --from ARCHIVE"),
            Self::BadSpec { .. } => None,
            Self::Unconfined { missing } if missing.contains("seccomp") => Some(
                "install a QEMU that is built with seccomp, or run without what keeps it apart from the host: \
                 --unconfined-vmm (PYRO_UNCONFINED_VMM=1)",
            ),
            Self::Unconfined { .. } => Some("run `pyro doctor`; this host's kernel does not keep a promise"),
            Self::Confine { .. } => Some(
                "allow user namespaces: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu), \
                 kernel.unprivileged_userns_clone=1 (Debian), user.max_user_namespaces=10000; or run as root; \
                 or without what keeps the VMM apart from the host: --unconfined-vmm (PYRO_UNCONFINED_VMM=1)",
            ),
            Self::Unjailable { .. } => Some(
                "install the distribution's own qemu-system-x86, or run without what keeps it apart from the host: \
                 --unconfined-vmm (PYRO_UNCONFINED_VMM=1)",
            ),
            Self::Spawn { .. } => Some("check the limits on processes, open files and memory of this host"),
            Self::ExitedAtOnce { exit } if exit.stderr_tail.contains("Cannot allocate memory") => {
                Some("free memory on this host, or ask for a smaller machine")
            }
            Self::ExitedAtOnce { exit } if exit.stderr_tail.contains("Failed to get \"write\" lock") => {
                Some("another machine has this disk open: end it first")
            }
            Self::ExitedAtOnce { .. } => None,
            Self::Control { .. } => Some("the host may be overloaded: try again with fewer machines"),
        }
    }
}

/// Why a running machine did not obey.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The VMM process has ended.
    #[error("the VMM has ended")]
    Ended,
    /// The one stream to the guest is in other hands.
    #[error("the stream to the guest is taken")]
    Taken,
    /// The control channel failed.
    #[error("the control channel failed")]
    Io(#[source] io::Error),
    /// The VMM sent something that is no answer.
    #[error("the VMM broke the control protocol: {what}")]
    Protocol {
        /// What was wrong with it.
        what: &'static str,
    },
    /// The VMM refused the command.
    #[error("the VMM refused {command:?}: {description}")]
    Refused {
        /// The command.
        command: &'static str,
        /// The VMM's own words, cut to a sane length.
        description: String,
    },
    /// No answer in time.
    #[error("the VMM did not answer within {} s", after.as_secs())]
    Timeout {
        /// How long it was waited for.
        after: Duration,
    },
}

fn is_qemu(binary: &Path) -> bool {
    binary.file_name().is_some_and(|name| name.to_string_lossy().starts_with("qemu"))
}

/// The end of what it said: QEMU puts the cause and its advice on lines of their own.
fn last_words(exit: &MachineExit) -> String {
    let mut lines: Vec<&str> =
        exit.stderr_tail.lines().rev().map(str::trim).filter(|line| !line.is_empty()).take(3).collect();
    lines.reverse();
    if lines.is_empty() { "it said nothing".to_owned() } else { lines.join("; ") }
}
