//! The entries that become durable in their own time: whoever waits has its answer by then, and few writes to the disk serve
//! all commands that have begun or ended meanwhile.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use crate::task::journal::{Journal, JournalEntry};
use crate::task::starts::{Slot, Starts};
use crate::task::writer::{NewEntry, Writer};

/// How much later than it can be read an entry may become durable.
const LATER: Duration = Duration::from_millis(50);
/// Between two attempts at a disk that refuses.
const AT_MOST: Duration = Duration::from_secs(10);

/// What of a journal may not be on the disk, or not in its place.
#[derive(Debug)]
pub(super) struct Unsettled {
    journal: Journal,
    /// Made while the first command runs.
    starts: OnceLock<Starts>,
    due: Mutex<Due>,
    /// Ends that could not be written yet. Callers are told of them from here.
    unwritten: Mutex<BTreeMap<u64, JournalEntry>>,
    /// Held by whoever makes some durable: when it is free, all that were taken are.
    settling: Mutex<()>,
}

#[derive(Debug, Default)]
struct Due {
    begun: Vec<(u64, Slot)>,
    ended: Vec<u64>,
    /// Somebody looks after them soon.
    is_looked_after: bool,
}

impl Unsettled {
    pub(super) fn of(journal: Journal) -> Arc<Self> {
        Arc::new(Self {
            journal,
            starts: OnceLock::new(),
            due: Mutex::default(),
            unwritten: Mutex::default(),
            settling: Mutex::default(),
        })
    }

    /// Gives a command its number; its start is durable when this returns. To be called where it may block.
    pub(super) fn begin(self: &Arc<Self>, sequence: u64, new: NewEntry) -> io::Result<Writer> {
        let (writer, slot) = self.journal.begin(sequence, new, self.starts.get())?;
        if let Some(slot) = slot {
            self.add(|due| due.begun.push((sequence, slot)));
        }
        Ok(writer)
    }

    /// A command has ended, and its end is in its file.
    pub(super) fn ended(self: &Arc<Self>, sequence: u64) {
        self.unwritten().remove(&sequence);
        self.add(|due| due.ended.push(sequence));
    }

    /// A command has ended, and its end cannot be written now.
    pub(super) fn cannot_write(&self, entry: JournalEntry) {
        self.unwritten().insert(entry.sequence, entry);
    }

    /// The end of a command that is not in its file yet.
    pub(super) fn unwritten_end(&self, sequence: u64) -> Option<JournalEntry> {
        self.unwritten().get(&sequence).cloned()
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
        if !std::mem::replace(&mut due.is_looked_after, true) {
            drop(tokio::spawn(Arc::clone(self).look_after()));
        }
    }

    /// Settles until nothing is due. There is one who does this, so that no more than one thread waits for the disk.
    async fn look_after(self: Arc<Self>) {
        let mut pause = LATER;
        loop {
            tokio::time::sleep(pause).await;
            let unsettled = Arc::clone(&self);
            let settled = tokio::task::spawn_blocking(move || unsettled.settle()).await;
            let mut due = self.due();
            if due.begun.is_empty() && due.ended.is_empty() {
                due.is_looked_after = false;
                return;
            }
            // There is no event for a disk that takes something again.
            pause = if matches!(settled, Ok(Ok(()))) { LATER } else { (pause * 2).min(AT_MOST) };
        }
    }

    /// Makes durable what is not.
    pub(super) fn settle(&self) -> io::Result<()> {
        let _settling = self.settling();
        let (begun, ended) = {
            let mut due = self.due();
            (std::mem::take(&mut due.begun), std::mem::take(&mut due.ended))
        };
        let sequences: BTreeSet<_> =
            begun.iter().map(|(sequence, _)| *sequence).chain(ended.clone()).collect();
        if sequences.is_empty() {
            return Ok(());
        }
        let (settled, mut result) = self.journal.settle(&sequences);
        for sequence in ended {
            // The start stands beside the end until nobody needs it any more.
            let forgotten =
                if settled.contains(&sequence) { self.journal.forget_start(sequence) } else { Ok(()) };
            if !settled.contains(&sequence) || forgotten.is_err() {
                self.due().ended.push(sequence);
            }
            result = result.and(forgotten);
        }
        for (sequence, slot) in begun {
            match self.starts.get() {
                Some(starts) if settled.contains(&sequence) => starts.give_back(slot),
                _ => self.due().begun.push((sequence, slot)),
            }
        }
        result
    }

    fn unwritten(&self) -> MutexGuard<'_, BTreeMap<u64, JournalEntry>> {
        self.unwritten.lock().unwrap_or_else(PoisonError::into_inner)
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
    use crate::task::writer::tests::{end, journal, new};

    #[tokio::test]
    async fn ends_are_looked_after_once_and_later() {
        let (dir, journal) = journal();
        let unsettled = Unsettled::of(journal.clone());
        for sequence in [1, 2] {
            end(&journal, sequence);
            unsettled.ended(sequence);
        }
        assert!(unsettled.due().ended.len() == 2 && unsettled.due().is_looked_after);
        while unsettled.due().is_looked_after {
            tokio::time::sleep(LATER).await;
        }
        assert!(unsettled.due().ended.is_empty() && !dir.path().join(".000002.json.beside").exists());
    }

    #[tokio::test]
    async fn one_that_cannot_be_made_durable_stays_due_and_holds_no_other() {
        let (dir, journal) = journal();
        let unsettled = Unsettled::of(journal.clone());
        drop(unsettled.begin(1, new("the first has no slot")).expect("begun"));
        assert!(unsettled.due().begun.is_empty());
        unsettled.prepare().expect("made");
        for sequence in [2, 3] {
            drop(unsettled.begin(sequence, new("make")).expect("begun"));
        }
        let (path, away) = (dir.path().join("000002.json"), dir.path().join("away"));
        fs_err::rename(&path, &away).expect("moved");
        // What is in its place can be opened by nobody.
        std::os::unix::fs::symlink("000002.json", &path).expect("made");
        unsettled.settle().expect_err("it leads nowhere");
        let due = || unsettled.due().begun.iter().map(|(sequence, _)| *sequence).collect::<Vec<_>>();
        assert_eq!(due(), [2]);
        fs_err::rename(&away, &path).expect("moved");
        unsettled.settle().expect("settled");
        assert_eq!(due(), [0; 0]);
    }

    #[tokio::test]
    async fn what_somebody_has_removed_is_settled() {
        let (dir, journal) = journal();
        let unsettled = Unsettled::of(journal.clone());
        for (sequence, gone) in [(1, "000001.stdout"), (2, "000002.json")] {
            end(&journal, sequence);
            unsettled.ended(sequence);
            fs_err::remove_file(dir.path().join(gone)).expect("removed");
        }
        unsettled.settle().expect("settled");
        assert!(unsettled.due().ended.is_empty());
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
