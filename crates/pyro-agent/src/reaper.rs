//! PID 1's oldest duty: reap every child, its own and those that lost their parent.
//!
//! Their ends come by a descriptor rather than by a handler, which would interrupt the agent, write to a socket for itself
//! and read from it again: where the processor is emulated, that takes as long as half a short command.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::process::{Pid, WaitOptions, wait};
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;

type Waiting = Arc<Mutex<HashMap<Pid, oneshot::Sender<ExitStatus>>>>;

/// Tells the end of children that were registered, and reaps all others silently.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reaper {
    waiting: Waiting,
}

impl Reaper {
    /// Starts to reap, on the current runtime. From now on this thread, and those that it starts, block SIGCHLD.
    pub(crate) fn start() -> io::Result<Self> {
        let reaper = Self::default();
        let ends = File::from(ends_of_children()?);
        #[expect(unsafe_code, reason = "tokio asks for a promise about the descriptor")]
        // SAFETY: the file owns its descriptor, and lives in what is made here.
        let ends = unsafe { AsyncFd::register(ends) }?;
        let waiting = Arc::clone(&reaper.waiting);
        drop(tokio::spawn(async move {
            // An end is told once, however many children have ended by then; and once more where the guest sends the
            // signal to this thread alone. What is left behind would keep the next from being told.
            while let Ok(mut ready) = ends.readable().await {
                drop(ends.get_ref().read(&mut [0; 2 * size_of::<libc::signalfd_siginfo>()]));
                ready.clear_ready();
                reap_all(&waiting);
            }
        }));
        Ok(reaper)
    }

    /// Asks for the exit status of a child. The agent has one thread for this and the reaping, so a child that
    /// was started since the last `await` cannot have been reaped yet.
    pub(crate) fn watch(&self, pid: Pid) -> oneshot::Receiver<ExitStatus> {
        let (sender, receiver) = oneshot::channel();
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(pid, sender);
        receiver
    }

    /// Whether a child is watched and has not been reaped.
    pub(crate) fn watches(&self, pid: Pid) -> bool {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&pid)
    }
}

/// Readable while SIGCHLD is pending.
#[expect(unsafe_code, reason = "rustix has no signalfd")]
fn ends_of_children() -> io::Result<OwnedFd> {
    // SAFETY: the set is initialised before it is read, and the descriptor is new and nobody else's.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        if libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) != 0 {
            return Err(io::Error::other("SIGCHLD cannot be blocked"));
        }
        match libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) {
            -1 => Err(io::Error::last_os_error()),
            descriptor => Ok(OwnedFd::from_raw_fd(descriptor)),
        }
    }
}

fn reap_all(waiting: &Waiting) {
    while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
        let watcher = waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&pid);
        if let Some(watcher) = watcher {
            // Whoever asked may have gone away; the child is reaped all the same.
            _ = watcher.send(ExitStatus::from_raw(status.as_raw()));
        }
    }
}
