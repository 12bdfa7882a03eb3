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

/// A lock that is held until it is dropped.
///
/// It is unlocked explicitly. Closing the file does not suffice: a child between fork and exec, or a forked copy of this
/// process, has the same open file, and would keep the lock.
#[derive(Debug)]
pub(crate) struct Lock {
    file: File,
    /// A forked copy must not unlock what its parent holds.
    owner: u32,
}

impl Drop for Lock {
    fn drop(&mut self) {
        if self.owner == std::process::id() {
            // Where that fails, closing the file does it.
            drop(self.file.unlock());
        }
    }
}

/// What became of an attempt to lock.
#[derive(Debug)]
pub(crate) enum Attempt {
    Locked(Lock),
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
        Ok(()) => {
            let lock = Lock { file, owner: std::process::id() };
            Ok(if is_at(&lock.file, path)? { Attempt::Locked(lock) } else { Attempt::Gone })
        }
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

#[cfg(test)]
mod tests {
    use pyro_process::Spawn;

    use super::*;

    #[test]
    fn a_lock_that_a_child_still_has_open_is_free_when_its_owner_drops_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("lock");
        let Attempt::Locked(lock) = attempt_file(&path).expect("tried") else { panic!("free") };
        // As a child between fork and exec has it: the same open file.
        let mut spawn = Spawn::new("sleep", Path::new("/"));
        spawn.arg("1000").fd(lock.file.try_clone().expect("copied").into(), 5);
        let mut child = spawn.spawn().expect("started");
        assert!(matches!(attempt_file(&path).expect("tried"), Attempt::Held));
        drop(lock);
        assert!(matches!(attempt_file(&path).expect("tried"), Attempt::Locked(_)));
        child.kill().expect("killed");
        child.wait().expect("reaped");
    }

    #[test]
    fn a_forked_copy_does_not_unlock_what_its_parent_holds() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("lock");
        let Attempt::Locked(lock) = attempt_file(&path).expect("tried") else { panic!("free") };
        let copy = Lock { file: lock.file.try_clone().expect("copied"), owner: 0 };
        drop(copy);
        assert!(matches!(attempt_file(&path).expect("tried"), Attempt::Held));
    }
}
