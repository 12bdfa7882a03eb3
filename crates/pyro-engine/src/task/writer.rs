//! The supervisor's side of a journal: it alone writes there, or whoever holds the lock of a task without one.
//!
//! The start of a command is durable before the command is sent, as a rule in a slot (`super::starts`); its entry is read
//! from then on. Its end is read as soon as it has come. What is read survives the death of every process; that it survives
//! a loss of power too follows a little later ([`Journal::settle`]), for all commands of that moment together. Until then
//! the start is kept, so that start or end is whole. Whatever takes a file system long, the making of files, is done while
//! the guest works.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::journal::{EntryStatus, JOURNAL_LIMIT, Journal, JournalEntry, MOST_ENTRY, STREAM_LIMIT};
use super::starts::{self, Slot, Starts};
use crate::capture;
use crate::files;
use crate::guest::{Chunk, Stream};
use crate::place::Manner;
use crate::record::Fault;
use crate::registry::now;

/// What an entry keeps of a command's words once the journal is full, in bytes.
const COMMAND_IN_FULL_JOURNAL: usize = 1024;

/// What is about to be run.
#[derive(Clone, Debug)]
pub(crate) struct NewEntry {
    pub(crate) command: String,
    pub(crate) argv: Option<Vec<String>>,
    pub(crate) cwd: String,
    pub(crate) user: Option<String>,
    pub(crate) manner: Manner,
    pub(crate) request_id: String,
}

/// The part of an entry that is being written.
#[derive(Debug)]
pub(crate) struct Writer {
    journal: Journal,
    pub(crate) entry: JournalEntry,
    /// Opened when there is something to hold.
    stdout: Option<File>,
    stderr: Option<File>,
}

/// Appends what the processes of an ended command write, within the limits that it had; the rest is dropped.
#[derive(Debug)]
pub(crate) struct LaterWriter {
    journal: Journal,
    sequence: u64,
    /// Of each stream, in bytes.
    room: [u64; 2],
}

impl LaterWriter {
    pub(crate) fn append(&mut self, chunk: &Chunk) -> io::Result<()> {
        let room = &mut self.room[usize::from(chunk.stream == Stream::Stderr)];
        let in_journal = JOURNAL_LIMIT.saturating_sub(self.journal.kept().load(Relaxed));
        let length = (*room).min(in_journal).min(chunk.bytes.len() as u64);
        *room -= length;
        let bytes = &chunk.bytes[..usize::try_from(length).unwrap_or_default()];
        if bytes.is_empty() {
            return Ok(());
        }
        let path = self.journal.output(self.sequence, chunk.stream);
        // The one empty file of all that have written nothing is not this command's alone.
        if std::fs::metadata(&path)?.len() == 0 {
            fs_err::remove_file(&path)?;
        }
        append_to(&path)?.write_all(bytes)?;
        self.journal.kept().fetch_add(length, Relaxed);
        Ok(())
    }
}

impl Journal {
    /// Gives the next command its number: the start is on disk when this returns, and the command may be sent. Where that is
    /// in a slot, the entry must be settled before the slot is given back.
    pub(crate) fn begin(
        &self,
        sequence: u64,
        new: NewEntry,
        starts: Option<&Starts>,
    ) -> io::Result<(Writer, Option<Slot>)> {
        if self.json(sequence).exists() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        for stream in [Stream::Stdout, Stream::Stderr] {
            // Of an entry that is not there any more, or never was: no command belongs to it.
            files::remove_if_there(&self.output(sequence, stream))?;
        }
        let started_at = now();
        let words = 2 * new.command.len() as u64;
        let is_full = self.kept().load(Relaxed) + words > JOURNAL_LIMIT;
        let entry = JournalEntry {
            sequence,
            command: if is_full { capture::cut(new.command, COMMAND_IN_FULL_JOURNAL) } else { new.command },
            argv: new.argv.filter(|_| !is_full),
            cwd: new.cwd,
            user: new.user,
            status: EntryStatus::Running,
            exit_code: None,
            duration_ms: None,
            execution_mode: new.manner.execution_mode.to_owned(),
            isolation: new.manner.isolation.to_owned(),
            start_mode: new.manner.start_mode.to_owned(),
            stdout_file: format!("{sequence:06}.stdout"),
            stderr_file: format!("{sequence:06}.stderr"),
            started_at,
            recorded_at: started_at,
            stdout_bytes: 0,
            stderr_bytes: 0,
            stdout_dropped_bytes: 0,
            stderr_dropped_bytes: 0,
            fault: None,
            output_open: false,
            reason: None,
            request_id: new.request_id,
            notes: Vec::new(),
        };
        match self.write_start(&entry, starts) {
            Ok(slot) => Ok((Writer { journal: self.clone(), entry, stdout: None, stderr: None }, slot)),
            Err(error) => {
                // The number stays free for the next command, unless another command has it.
                if error.kind() != io::ErrorKind::AlreadyExists {
                    drop(files::remove_if_there(&self.json(sequence)));
                }
                Err(error)
            }
        }
    }

    fn write_start(&self, entry: &JournalEntry, starts: Option<&Starts>) -> io::Result<Option<Slot>> {
        let (next, path) = (self.next(), self.json(entry.sequence));
        let bytes = json(entry)?;
        self.kept().fetch_add(bytes.len() as u64, Relaxed);
        let file = write_to(&next, &bytes)?;
        let name = || files::rename_new(&next, &path);
        let slot = starts.and_then(|starts| Some((starts, starts.slot_for(&bytes)?)));
        let Some((starts, slot)) = slot else {
            // Its name too must be on the disk before the command is sent: after a loss of power the number must not be
            // given again.
            file.sync_data()?;
            name()?;
            self.sync()?;
            return Ok(None);
        };
        // What has no name has no slot either, or it would be found there after a loss of power.
        let written = name().and_then(|()| starts.write(&slot, &bytes));
        match written {
            Ok(()) => Ok(Some(slot)),
            Err(error) => {
                // One that cannot be written may hold anything, and serves nobody any more.
                if error.kind() == io::ErrorKind::AlreadyExists {
                    starts.give_back(slot);
                }
                Err(error)
            }
        }
    }

    /// Makes the file in which starts are durable before their own files are.
    pub(crate) fn make_starts(&self) -> io::Result<Starts> {
        Starts::make(&self.starts())
    }

    /// Makes the file that the end of a command needs.
    pub(crate) fn prepare_end(&self, sequence: u64) -> io::Result<()> {
        append_to(&self.beside(sequence)).map(drop)
    }

    /// Makes the file in which the next command will begin.
    pub(crate) fn prepare_next(&self) -> io::Result<()> {
        append_to(&self.next()).map(drop)
    }

    /// Makes an output that is not there, for a command that has written nothing and never will: one more name of the one
    /// empty file, which takes less than a file does.
    fn make_empty(&self, sequence: u64, stream: Stream) -> io::Result<()> {
        let (empty, path) = (self.path().join(".empty"), self.output(sequence, stream));
        if !empty.exists() {
            drop(File::options().append(true).create(true).mode(0o400).open(&empty));
        }
        match std::fs::hard_link(&empty, &path) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            // Not every file system has names to give, and none has any number of them.
            Err(_) => append_to(&path).map(drop),
        }
    }

    /// Makes entries durable as they are now, with their output; gives back those that are, and what went wrong with others.
    /// Those that are gone need nothing any more.
    pub(crate) fn settle(&self, sequences: &BTreeSet<u64>) -> (BTreeSet<u64>, io::Result<()>) {
        let (mut settled, mut result) = (BTreeSet::new(), Ok(()));
        for &sequence in sequences {
            match unless_gone(self.settle_one(sequence)) {
                Ok(()) => drop(settled.insert(sequence)),
                Err(error) => result = Err(error),
            }
        }
        match unless_gone(self.sync()) {
            Ok(()) => (settled, result),
            Err(error) => (BTreeSet::new(), Err(error)),
        }
    }

    fn settle_one(&self, sequence: u64) -> io::Result<()> {
        // Opened first: whichever entry this is, all that it tells of was written before.
        let entry = File::open(self.json(sequence))?;
        for stream in [Stream::Stdout, Stream::Stderr] {
            unless_gone(File::open(self.output(sequence, stream)).and_then(|output| {
                let is_silent = output.metadata()?.len() == 0;
                if is_silent { Ok(()) } else { output.sync_data() }
            }))?;
        }
        entry.sync_data()
    }

    /// Lets go of the start of a command whose end has settled.
    pub(crate) fn forget_start(&self, sequence: u64) -> io::Result<()> {
        files::remove_if_there(&self.beside(sequence))
    }

    /// What nobody can finish any more: commands that ran when their supervisor or the host went down.
    pub(crate) fn interrupt_all(&self, host_restarted: bool) -> io::Result<()> {
        // A task runs no more than so many at once, and gives numbers in ascending order; but an old one may have
        // run all the while, so all are looked at unless the directory says that it is in order.
        let mark = self.path().join(".in-order");
        if mark.exists() {
            return Ok(());
        }
        self.keep_whole_ones()?;
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
            for stream in [Stream::Stdout, Stream::Stderr] {
                self.make_empty(sequence, stream)?;
            }
            files::put(&self.json(sequence), &json(&entry)?)?;
        }
        self.sync()?;
        File::create(mark).map(drop)
    }

    /// Of each command whose entry had not settled: its end where that is whole, else its start.
    fn keep_whole_ones(&self) -> io::Result<()> {
        let mut starts: BTreeMap<_, _> =
            starts::read(&self.starts())?.into_iter().map(|start| (start.sequence, start)).collect();
        let sequences: BTreeSet<_> = self.sequences()?.into_iter().chain(starts.keys().copied()).collect();
        for sequence in sequences {
            let (path, beside) = (self.json(sequence), self.beside(sequence));
            let (start, has_beside) = (starts.remove(&sequence), beside.exists());
            if start.is_none() && !has_beside {
                continue;
            }
            if self.is_whole(&path, sequence)? {
                if has_beside {
                    self.settle_one(sequence)?;
                    self.sync()?;
                }
            } else if self.is_whole(&beside, sequence)? {
                fs_err::rename(&beside, &path)?;
            } else if let Some(start) = start {
                files::put(&path, &json(&start)?)?;
            }
            files::remove_if_there(&beside)?;
        }
        Ok(())
    }

    /// Whether this is the entry of that command, and what it tells of is there.
    fn is_whole(&self, path: &Path, sequence: u64) -> io::Result<bool> {
        let bytes = files::read_or_nothing(path, MOST_ENTRY)?;
        let Ok(entry) = serde_json::from_slice::<JournalEntry>(&bytes) else { return Ok(false) };
        let streams = [
            (Stream::Stdout, entry.stdout_bytes.saturating_sub(entry.stdout_dropped_bytes)),
            (Stream::Stderr, entry.stderr_bytes.saturating_sub(entry.stderr_dropped_bytes)),
        ];
        let is_there = |(stream, kept)| {
            let length = std::fs::metadata(self.output(sequence, stream)).map_or(0, |output| output.len());
            length >= kept
        };
        Ok(entry.sequence == sequence && streams.into_iter().all(is_there))
    }

    /// A supervisor takes over: from now on entries may be left running.
    pub(crate) fn take_over(&self) -> io::Result<()> {
        files::remove_if_there(&self.path().join(".in-order"))?;
        self.sync()
    }

    fn sync(&self) -> io::Result<()> {
        files::sync_directory(self.path())
    }

    /// Where an end is written before it changes places with the start.
    fn beside(&self, sequence: u64) -> PathBuf {
        self.path().join(format!(".{sequence:06}.json.beside"))
    }

    fn starts(&self) -> PathBuf {
        self.path().join(".starts")
    }

    /// Where a start is written before it has its name.
    fn next(&self) -> PathBuf {
        self.path().join(".next.json")
    }
}

impl Writer {
    /// Appends output. What is past the limits, of the stream and of all commands together, is counted and dropped.
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
        let asked = STREAM_LIMIT.saturating_sub(kept).min(bytes.len() as u64);
        // Commands of the same moment may pass the second limit by a piece each.
        let journal_room = JOURNAL_LIMIT.saturating_sub(self.journal.kept().load(Relaxed));
        // Once something was dropped, what comes later has no place after it.
        let room = if *dropped > 0 { 0 } else { asked.min(journal_room) };
        let room = usize::try_from(room).unwrap_or(usize::MAX);
        if file.is_none() {
            *file = Some(append_to(&self.journal.output(entry.sequence, stream))?);
        }
        if let Some(file) = file {
            file.write_all(&bytes[..room])?;
            self.journal.kept().fetch_add(room as u64, Relaxed);
        }
        *total += bytes.len() as u64;
        *dropped += (bytes.len() - room) as u64;
        Ok(())
    }

    /// Appends to the files of this command after its end.
    pub(crate) fn later(&self) -> LaterWriter {
        let kept = |stream: Stream| {
            let entry = &self.entry;
            match stream {
                Stream::Stdout => {
                    (entry.stdout_bytes - entry.stdout_dropped_bytes, entry.stdout_dropped_bytes > 0)
                }
                Stream::Stderr => {
                    (entry.stderr_bytes - entry.stderr_dropped_bytes, entry.stderr_dropped_bytes > 0)
                }
            }
        };
        let room = |stream| match kept(stream) {
            (_, true) => 0,
            (kept, false) => STREAM_LIMIT.saturating_sub(kept),
        };
        LaterWriter {
            journal: self.journal.clone(),
            sequence: self.entry.sequence,
            room: [room(Stream::Stdout), room(Stream::Stderr)],
        }
    }

    /// How much of each stream is in its file.
    pub(crate) fn kept(&self) -> [u64; 2] {
        let entry = &self.entry;
        [entry.stdout_bytes - entry.stdout_dropped_bytes, entry.stderr_bytes - entry.stderr_dropped_bytes]
    }

    /// Replaces the entry with its end, which everybody reads from now on, and which must be settled.
    pub(crate) fn finish(&mut self) -> io::Result<()> {
        self.entry.recorded_at = now();
        let sequence = self.entry.sequence;
        for (file, stream) in [(&self.stdout, Stream::Stdout), (&self.stderr, Stream::Stderr)] {
            if file.is_none() {
                self.journal.make_empty(sequence, stream)?;
            }
        }
        let (path, beside) = (self.journal.json(sequence), self.journal.beside(sequence));
        let written = write_to(&beside, &json(&self.entry)?)?;
        match renameat_with(CWD, &beside, CWD, &path, RenameFlags::EXCHANGE) {
            Ok(()) => Ok(()),
            // Not every file system can do that; and somebody may have removed the start.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::NOENT) => {
                written.sync_data()?;
                fs_err::rename(&beside, &path)
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// What is done for a file that is not there any more need not be done.
fn unless_gone(done: io::Result<()>) -> io::Result<()> {
    match done {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

/// A file to append to, made where it is not there.
fn append_to(path: &Path) -> io::Result<File> {
    File::options().append(true).create(true).open(path)
}

fn json(entry: &JournalEntry) -> io::Result<Vec<u8>> {
    serde_json::to_vec_pretty(entry).map_err(io::Error::other)
}

/// Writes an entry where nobody looks for one.
fn write_to(path: &Path, bytes: &[u8]) -> io::Result<File> {
    let mut file = File::options().write(true).create(true).truncate(true).open(path)?;
    file.write_all(bytes)?;
    Ok(file)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn journal() -> (tempfile::TempDir, Journal) {
        let dir = tempfile::tempdir().expect("a directory");
        let journal = Journal::new(dir.path().to_owned());
        (dir, journal)
    }

    pub(crate) fn new(command: &str) -> NewEntry {
        NewEntry {
            command: command.to_owned(),
            argv: None,
            cwd: "/workspace".to_owned(),
            user: None,
            manner: Manner { execution_mode: "guest_serial", isolation: "qemu-tcg", start_mode: "cold" },
            request_id: format!("request of {command}"),
        }
    }

    /// Begins a command without slots.
    pub(crate) fn begin(journal: &Journal, sequence: u64, command: &str) -> io::Result<Writer> {
        journal.begin(sequence, new(command), None).map(|(writer, _no_slot)| writer)
    }

    #[test]
    fn an_entry_is_there_from_its_start_and_its_output_as_it_comes() {
        let (_dir, journal) = journal();
        let mut writer = begin(&journal, 1, "make").expect("begun");
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
        begin(&journal, 7, "first").expect("begun");
        let error = begin(&journal, 7, "second").expect_err("taken");
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(journal.entry(7).expect("read").expect("there").command, "first");
        assert_eq!(journal.last_sequence().expect("read"), 7);
    }

    #[test]
    fn output_past_the_limit_is_counted_and_dropped() {
        let (_dir, journal) = journal();
        let mut writer = begin(&journal, 1, "yes").expect("begun");
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
    fn all_commands_together_keep_no_more_than_the_limit_of_a_journal() {
        let (dir, journal) = journal();
        let filler = File::create(dir.path().join("000001.stdout")).expect("made");
        filler.set_len(JOURNAL_LIMIT - 5000).expect("sparse");
        let mut writer = begin(&journal, 2, "yes").expect("begun");
        for _ in 0..3 {
            writer.append(Stream::Stdout, &[b'y'; 4096]).expect("written");
        }
        writer.append(Stream::Stderr, b"late").expect("written");
        writer.finish().expect("its end is kept all the same");
        let entry = journal.entry(2).expect("read").expect("there");
        assert_eq!((entry.stdout_bytes, entry.stderr_bytes), (3 * 4096, 4));
        let kept = 3 * 4096 - entry.stdout_dropped_bytes;
        assert!((4096..5000).contains(&kept), "{kept}");
        let length = fs_err::metadata(dir.path().join("000002.stdout")).expect("there").len();
        assert_eq!(length, kept);
        assert_eq!(entry.stderr_dropped_bytes, 4);
        let long = begin(&journal, 3, &"x".repeat(100_000)).expect("begun");
        assert!(long.entry.command.len() < 1200, "{}", long.entry.command.len());
        assert!(long.entry.command.ends_with("(98976 more bytes)"), "{}", long.entry.command);
        // Who takes the task over counts anew.
        let again = Journal::new(dir.path().to_owned());
        assert!(again.kept().load(Relaxed) >= JOURNAL_LIMIT - 5000 + kept);
    }

    #[test]
    fn what_ran_when_the_supervisor_died_is_interrupted_with_its_output() {
        let (_dir, journal) = journal();
        let mut writer = begin(&journal, 1, "sleep").expect("begun");
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
        drop(begin(&journal, 2, "more").expect("begun"));
        journal.interrupt_all(true).expect("interrupted");
        assert_eq!(journal.entry(2).expect("read").expect("there").status, EntryStatus::Interrupted);
    }

    /// Runs a command, whose end is not settled then.
    pub(crate) fn end(journal: &Journal, sequence: u64) {
        let mut writer = begin(journal, sequence, "make").expect("begun");
        journal.prepare_end(sequence).expect("made");
        journal.prepare_next().expect("made");
        writer.append(Stream::Stdout, b"done").expect("written");
        writer.entry.status = EntryStatus::Finished;
        writer.finish().expect("finished");
    }

    fn settle(journal: &Journal, sequences: &[u64]) {
        let sequences = sequences.iter().copied().collect();
        let (settled, result) = journal.settle(&sequences);
        result.expect("settled");
        assert_eq!(settled, sequences);
        for sequence in sequences {
            journal.forget_start(sequence).expect("removed");
        }
    }

    fn status(journal: &Journal, sequence: u64) -> EntryStatus {
        journal.entry(sequence).expect("read").expect("there").status
    }

    fn names(dir: &tempfile::TempDir) -> Vec<String> {
        let names = fs_err::read_dir(dir.path()).expect("read");
        let mut names: Vec<_> =
            names.map(|entry| entry.expect("read").file_name().into_string().expect("text")).collect();
        names.sort();
        names
    }

    #[test]
    fn an_end_is_read_at_once_and_nothing_is_beside_it_once_it_is_settled() {
        let (dir, journal) = journal();
        end(&journal, 1);
        assert_eq!(status(&journal, 1), EntryStatus::Finished);
        end(&journal, 2);
        assert!(names(&dir).contains(&".000001.json.beside".to_owned()));
        settle(&journal, &[1, 2]);
        let kept = [
            "000001.json",
            "000001.stderr",
            "000001.stdout",
            "000002.json",
            "000002.stderr",
            "000002.stdout",
        ];
        assert_eq!(names(&dir), [&[".empty", ".next.json"], &kept[..]].concat());
    }

    #[test]
    fn an_end_that_a_loss_of_power_took_leaves_the_start_and_one_that_it_spared_stays() {
        let (dir, journal) = journal();
        for sequence in [1, 2, 3, 5] {
            end(&journal, sequence);
        }
        fs_err::write(dir.path().join("000005.stdout"), "do").expect("the rest was lost");
        fs_err::write(dir.path().join("000001.json"), "").expect("lost");
        fs_err::write(dir.path().join("000002.json"), "").expect("lost");
        fs_err::write(dir.path().join(".000002.json.beside"), "{").expect("lost as well");
        // Its end was being written when everything was killed.
        drop(begin(&journal, 4, "sleep").expect("begun"));
        fs_err::write(dir.path().join(".000004.json.beside"), "{\"sequence\": 4,").expect("written");
        journal.interrupt_all(true).expect("interrupted");
        let first = journal.entry(1).expect("read").expect("there");
        assert_eq!((first.command.as_str(), first.status), ("make", EntryStatus::Interrupted));
        assert!(journal.entry(2).expect("read").expect("told").reason.expect("said").contains("damaged"));
        assert_eq!(status(&journal, 3), EntryStatus::Finished);
        assert_eq!(
            status(&journal, 5),
            EntryStatus::Interrupted,
            "it would tell of output that is not there"
        );
        let fourth = journal.entry(4).expect("read").expect("there");
        assert_eq!((fourth.command.as_str(), fourth.status), ("sleep", EntryStatus::Interrupted));
        assert!(!names(&dir).iter().any(|name| name.ends_with(".beside")), "{:?}", names(&dir));
    }

    #[test]
    fn a_start_in_a_slot_survives_a_loss_of_power_without_a_file_of_its_own() {
        let (dir, journal) = journal();
        let starts = journal.make_starts().expect("made");
        for sequence in 1..=5 {
            let (mut writer, slot) = journal.begin(sequence, new("make"), Some(&starts)).expect("begun");
            assert!(slot.is_some());
            if sequence == 3 || sequence == 4 {
                writer.entry.status = EntryStatus::Finished;
                writer.finish().expect("finished");
            }
        }
        let path = |name: &str| dir.path().join(name);
        fs_err::remove_file(path("000005.json")).expect("its name was lost");
        fs_err::write(path("000002.json"), "").expect("its bytes were lost");
        fs_err::write(path("000003.json"), "").expect("those of its end were lost");
        fs_err::remove_file(path(".000003.json.beside")).expect("and the name of its start");
        journal.interrupt_all(true).expect("interrupted");
        for sequence in [1, 2, 3, 5] {
            let entry = journal.entry(sequence).expect("read").expect("there");
            assert_eq!(
                (entry.command.as_str(), entry.status),
                ("make", EntryStatus::Interrupted),
                "{sequence}"
            );
        }
        assert_eq!(status(&journal, 4), EntryStatus::Finished);
        assert_eq!(journal.last_sequence().expect("read"), 5, "no number is given twice");
    }

    #[test]
    fn silent_commands_share_one_empty_file_and_others_have_their_own() {
        let (dir, journal) = journal();
        for sequence in [1, 2] {
            end(&journal, sequence);
            settle(&journal, &[sequence]);
        }
        let lengths = |name: &str| fs_err::metadata(dir.path().join(name)).expect("there").len();
        assert_eq!(["000001.stderr", "000002.stderr"].map(lengths), [0, 0]);
        assert_eq!(["000001.stdout", "000002.stdout"].map(lengths), [4, 4]);
        fs_err::remove_file(dir.path().join(".empty")).expect("removed");
        journal.make_empty(3, Stream::Stdout).expect("made");
        journal.make_empty(1, Stream::Stdout).expect("it is there");
        assert_eq!(["000001.stdout", "000003.stdout"].map(lengths), [4, 0]);
    }

    #[test]
    fn an_end_is_written_also_where_somebody_has_removed_the_start() {
        let (dir, journal) = journal();
        let mut writer = begin(&journal, 1, "make").expect("begun");
        fs_err::remove_file(dir.path().join("000001.json")).expect("removed");
        writer.entry.status = EntryStatus::Finished;
        writer.finish().expect("finished");
        assert_eq!(status(&journal, 1), EntryStatus::Finished);
    }

    #[test]
    fn a_command_that_has_no_number_has_no_slot() {
        let (dir, journal) = journal();
        let starts = journal.make_starts().expect("made");
        let long = NewEntry { command: "x".repeat(5000), ..new("") };
        assert!(journal.begin(1, long, Some(&starts)).expect("begun").1.is_none());
        let error = journal.begin(1, new("second"), Some(&starts)).expect_err("taken");
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(starts::read(&dir.path().join(".starts")).expect("read"), []);
    }
}
