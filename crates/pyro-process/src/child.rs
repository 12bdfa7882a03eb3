//! A running child.

use std::fmt;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{ChildStderr, ChildStdin, ChildStdout, ExitStatus, Stdio};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{Signal, WaitId, WaitIdOptions, WaitIdStatus};

use crate::report::{Message, Report};
use crate::spawn::Spawn;

/// A running child, its pidfd, and its standard streams where they are pipes.
///
/// Dropping it neither ends nor reaps the child: call [`Child::kill`] and [`Child::wait`].
#[derive(Debug)]
pub struct Child {
    pub(crate) id: u32,
    pub(crate) pidfd: OwnedFd,
    pub(crate) stdin: Option<ChildStdin>,
    pub(crate) stdout: Option<ChildStdout>,
    pub(crate) stderr: Option<ChildStderr>,
    /// Whether the process is the warden of a jail.
    pub(crate) jailed: bool,
    /// The process that learns the status in place of the owner.
    pub(crate) keeper: Option<OwnedFd>,
    pub(crate) report: Report,
    /// What the keeper has said already.
    pub(crate) ended: Option<i32>,
    pub(crate) exit: Option<Exit>,
}

/// How a child has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit(Option<ExitStatus>);

impl Exit {
    /// The status. None when another part of this program has reaped the child, as one that calls `waitpid(-1)` does.
    pub fn status(self) -> Option<ExitStatus> {
        self.0
    }

    /// Whether the child is known to have succeeded.
    pub fn success(self) -> bool {
        self.0.is_some_and(|status| status.success())
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(status) => status.fmt(formatter),
            None => {
                formatter.write_str("unknown status: another part of this program has reaped the process")
            }
        }
    }
}

impl Child {
    /// The process number, for reports only: signals go through the pidfd.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The pidfd; it becomes readable when the child ends.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// The write end of the child's standard input, once, where it was `Stdio::piped()`. Where nobody takes it, it stays open
    /// as long as this.
    pub fn take_stdin(&mut self) -> Option<ChildStdin> {
        self.stdin.take()
    }

    /// The read end of the child's standard output, once, where it was `Stdio::piped()`.
    pub fn take_stdout(&mut self) -> Option<ChildStdout> {
        self.stdout.take()
    }

    /// The read end of the child's standard error, once, where it was `Stdio::piped()`.
    pub fn take_stderr(&mut self) -> Option<ChildStderr> {
        self.stderr.take()
    }

    /// Sends a signal; a child that has ended already is no error.
    ///
    /// # Errors
    /// When the kernel refuses for another reason.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        match rustix::process::pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Ends the child at once; a child that has ended already is no error.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn kill(&self) -> io::Result<()> {
        self.signal(self.end_signal())
    }

    /// The signal that ends the child at once. A warden is told to end what it guards, so that its own end says that
    /// this is gone.
    pub fn end_signal(&self) -> Signal {
        if self.jailed { Signal::TERM } else { Signal::KILL }
    }

    /// The number of the process that runs the program, for reports: in a jail it is not the child itself. None where
    /// it has ended.
    pub fn program(&self) -> Option<u32> {
        if !self.jailed {
            return Some(self.id());
        }
        only_child(self.id()).and_then(only_child)
    }

    /// How the child has ended, if it has, without waiting.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn try_wait(&mut self) -> io::Result<Option<Exit>> {
        if self.exit.is_none() && !has_ended(self.pidfd(), Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))? {
            return Ok(None);
        }
        self.wait().map(Some)
    }

    /// Waits for the end of the child and reaps it.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn wait(&mut self) -> io::Result<Exit> {
        if let Some(exit) = self.exit {
            return Ok(exit);
        }
        // A child that was reaped by somebody else is no child any more, and its pidfd still tells its end.
        has_ended(self.pidfd(), None)?;
        let exit = match &self.keeper {
            None => reap(self.pidfd())?,
            Some(keeper) => {
                has_ended(keeper.as_fd(), None)?;
                reap(keeper.as_fd())?;
                self.told()?
            }
        };
        self.exit = Some(exit);
        Ok(exit)
    }

    /// What the keeper has said before its end.
    fn told(&self) -> io::Result<Exit> {
        if let Some(status) = self.ended {
            return Ok(Exit(Some(ExitStatus::from_raw(status))));
        }
        while let Some(message) = self.report.next()? {
            if let Message::Ended(status) = message {
                return Ok(Exit(Some(ExitStatus::from_raw(status))));
            }
        }
        // Somebody has killed the keeper, and the child died with it.
        Ok(Exit(None))
    }
}

/// Waits until a process has ended; false when the time is up before.
fn has_ended(pidfd: BorrowedFd<'_>, timeout: Option<&Timespec>) -> io::Result<bool> {
    loop {
        let mut fds = [PollFd::from_borrowed_fd(pidfd, PollFlags::IN)];
        match rustix::event::poll(&mut fds, timeout) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Reaps a child that has ended.
fn reap(pidfd: BorrowedFd<'_>) -> io::Result<Exit> {
    loop {
        match rustix::process::waitid(WaitId::PidFd(pidfd), WaitIdOptions::EXITED) {
            Ok(status) => return Ok(Exit(status.as_ref().and_then(exit_status))),
            // The owner ignores SIGCHLD, or another part of it was quicker.
            Err(Errno::CHILD) => return Ok(Exit(None)),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn exit_status(status: &WaitIdStatus) -> Option<ExitStatus> {
    const DUMPED: i32 = 0x80;
    let raw = match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => code << 8,
        (None, Some(signal)) if status.dumped() => signal | DUMPED,
        (None, signal) => signal?,
    };
    Some(ExitStatus::from_raw(raw))
}

fn only_child(pid: u32) -> Option<u32> {
    let children = fs_err::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_ascii_whitespace().next()?.parse().ok()
}

/// What a helper has said, and how it has ended.
#[derive(Debug)]
pub struct Output {
    /// How it has ended.
    pub status: Exit,
    /// All of its standard output.
    pub stdout: Vec<u8>,
    /// All of its standard error.
    pub stderr: Vec<u8>,
}

/// Runs a short helper to its end and returns its status and output, read whole.
///
/// # Errors
/// As [`Spawn::spawn`], or when its output cannot be read.
pub fn output(mut spawn: Spawn) -> io::Result<Output> {
    spawn.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = spawn.spawn()?;
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let (out, err) = (child.take_stdout(), child.take_stderr());
    std::thread::scope(|scope| {
        let reader = std::thread::Builder::new()
            .spawn_scoped(scope, || err.map_or(Ok(0), |mut err| err.read_to_end(&mut stderr)))?;
        out.map_or(Ok(0), |mut out| out.read_to_end(&mut stdout))?;
        reader.join().unwrap_or_else(|_panic| Err(io::Error::other("the reader of its output has failed")))
    })?;
    Ok(Output { status: child.wait()?, stdout, stderr })
}
