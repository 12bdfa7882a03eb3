//! What a task's directory holds.
//!
//! ```text
//! tasks/ID/                 locked by the supervisor for life
//! tasks/ID/task.json        the record
//! tasks/ID/control.sock     where the supervisor answers
//! tasks/ID/overlay.ext4     the guest's disk; sparse
//! tasks/ID/commands/        the journal: see `journal`
//! tasks/ID/workspace/       the working directory of commands on the host, where they may run there
//! tasks/ID/supervisor.log   the supervisor's last words, if it had any
//! ```

use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::files;
use crate::task::journal::Journal;

/// The path of a task's directory.
#[derive(Clone, Debug)]
pub(crate) struct TaskDirectory(PathBuf);

impl TaskDirectory {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn record(&self) -> PathBuf {
        self.0.join("task.json")
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.0.join("supervisor.log")
    }

    pub(crate) fn workspace(&self) -> PathBuf {
        self.0.join("workspace")
    }

    pub(crate) fn journal(&self) -> Journal {
        Journal::new(self.0.join("commands"))
    }

    /// Makes the journal's directory.
    pub(crate) fn furnish(&self) -> io::Result<()> {
        std::fs::DirBuilder::new().mode(0o700).create(self.0.join("commands"))?;
        files::sync_directory(&self.0)
    }

    pub(crate) fn remove_record(&self) -> io::Result<()> {
        files::remove_if_there(&self.record())
    }

    /// What the task takes on the host's disk, in bytes.
    pub(crate) fn disk_bytes(&self) -> u64 {
        let blocks = |path: &Path| std::fs::symlink_metadata(path).map_or(0, |found| found.blocks() * 512);
        let commands = std::fs::read_dir(self.0.join("commands")).into_iter().flatten().flatten();
        blocks(&self.0.join(crate::live::OVERLAY)) + commands.map(|entry| blocks(&entry.path())).sum::<u64>()
    }

    /// When a command was last begun or ended; else when the task was made.
    pub(crate) fn last_activity(&self) -> Option<SystemTime> {
        std::fs::metadata(self.0.join("commands")).and_then(|found| found.modified()).ok()
    }
}
