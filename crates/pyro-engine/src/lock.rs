//! Advisory locks on directories (`flock`), each tied to an open file.
//!
//! A machine's directory is locked by its owner for life. The lock is on the directory itself, so it moves with a
//! rename, needs no file that a clean-up could remove too early, and ends with the last process that holds it.

use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pyro_process::{Holder, lock_holder, lock_within};

use crate::error::Error;

/// How long a lock is waited for that others hold for moments: less than the ten seconds after which a caller must hear
/// why nothing happens.
pub(crate) const BUSY: Duration = Duration::from_secs(8);

use rustix::fs::{CWD, Mode, OFlags};

/// A lock on a file that is held for a moment.
///
/// It is unlocked explicitly, not by closing the file: a copy of this process that was forked meanwhile has the file open
/// as well, and would keep the lock.
#[derive(Debug)]
pub(crate) struct Moment(File);

impl Moment {
    /// Waits for the lock on this file, which is made where there is none.
    ///
    /// # Errors
    /// When the file cannot be made, or another process holds the lock for too long.
    pub(crate) fn wait(path: &Path) -> Result<Self, Error> {
        Self::wait_for(path, BUSY)
    }

    /// As [`Moment::wait`], for no longer than `deadline`.
    pub(crate) fn wait_for(path: &Path, deadline: Duration) -> Result<Self, Error> {
        let locked = File::create(path).and_then(|file| Ok(lock_within(&file, deadline)?.then_some(file)));
        match locked.map_err(|error| Error::state(path, &error))? {
            Some(file) => Ok(Self(file)),
            None => {
                let what = format!("the lock '{}'", path.display());
                Err(Error::lock_held(&what, lock_holder(path).as_ref(), deadline))
            }
        }
    }
}

impl Drop for Moment {
    fn drop(&mut self) {
        // Where that fails, closing the file does it.
        drop(self.0.unlock());
    }
}

/// The process that holds one of the registries that this process has open, where the kernel tells.
pub(crate) fn registry_holder() -> Option<Holder> {
    let descriptors = std::fs::read_dir("/proc/self/fd").ok()?.flatten();
    let open = descriptors.filter_map(|descriptor| std::fs::read_link(descriptor.path()).ok());
    // In WAL mode SQLite's locks are on the shared memory, but for those of one who recovers the database.
    let registry = |path: &std::path::PathBuf| {
        let name = path.file_name().unwrap_or_default();
        name == "registry.db-shm" || name == "registry.db"
    };
    open.filter(registry).find_map(|path| lock_holder(&path))
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

/// What is locked for the directory at `path`: the directory, or the file that has taken its place.
pub(crate) fn locked(path: &Path) -> PathBuf {
    let renewed = path.join(RENEWED);
    if renewed.exists() { renewed } else { path.to_owned() }
}

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
    fn a_lock_that_somebody_holds_for_ever_is_an_error_that_names_it() {
        let root = tempfile::tempdir().expect("a directory");
        let path = root.path().join("repair.lock");
        let held = Moment::wait(&path).expect("free");
        // Another open file of the same process conflicts as another process would.
        let error = Moment::wait_for(&path, Duration::from_millis(50)).expect_err("held");
        assert_eq!(error.code(), "lock_held");
        assert!(error.to_string().contains("repair.lock"), "{error}");
        assert!(error.remedy().is_some());
        drop(held);
        Moment::wait_for(&path, Duration::from_millis(50)).expect("free again");
    }

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
