//! Durable files: written beside their place, synced, renamed.

use std::io::{self, Read, Write};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, RenameFlags, open, renameat_with};
use rustix::io::Errno;

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

/// A file that no other process finds, and that ends with its last descriptor.
pub(crate) fn unnamed(dir: &Path) -> io::Result<std::fs::File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match open(dir, flags, Mode::RUSR | Mode::WUSR) {
        // Not every file system has such files.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOENT) => {
            let path = dir.join(format!(".unnamed.{}", random_hex(4)?));
            let file = std::fs::File::options().read(true).write(true).create_new(true).open(&path)?;
            fs_err::remove_file(&path)?;
            Ok(file)
        }
        opened => Ok(opened?.into()),
    }
}

/// Renames a file, unless something has the new name already.
///
/// # Errors
/// [`io::ErrorKind::AlreadyExists`] when something has it, or when the file system refuses.
pub(crate) fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // 9p, FUSE, NFS and older ZFS do not know the flag.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => rename_new_in_steps(from, to),
        renamed => renamed.map_err(io::Error::from),
    }
}

/// As [`rename_new`], where the file system cannot do it at once. A link never replaces anything; where there are no links
/// either, the caller's lock is what keeps others from taking the name in between.
fn rename_new_in_steps(from: &Path, to: &Path) -> io::Result<()> {
    match fs_err::hard_link(from, to) {
        Ok(()) => fs_err::remove_file(from),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(error),
        Err(_no_links) if fs_err::symlink_metadata(to).is_ok() => Err(io::ErrorKind::AlreadyExists.into()),
        Err(_no_links) => fs_err::rename(from, to),
    }
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

    #[test]
    fn a_file_system_that_cannot_rename_without_replacing_is_no_obstacle() {
        type Rename = fn(&Path, &Path) -> io::Result<()>;
        for rename in [rename_new as Rename, rename_new_in_steps] {
            let dir = tempfile::tempdir().expect("a directory");
            let [from, to] = ["next", "entry"].map(|name| dir.path().join(name));
            fs_err::write(&from, "first").expect("written");
            rename(&from, &to).expect("renamed");
            assert!(!from.exists());
            fs_err::write(&from, "second").expect("written");
            assert_eq!(rename(&from, &to).expect_err("taken").kind(), io::ErrorKind::AlreadyExists);
            assert_eq!(fs_err::read_to_string(&to).expect("read"), "first");
            assert_eq!(fs_err::read_to_string(&from).expect("read"), "second");
        }
    }
}
