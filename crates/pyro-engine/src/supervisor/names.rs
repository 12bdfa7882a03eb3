//! The names of finished entries, which become durable in their own time: the caller has its answer by then, and one
//! write to the disk serves all commands that have ended meanwhile.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::task::journal::Journal;

/// How much later than the answer a name may become durable. The next command of a busy caller has begun by then, and
/// makes all names durable anyway.
const LATER: Duration = Duration::from_millis(50);

/// Whether there are names in a journal's directory that may not be on the disk.
#[derive(Debug)]
pub(super) struct Names {
    journal: Journal,
    due: AtomicBool,
    /// Somebody looks after them soon.
    coming: AtomicBool,
}

impl Names {
    pub(super) fn of(journal: Journal) -> Arc<Self> {
        Arc::new(Self { journal, due: AtomicBool::new(false), coming: AtomicBool::new(false) })
    }

    /// An entry was replaced.
    pub(super) fn changed(self: &Arc<Self>) {
        self.due.store(true, Ordering::Release);
        if self.coming.swap(true, Ordering::AcqRel) {
            return;
        }
        let names = Arc::clone(self);
        drop(tokio::spawn(async move {
            tokio::time::sleep(LATER).await;
            names.coming.swap(false, Ordering::AcqRel);
            // What cannot be written down now is so with the next entry.
            drop(tokio::task::spawn_blocking(move || names.settle()));
        }));
    }

    /// Does what makes all names durable; what has changed before it need not be looked after any more.
    pub(super) fn with<T>(self: &Arc<Self>, sync: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let was_due = self.due.swap(false, Ordering::AcqRel);
        let done = sync();
        if done.is_err() && was_due {
            self.due.store(true, Ordering::Release);
        }
        done
    }

    /// Makes names durable that are not.
    pub(super) fn settle(self: &Arc<Self>) -> io::Result<()> {
        if !self.due.load(Ordering::Acquire) {
            return Ok(());
        }
        self.with(|| self.journal.sync())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Arc<Names> {
        Names::of(Journal::new(std::env::temp_dir()))
    }

    #[tokio::test]
    async fn names_are_looked_after_once_and_later() {
        let names = names();
        names.changed();
        names.changed();
        assert!(names.due.load(Ordering::Acquire) && names.coming.load(Ordering::Acquire));
        while names.due.load(Ordering::Acquire) {
            tokio::time::sleep(LATER).await;
        }
        assert!(!names.coming.load(Ordering::Acquire));
    }

    #[tokio::test]
    async fn a_sync_of_somebody_else_serves_too_unless_it_fails() {
        let names = names();
        names.changed();
        let failed: io::Result<()> = names.with(|| Err(io::Error::other("full")));
        assert!(failed.is_err() && names.due.load(Ordering::Acquire));
        names.with(|| Ok(())).expect("synced");
        assert!(!names.due.load(Ordering::Acquire));
    }
}
