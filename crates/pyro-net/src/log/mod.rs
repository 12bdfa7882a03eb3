//! The log of decisions, `network.jsonl`: bounded on disk and in memory, whatever the guest does. The newest entries are kept:
//! a guest that fills it cannot hide what it does next.

mod denials;
mod entry;
mod file;
mod read;

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

pub use denials::Denial;
use denials::Denials;
use entry::Key;
pub use entry::{Entry, Kind};
use file::Out;
pub use read::read;
use serde::Serialize;

/// Equal decisions within this time become one line.
const WINDOW: Duration = Duration::from_secs(1);
/// How many different decisions are counted at a time. Beyond it each is a line, which the limit of the file bounds.
const MAX_PENDING: usize = 1024;

/// The log of one sandbox.
#[derive(Debug)]
pub struct Log {
    file: Option<Out>,
    pending: HashMap<Key, Pending>,
    denials: Denials,
    counts: Counts,
}

/// What a log has counted since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Decisions that allowed something.
    pub allowed: u64,
    /// Decisions that denied something.
    pub denied: u64,
    /// Entries that could not be written.
    pub dropped: u64,
    /// Bytes to the guest.
    pub bytes_in: u64,
    /// Bytes from the guest.
    pub bytes_out: u64,
}

/// Equal decisions that are not written yet.
#[derive(Debug)]
struct Pending {
    since: Instant,
    /// The last of them, with the bytes and the count of all. None while there was only the one that was written.
    last: Option<Entry>,
}

impl Log {
    /// Opens a log of which the newest `limit_bytes` are kept, in two files; without a path it only counts.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn open(path: Option<PathBuf>, limit_bytes: u64) -> io::Result<Self> {
        let file = path.map(|path| Out::open(&path, limit_bytes)).transpose()?;
        let (denials, counts) = (Denials::default(), Counts::default());
        Ok(Self { file, pending: HashMap::new(), denials, counts })
    }

    /// Records an entry. One with bytes tells the end of a connection, whose decision was recorded before: it adds to the
    /// bytes and not to the decisions. A log that cannot be written does not stop the network; it counts what is dropped.
    pub fn record(&mut self, mut entry: Entry, now: Instant) {
        entry.clip();
        self.count(&entry);
        let key = entry.key();
        match self.pending.get_mut(&key) {
            Some(pending) if now.saturating_duration_since(pending.since) < WINDOW => {
                pending.hold(entry);
                return;
            }
            Some(pending) => {
                pending.since = now;
                if let Some(earlier) = pending.last.take() {
                    entry = earlier.with(entry);
                }
            }
            None => {
                if self.pending.len() >= MAX_PENDING {
                    self.flush(now);
                }
                if self.pending.len() < MAX_PENDING {
                    self.pending.insert(key, Pending { since: now, last: None });
                }
            }
        }
        self.write(&entry);
    }

    /// Writes the counts of decisions whose second is over. Call it about once a second while anything happens.
    pub fn flush(&mut self, now: Instant) {
        let is_over = |_: &Key, pending: &mut Pending| now.saturating_duration_since(pending.since) >= WINDOW;
        let over: Vec<_> = self.pending.extract_if(is_over).filter_map(|(_, pending)| pending.last).collect();
        self.write_all(over);
    }

    /// Writes all counts, as at the end of a sandbox.
    pub fn finish(&mut self) {
        let all = self.pending.drain().filter_map(|(_, pending)| pending.last).collect();
        self.write_all(all);
    }

    /// What was counted since the log was opened.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// How many entries could not be written.
    pub fn dropped(&self) -> u64 {
        self.counts.dropped
    }

    /// A mark for [`denials_since`](Self::denials_since).
    pub fn mark(&self) -> u64 {
        self.denials.mark()
    }

    /// What was denied after a mark, each name or address with its port once, in the order of the last time. Only the last
    /// 64 different ones are known.
    pub fn denials_since(&self, mark: u64) -> Vec<Denial> {
        self.denials.since(mark)
    }

    fn count(&mut self, entry: &Entry) {
        let add = |sum: &mut u64, more: u64| *sum = sum.saturating_add(more);
        add(&mut self.counts.bytes_in, entry.bytes_in.unwrap_or(0));
        add(&mut self.counts.bytes_out, entry.bytes_out.unwrap_or(0));
        match entry.allowed {
            _ if entry.is_end() => {}
            Some(true) => self.counts.allowed += 1,
            Some(false) => {
                self.counts.denied += 1;
                self.denials.add(entry);
            }
            None => {}
        }
    }

    fn write_all(&mut self, mut entries: Vec<Entry>) {
        entries.sort_by(|one, other| one.at.total_cmp(&other.at));
        for entry in entries {
            self.write(&entry);
        }
    }

    fn write(&mut self, entry: &Entry) {
        if let Some(file) = &mut self.file
            && !file.write(entry)
        {
            self.counts.dropped += entry.count.unwrap_or(1);
        }
    }
}

impl Pending {
    fn hold(&mut self, entry: Entry) {
        self.last = Some(match self.last.take() {
            Some(earlier) => earlier.with(entry),
            None => entry,
        });
    }
}

impl Entry {
    /// Returns a later equal entry, standing for this one too.
    fn with(self, mut later: Self) -> Self {
        later.add_bytes(&self);
        later.count = Some(self.count.unwrap_or(1) + later.count.unwrap_or(1));
        later
    }
}

#[cfg(test)]
mod tests;
