//! PID 1's oldest duty: reap every child, its own and those that lost their parent.

use std::collections::HashMap;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::process::{Pid, WaitOptions, wait};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

type Waiting = Arc<Mutex<HashMap<Pid, oneshot::Sender<ExitStatus>>>>;

/// Tells the end of children that were registered, and reaps all others silently.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reaper {
    waiting: Waiting,
}

impl Reaper {
    /// Starts to reap, on the current runtime.
    pub(crate) fn start() -> std::io::Result<Self> {
        let reaper = Self::default();
        let mut ended = signal(SignalKind::child())?;
        let waiting = Arc::clone(&reaper.waiting);
        drop(tokio::spawn(async move {
            while ended.recv().await.is_some() {
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

fn reap_all(waiting: &Waiting) {
    while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
        let watcher = waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&pid);
        if let Some(watcher) = watcher {
            // Whoever asked may have gone away; the child is reaped all the same.
            _ = watcher.send(ExitStatus::from_raw(status.as_raw()));
        }
    }
}
