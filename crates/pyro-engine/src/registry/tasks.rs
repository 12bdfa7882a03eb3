//! Tasks in the registry: their slots, their locks, and what becomes of one whose supervisor is gone.
//!
//! The record of a task is a file in its directory (`task::file`), so the database can be lost; a row only counts
//! towards the cap. The lock of the directory is handed from the process that makes the task to its supervisor
//! without ever being free, and is held by that supervisor for life.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use rusqlite::{Connection, params};

use super::slots::Asking;
use super::{Lease, Registry, Swept};
use crate::budget::Promise;
use crate::error::{Error, ErrorKind};
use crate::files;
use crate::lock::{self, Attempt};
use crate::record::VmState;
use crate::task::{TaskDirectory, TaskFile, TaskFileError, owner, ready};

/// How long after a task's time its supervisor may need to end it: longer than its commands and its guest take.
const OVERDUE: Duration = Duration::from_secs(5);
/// How long a sweep waits for others that put tasks in order.
const SWEEP_WAITS: Duration = Duration::from_secs(1);

/// Whether a task has a supervisor, found out by its lock.
#[derive(Debug)]
pub(crate) enum TaskLock {
    /// It has none; the lock is ours, and the record is in order.
    Free(File, Box<TaskFile>),
    /// It has one.
    Held,
}

impl Registry {
    /// Takes a slot for a new task: directory, lock, row in the state `creating`.
    pub(crate) fn bear_task(&self, cap: u32, promise: Promise) -> Result<Lease, Error> {
        let lease = self.new_lease("tasks")?;
        let asking = Asking { id: &lease.id, kind: "tasks", cap: Some(cap), promise: Some(promise) };
        let admitted = self.take_slot(asking, |connection| {
            connection.execute("INSERT OR REPLACE INTO tasks VALUES (?1, 'creating')", [&lease.id])
        });
        // After a loss of power, a task that was told of is there.
        let tasks = self.state_dir.join("tasks");
        let durable = admitted
            .and_then(|()| files::sync_directory(&tasks).map_err(|error| Error::state(&tasks, &error)));
        match durable {
            Ok(()) => Ok(lease),
            Err(error) => {
                // Why it was not admitted is what is told; what cannot be removed now is found by the next sweep.
                drop(self.remove_task(&lease.id, lease.lock));
                Err(error)
            }
        }
    }

    /// Gives a stopped task its slot back, if one is free.
    pub(crate) fn readmit_task(&self, cap: u32, id: &str) -> Result<(), Error> {
        let asking = Asking { id, kind: "tasks", cap: Some(cap), promise: None };
        self.take_slot(asking, |connection| {
            connection.execute("INSERT OR REPLACE INTO tasks VALUES (?1, 'started')", [id])
        })
    }

    /// Says in the registry what the task's record says.
    pub(crate) fn set_task_state(&self, id: &str, state: &str) -> Result<(), Error> {
        self.connection().execute("INSERT OR REPLACE INTO tasks VALUES (?1, ?2)", params![id, state])?;
        self.set_counts(id, state != VmState::Stopped.as_str())
    }

    /// Where the directory of a task is or was.
    pub(crate) fn task_path(&self, id: &str) -> TaskDirectory {
        TaskDirectory::new(self.path("tasks", id))
    }

    /// The directory of a task, where there is one of this name.
    pub(crate) fn task_directory(&self, id: &str) -> Result<TaskDirectory, Error> {
        if !super::is_id(id) {
            return Err(Error::new(ErrorKind::NotFound, format!("task '{id}' does not exist")));
        }
        let directory = TaskDirectory::new(self.path("tasks", id));
        if directory.path().is_dir() {
            return Ok(directory);
        }
        if self.path("quarantine", id).is_dir() {
            let kept = self.path("quarantine", id);
            let text = format!("task '{id}' is damaged: its record cannot be read");
            return Err(Error::new(ErrorKind::Damaged, text).hint(format!(
                "what is left of it is in '{}'; when you are done, run: pyro task delete {id}",
                kept.display()
            )));
        }
        Err(self.missing("task", id))
    }

    /// The ids of all tasks on disk.
    pub(crate) fn task_ids(&self) -> Vec<String> {
        self.entries("tasks", &mut Vec::new()).into_iter().map(|(id, _)| id).collect()
    }

    /// Takes the lock of a task if it has no supervisor, after putting its record in order.
    pub(crate) fn lock_task(&self, id: &str) -> Result<TaskLock, Error> {
        let directory = self.task_directory(id)?;
        let _repair = self.repair_lock(lock::BUSY)?;
        self.lock_under_repair(id, &directory)
    }

    /// Whoever takes the lock of a task without a supervisor does so under this one, for a moment: so a lock that is
    /// held is held by a supervisor, or by the birth of one.
    fn repair_lock(&self, deadline: Duration) -> Result<lock::Moment, Error> {
        lock::Moment::wait_for(&self.state_dir.join("repair.lock"), deadline)
    }

    fn lock_under_repair(&self, id: &str, directory: &TaskDirectory) -> Result<TaskLock, Error> {
        match self.attempt(id, directory.path()).map_err(|error| Error::state(directory.path(), &error))? {
            Attempt::Held => self.end_overdue(id, directory),
            Attempt::Gone => Err(self.missing("task", id)),
            Attempt::Locked(lock) => self.put_in_order(id, directory, lock),
        }
    }

    /// Ends a task whose time was up some seconds ago and whose supervisor, being stopped or stuck, has not ended it.
    fn end_overdue(&self, id: &str, directory: &TaskDirectory) -> Result<TaskLock, Error> {
        // A record that cannot be read says nothing, so it is no reason to kill anybody.
        let is_overdue = matches!(TaskFile::read(directory), Ok(Some(file)) if file.overdue() > OVERDUE);
        if !is_overdue || !owner::kill(directory)? {
            return Ok(TaskLock::Held);
        }
        match self.attempt(id, directory.path()).map_err(|error| Error::state(directory.path(), &error))? {
            Attempt::Held => Ok(TaskLock::Held),
            Attempt::Gone => Err(self.missing("task", id)),
            Attempt::Locked(lock) => self.put_in_order(id, directory, lock),
        }
    }

    /// Brings a task without a supervisor into a state that its record tells truly.
    fn put_in_order(&self, id: &str, directory: &TaskDirectory, lock: File) -> Result<TaskLock, Error> {
        let failed = |error: io::Error| Error::state(directory.path(), &error);
        // Also of a task that is put aside. Where its VMM is still dying, its next start or its end does it.
        drop(self.remove_resources(id, directory.path()));
        let mut file = match TaskFile::read(directory) {
            Ok(Some(file)) => file,
            Ok(None) => {
                // Its birth was cut short: it never was.
                self.take_out(id)?;
                return Err(self.missing("task", id));
            }
            Err(TaskFileError::Newer(error)) => return Err(error),
            Err(TaskFileError::Damaged(error)) => {
                self.forget_task(id)?;
                let kept = self.path("quarantine", id);
                fs_err::rename(directory.path(), kept).map_err(failed)?;
                drop(lock);
                return Err(self.task_directory(id).err().unwrap_or(error));
            }
        };
        if !ready::is_listed(&file) {
            // A machine that was kept ready, or was used by one command: it ends with its supervisor.
            self.take_out(id)?;
            return Err(self.missing("task", id));
        }
        if file.has_expired() {
            drop(self.bury(id));
            self.take_out(id)?;
            return Err(self.missing("task", id));
        }
        directory.journal().interrupt_all(file.has_rebooted()).map_err(failed)?;
        let (is_lost, has_rebooted) = (file.note_lost_supervisor(), file.note_reboot());
        if is_lost || has_rebooted {
            file.write(directory).map_err(failed)?;
        }
        self.set_task_state(id, file.state.as_str())?;
        Ok(TaskLock::Free(lock, Box::new(file)))
    }

    /// Ends a task's record and files; its VMM must be gone. Dropping the lock is the last of it.
    pub(crate) fn remove_task(&self, id: &str, _lock: File) -> Result<(), Error> {
        let trash = self.take_out(id)?;
        // What cannot be removed now is the next sweep's.
        drop(self.remove_tree(id, &trash));
        Ok(())
    }

    /// Removes a task that is damaged and was put aside; whether there was one.
    pub(crate) fn remove_quarantined(&self, id: &str) -> Result<bool, Error> {
        let quarantined = self.path("quarantine", id);
        if !super::is_id(id) || !quarantined.is_dir() {
            return Ok(false);
        }
        let trash = self.set_aside(id, &quarantined)?;
        drop(self.remove_tree(id, &trash));
        Ok(true)
    }

    /// Moves a task out of its place. The record goes first: a directory without one is of a task that never was
    /// or is no more. The row goes last, and where the disk is too full for that, with the next sweep: a task must be
    /// removable to make room.
    fn take_out(&self, id: &str) -> Result<PathBuf, Error> {
        let directory = self.task_path(id);
        directory.remove_record().map_err(|error| Error::state(directory.path(), &error))?;
        let trash = self.set_aside(id, directory.path())?;
        drop(self.forget_task(id));
        Ok(trash)
    }

    /// As [`Registry::remove_task`], and remembers that its time was up.
    pub(crate) fn expire_task(&self, id: &str, lock: File) -> Result<(), Error> {
        // Where it cannot be remembered, whoever asks is told that there is no such task.
        drop(self.bury(id));
        self.remove_task(id, lock)
    }

    /// An expiry that was told to nobody yet.
    pub(crate) fn remember_expired(&self, id: &str) {
        drop(self.bury(id));
    }

    fn forget_task(&self, id: &str) -> Result<(), Error> {
        self.connection().execute("DELETE FROM tasks WHERE id = ?1", [id])?;
        Ok(())
    }

    /// Puts every task without a supervisor in order.
    pub(super) fn sweep_tasks(&self, swept: &mut Swept) {
        let entries = self.entries("tasks", &mut swept.problems);
        // What this command is for matters more than what others have left.
        let repair = self.repair_lock(SWEEP_WAITS);
        if let Err(error) = &repair {
            return swept.problems.push(error.to_string());
        }
        for (id, path) in entries {
            match self.lock_under_repair(&id, &TaskDirectory::new(path)) {
                Ok(TaskLock::Free(..)) => {}
                // Where the database was lost, its supervisor still counts.
                Ok(TaskLock::Held) => drop(self.count_again(&id)),
                Err(error) if error.kind() == ErrorKind::Expired => {
                    // Told to nobody yet: whoever asks for it is to hear of it.
                    drop(self.bury(&id));
                    swept.task_ids.push(id);
                }
                Err(error) if error.kind() == ErrorKind::NotFound => swept.task_ids.push(id),
                Err(error) => swept.problems.push(error.to_string()),
            }
        }
        drop(repair);
        // A row without a directory: its owner died between the two halves of a removal.
        let gone = self
            .ids("tasks")
            .map(|ids| ids.into_iter().filter(|id| !self.path("tasks", id).exists()).collect::<Vec<_>>());
        match gone.and_then(|ids| ids.iter().try_for_each(|id| self.forget_task(id))) {
            Ok(()) => {}
            Err(error) => swept.problems.push(error.to_string()),
        }
    }

    /// Makes the row of a task with a supervisor, where there is none.
    fn count_again(&self, id: &str) -> Result<(), Error> {
        if let Ok(Some(file)) = TaskFile::read(&self.task_path(id)) {
            insert_again(&self.connection(), id, Some(&file))?;
        }
        Ok(())
    }
}

/// After the database was lost, or found with an older layout: tasks with a supervisor, or about to get one, count again.
pub(super) fn find_tasks_again(connection: &Connection, tasks: &[(String, PathBuf)]) -> rusqlite::Result<()> {
    for (id, path) in tasks {
        let file = TaskFile::read(&TaskDirectory::new(path.clone())).ok().flatten();
        insert_again(connection, id, file.as_ref())?;
    }
    Ok(())
}

/// Makes the rows of a task from its record, where there are none. Its owner is unknown, and its lock alone says whether it
/// lives.
fn insert_again(connection: &Connection, id: &str, file: Option<&TaskFile>) -> rusqlite::Result<()> {
    let state = file.map_or("creating", |file| file.state.as_str());
    connection.execute("INSERT OR IGNORE INTO tasks VALUES (?1, ?2)", params![id, state])?;
    let promise = file.map_or_else(Promise::default, TaskFile::promise);
    connection.execute(
        "INSERT OR IGNORE INTO machines VALUES (?1, 'tasks', ?2, ?3, ?4, '')",
        params![id, promise.mem_mib, promise.disk_mib, state != VmState::Stopped.as_str()],
    )?;
    Ok(())
}
