//! The entries that become durable in their own time: whoever waits has its answer by then, and few writes to the disk serve
//! all commands that have begun or ended meanwhile.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use crate::task::journal::Journal;
use crate::task::starts::{Slot, Starts};
use crate::task::writer::{Ended, NewEntry, Writer};

/// How much later than it can be read an entry may become durable.
const LATER: Duration = Duration::from_millis(50);

/// What of a journal may not be on the disk, or not in its place.
#[derive(Debug)]
pub(super) struct Unsettled {
    journal: Journal,
    /// Made while the first command runs.
    starts: OnceLock<Starts>,
    due: Mutex<Due>,
    /// Held by whoever makes some durable: when it is free, all that were taken are.
    settling: Mutex<()>,
}

#[derive(Debug, Default)]
struct Due {
    begun: Vec<(u64, Slot)>,
    ended: Vec<Ended>,
    /// Somebody looks after them soon.
    is_looked_after: bool,
}

impl Unsettled {
    pub(super) fn of(journal: Journal) -> Arc<Self> {
        Arc::new(Self { journal, starts: OnceLock::new(), due: Mutex::default(), settling: Mutex::default() })
    }

    /// Gives a command its number; its start is durable when this returns. To be called where it may block.
    pub(super) fn begin(self: &Arc<Self>, sequence: u64, new: NewEntry) -> io::Result<Writer> {
        let (writer, slot) = self.journal.begin(sequence, new, self.starts.get())?;
        if let Some(slot) = slot {
            self.add(|due| due.begun.push((sequence, slot)));
        }
        Ok(writer)
    }

    /// A command has ended.
    pub(super) fn ended(self: &Arc<Self>, ended: Ended) {
        self.add(|due| due.ended.push(ended));
    }

    /// Makes what the next command needs, while nobody waits. To be called where it may block.
    pub(super) fn prepare(&self) -> io::Result<()> {
        self.journal.prepare_next()?;
        if self.starts.get().is_none() {
            // Another command may have had the same thought: then its file is the one that stays in use, and must be the
            // one that is found later.
            let _settling = self.settling();
            if self.starts.get().is_none() {
                drop(self.starts.set(self.journal.make_starts()?));
            }
        }
        Ok(())
    }

    fn add(self: &Arc<Self>, add: impl FnOnce(&mut Due)) {
        let mut due = self.due();
        add(&mut due);
        if std::mem::replace(&mut due.is_looked_after, true) {
            return;
        }
        drop(due);
        let unsettled = Arc::clone(self);
        drop(tokio::spawn(async move {
            tokio::time::sleep(LATER).await;
            unsettled.due().is_looked_after = false;
            // What cannot be written down now is so with the next command.
            drop(tokio::task::spawn_blocking(move || unsettled.settle()));
        }));
    }

    /// Makes durable what is not.
    pub(super) fn settle(&self) -> io::Result<()> {
        let _settling = self.settling();
        let (begun, ended) = {
            let mut due = self.due();
            (std::mem::take(&mut due.begun), std::mem::take(&mut due.ended))
        };
        if begun.is_empty() && ended.is_empty() {
            return Ok(());
        }
        let settled = self.journal.settle(begun.iter().map(|(sequence, _)| *sequence), &ended);
        if settled.is_err() {
            let mut due = self.due();
            due.begun.extend(begun);
            due.ended.extend(ended);
        } else if let Some(starts) = self.starts.get() {
            begun.into_iter().for_each(|(_, slot)| starts.give_back(slot));
        }
        settled
    }

    fn due(&self) -> MutexGuard<'_, Due> {
        self.due.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn settling(&self) -> MutexGuard<'_, ()> {
        self.settling.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::writer::tests::{ended, journal, new};

    #[tokio::test]
    async fn ends_are_looked_after_once_and_later() {
        let (dir, journal) = journal();
        let unsettled = Unsettled::of(journal.clone());
        for sequence in [1, 2] {
            unsettled.ended(ended(&journal, sequence));
        }
        assert!(unsettled.due().ended.len() == 2 && unsettled.due().is_looked_after);
        let beside = dir.path().join(".000002.json.beside");
        while beside.exists() {
            tokio::time::sleep(LATER).await;
        }
        unsettled.settle().expect("nothing is due");
        assert!(unsettled.due().ended.is_empty() && !unsettled.due().is_looked_after);
    }

    #[tokio::test]
    async fn what_cannot_be_made_durable_stays_due_and_keeps_its_slot() {
        let (dir, journal) = journal();
        let unsettled = Unsettled::of(journal);
        drop(unsettled.begin(1, new("the first has no slot")).expect("begun"));
        assert!(unsettled.due().begun.is_empty());
        unsettled.prepare().expect("made");
        drop(unsettled.begin(2, new("make")).expect("begun"));
        let (path, away) = (dir.path().join("000002.json"), dir.path().join("away"));
        fs_err::rename(&path, &away).expect("moved");
        unsettled.settle().expect_err("it is not there");
        assert_eq!(unsettled.due().begun.len(), 1);
        fs_err::rename(&away, &path).expect("moved");
        unsettled.settle().expect("settled");
        assert!(unsettled.due().begun.is_empty());
    }

    #[tokio::test]
    async fn more_commands_than_there_are_slots_begin_all_the_same() {
        let (_dir, journal) = journal();
        let unsettled = Unsettled::of(journal.clone());
        unsettled.prepare().expect("made");
        for sequence in 1..=40 {
            drop(unsettled.begin(sequence, new("make")).expect("begun"));
        }
        assert!(unsettled.due().begun.len() < 40);
        unsettled.settle().expect("settled");
        assert_eq!(journal.sequences().expect("read"), (1..=40).collect::<Vec<_>>());
    }
}
