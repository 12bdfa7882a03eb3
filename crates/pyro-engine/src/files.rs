//! Durable files: written beside their place, synced, renamed.

use std::io::{self, Read, Write};
use std::path::Path;

/// Writes `bytes` to `path`, which at any moment holds its old contents or its new ones, whole. The bytes are on
/// the disk when this returns; the name is once the directory is synced.
///
/// # Errors
/// When the file system refuses.
pub(crate) fn put(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let parent = path.parent().ok_or_else(|| io::Error::other("a path without a parent"))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let beside = parent.join(format!(".{name}.{}", random_hex(4)?));
    let write = || {
        let mut file = fs_err::OpenOptions::new().write(true).create_new(true).open(&beside)?;
        file.write_all(bytes)?;
        file.sync_data()?;
        fs_err::rename(&beside, path)
    };
    let written = write();
    if written.is_err() {
        drop(fs_err::remove_file(&beside));
    }
    written
}

/// Makes the names in a directory durable.
pub(crate) fn sync_directory(path: &Path) -> io::Result<()> {
    fs_err::File::open(path)?.sync_all()
}

/// Reads a file that must not be longer than `most` bytes; none where there is no such file.
pub(crate) fn read_bounded(path: &Path, most: u64) -> io::Result<Option<Vec<u8>>> {
    let file = match fs_err::File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    let mut bytes = Vec::new();
    file.take(most + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("more than {most} bytes")));
    }
    Ok(Some(bytes))
}

/// What a file holds; nothing where it is not there, or holds more than pyro would have written.
pub(crate) fn read_or_nothing(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    match read_bounded(path, most) {
        Err(error) if error.kind() == io::ErrorKind::FileTooLarge => Ok(Vec::new()),
        read => Ok(read?.unwrap_or_default()),
    }
}

/// Removes a file; that there is none is what is wanted.
pub(crate) fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs_err::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// So many random bytes as hexadecimal digits.
pub(crate) fn random_hex(bytes: usize) -> io::Result<String> {
    let mut random = vec![0; bytes];
    getrandom::fill(&mut random).map_err(io::Error::other)?;
    Ok(random.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_nothing_is_left_beside_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("task.json");
        for contents in [&b"first"[..], b"third"] {
            put(&path, contents).expect("put");
            assert_eq!(read_bounded(&path, 10).expect("read").as_deref(), Some(contents));
        }
        assert_eq!(read_bounded(&path, 4).expect_err("too long").kind(), io::ErrorKind::FileTooLarge);
        assert_eq!(fs_err::read_dir(dir.path()).expect("read").count(), 1);
    }
}
