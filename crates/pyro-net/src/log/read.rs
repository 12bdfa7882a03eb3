//! Reading a log while it grows.

use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use fs_err::File;

use super::Entry;

/// The least that is read at once, so that every line that the log writes fits.
const LEAST: usize = 64 << 10;

/// Reads entries from an offset on, of about `max_bytes` of the file; returns them with the offset to read from next. A
/// last line without an end is left for the next time. Lines that are no entries are skipped. A file that does not exist
/// has no entries yet.
///
/// # Errors
/// When the file cannot be read.
pub fn read(path: &Path, offset: u64, max_bytes: usize) -> io::Result<(Vec<Entry>, u64)> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((Vec::new(), 0)),
        Err(error) => return Err(error),
    };
    // A shorter file is another one, which is read from where it ends.
    let offset = offset.min(file.metadata()?.len());
    file.seek(SeekFrom::Start(offset))?;
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
    Ok((entries, offset + end as u64))
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
