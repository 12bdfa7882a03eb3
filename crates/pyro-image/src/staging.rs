//! Directories for unfinished work, each held by a lock for as long as its maker lives.
//!
//! A staging directory whose lock is free was left by a process that died; the next command removes it.

use std::io;
use std::path::{Path, PathBuf};

use crate::files;
use crate::lock::{Attempt, Lock, Mode, attempt};
use crate::tool::{self, Tools};

/// A directory of our own, removed with everything in it when dropped.
#[derive(Debug)]
pub(crate) struct Staging {
    path: PathBuf,
    tools: Tools,
    _lock: Lock,
}

impl Staging {
    /// Makes a directory of mode 0700 below `root`.
    pub(crate) fn create(root: &Path, tools: &Tools) -> io::Result<Self> {
        loop {
            let path = root.join(files::random_name()?);
            files::create_private(&path)?;
            match attempt(&path, Mode::Exclusive)? {
                Attempt::Locked(file) => return Ok(Self { path, tools: tools.clone(), _lock: file }),
                // A sweeper saw the directory before its lock; what it removes is empty.
                Attempt::Held | Attempt::Gone => {}
            }
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Takes something out of use: moves it in here, from where it is removed with the rest.
    pub(crate) fn discard(&self, path: &Path) -> io::Result<()> {
        fs_err::rename(path, self.path.join(format!("discarded-{}", files::random_name()?)))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Whatever stays is swept by the next command.
        drop(remove(&self.path, &self.tools));
    }
}

/// Removes all staging directories that nobody holds and returns how many.
pub(crate) fn sweep(root: &Path, tools: &Tools) -> io::Result<usize> {
    let mut removed = 0;
    for entry in fs_err::read_dir(root)? {
        let path = entry?.path();
        if let Ok(Attempt::Locked(held)) = attempt(&path, Mode::Exclusive) {
            removed += usize::from(remove(&path, tools).is_ok());
            drop(held);
        }
    }
    Ok(removed)
}

/// Removes a tree, with the help of a user namespace where parts belong to subordinate ids.
fn remove(path: &Path, tools: &Tools) -> io::Result<()> {
    match fs_err::remove_dir_all(path) {
        Err(error)
            if error.kind() == io::ErrorKind::PermissionDenied && !rustix::process::geteuid().is_root() =>
        {
            remove_mapped(path, tools)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn remove_mapped(path: &Path, tools: &Tools) -> io::Result<()> {
    let parent = path.parent().unwrap_or_else(|| Path::new("/"));
    let mut spawn = tools.confined("rm", parent).map_err(io::Error::other)?;
    spawn.args(["-rf", "--one-file-system", "--"]).arg(path);
    tool::run("rm", spawn, &mut |_line| {}, &|| false).map_err(io::Error::other)
}
