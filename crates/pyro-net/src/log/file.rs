//! The files of a log: the one that grows, and the one before it. Half of the room is for each.
//!
//! Offsets count from the beginning of the log, and so go on when a file does: its first line says where it begins.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::{Entry, Kind};
use crate::append;

/// The longest first line of a file, in bytes.
const FIRST_LINE: u64 = 512;

/// The file that grows.
#[derive(Debug)]
pub(super) struct Out {
    path: Option<PathBuf>,
    file: File,
    /// How long the log was before this file.
    begins_at: u64,
    len: u64,
    /// How long one file may be.
    limit: u64,
    /// The last line has no end, because its writer died or the disk was full.
    is_torn: bool,
}

/// A file to read from.
pub(super) struct Part {
    pub(super) file: fs_err::File,
    pub(super) begins_at: u64,
}

/// The file before the one at this path.
fn before(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

/// Where a file begins in the log, by its first line.
fn begins_at(file: &mut (impl Read + Seek)) -> io::Result<u64> {
    file.seek(SeekFrom::Start(0))?;
    let mut line = Vec::new();
    BufReader::new(file.take(FIRST_LINE)).read_until(b'\n', &mut line)?;
    let first = serde_json::from_slice::<Entry>(&line).ok();
    Ok(first.and_then(|entry| entry.begins_at).unwrap_or(0))
}

impl Part {
    fn open(path: &Path) -> io::Result<Option<Self>> {
        let mut file = match fs_err::File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let begins_at = begins_at(&mut file)?;
        Ok(Some(Self { file, begins_at }))
    }

    /// The parts of a log, the earlier first.
    pub(super) fn all(path: &Path) -> io::Result<Vec<Self>> {
        // The later one first: a file that takes its place meanwhile is then the earlier one of what is found here, or the same.
        let last = Self::open(path)?;
        let first = Self::open(&before(path))?;
        let is_earlier = |first: &Self| last.as_ref().is_none_or(|last| first.begins_at < last.begins_at);
        Ok(first.filter(is_earlier).into_iter().chain(last).collect())
    }
}

impl Out {
    pub(super) fn open(path: &Path, limit: u64) -> io::Result<Self> {
        let mut file = append::open(path)?;
        let len = file.metadata()?.len();
        let begins_at = begins_at(&mut file)?;
        let mut last = [b'\n'];
        if len > 0 {
            file.read_exact_at(&mut last, len - 1)?;
        }
        let path = Some(path.to_owned());
        let mut out = Self { path, file, begins_at, len, limit: limit / 2, is_torn: last != [b'\n'] };
        if len == 0
            && let Some(Part { file, begins_at }) =
                out.path.as_deref().map(before).map_or(Ok(None), |path| Part::open(&path))?
        {
            // The owner that began this file died before its first line.
            out.begin(begins_at + file.metadata()?.len());
        }
        Ok(out)
    }

    /// One that has no other file before it.
    #[cfg(test)]
    pub(super) fn over(file: File) -> Self {
        Self { path: None, file, begins_at: 0, len: 0, limit: 1 << 20, is_torn: false }
    }

    /// Writes a line; returns whether it is in the file.
    pub(super) fn write(&mut self, entry: &Entry) -> bool {
        let mut line = self.line(entry);
        if self.len > 0 && self.len + line.len() as u64 > self.limit {
            // Where there can be no other file, this one is not made longer.
            if self.turn_over().is_err() {
                return false;
            }
            line = self.line(entry);
        }
        self.len + line.len() as u64 <= self.limit && self.append(&line)
    }

    /// Has another file grow; this one takes the place of the one before.
    fn turn_over(&mut self) -> io::Result<()> {
        let path = self.path.as_deref().ok_or(io::ErrorKind::Unsupported)?;
        match fs_err::rename(path, before(path)) {
            // An earlier attempt got no further.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            renamed => renamed?,
        }
        self.file = append::open(path)?;
        let begins_at = self.begins_at + self.len;
        (self.len, self.is_torn) = (0, false);
        self.begin(begins_at);
        Ok(())
    }

    /// Writes the first line.
    fn begin(&mut self, begins_at: u64) {
        self.begins_at = begins_at;
        let why = Some("the log goes on; what came before is in the file before it, or gone".to_owned());
        let first = Entry { why, begins_at: Some(begins_at), ..Entry::now(Kind::Policy) };
        let line = self.line(&first);
        self.append(&line);
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
