//! The journal of a task: every command, its output as bytes, its end, in plain files.
//!
//! ```text
//! commands/000001.json      the entry: `running` from before the command is sent, replaced when it has ended
//! commands/000001.stdout    what it wrote, appended as it comes; there, if empty, when the command has ended
//! commands/000001.stderr
//! ```
//!
//! Names with a dot in front are the writer's own: `.starts` (`super::starts`); `.next.json`, in which the next start will be
//! written; `.000001.json.beside`, an end that is being written and then the start that it has replaced; `.empty`, the
//! output of all commands that have none; `.in-order`, which says that nothing is left running.
//!
//! Only the supervisor writes (`super::writer`); anybody may read. A start is durable before its command is sent to the
//! guest, and a name that exists is never written anew, so that a sequence number is given once. Output that was passed on
//! to anybody is in the file first.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize};

use crate::capture;
use crate::files;
use crate::guest::Stream;
use crate::record::Fault;
use crate::task::record::OutputRange;

/// What is kept of each stream of a command, in bytes; the rest is dropped, and the entry says so.
pub(crate) const STREAM_LIMIT: u64 = 64 << 20;
/// What is kept of all commands of a task together, in bytes: their output, and their own words. What comes after that is
/// dropped as well, and the entries say so.
pub(crate) const JOURNAL_LIMIT: u64 = 1 << 30;
/// A command may be long: 1 MiB of arguments, which JSON may write in six bytes each, as words and as one text.
pub(crate) const MOST_ENTRY: u64 = 16 << 20;

/// How far a command has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum EntryStatus {
    /// It has been or is being sent to the guest.
    Running,
    /// It ended by itself.
    Finished,
    /// Its time was up.
    TimedOut,
    /// Something else ended it, or may have: it was cancelled, or guest, supervisor or host went down.
    Interrupted,
}

/// One command of a task, as its file in `commands/` says. Times are epoch seconds, durations milliseconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[expect(missing_docs, reason = "the keys are those of the public contract, section 4")]
pub struct JournalEntry {
    pub sequence: u64,
    pub command: String,
    /// The words that were run as they are; none for a shell string, and in entries of an older pyro.
    #[serde(default)]
    pub argv: Option<Vec<String>>,
    pub cwd: String,
    /// Who ran it, as its caller named them; none: root.
    #[serde(default)]
    pub user: Option<String>,
    pub status: EntryStatus,
    /// None while it runs, and where nobody can know.
    pub exit_code: Option<i32>,
    pub duration_ms: Option<f64>,
    pub execution_mode: String,
    /// How strongly the machine isolated it; empty in entries of an older pyro.
    #[serde(default)]
    pub isolation: String,
    /// How its guest had started, `cold` or `restored`; empty in entries of an older pyro.
    #[serde(default)]
    pub start_mode: String,
    pub stdout_file: String,
    pub stderr_file: String,
    pub started_at: f64,
    /// When this entry was written.
    pub recorded_at: f64,
    /// What the command wrote, dropped bytes included.
    pub stdout_bytes: u64,
    pub stderr_bytes: u64,
    /// How much of that is not in the files.
    pub stdout_dropped_bytes: u64,
    pub stderr_dropped_bytes: u64,
    pub fault: Option<Fault>,
    /// Processes that it has left behind may write more, which is appended to its files.
    #[serde(default)]
    pub output_open: bool,
    /// Why it was interrupted, in words.
    pub reason: Option<String>,
    /// By which its caller finds it after a lost connection.
    pub request_id: String,
    /// What its caller should know of.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// The journal in one directory.
#[derive(Clone, Debug)]
pub(crate) struct Journal {
    dir: PathBuf,
    /// What is kept so far, in bytes; known once somebody has asked.
    kept: Arc<OnceLock<AtomicU64>>,
}

impl Journal {
    pub(crate) fn new(dir: PathBuf) -> Self {
        Self { dir, kept: Arc::default() }
    }

    /// What is kept of all commands, counted when it is first asked for. Only the writer, who alone adds to it, asks.
    pub(super) fn kept(&self) -> &AtomicU64 {
        self.kept.get_or_init(|| {
            let entries = std::fs::read_dir(&self.dir).into_iter().flatten().flatten();
            AtomicU64::new(entries.filter_map(|entry| Some(entry.metadata().ok()?.len())).sum())
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.dir
    }

    /// The numbers of all entries, ascending. Reads names only.
    pub(crate) fn sequences(&self) -> io::Result<Vec<u64>> {
        let entries = match fs_err::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            opened => opened?,
        };
        let mut sequences = Vec::new();
        for entry in entries {
            let name = entry?.file_name();
            let stem = name
                .to_str()
                .and_then(|name| name.strip_suffix(".json").or_else(|| name.strip_suffix(".json.damaged")));
            let digits =
                stem.filter(|stem| stem.len() >= 6 && stem.bytes().all(|byte| byte.is_ascii_digit()));
            sequences.extend(digits.and_then(|digits| digits.parse::<u64>().ok()));
        }
        sequences.sort_unstable();
        sequences.dedup();
        Ok(sequences)
    }

    /// Reads one entry; none where there is none. One that cannot be read is put aside, and told as interrupted.
    pub(crate) fn entry(&self, sequence: u64) -> io::Result<Option<JournalEntry>> {
        let path = self.json(sequence);
        let found = match files::read_bounded(&path, MOST_ENTRY) {
            Ok(Some(bytes)) => serde_json::from_slice::<JournalEntry>(&bytes)
                .map_err(|error| error.to_string())
                .and_then(|entry| {
                    let fits = entry.sequence == sequence;
                    if fits { Ok(entry) } else { Err(format!("it is entry {}", entry.sequence)) }
                }),
            Ok(None) if aside(&path).exists() => Err("it was put aside".to_owned()),
            Ok(None) => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::FileTooLarge => Err(error.to_string()),
            Err(error) => return Err(error),
        };
        match found {
            Ok(entry) => Ok(Some(entry)),
            Err(why) => {
                match fs_err::rename(&path, aside(&path)) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
                Ok(Some(self.unreadable(sequence, &why)))
            }
        }
    }

    /// The number of the newest entry; 0 where there is none.
    pub(crate) fn last_sequence(&self) -> io::Result<u64> {
        Ok(self.sequences()?.last().copied().unwrap_or(0))
    }

    /// The entry of a request, searched from the newest backwards.
    pub(crate) fn entry_of_request(&self, request_id: &str) -> io::Result<Option<JournalEntry>> {
        const RECENT: usize = 1000;
        for sequence in self.sequences()?.into_iter().rev().take(RECENT) {
            if let Some(entry) = self.entry(sequence)?.filter(|entry| entry.request_id == request_id) {
                return Ok(Some(entry));
            }
        }
        Ok(None)
    }

    /// The text of one stream: its head and its tail where it is longer than `most` bytes, of which only these are
    /// read.
    pub(crate) fn text(&self, sequence: u64, stream: Stream, most: u64) -> io::Result<(String, bool)> {
        let Some(mut file) = opened(&self.output(sequence, stream))? else {
            return Ok((String::new(), false));
        };
        let length = file.metadata()?.len();
        if length <= most {
            let whole = part(&mut file, 0, length)?;
            return Ok((String::from_utf8_lossy(&whole).into_owned(), false));
        }
        let tail = most / 2;
        let head = most - tail;
        let (first, last) = (part(&mut file, 0, head)?, part(&mut file, length - tail, tail)?);
        Ok((capture::joined(&first, length - most, &last), true))
    }

    /// Bytes of one stream from an offset on; none where there is no such stream, or nothing there.
    pub(crate) fn range(
        &self,
        sequence: u64,
        stream: Stream,
        offset: u64,
        most: u64,
    ) -> io::Result<OutputRange> {
        let Some(mut file) = opened(&self.output(sequence, stream))? else {
            return Ok(OutputRange { bytes: Vec::new(), file_bytes: 0 });
        };
        let bytes = part(&mut file, offset, most)?;
        Ok(OutputRange { bytes, file_bytes: file.metadata()?.len() })
    }

    /// Opens what a command wrote, from an offset on; none where there is no such file, as before its first output.
    pub(crate) fn reader(&self, sequence: u64, stream: Stream, offset: u64) -> io::Result<Option<File>> {
        let Some(mut file) = opened(&self.output(sequence, stream))? else { return Ok(None) };
        file.seek(SeekFrom::Start(offset))?;
        Ok(Some(file))
    }

    fn unreadable(&self, sequence: u64, why: &str) -> JournalEntry {
        let size = |stream| std::fs::metadata(self.output(sequence, stream)).map_or(0, |found| found.len());
        JournalEntry {
            sequence,
            command: String::new(),
            argv: None,
            cwd: String::new(),
            user: None,
            status: EntryStatus::Interrupted,
            exit_code: None,
            duration_ms: None,
            execution_mode: String::new(),
            isolation: String::new(),
            start_mode: String::new(),
            stdout_file: format!("{sequence:06}.stdout"),
            stderr_file: format!("{sequence:06}.stderr"),
            started_at: 0.0,
            recorded_at: 0.0,
            stdout_bytes: size(Stream::Stdout),
            stderr_bytes: size(Stream::Stderr),
            stdout_dropped_bytes: 0,
            stderr_dropped_bytes: 0,
            fault: None,
            output_open: false,
            reason: Some(format!(
                "its entry cannot be read ({why}) and is kept as {sequence:06}.json.damaged"
            )),
            request_id: String::new(),
            notes: Vec::new(),
        }
    }

    pub(super) fn json(&self, sequence: u64) -> PathBuf {
        self.dir.join(format!("{sequence:06}.json"))
    }

    pub(super) fn output(&self, sequence: u64, stream: Stream) -> PathBuf {
        self.dir.join(match stream {
            Stream::Stdout => format!("{sequence:06}.stdout"),
            Stream::Stderr => format!("{sequence:06}.stderr"),
        })
    }
}

/// A file to read, if it is there.
fn opened(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        opened => opened.map(Some),
    }
}

/// At most so many bytes of a file, from an offset on.
fn part(file: &mut File, offset: u64, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(offset))?;
    file.take(most).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn aside(path: &Path) -> PathBuf {
    path.with_extension("json.damaged")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::writer::tests::{begin, journal};

    #[test]
    fn a_damaged_entry_is_put_aside_and_keeps_its_number() {
        let (dir, journal) = journal();
        drop(begin(&journal, 1, "one").expect("begun"));
        drop(begin(&journal, 2, "two").expect("begun"));
        for damage in ["", "{\"sequence\":", "\0\0\0", "{\"sequence\": 9}"] {
            fs_err::write(dir.path().join("000001.json"), damage).expect("written");
            let entry = journal.entry(1).expect("read").expect("told of");
            assert_eq!(entry.status, EntryStatus::Interrupted);
            assert!(entry.reason.expect("said").contains("000001.json.damaged"));
        }
        assert_eq!(journal.sequences().expect("read"), [1, 2]);
        assert_eq!(journal.entry(2).expect("read").expect("there").command, "two");
        begin(&journal, 1, "again").expect("the supervisor never asks for it: it goes on after the last");
    }

    #[test]
    fn other_files_are_no_entries() {
        let (dir, journal) = journal();
        for name in
            ["1.json", "abcdef.json", ".000009.json.x", "000003.stdout", "99999999999999999999999.json"]
        {
            fs_err::write(dir.path().join(name), "{}").expect("written");
        }
        assert_eq!(journal.sequences().expect("read"), Vec::<u64>::new());
    }
}
