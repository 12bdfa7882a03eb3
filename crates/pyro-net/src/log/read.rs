//! Reading a log while it grows.

use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use fs_err::File;

use super::Entry;
use super::file::Part;

/// The least that is read at once, so that every line that the log writes fits.
const LEAST: usize = 64 << 10;

/// Reads entries from an offset on, of about `max_bytes` of the log; returns them with the offset to read from next. A
/// last line without an end is left for the next time. Lines that are no entries are skipped. A log that does not exist
/// has no entries yet; what is gone of it is passed over.
///
/// # Errors
/// When a file cannot be read.
pub fn read(path: &Path, offset: u64, max_bytes: usize) -> io::Result<(Vec<Entry>, u64)> {
    let parts = Part::all(path)?;
    let last = parts.len().saturating_sub(1);
    for (at, mut part) in parts.into_iter().enumerate() {
        let end = part.begins_at + part.file.metadata()?.len();
        if at < last && offset >= end {
            continue;
        }
        // An offset beyond the end is another log's: this one is read from where it ends.
        let from = offset.clamp(part.begins_at, end) - part.begins_at;
        let (entries, taken) = lines(&mut part.file, from, max_bytes)?;
        // Of a file that does not grow any more, a line without an end is nobody's.
        let taken = if at < last && taken == from { end - part.begins_at } else { taken };
        if !entries.is_empty() || at == last {
            return Ok((entries, part.begins_at + taken));
        }
        if part.begins_at + taken < end {
            return Ok((entries, part.begins_at + taken));
        }
    }
    Ok((Vec::new(), 0))
}

/// Reads entries of one file; returns them with the place in the file to read from next.
fn lines(file: &mut File, from: u64, max_bytes: usize) -> io::Result<(Vec<Entry>, u64)> {
    file.seek(SeekFrom::Start(from))?;
    let max_bytes = max_bytes.max(LEAST);
    let mut bytes = Vec::new();
    file.take(max_bytes as u64).read_to_end(&mut bytes)?;
    let end = match bytes.iter().rposition(|byte| *byte == b'\n') {
        Some(last) => last + 1,
        // No entry is that long. It is passed over, or nobody would get beyond it.
        None if bytes.len() == max_bytes => bytes.len(),
        None => 0,
    };
    let lines = bytes[..end].split(|byte| *byte == b'\n');
    let entries = lines.filter_map(|line| serde_json::from_slice(line).ok()).collect();
    Ok((entries, from + end as u64))
}

#[cfg(test)]
mod tests {
    use super::super::Kind;
    use super::*;

    fn line(at: u32) -> String {
        serde_json::to_string(&Entry::new(at.into(), Kind::Dns)).expect("json") + "\n"
    }

    #[test]
    fn a_log_is_read_on_from_where_the_last_whole_line_ended() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("log");
        assert_eq!(read(&path, 0, 0).expect("no file yet"), (Vec::new(), 0));
        let torn = &line(3)[..20];
        fs_err::write(&path, [&line(1), "no entry\n", "\n", "{}\n", &line(2), torn].concat())
            .expect("written");
        let (entries, next) = read(&path, 0, 0).expect("read");
        assert_eq!(entries.iter().map(|entry| entry.at).collect::<Vec<_>>(), [1.0, 2.0]);
        assert_eq!(read(&path, next, 0).expect("read"), (Vec::new(), next));
        let whole = fs_err::read_to_string(&path).expect("text") + &line(3)[20..];
        fs_err::write(&path, &whole).expect("written");
        let (entries, next) = read(&path, next, 0).expect("read");
        assert_eq!((entries[0].at, next), (3.0, whole.len() as u64));
        assert_eq!(read(&path, u64::MAX, 0).expect("read"), (Vec::new(), next));
    }

    #[test]
    fn a_log_is_read_in_parts_and_a_long_line_does_not_stop_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("log");
        let text = line(1).repeat(2000) + &"x".repeat(3 * LEAST) + "\n" + &line(2);
        fs_err::write(&path, &text).expect("written");
        let (mut offset, mut all) = (0, Vec::new());
        while offset < text.len() as u64 {
            let (entries, next) = read(&path, offset, 0).expect("read");
            assert!(next > offset && entries.len() < 2000);
            all.extend(entries);
            offset = next;
        }
        assert_eq!((all.len(), all.last().map(|entry| entry.at)), (2001, Some(2.0)));
    }
}
