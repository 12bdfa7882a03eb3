//! Advisory locks on directories (`flock`), each tied to an open file.
//!
//! A machine's directory is locked by its owner for life. The lock is on the directory itself, so it moves with a
//! rename, needs no file that a clean-up could remove too early, and ends with the last process that holds it.

use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags};

/// A lock on a file that is held for a moment.
///
/// It is given up in so many words, not by closing the file: a copy of this process that was forked meanwhile has the
/// file open as well, and would hold the lock on.
#[derive(Debug)]
pub(crate) struct Moment(File);

impl Moment {
    /// Waits for the lock on this file, which is made where there is none.
    pub(crate) fn wait(path: &Path) -> io::Result<Self> {
        let file = File::create(path)?;
        file.lock()?;
        Ok(Self(file))
    }
}

impl Drop for Moment {
    fn drop(&mut self) {
        // Where that fails, closing the file does it.
        drop(self.0.unlock());
    }
}

/// What became of an attempt to lock.
#[derive(Debug)]
pub(crate) enum Attempt {
    /// It was free, and is ours now.
    Locked(File),
    /// Somebody alive holds it.
    Held,
    /// There is nothing under this path, or something else by now.
    Gone,
}

/// The file that is locked instead of a directory whose own lock is stuck.
const RENEWED: &str = ".lock";

/// Tries to lock the directory at `path`; it is not waited for.
pub(crate) fn attempt(path: &Path) -> io::Result<Attempt> {
    let renewed = path.join(RENEWED);
    if renewed.exists() { attempt_at(&renewed, OFlags::empty()) } else { attempt_at(path, OFlags::DIRECTORY) }
}

/// Takes the lock of a directory away from a dead owner, of which a forked copy holds it still. To be called by one
/// process at a time, which knows that the owner is dead.
pub(crate) fn renew(path: &Path) -> io::Result<File> {
    let beside = path.join(format!("{RENEWED}.{}", crate::files::random_hex(4)?));
    let file = File::create_new(&beside)?;
    file.try_lock()?;
    fs_err::rename(&beside, path.join(RENEWED))?;
    Ok(file)
}

fn attempt_at(path: &Path, flags: OFlags) -> io::Result<Attempt> {
    let flags = flags | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = match rustix::fs::openat(CWD, path, flags, Mode::empty()) {
        Ok(fd) => File::from(fd),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP) => {
            return Ok(Attempt::Gone);
        }
        Err(error) => return Err(error.into()),
    };
    match file.try_lock() {
        Ok(()) if is_at(&file, path)? => Ok(Attempt::Locked(file)),
        Ok(()) => Ok(Attempt::Gone),
        Err(TryLockError::WouldBlock) => Ok(Attempt::Held),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Whether the open file is what the path names now.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let open = file.metadata()?;
    match std::fs::symlink_metadata(path) {
        Ok(named) => Ok((named.dev(), named.ino()) == (open.dev(), open.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_moves_with_its_directory_and_ends_with_its_holder() {
        let root = tempfile::tempdir().expect("a directory");
        let (here, there) = (root.path().join("here"), root.path().join("there"));
        fs_err::create_dir(&here).expect("made");
        let Attempt::Locked(held) = attempt(&here).expect("tried") else { panic!("free") };
        assert!(matches!(attempt(&here).expect("tried"), Attempt::Held));
        fs_err::rename(&here, &there).expect("moved");
        assert!(matches!(attempt(&here).expect("tried"), Attempt::Gone));
        assert!(matches!(attempt(&there).expect("tried"), Attempt::Held));
        drop(held);
        assert!(matches!(attempt(&there).expect("tried"), Attempt::Locked(_)));
        fs_err::write(&here, "no directory").expect("written");
        assert!(matches!(attempt(&here).expect("tried"), Attempt::Gone));
    }

    #[test]
    fn a_lock_that_a_forked_copy_holds_is_taken_from_its_dead_owner() {
        let root = tempfile::tempdir().expect("a directory");
        let dir = root.path().join("dir");
        fs_err::create_dir(&dir).expect("made");
        let Attempt::Locked(_copied) = attempt(&dir).expect("tried") else { panic!("free") };
        for _ in 0..2 {
            let renewed = renew(&dir).expect("taken");
            assert!(matches!(attempt(&dir).expect("tried"), Attempt::Held));
            drop(renewed);
            assert!(
                matches!(attempt(&dir).expect("tried"), Attempt::Locked(_)),
                "the old lock does not count"
            );
        }
        assert_eq!(fs_err::read_dir(&dir).expect("read").count(), 1);
    }
}
