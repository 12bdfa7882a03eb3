//! The VMM process as its owner sees it: who it is, how to signal it, how it ended.

use std::any::Any;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use pyro_process::Child;
use rustix::process::Signal;

use crate::error::{ControlError, LaunchError};
use crate::machine::{MachineEnd, MachineExit};
pub(crate) use crate::watch::Streams;
use crate::watch::{self, ExitReceiver, Watched};

/// How much sooner than others a VMM is ended by a host without memory, in thousandths of its memory: before its owner,
/// which keeps the record, and before the user's programs.
pub(crate) const OOM_SCORE_ADJ: i32 = 500;

/// How long the end of a VMM is waited for that has closed its control channel.
const EXIT_GRACE: Duration = Duration::from_secs(2);

/// A running VMM. Dropping it kills the process at once and leaves the reaping to its thread.
#[derive(Debug)]
pub(crate) struct VmmProcess {
    pid: u32,
    start_time: u64,
    /// Signals go through this, so that they can hit no other process.
    pidfd: OwnedFd,
    end_signal: Signal,
    watched: Arc<Watched>,
    exit: ExitReceiver,
}

impl VmmProcess {
    /// Takes over a child that was just started, and what must stay as long as it. On failure the child is ended and
    /// reaped.
    pub(crate) fn new(child: Child, streams: Streams, kept: Box<dyn Any + Send>) -> io::Result<Self> {
        let child = watch::Reaper::new(child);
        let pid = child.program().unwrap_or_else(|| child.id());
        let pidfd = child.pidfd().try_clone_to_owned()?;
        let end_signal = child.end_signal();
        let start_time = process_start_time(pid).unwrap_or_default();
        let (watched, exit) = watch::start(child, streams, kept)?;
        Ok(Self { pid, start_time, pidfd, end_signal, watched, exit })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    pub(crate) fn start_time(&self) -> u64 {
        self.start_time
    }

    pub(crate) fn console_text(&self) -> String {
        self.watched.console_text()
    }

    /// Waits until the process has ended and is reaped.
    pub(crate) async fn wait(&self) -> MachineExit {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await.map(|value| value.clone()) {
            Ok(Some(exit)) => MachineExit::clone(&exit),
            Ok(None) | Err(_) => MachineExit {
                reason: MachineEnd::Crashed,
                status: "the thread that watched the VMM has failed".to_owned(),
                stderr_tail: self.watched.stderr_text(),
                console_tail: self.watched.console_text(),
            },
        }
    }

    /// The VMM is about to be told to quit.
    pub(crate) fn note_quit(&self) {
        self.watched.note_quit();
    }

    /// Kills the process and does not wait.
    pub(crate) fn kill(&self) {
        self.watched.note_kill();
        // It fails only when the process has ended already.
        rustix::process::pidfd_send_signal(&self.pidfd, self.end_signal).ok();
    }

    /// Why a VMM that did not take its configuration did not; it has ended when this returns.
    pub(crate) async fn refused(self, source: ControlError) -> LaunchError {
        if matches!(source, ControlError::Ended)
            && let Ok(exit) = tokio::time::timeout(EXIT_GRACE, self.wait()).await
        {
            return LaunchError::ExitedAtOnce { exit: Box::new(exit) };
        }
        self.kill();
        self.wait().await;
        LaunchError::Control { source }
    }

    pub(crate) fn memory_usage(&self) -> Option<u64> {
        // The process is reaped just before its end is published; a number that another process has got in
        // between would need the whole range of numbers to have gone round.
        if self.exit.borrow().is_some() {
            return None;
        }
        let statm = fs_err::read_to_string(format!("/proc/{}/statm", self.pid)).ok()?;
        let pages: u64 = statm.split(' ').nth(1)?.parse().ok()?;
        (pages > 0).then(|| pages * rustix::param::page_size() as u64)
    }
}

impl Drop for VmmProcess {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Field 22 of `/proc/PID/stat`.
fn process_start_time(pid: u32) -> Option<u64> {
    let stat = fs_err::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name of the program, field 2, may hold anything, also parentheses and spaces.
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.split(' ').nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_start_time_of_a_process_is_its_own_and_stays() {
        let first = super::process_start_time(std::process::id()).expect("this process runs");
        assert!(first > 0);
        assert_eq!(super::process_start_time(std::process::id()), Some(first));
        assert_eq!(super::process_start_time(u32::MAX), None);
    }
}
