//! The log of decisions, `network.jsonl`: bounded on disk and in memory, whatever the guest does.

mod denials;
mod entry;
mod read;

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

pub use denials::Denial;
use denials::Denials;
use entry::Key;
pub use entry::{Entry, Kind};
pub use read::read;
use serde::Serialize;

use crate::append;

/// Equal decisions within this time become one line.
const WINDOW: Duration = Duration::from_secs(1);
/// How many different decisions are counted at a time. Beyond it each is a line, which the limit of the file bounds.
const MAX_PENDING: usize = 1024;
/// What the limit keeps for the line that tells of dropped entries.
const MARK_ROOM: u64 = 512;
/// The reason in that line.
const MARK: &str = "the log is full; further entries are dropped";

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
    /// Entries that are in no line of the file.
    pub dropped: u64,
    /// Bytes to the guest.
    pub bytes_in: u64,
    /// Bytes from the guest.
    pub bytes_out: u64,
}

#[derive(Debug)]
struct Out {
    file: File,
    len: u64,
    limit: u64,
    /// The line of dropped entries is there.
    is_full: bool,
    /// The last line has no end, because its writer died or the disk was full.
    is_torn: bool,
}

/// Equal decisions that are not written yet.
#[derive(Debug)]
struct Pending {
    since: Instant,
    /// The last of them, with the bytes and the count of all. None while there was only the one that was written.
    last: Option<Entry>,
}

impl Log {
    /// Opens a log that grows to `limit_bytes`, counting what is there; without a path it only counts.
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

    /// How many entries are in no line of the file.
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

impl Out {
    fn open(path: &std::path::Path, limit: u64) -> io::Result<Self> {
        let file = append::open(path)?;
        let len = file.metadata()?.len();
        let tail_len = len.min(MARK_ROOM);
        let mut tail = vec![0; usize::try_from(tail_len).unwrap_or(0)];
        file.read_exact_at(&mut tail, len - tail_len)?;
        let last = tail.trim_ascii_end().rsplit(|byte| *byte == b'\n').next().unwrap_or_default();
        let is_mark = |entry: Entry| entry.kind == Kind::Policy && entry.why.as_deref() == Some(MARK);
        let is_full = serde_json::from_slice(last).is_ok_and(is_mark);
        Ok(Self { file, len, limit, is_full, is_torn: tail.last().is_some_and(|last| *last != b'\n') })
    }

    /// Writes a line; returns whether it is in the file. Once an entry found no room, a last line tells so, and no smaller
    /// one follows it.
    fn write(&mut self, entry: &Entry) -> bool {
        if self.is_full {
            return false;
        }
        let line = self.line(entry);
        if self.len + line.len() as u64 + MARK_ROOM <= self.limit {
            return self.append(&line);
        }
        self.is_full = true;
        let mark = Entry { why: Some(MARK.to_owned()), ..Entry::new(entry.at, Kind::Policy) };
        let mark = self.line(&mark);
        if self.len + mark.len() as u64 <= self.limit {
            self.append(&mark);
        }
        false
    }

    fn line(&self, entry: &Entry) -> Vec<u8> {
        // An unfinished line must not be joined to this one.
        let mut line = if self.is_torn { vec![b'\n'] } else { Vec::new() };
        serde_json::to_writer(&mut line, entry).expect("an entry has text keys, and memory takes all");
        line.push(b'\n');
        line
    }

    /// Appends by one system call, so that readers see whole lines.
    fn append(&mut self, line: &[u8]) -> bool {
        let written = loop {
            match self.file.write(line) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                written => break written.unwrap_or(0),
            }
        };
        self.len += written as u64;
        if written > 0 {
            self.is_torn = written < line.len();
        }
        written == line.len()
    }
}

#[cfg(test)]
mod tests;
