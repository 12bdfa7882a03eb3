//! Advisory locks on files and directories (`flock`), each tied to an open file.
//!
//! A lock outlives the rename of what it is on and ends with the process that holds it, however that ends.
//! After a lock is taken the path is looked up again: what was locked may have been moved away meanwhile.

use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// How a lock is shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Shared,
    Exclusive,
}

/// What became of an attempt to lock.
#[derive(Debug)]
pub(crate) enum Attempt {
    Locked(File),
    /// Somebody else holds it.
    Held,
    /// There is nothing under this path, or something else by now.
    Gone,
}

/// Tries to lock what is at `path`, a directory or a file that exists.
pub(crate) fn attempt(path: &Path, mode: Mode) -> io::Result<Attempt> {
    let file = match fs_err::File::open(path) {
        Ok(file) => file.into_file(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Attempt::Gone),
        Err(error) => return Err(error),
    };
    let locked = match mode {
        Mode::Shared => file.try_lock_shared(),
        Mode::Exclusive => file.try_lock(),
    };
    match locked {
        Ok(()) if is_at(&file, path)? => Ok(Attempt::Locked(file)),
        Ok(()) => Ok(Attempt::Gone),
        Err(TryLockError::WouldBlock) => Ok(Attempt::Held),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Tries to lock the file at `path`, which is made when missing and never removed.
pub(crate) fn attempt_file(path: &Path) -> io::Result<Attempt> {
    let mut options = fs_err::OpenOptions::new();
    options.create(true).append(true);
    drop(options.open(path)?);
    attempt(path, Mode::Exclusive)
}

/// Whether the open file is what the path names now.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let open = file.metadata()?;
    match fs_err::symlink_metadata(path) {
        Ok(named) => Ok((named.dev(), named.ino()) == (open.dev(), open.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}
