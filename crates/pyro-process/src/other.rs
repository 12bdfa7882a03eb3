//! Processes that this one did not start: who holds a lock, and ending one that does not answer.
//!
//! A process number may name another process by the time that it is used. [`Other`] opens a pidfd first and looks at the
//! process afterwards, so that what it saw and what it signals are the same.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// A process that something waits for, in the words of an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its number, for people.
    pub pid: i32,
    /// Its name, as `ps` shows it.
    pub name: String,
    /// Whether it is stopped, as by Ctrl-Z or a debugger.
    pub is_stopped: bool,
}

impl fmt::Display for Holder {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stopped = if self.is_stopped { ", which is stopped" } else { "" };
        write!(formatter, "process {} ({}){stopped}", self.pid, self.name)
    }
}

impl Holder {
    /// Describes a process; none when it is gone.
    pub fn of(pid: i32) -> Option<Self> {
        let stat = fs_err::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name may hold parentheses and blanks: it ends at the last parenthesis.
        let (head, rest) = stat.rsplit_once(") ")?;
        let (_, name) = head.split_once('(')?;
        let safe = name.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
        Some(Self { pid, name: safe, is_stopped: rest.starts_with(['T', 't']) })
    }

    /// What to type so that the wait for it ends.
    pub fn remedy(&self) -> String {
        if self.is_stopped {
            format!("let it go on: kill -CONT {}", self.pid)
        } else {
            format!("wait for it, or end it: kill {}", self.pid)
        }
    }
}

/// The process that has this file or directory locked for itself alone; none where the kernel does not tell, or nobody has.
pub fn lock_holder(path: &Path) -> Option<Holder> {
    let wanted = std::fs::metadata(path).ok()?;
    let own = i32::try_from(std::process::id()).ok()?;
    let locks = fs_err::read_to_string("/proc/locks").ok()?;
    // `1: FLOCK ADVISORY WRITE 4321 fe:00:1234 0 EOF`; a line with an arrow is of one that waits.
    let candidates = locks.lines().filter(|line| !line.contains("->")).filter_map(|line| {
        let mut words = line.split_whitespace().skip(3);
        // Locks that are shared are those of readers, who hold nobody up.
        if words.next()? != "WRITE" {
            return None;
        }
        let pid: i32 = words.next()?.parse().ok()?;
        let inode: u64 = words.next()?.rsplit(':').next()?.parse().ok()?;
        (inode == wanted.ino() && pid > 0 && pid != own).then_some(pid)
    });
    // Some file systems show another device here than to stat: what the process has open tells.
    candidates.filter(|pid| has_open(*pid, &wanted)).find_map(Holder::of)
}

fn has_open(pid: i32, wanted: &std::fs::Metadata) -> bool {
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let mut open = descriptors.filter_map(|descriptor| std::fs::metadata(descriptor.path()).ok());
    open.any(|open| (open.dev(), open.ino()) == (wanted.dev(), wanted.ino()))
}

/// A process that this one did not start, by its pidfd.
#[derive(Debug)]
pub struct Other {
    pid: i32,
    pidfd: OwnedFd,
}

impl Other {
    /// Finds the process with these words as its arguments that has the file or directory at `path` open as descriptor
    /// `number`; none where there is no such process of this user's.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn find(path: &Path, number: i32, arguments: &[&str]) -> io::Result<Option<Self>> {
        let wanted = match std::fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            wanted => wanted?,
        };
        let is_it = |pid: i32| {
            let open = std::fs::metadata(format!("/proc/{pid}/fd/{number}"));
            open.is_ok_and(|open| (open.dev(), open.ino()) == (wanted.dev(), wanted.ino()))
                && has_arguments(pid, arguments)
        };
        for entry in std::fs::read_dir("/proc")?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            if !is_it(pid) {
                continue;
            }
            // Opened, then looked at once more: the number may be another process's by now.
            let opened = Pid::from_raw(pid).map(|pid| pidfd_open(pid, PidfdFlags::empty()));
            if let Some(Ok(pidfd)) = opened
                && is_it(pid)
            {
                return Ok(Some(Self { pid, pidfd }));
            }
        }
        Ok(None)
    }

    /// Its number, for people.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Kills it, also when it is stopped, and waits for its end; false when it lives on after `deadline`, as in a system
    /// call that the kernel does not interrupt.
    ///
    /// # Errors
    /// When it may not be signalled.
    pub fn kill(&self, deadline: Duration) -> io::Result<bool> {
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(error) => return Err(error.into()),
        }
        let until = Instant::now() + deadline;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let timeout = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            match poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&timeout)) {
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
                Ok(ready) => return Ok(ready > 0),
            }
        }
    }
}

fn has_arguments(pid: i32, arguments: &[&str]) -> bool {
    let Ok(line) = fs_err::read(format!("/proc/{pid}/cmdline")) else { return false };
    let words: Vec<_> = line.split(|byte| *byte == 0).skip(1).take(arguments.len()).collect();
    words.len() == arguments.len()
        && words.iter().zip(arguments).all(|(word, argument)| *word == argument.as_bytes())
}

/// Tries to take a lock on a file until `deadline` has passed; false when another process holds it for longer.
///
/// `flock` has no time limit, so the lock is tried again after short pauses.
///
/// # Errors
/// When the file system has no locks.
pub fn lock_within(file: &File, deadline: Duration) -> io::Result<bool> {
    const LONGEST_PAUSE: Duration = Duration::from_millis(10);
    let until = Instant::now() + deadline;
    let mut pause = Duration::from_micros(200);
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(true),
            Err(std::fs::TryLockError::Error(error)) => return Err(error),
            Err(std::fs::TryLockError::WouldBlock) if Instant::now() >= until => return Ok(false),
            Err(std::fs::TryLockError::WouldBlock) => std::thread::sleep(pause),
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;

    use super::*;
    use crate::Spawn;

    /// Starts a process that holds a lock on a file, until its stdin ends.
    fn holder_of(path: &Path) -> crate::Child {
        let mut spawn = Spawn::new("flock", Path::new("/"));
        spawn
            .arg("-o")
            .arg(path)
            .args(["sh", "-c", "echo held; exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = spawn.spawn().expect("flock runs");
        let mut held = [0; 5];
        let mut stdout = child.take_stdout().expect("piped");
        io::Read::read_exact(&mut stdout, &mut held).expect("it holds the lock");
        child
    }

    #[test]
    fn a_lock_that_another_process_holds_is_waited_for_until_the_deadline_and_its_holder_is_named() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("lock");
        let file = File::create(&path).expect("made");
        assert_eq!(lock_holder(&path), None);
        let mut child = holder_of(&path);
        let began = Instant::now();
        assert!(!lock_within(&file, Duration::from_millis(100)).expect("locks work"));
        assert!(began.elapsed() >= Duration::from_millis(100));
        let holder = lock_holder(&path).expect("the kernel tells");
        assert_eq!(holder.name, "flock");
        assert!(!holder.is_stopped);
        drop(child.kill());
        drop(child.wait());
        assert!(lock_within(&file, Duration::from_secs(5)).expect("locks work"));
        assert_eq!(lock_holder(&path), None, "one's own lock is nobody else's");
    }

    #[test]
    fn a_stopped_process_is_found_by_what_it_holds_and_killed() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut spawn = Spawn::new("sleep", Path::new("/"));
        spawn.arg("1000").fd(File::open(dir.path()).expect("opened").into(), 3);
        let mut child = spawn.spawn().expect("sleep runs");
        pidfd_send_signal(child.pidfd(), Signal::STOP).expect("stopped");
        assert!(Other::find(dir.path(), 3, &["999"]).expect("looked").is_none());
        assert!(Other::find(dir.path(), 4, &["1000"]).expect("looked").is_none());
        let found = Other::find(dir.path(), 3, &["1000"]).expect("looked").expect("it is there");
        assert_eq!(u32::try_from(found.pid()).ok(), Some(child.id()));
        assert!(found.kill(Duration::from_secs(5)).expect("signalled"));
        drop(child.wait());
    }
}
