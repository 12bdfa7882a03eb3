//! Where the starts of commands are durable before their own files are.
//!
//! To make a new file and its name durable takes a disk two or three writes, each after the other, and a file system with a
//! journal a commit for each; to write over what a file holds already takes one. So a few starts fit into one file that
//! was made beforehand, each in a slot of its own, until their entries have settled.
//!
//! ```text
//! .starts    slots of 4096 bytes: the first 8 bytes of the SHA-256 of what follows, its length (4 bytes, little-endian),
//!            an entry as JSON. A slot that is not like this holds nothing.
//! ```

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use sha2::{Digest, Sha256};

use super::journal::JournalEntry;
use crate::files;

const SLOT: usize = 4096;
const SLOTS: usize = 16;
const CHECK: usize = 8;
const HEAD: usize = CHECK + size_of::<u32>();

/// The file of slots, as its only writer has it.
#[derive(Debug)]
pub(crate) struct Starts {
    file: File,
    free: Mutex<Vec<u64>>,
}

/// One start that is durable here; whoever has made it durable elsewhere gives the slot back.
#[derive(Debug)]
pub(crate) struct Slot(u64);

impl Starts {
    /// Makes the file, with nothing in it, in the place of whatever is there.
    pub(crate) fn make(path: &Path) -> io::Result<Self> {
        let beside = path.with_extension("new");
        let mut file = File::options().write(true).create(true).truncate(true).open(&beside)?;
        // Written, not only allocated: to write for the first time is what takes long.
        file.write_all(&[0; SLOT * SLOTS])?;
        file.sync_all()?;
        fs_err::rename(&beside, path)?;
        files::sync_directory(path.parent().unwrap_or(path))?;
        Ok(Self { file, free: Mutex::new((0..SLOTS as u64).collect()) })
    }

    /// A slot for an entry of so many bytes; none where it does not fit, or all are taken.
    pub(crate) fn slot_for(&self, bytes: &[u8]) -> Option<Slot> {
        let fits = bytes.len() <= SLOT - HEAD;
        fits.then(|| self.free.lock().unwrap_or_else(PoisonError::into_inner).pop())?.map(Slot)
    }

    /// Writes an entry, which is durable when this returns.
    pub(crate) fn write(&self, Slot(number): &Slot, bytes: &[u8]) -> io::Result<()> {
        let mut slot = Vec::with_capacity(HEAD + bytes.len());
        slot.extend_from_slice(&[0; CHECK]);
        slot.extend_from_slice(&u32::try_from(bytes.len()).map_err(io::Error::other)?.to_le_bytes());
        slot.extend_from_slice(bytes);
        let check = check(&slot[CHECK..]);
        slot[..CHECK].copy_from_slice(&check);
        self.file.write_all_at(&slot, number * SLOT as u64)?;
        self.file.sync_data()
    }

    /// Lets another start have the slot. What it holds is told to nobody any more, as long as the host keeps its power; and
    /// then nobody who finds it there lacks the entry.
    pub(crate) fn give_back(&self, Slot(number): Slot) {
        drop(self.file.write_all_at(&[0; HEAD], number * SLOT as u64));
        self.free.lock().unwrap_or_else(PoisonError::into_inner).push(number);
    }
}

/// The starts in a file of slots, older ones first. There may be some that have settled long ago.
pub(crate) fn read(path: &Path) -> io::Result<Vec<JournalEntry>> {
    let bytes = files::read_or_nothing(path, (SLOT * SLOTS) as u64)?;
    let mut starts: Vec<_> = bytes.chunks(SLOT).filter_map(entry).collect();
    starts.sort_by(|one, other| one.started_at.total_cmp(&other.started_at));
    Ok(starts)
}

fn entry(slot: &[u8]) -> Option<JournalEntry> {
    let (sum, rest) = slot.split_first_chunk::<CHECK>()?;
    let (length, json) = rest.split_first_chunk()?;
    let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
    let json = json.get(..length)?;
    (check(&rest[..size_of::<u32>() + length]) == *sum).then(|| serde_json::from_slice(json).ok())?
}

fn check(bytes: &[u8]) -> [u8; CHECK] {
    let digest = Sha256::digest(bytes);
    std::array::from_fn(|index| digest[index])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::writer::tests::{journal, new};

    #[test]
    fn what_a_slot_holds_is_read_until_it_is_given_back() {
        let (dir, journal) = journal();
        let path = dir.path().join(".starts");
        let entries: Vec<_> = (1..=3)
            .map(|sequence| journal.begin(sequence, new("make"), None).expect("begun").0.entry)
            .collect();
        let json = |index: usize| serde_json::to_vec(&entries[index]).expect("JSON");
        let starts = Starts::make(&path).expect("made");
        assert_eq!(read(&path).expect("read"), []);
        let slots = [0, 1].map(|index| {
            let slot = starts.slot_for(&json(index)).expect("free");
            starts.write(&slot, &json(index)).expect("written");
            slot
        });
        let sequences = || read(&path).expect("read").iter().map(|entry| entry.sequence).collect::<Vec<_>>();
        assert_eq!(sequences(), [1, 2]);
        let [first, _] = slots;
        starts.give_back(first);
        assert_eq!(sequences(), [2]);
        let slot = starts.slot_for(&json(2)).expect("free");
        starts.write(&slot, &json(2)).expect("written");
        assert_eq!(sequences(), [2, 3]);
    }

    #[test]
    fn no_more_than_there_are_slots_and_nothing_longer() {
        let (dir, _) = journal();
        let starts = Starts::make(&dir.path().join(".starts")).expect("made");
        assert!(starts.slot_for(&[b' '; SLOT]).is_none());
        let taken: Vec<_> = (0..SLOTS).map(|_| starts.slot_for(b"{}").expect("free")).collect();
        assert!(starts.slot_for(b"{}").is_none());
        taken.into_iter().for_each(|slot| starts.give_back(slot));
        assert!(starts.slot_for(b"{}").is_some());
    }

    #[test]
    fn a_torn_slot_holds_nothing_and_a_strange_file_neither() {
        let (dir, journal) = journal();
        let path = dir.path().join(".starts");
        let entry = journal.begin(1, new("make"), None).expect("begun").0.entry;
        let json = serde_json::to_vec(&entry).expect("JSON");
        let starts = Starts::make(&path).expect("made");
        starts.write(&starts.slot_for(&json).expect("free"), &json).expect("written");
        let whole = fs_err::read(&path).expect("read");
        let at = whole.iter().position(|byte| *byte != 0).expect("somewhere") / SLOT * SLOT;
        for offset in [at, at + CHECK, at + HEAD, at + HEAD + json.len() - 1] {
            let mut torn = whole.clone();
            torn[offset] ^= 1;
            fs_err::write(&path, torn).expect("written");
            assert_eq!(read(&path).expect("read"), [], "a change at {offset}");
        }
        for strange in [&b""[..], b"{}", &[0xff; SLOT], &[0; SLOT * (SLOTS + 1)]] {
            fs_err::write(&path, strange).expect("written");
            assert_eq!(read(&path).expect("read"), []);
        }
        fs_err::remove_file(&path).expect("removed");
        assert_eq!(read(&path).expect("there is none"), []);
    }
}
