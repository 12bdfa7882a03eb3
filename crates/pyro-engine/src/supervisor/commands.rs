//! The commands that run now, by their numbers.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::ending::Ending;
use crate::error::{Error, ErrorKind};

/// Commands of one task at the same time: as many streams as the guest channel keeps apart, less some for other
/// calls.
pub(super) const MOST: usize = 100;

/// How far the output of a command has come, in bytes that are in its files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Progress {
    pub(super) stdout: u64,
    pub(super) stderr: u64,
    pub(super) ended: bool,
}

/// A running command, as others see it.
#[derive(Clone, Debug)]
pub(super) struct Handle {
    pub(super) progress: watch::Receiver<Progress>,
    pub(super) cancel: watch::Sender<Option<Ending>>,
}

#[derive(Debug, Default)]
struct Running {
    handles: BTreeMap<u64, Handle>,
    /// All are being ended, and whatever begins now is ended with them.
    ending: Option<Ending>,
}

/// All commands that run.
#[derive(Debug)]
pub(super) struct Commands {
    running: Mutex<Running>,
    /// How many there are, for whoever waits for none.
    count: watch::Sender<usize>,
    /// The number that was given last; held while one is given.
    last: tokio::sync::Mutex<u64>,
    /// The same, for whoever waits for a number.
    begun: watch::Sender<u64>,
}

impl Commands {
    pub(super) fn after(last: u64) -> Self {
        Self {
            running: Mutex::default(),
            count: watch::Sender::new(0),
            last: tokio::sync::Mutex::new(last),
            begun: watch::Sender::new(last),
        }
    }

    /// Gives the next number to a command, if `begin` succeeds in making its entry.
    pub(super) async fn begin<T>(
        &self,
        handle: Handle,
        begin: impl AsyncFnOnce(u64) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let mut last = self.last.lock().await;
        if self.running().handles.len() >= MOST {
            let text = format!("{MOST} commands run in this task at the same time already");
            return Err(
                Error::new(ErrorKind::HostResources, text).hint("wait for some to end, or use another task")
            );
        }
        let begun = begin(*last + 1).await?;
        *last += 1;
        {
            let mut running = self.running();
            if running.ending.is_some() {
                handle.cancel.send_replace(running.ending);
            }
            running.handles.insert(*last, handle);
            // Under the lock: whoever ends all commands counts this one, or ends it here.
            self.count.send_modify(|count| *count += 1);
        }
        self.begun.send_replace(*last);
        Ok(begun)
    }

    pub(super) fn get(&self, sequence: u64) -> Option<Handle> {
        self.running().handles.get(&sequence).cloned()
    }

    /// Waits until a number has been given.
    pub(super) async fn begun(&self, sequence: u64) {
        // The sender lives as long as this.
        drop(self.begun.subscribe().wait_for(|last| *last >= sequence).await);
    }

    pub(super) fn ended(&self, sequence: u64) {
        if self.running().handles.remove(&sequence).is_some() {
            self.count.send_modify(|count| *count -= 1);
        }
    }

    /// Whether none runs.
    pub(super) fn is_idle(&self) -> bool {
        *self.count.borrow() == 0
    }

    /// Asks all commands to end, and waits until they have: each gives up by itself in bounded time.
    pub(super) async fn end_all(&self, ending: Ending) {
        {
            let mut running = self.running();
            running.ending = Some(ending);
            for handle in running.handles.values() {
                handle.cancel.send_replace(Some(ending));
            }
        }
        drop(self.count.subscribe().wait_for(|count| *count == 0).await);
    }

    /// Commands may run again.
    pub(super) fn reopen(&self) {
        let mut running = self.running();
        running.ending = None;
    }

    fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
