//! The process that owns a machine, named so that no other process is ever taken for it.

use std::fmt;
use std::os::unix::fs::MetadataExt;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::task::boot_id;

/// A process: its number, when it started, the namespace of its number, and the boot of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(super) pid: u32,
    /// In clock ticks since the host's boot: field 22 of `/proc/PID/stat`.
    pub(super) start_time: u64,
    pub(super) pid_namespace: u64,
    pub(super) boot_id: String,
}

impl Owner {
    /// This process. None where `/proc` does not describe it, as in a process namespace that has the `/proc` of another.
    pub(crate) fn current() -> Option<Self> {
        Self::numbered(std::process::id())
    }

    /// The process that has this number now.
    pub(crate) fn numbered(pid: u32) -> Option<Self> {
        let own = fs_err::read_to_string("/proc/self/stat").ok()?;
        if own.split(' ').next() != Some(std::process::id().to_string().as_str()) {
            return None;
        }
        let boot_id = Some(boot_id().to_owned()).filter(|id| !id.is_empty())?;
        let pid_namespace = fs_err::metadata("/proc/self/ns/pid").ok()?.ino();
        Some(Self { pid, start_time: start_time(pid)?, pid_namespace, boot_id })
    }

    /// As [`Owner::is_dead`], for a process of which somebody may hold a lock still. A lock that is held is no forked copy's
    /// of another boot: there, its owner lives on another host, or in another container that has this directory too.
    pub(super) fn is_dead_in_this_boot(&self) -> bool {
        self.boot_id == boot_id() && self.is_dead()
    }

    /// Whether the process has ended for certain. False where this process cannot tell, as for one of another process
    /// namespace: what cannot be known takes nothing from anybody.
    pub(crate) fn is_dead(&self) -> bool {
        if boot_id().is_empty() {
            return false;
        }
        if self.boot_id != boot_id() {
            return true;
        }
        let namespace = fs_err::metadata("/proc/self/ns/pid").map(|found| found.ino());
        if namespace.ok() != Some(self.pid_namespace) {
            return false;
        }
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else { return false };
        // Opened first: the start time that is read afterwards is that of the same process, unless it has ended meanwhile.
        let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(Errno::SRCH) => return true,
            Err(_) => return false,
        };
        let mut polled = [PollFd::new(&pidfd, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        // Readable once all of its threads have ended, also while nobody has reaped it.
        let ended = poll(&mut polled, Some(&now)).is_ok_and(|ready| ready > 0);
        ended || start_time(self.pid).is_some_and(|start_time| start_time != self.start_time)
    }

    /// Reads what [`Owner`]'s `Display` has written; none where it is no owner.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        let owner = Self {
            pid: words.next()?.parse().ok()?,
            start_time: words.next()?.parse().ok()?,
            pid_namespace: words.next()?.parse().ok()?,
            boot_id: words.next()?.to_owned(),
        };
        words.next().is_none().then_some(owner)
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} {} {} {}", self.pid, self.start_time, self.pid_namespace, self.boot_id)
    }
}

fn start_time(pid: u32) -> Option<u64> {
    let stat = fs_err::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name of the program, in parentheses, may hold anything; what follows is fields 3 and on.
    let (_, fields) = stat.rsplit_once(") ")?;
    fields.split(' ').nth(19)?.parse().ok()
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::Path;

    use pyro_process::Spawn;

    use super::*;

    /// The owner that a process was which has ended.
    pub(crate) fn dead_owner() -> Owner {
        let mut child = Spawn::new("sleep", Path::new("/"));
        child.arg("99");
        let mut child = child.spawn().expect("it runs");
        let owner = Owner::numbered(child.id()).expect("it lives");
        child.kill().expect("killed");
        child.wait().expect("reaped");
        owner
    }

    #[test]
    fn only_the_process_itself_is_taken_for_the_owner() {
        let own = Owner::current().expect("this process");
        assert!(!own.is_dead());
        assert_eq!(Owner::parse(&own.to_string()).as_ref(), Some(&own));
        assert!(
            Owner { start_time: own.start_time + 1, ..own.clone() }.is_dead(),
            "its number was used again"
        );
        assert!(
            Owner { boot_id: "another".to_owned(), ..own.clone() }.is_dead(),
            "no process outlives a boot"
        );
        assert!(
            !Owner { pid: 1 << 21, pid_namespace: 1, ..own }.is_dead(),
            "another namespace cannot be known"
        );
        assert!(dead_owner().is_dead());
        for bad in ["", "1", "1 2 3", "1 2 3 boot more", "x 2 3 boot"] {
            assert_eq!(Owner::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_process_that_nobody_has_reaped_is_dead() {
        let mut child = Spawn::new("true", Path::new("/")).spawn().expect("it runs");
        let owner = Owner::numbered(child.id()).expect("it is there until it is reaped");
        let pidfd = child.pidfd();
        poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], None).expect("it ends");
        assert!(owner.is_dead());
        child.wait().expect("reaped");
    }
}
