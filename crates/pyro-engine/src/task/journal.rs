//! The journal of a task: every command, its output as bytes, its end, in plain files.
//!
//! ```text
//! commands/000001.json      the entry: `running` from before the command is sent, replaced when it has ended
//! commands/000001.stdout    what it wrote, appended as it comes; there, if empty, when the command has ended
//! commands/000001.stderr
//! ```
//!
//! Only the supervisor writes; anybody may read. An entry is durable before its command is sent to the guest, and
//! a name that exists is never written anew, so that a sequence number is given once. Output that was passed on to
//! anybody is in the file first.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::capture;
use crate::files::{self, Place};
use crate::guest::Stream;
use crate::record::Fault;
use crate::registry::now;
use crate::task::record::OutputRange;

/// What is kept of each stream of a command, in bytes; the rest is dropped, and the entry says so.
pub(crate) const STREAM_LIMIT: u64 = 64 << 20;
/// A command may be long: 1 MiB of arguments, which JSON may write in six bytes each.
const MOST_ENTRY: u64 = 8 << 20;

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
    pub cwd: String,
    pub status: EntryStatus,
    /// None while it runs, and where nobody can know.
    pub exit_code: Option<i32>,
    pub duration_ms: Option<f64>,
    pub execution_mode: String,
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
    /// Why it was interrupted, in words.
    pub reason: Option<String>,
    /// By which its caller finds it after a lost connection.
    pub request_id: String,
}

/// What is about to be run.
#[derive(Clone, Debug)]
pub(crate) struct NewEntry {
    pub(crate) command: String,
    pub(crate) cwd: String,
    pub(crate) execution_mode: String,
    pub(crate) request_id: String,
}

/// The journal in one directory.
#[derive(Clone, Debug)]
pub(crate) struct Journal {
    dir: PathBuf,
}

/// The part of an entry that is being written.
#[derive(Debug)]
pub(crate) struct Writer {
    dir: PathBuf,
    pub(crate) entry: JournalEntry,
    /// Opened when there is something to hold.
    stdout: Option<File>,
    stderr: Option<File>,
}

impl Journal {
    pub(crate) fn new(dir: PathBuf) -> Self {
        Self { dir }
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

    /// Gives the next command its number: the entry is on disk when this returns, and the command may be sent.
    pub(crate) fn begin(&self, sequence: u64, new: NewEntry) -> io::Result<Writer> {
        if self.json(sequence).exists() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        for stream in [Stream::Stdout, Stream::Stderr] {
            // Of an entry that is not there any more, or never was: no command belongs to it.
            files::remove_if_there(&self.output(sequence, stream))?;
        }
        let started_at = now();
        let entry = JournalEntry {
            sequence,
            command: new.command,
            cwd: new.cwd,
            status: EntryStatus::Running,
            exit_code: None,
            duration_ms: None,
            execution_mode: new.execution_mode,
            stdout_file: format!("{sequence:06}.stdout"),
            stderr_file: format!("{sequence:06}.stderr"),
            started_at,
            recorded_at: started_at,
            stdout_bytes: 0,
            stderr_bytes: 0,
            stdout_dropped_bytes: 0,
            stderr_dropped_bytes: 0,
            fault: None,
            reason: None,
            request_id: new.request_id,
        };
        // Its name too must be on the disk before the command is sent: after a loss of power the number must not be
        // given again.
        let written = self.write(&entry, Place::Free).and_then(|()| self.sync());
        if let Err(error) = written {
            // The number stays free for the next command, unless another command has it.
            if error.kind() != io::ErrorKind::AlreadyExists {
                drop(files::remove_if_there(&self.json(sequence)));
            }
            return Err(error);
        }
        Ok(Writer { dir: self.dir.clone(), entry, stdout: None, stderr: None })
    }

    /// Makes the files of output that are not there yet. To make two files takes as long as to write an entry, so that is done
    /// while the command runs, and otherwise at its end.
    pub(crate) fn make_outputs(&self, sequence: u64) -> io::Result<()> {
        for stream in [Stream::Stdout, Stream::Stderr] {
            append_to(&self.output(sequence, stream))?;
        }
        Ok(())
    }

    /// What nobody can finish any more: commands that ran when their supervisor or the host went down.
    pub(crate) fn interrupt_all(&self, host_restarted: bool) -> io::Result<()> {
        // A task runs no more than so many at once, and gives numbers in ascending order; but an old one may have
        // run all the while, so all are looked at unless the directory says that it is in order.
        let mark = self.dir.join(".in-order");
        if mark.exists() {
            return Ok(());
        }
        for sequence in self.sequences()? {
            let Some(mut entry) = self.entry(sequence)?.filter(|entry| entry.status == EntryStatus::Running)
            else {
                continue;
            };
            let size =
                |stream| std::fs::metadata(self.output(sequence, stream)).map_or(0, |found| found.len());
            entry.status = EntryStatus::Interrupted;
            entry.fault = Some(Fault::GuestLost);
            entry.stdout_bytes = size(Stream::Stdout);
            entry.stderr_bytes = size(Stream::Stderr);
            entry.recorded_at = now();
            let what =
                if host_restarted { "the host was restarted" } else { "the task's supervisor was killed" };
            entry.reason = Some(format!("{what} while it ran"));
            self.make_outputs(sequence)?;
            self.write(&entry, Place::Taken)?;
        }
        self.sync()?;
        File::create(mark).map(drop)
    }

    /// A supervisor takes over: from now on entries may be left running.
    pub(crate) fn take_over(&self) -> io::Result<()> {
        files::remove_if_there(&self.dir.join(".in-order"))
    }

    /// Makes the names of entries durable.
    pub(crate) fn sync(&self) -> io::Result<()> {
        files::sync_directory(&self.dir)
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

    fn write(&self, entry: &JournalEntry, place: Place) -> io::Result<()> {
        write_entry(&self.dir, entry, place)
    }

    fn unreadable(&self, sequence: u64, why: &str) -> JournalEntry {
        let size = |stream| std::fs::metadata(self.output(sequence, stream)).map_or(0, |found| found.len());
        JournalEntry {
            sequence,
            command: String::new(),
            cwd: String::new(),
            status: EntryStatus::Interrupted,
            exit_code: None,
            duration_ms: None,
            execution_mode: String::new(),
            stdout_file: format!("{sequence:06}.stdout"),
            stderr_file: format!("{sequence:06}.stderr"),
            started_at: 0.0,
            recorded_at: 0.0,
            stdout_bytes: size(Stream::Stdout),
            stderr_bytes: size(Stream::Stderr),
            stdout_dropped_bytes: 0,
            stderr_dropped_bytes: 0,
            fault: None,
            reason: Some(format!(
                "its entry cannot be read ({why}) and is kept as {sequence:06}.json.damaged"
            )),
            request_id: String::new(),
        }
    }

    fn json(&self, sequence: u64) -> PathBuf {
        self.dir.join(format!("{sequence:06}.json"))
    }

    fn output(&self, sequence: u64, stream: Stream) -> PathBuf {
        output(&self.dir, sequence, stream)
    }
}

fn output(dir: &Path, sequence: u64, stream: Stream) -> PathBuf {
    dir.join(match stream {
        Stream::Stdout => format!("{sequence:06}.stdout"),
        Stream::Stderr => format!("{sequence:06}.stderr"),
    })
}

/// A file to append to, made where it is not there.
fn append_to(path: &Path) -> io::Result<File> {
    File::options().append(true).create(true).open(path)
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

impl Writer {
    /// Appends output. What is past the limit is counted and dropped.
    ///
    /// # Errors
    /// When the file system refuses; then nothing of `bytes` may be passed on.
    pub(crate) fn append(&mut self, stream: Stream, bytes: &[u8]) -> io::Result<()> {
        let entry = &mut self.entry;
        let (file, total, dropped) = match stream {
            Stream::Stdout => (&mut self.stdout, &mut entry.stdout_bytes, &mut entry.stdout_dropped_bytes),
            Stream::Stderr => (&mut self.stderr, &mut entry.stderr_bytes, &mut entry.stderr_dropped_bytes),
        };
        let kept = *total - *dropped;
        let room = usize::try_from(STREAM_LIMIT.saturating_sub(kept)).unwrap_or(usize::MAX).min(bytes.len());
        if file.is_none() {
            *file = Some(append_to(&output(&self.dir, entry.sequence, stream))?);
        }
        if let Some(file) = file {
            file.write_all(&bytes[..room])?;
        }
        *total += bytes.len() as u64;
        *dropped += (bytes.len() - room) as u64;
        Ok(())
    }

    /// Replaces the entry with its end; output and entry are on the disk when this returns.
    pub(crate) fn finish(&mut self) -> io::Result<()> {
        self.entry.recorded_at = now();
        for (file, stream) in [(&self.stdout, Stream::Stdout), (&self.stderr, Stream::Stderr)] {
            match file {
                Some(file) => file.sync_data()?,
                None => drop(append_to(&output(&self.dir, self.entry.sequence, stream))?),
            }
        }
        write_entry(&self.dir, &self.entry, Place::Taken)
    }
}

fn write_entry(dir: &Path, entry: &JournalEntry, place: Place) -> io::Result<()> {
    let bytes = serde_json::to_vec_pretty(entry).map_err(io::Error::other)?;
    files::put(&dir.join(format!("{:06}.json", entry.sequence)), &bytes, place)
}

fn aside(path: &Path) -> PathBuf {
    path.with_extension("json.damaged")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal() -> (tempfile::TempDir, Journal) {
        let dir = tempfile::tempdir().expect("a directory");
        let journal = Journal::new(dir.path().to_owned());
        (dir, journal)
    }

    fn new(command: &str) -> NewEntry {
        NewEntry {
            command: command.to_owned(),
            cwd: "/workspace".to_owned(),
            execution_mode: "guest_serial".to_owned(),
            request_id: format!("request of {command}"),
        }
    }

    #[test]
    fn an_entry_is_there_from_its_start_and_its_output_as_it_comes() {
        let (_dir, journal) = journal();
        let mut writer = journal.begin(1, new("make")).expect("begun");
        assert_eq!(journal.entry(1).expect("read").expect("there").status, EntryStatus::Running);
        writer.append(Stream::Stdout, b"caf\xc3").expect("written");
        assert_eq!(journal.text(1, Stream::Stdout, 100).expect("read"), ("caf\u{fffd}".to_owned(), false));
        writer.append(Stream::Stdout, b"\xa9").expect("written");
        writer.entry.status = EntryStatus::Finished;
        writer.entry.exit_code = Some(0);
        writer.finish().expect("finished");
        let entry = journal.entry(1).expect("read").expect("there");
        assert_eq!((entry.status, entry.stdout_bytes), (EntryStatus::Finished, 5));
        assert_eq!(journal.text(1, Stream::Stdout, 100).expect("read").0, "café");
        assert_eq!(journal.entry_of_request("request of make").expect("read"), Some(entry));
        assert_eq!(journal.entry_of_request("another").expect("read"), None);
    }

    #[test]
    fn a_number_is_given_once() {
        let (_dir, journal) = journal();
        journal.begin(7, new("first")).expect("begun");
        let error = journal.begin(7, new("second")).expect_err("taken");
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(journal.entry(7).expect("read").expect("there").command, "first");
        assert_eq!(journal.last_sequence().expect("read"), 7);
    }

    #[test]
    fn output_past_the_limit_is_counted_and_dropped() {
        let (_dir, journal) = journal();
        let mut writer = journal.begin(1, new("yes")).expect("begun");
        let piece = vec![b'y'; 3 << 20];
        for _ in 0..23 {
            writer.append(Stream::Stderr, &piece).expect("written");
        }
        writer.finish().expect("finished");
        let entry = journal.entry(1).expect("read").expect("there");
        assert_eq!((entry.stderr_bytes, entry.stderr_dropped_bytes), (69 << 20, 5 << 20));
        let (text, truncated) = journal.text(1, Stream::Stderr, 1000).expect("read");
        assert!(truncated && text.len() < 1100, "{}", text.len());
    }

    #[test]
    fn what_ran_when_the_supervisor_died_is_interrupted_with_its_output() {
        let (_dir, journal) = journal();
        let mut writer = journal.begin(1, new("sleep")).expect("begun");
        writer.append(Stream::Stdout, b"so far").expect("written");
        drop(writer);
        journal.interrupt_all(false).expect("interrupted");
        let entry = journal.entry(1).expect("read").expect("there");
        assert_eq!((entry.status, entry.stdout_bytes), (EntryStatus::Interrupted, 6));
        assert_eq!(
            File::open(journal.output(1, Stream::Stderr)).expect("made").metadata().expect("read").len(),
            0
        );
        assert_eq!(entry.reason.as_deref(), Some("the task's supervisor was killed while it ran"));
        journal.take_over().expect("taken over");
        drop(journal.begin(2, new("more")).expect("begun"));
        journal.interrupt_all(true).expect("interrupted");
        assert_eq!(journal.entry(2).expect("read").expect("there").status, EntryStatus::Interrupted);
    }

    #[test]
    fn a_damaged_entry_is_put_aside_and_keeps_its_number() {
        let (dir, journal) = journal();
        drop(journal.begin(1, new("one")).expect("begun"));
        drop(journal.begin(2, new("two")).expect("begun"));
        for damage in ["", "{\"sequence\":", "\0\0\0", "{\"sequence\": 9}"] {
            fs_err::write(dir.path().join("000001.json"), damage).expect("written");
            let entry = journal.entry(1).expect("read").expect("told of");
            assert_eq!(entry.status, EntryStatus::Interrupted);
            assert!(entry.reason.expect("said").contains("000001.json.damaged"));
        }
        assert_eq!(journal.sequences().expect("read"), [1, 2]);
        assert_eq!(journal.entry(2).expect("read").expect("there").command, "two");
        journal.begin(1, new("again")).expect("the supervisor never asks for it: it goes on after the last");
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
