//! Tasks as their callers see them. What a living supervisor must do, it is asked to; what is on disk, anybody reads;
//! what a dead supervisor has left, the caller puts in order.

mod birth;
mod client;
mod directory;
mod exec;
mod file;
pub(crate) mod journal;
mod logs;
mod record;
mod socket;
pub(crate) mod starts;
pub(crate) mod writer;

use std::time::Duration;

pub(crate) use self::birth::{CONTROL_FD, Kind, LOCK_FD, READY_FD, Report, read_order};
use self::client::Client;
pub(crate) use self::client::{supervisor_proto, to_status};
pub(crate) use self::directory::TaskDirectory;
#[cfg(test)]
pub(crate) use self::file::tests::file as test_file;
pub(crate) use self::file::{TaskFile, TaskFileError, boot_id};
pub use self::journal::{EntryStatus, JournalEntry};
pub use self::record::{
    DeletedTask, Detached, LastCommand, LogEntry, LogQuery, OutputRange, TaskList, TaskLogs, TaskRecord,
};
use crate::engine::Engine;
use crate::error::{Error, ErrorKind};
use crate::registry::TaskLock;

/// Between two looks at a supervisor that is on its way in or out: for a moment it holds its lock and does not
/// answer, and that has no event.
const BEAT: Duration = Duration::from_millis(5);
const BEATS: u32 = 1000;

/// A task as it was found.
enum Found {
    /// With its supervisor.
    Supervised(Client),
    /// Without one; its lock is ours.
    Alone(std::fs::File, Box<TaskFile>),
}

impl Engine {
    /// A task's record.
    ///
    /// # Errors
    /// When there is no such task, or its time was up.
    pub async fn status_task(&self, task_id: &str) -> Result<TaskRecord, Error> {
        let (engine, id) = (self.clone(), task_id.to_owned());
        self.blocking(move || engine.task_record(&id)).await
    }

    /// All tasks, newest activity first.
    ///
    /// # Errors
    /// When a thread cannot be had; a task that cannot be read is told among the problems.
    pub async fn list_tasks(&self) -> Result<TaskList, Error> {
        let engine = self.clone();
        self.blocking(move || {
            let mut problems = Vec::new();
            let mut tasks = Vec::new();
            for id in engine.inner.registry.task_ids() {
                match engine.task_record(&id) {
                    Ok(record) => tasks.push((engine.last_activity(&id), record)),
                    // Gone since its name was read, or not born yet.
                    Err(error) if error.kind() == ErrorKind::NotFound => {}
                    // Whoever asks for it by name is to hear of it.
                    Err(error) if error.kind() == ErrorKind::Expired => {
                        engine.inner.registry.remember_expired(&id)
                    }
                    Err(error) => problems.push(error.to_string()),
                }
            }
            tasks.sort_by_key(|(activity, _)| std::cmp::Reverse(*activity));
            let tasks: Vec<TaskRecord> = tasks.into_iter().map(|(_, record)| record).collect();
            let disk_bytes = tasks.iter().map(|task| task.disk_bytes).sum();
            Ok(TaskList { count: tasks.len(), disk_bytes, tasks, problems })
        })
        .await
    }

    /// Boots a stopped task from its disk.
    ///
    /// # Errors
    /// When it runs already, the cap is reached, or it does not boot.
    pub async fn start_task(&self, task_id: &str) -> Result<TaskRecord, Error> {
        match self.find_task(task_id).await? {
            Found::Supervised(mut client) => client.start(self.inner.config.max_active_vms).await?,
            Found::Alone(lock, file) => {
                if !file.state.can_start() {
                    let text =
                        format!("task {task_id} cannot be started from state '{}'", file.state.as_str());
                    return Err(Error::new(ErrorKind::WrongState, text));
                }
                self.revive(lock, *file).await?;
            }
        }
        self.status_task(task_id).await
    }

    /// Powers a task's guest off cleanly; disk and journal are kept. Running commands are ended. One that is stopped
    /// already stays so.
    ///
    /// # Errors
    /// When there is no such task.
    pub async fn stop_task(&self, task_id: &str) -> Result<TaskRecord, Error> {
        if let Found::Supervised(mut client) = self.find_task(task_id).await? {
            client.stop().await?;
        }
        self.status_task(task_id).await
    }

    /// Ends a task in any state, and removes every trace. Running commands are ended first; their callers get what
    /// there is and the reason.
    ///
    /// # Errors
    /// When there is no such task.
    pub async fn delete_task(&self, task_id: &str) -> Result<DeletedTask, Error> {
        let mut asked = false;
        loop {
            match self.find_task(task_id).await {
                Ok(Found::Supervised(mut client)) => {
                    asked = true;
                    match client.delete().await {
                        Ok(()) => break,
                        // It died over it: what it has left is put in order in the next round.
                        Err(error) if error.kind() == ErrorKind::OutcomeUnknown => {}
                        Err(error) => return Err(error),
                    }
                }
                Ok(Found::Alone(lock, _)) => {
                    let (engine, id) = (self.clone(), task_id.to_owned());
                    self.blocking(move || engine.inner.registry.remove_task(&id, lock)).await?;
                    break;
                }
                Err(error) if asked && error.kind() == ErrorKind::NotFound => break,
                Err(error) if error.kind() == ErrorKind::Damaged => {
                    let (engine, id) = (self.clone(), task_id.to_owned());
                    let removed =
                        self.blocking(move || engine.inner.registry.remove_quarantined(&id)).await?;
                    if removed {
                        break;
                    }
                    return Err(error);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(DeletedTask { task_id: task_id.to_owned(), deleted: true, reason: "explicit_delete" })
    }

    /// Ends one command of a task; it has ended when this returns. One that has ended already is no error.
    ///
    /// # Errors
    /// When there is no such task.
    pub async fn cancel_task(&self, task_id: &str, sequence: u64) -> Result<(), Error> {
        match self.find_task(task_id).await? {
            Found::Supervised(mut client) => client.cancel(sequence).await,
            Found::Alone(..) => Ok(()),
        }
    }

    /// The records of all tasks, as they are on disk.
    pub(crate) fn task_files(&self) -> Vec<TaskFile> {
        let ids = self.inner.registry.task_ids();
        let directories = ids.iter().filter_map(|id| self.inner.registry.task_directory(id).ok());
        directories.filter_map(|directory| TaskFile::read(&directory).ok().flatten()).collect()
    }

    /// A connection to a task's supervisor, or its lock where it has none.
    async fn find_task(&self, task_id: &str) -> Result<Found, Error> {
        for _ in 0..BEATS {
            let (engine, id) = (self.clone(), task_id.to_owned());
            let directory = self.blocking(move || engine.inner.registry.task_directory(&id)).await?;
            if let Some(client) = Client::connect(&directory).await? {
                return Ok(Found::Supervised(client));
            }
            let (engine, id) = (self.clone(), task_id.to_owned());
            match self.blocking(move || engine.inner.registry.lock_task(&id)).await? {
                TaskLock::Free(lock, file) => return Ok(Found::Alone(lock, file)),
                TaskLock::Held => tokio::time::sleep(BEAT).await,
            }
        }
        let text = format!("the supervisor of task '{task_id}' lives and does not answer");
        Err(Error::new(ErrorKind::Host, text)
            .hint("kill it (its command line names the task), then try again"))
    }

    /// Reads a task's record from disk, after putting it in order where its supervisor is gone.
    fn task_record(&self, task_id: &str) -> Result<TaskRecord, Error> {
        let registry = &self.inner.registry;
        let file = match registry.lock_task(task_id)? {
            TaskLock::Free(lock, file) => {
                drop(lock);
                *file
            }
            TaskLock::Held => {
                let directory = registry.task_directory(task_id)?;
                TaskFile::read(&directory)?.ok_or_else(|| registry.missing("task", task_id))?
            }
        };
        let directory = registry.task_directory(task_id)?;
        let journal = directory.journal();
        let failed = |error: std::io::Error| Error::state(directory.path(), &error);
        let count = journal.last_sequence().map_err(failed)?;
        let last = if count > 0 { journal.entry(count).map_err(failed)? } else { None };
        Ok(TaskRecord::new(file, count, last, directory.disk_bytes()))
    }

    fn last_activity(&self, task_id: &str) -> Option<std::time::SystemTime> {
        self.inner.registry.task_directory(task_id).ok()?.last_activity()
    }
}

/// A task that is not started has no guest to run a command in.
pub(crate) fn not_started(task_id: &str) -> Error {
    let text = format!("task {task_id} must be in 'started' state before task_exec");
    Error::new(ErrorKind::WrongState, text).hint(format!("start it: pyro task start {task_id}"))
}
