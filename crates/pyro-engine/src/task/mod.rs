//! Tasks as their callers see them. What a living supervisor must do, it is asked to; what is on disk, anybody reads;
//! what a dead supervisor has left, the caller puts in order.

mod birth;
mod client;
mod directory;
mod exec;
mod file;
pub(crate) mod journal;
mod logs;
pub(crate) mod owner;
pub(crate) mod ready;
mod record;
mod socket;
pub(crate) mod starts;
pub(crate) mod writer;

use std::time::{Duration, Instant};

pub(crate) use self::birth::{CONTROL_FD, Kind, LOCK_FD, READY_FD, Report, read_order};
use self::client::Client;
pub(crate) use self::client::{GENERATION, supervisor_proto, to_status};
pub(crate) use self::directory::TaskDirectory;
#[cfg(test)]
pub(crate) use self::file::tests::file as test_file;
pub(crate) use self::file::{TaskFile, TaskFileError, boot_id, boottime};
pub use self::journal::{EntryStatus, JournalEntry};
pub use self::record::{
    CancelledCommand, DeletedTask, Detached, LastCommand, LogEntry, LogQuery, OutputRange, TaskList,
    TaskLogs, TaskRecord,
};
use crate::engine::Engine;
use crate::error::{Error, ErrorKind, LOCK_HELD};
use crate::network::{self, NetworkChange, NetworkLog, NetworkPolicy, TaskNetwork};
use crate::ports::{self, PortChange, TaskPorts};
use crate::registry::TaskLock;

/// Between two looks at a supervisor that is on its way in or out: for a moment it holds its lock and does not
/// answer, and that has no event.
const BEAT: Duration = Duration::from_millis(5);
/// How long that is looked for.
const APPEARS: Duration = Duration::from_secs(8);
/// How long a task may take to be deleted whose supervisors die or change over it, and the pauses between attempts.
const DELETED: Duration = Duration::from_secs(60);
const AGAIN: Duration = Duration::from_millis(20);
const AGAIN_AT_MOST: Duration = Duration::from_secs(1);
/// How long a supervisor may take to delete its task before it is killed, where that is asked for.
const BEFORE_FORCE: Duration = Duration::from_secs(3);

/// What is read of a network's log at once, in bytes.
const MOST_LOG: usize = 4 << 20;

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
    /// When a thread cannot be had, or another process keeps the lock for putting tasks in order; a task that cannot be read is told among the problems.
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
                    // It would be waited for again for each task.
                    Err(error) if error.code() == LOCK_HELD => return Err(error),
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
            Found::Supervised(client) => {
                let started = client.start(self.inner.config.max_active_vms).await;
                self.unless_expired(task_id, started).await?;
            }
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
        if let Found::Supervised(client) = self.find_task(task_id).await? {
            self.unless_expired(task_id, client.stop().await).await?;
        }
        self.status_task(task_id).await
    }

    /// Ends a task in any state, and removes every trace. Running commands are ended first; their callers get what
    /// there is and the reason.
    ///
    /// # Errors
    /// When there is no such task.
    pub async fn delete_task(&self, task_id: &str) -> Result<DeletedTask, Error> {
        let until = Instant::now() + DELETED;
        let mut pause = AGAIN;
        let mut asked = false;
        loop {
            let error = match self.find_task(task_id).await {
                Ok(Found::Supervised(client)) => {
                    asked = true;
                    match client.delete().await {
                        Ok(()) => break,
                        // It died over it: what it has left is put in order in the next round.
                        Err(error) if error.kind() == ErrorKind::OutcomeUnknown => error,
                        Err(error) => return self.unless_expired(task_id, Err(error)).await,
                    }
                }
                Ok(Found::Alone(lock, _)) => {
                    self.remove_alone(task_id, lock).await?;
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
            };
            if Instant::now() >= until {
                return Err(error.hint(format!("end it: pyro task delete {task_id} --force")));
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(AGAIN_AT_MOST);
        }
        Ok(DeletedTask::explicitly(task_id))
    }

    /// As [`Engine::delete_task`], but a supervisor that does not obey within some seconds is killed, and its VMM with it.
    ///
    /// # Errors
    /// When there is no such task, or its supervisor cannot be killed.
    pub async fn delete_task_by_force(&self, task_id: &str) -> Result<DeletedTask, Error> {
        // One that answers ends its commands, and tells their callers.
        match tokio::time::timeout(BEFORE_FORCE, self.delete_task(task_id)).await {
            Ok(Ok(deleted)) => return Ok(deleted),
            Ok(Err(error))
                if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Expired | ErrorKind::Damaged) =>
            {
                return Err(error);
            }
            Ok(Err(_)) | Err(_) => {}
        }
        let until = Instant::now() + APPEARS;
        loop {
            let (engine, id) = (self.clone(), task_id.to_owned());
            let found = self
                .blocking(move || {
                    let registry = &engine.inner.registry;
                    owner::kill(&registry.task_directory(&id)?)?;
                    registry.lock_task(&id)
                })
                .await;
            match found {
                Ok(TaskLock::Free(lock, _)) => {
                    self.remove_alone(task_id, lock).await?;
                    break;
                }
                // It had deleted the task by then, or the task was not made yet.
                Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Expired) => break,
                Err(error) => return Err(error),
                Ok(TaskLock::Held) if Instant::now() >= until => {
                    let directory = self.inner.registry.task_path(task_id);
                    return Err(client::silent(directory, APPEARS, false).await);
                }
                Ok(TaskLock::Held) => tokio::time::sleep(BEAT).await,
            }
        }
        Ok(DeletedTask::explicitly(task_id))
    }

    async fn remove_alone(&self, task_id: &str, lock: std::fs::File) -> Result<(), Error> {
        let (engine, id) = (self.clone(), task_id.to_owned());
        self.blocking(move || engine.inner.registry.remove_task(&id, lock)).await
    }

    /// Ends one command of a task; it has ended when this returns. The result says whether it was running.
    ///
    /// # Errors
    /// When there is no such task, or it has run no such command.
    pub async fn cancel_task(&self, task_id: &str, sequence: u64) -> Result<CancelledCommand, Error> {
        let entry = self.task_entry(task_id, sequence).await?;
        let entry = entry.ok_or_else(|| exec::no_command(task_id, sequence))?;
        let mut ended = false;
        if entry.status == EntryStatus::Running
            && let Found::Supervised(client) = self.find_task(task_id).await?
        {
            self.unless_expired(task_id, client.cancel(sequence).await).await?;
            ended = true;
        }
        Ok(CancelledCommand { task_id: task_id.to_owned(), sequence, ended })
    }

    /// What a supervisor has answered; or, where it does not answer and its task's time is up, that error: the task is
    /// ended then.
    async fn unless_expired<T>(&self, task_id: &str, answer: Result<T, Error>) -> Result<T, Error> {
        let Err(error) = answer else { return answer };
        if !matches!(error.kind(), ErrorKind::Host | ErrorKind::OutcomeUnknown) {
            return Err(error);
        }
        let (engine, id) = (self.clone(), task_id.to_owned());
        match self.blocking(move || engine.inner.registry.lock_task(&id)).await {
            Err(expired) if expired.kind() == ErrorKind::Expired => Err(expired),
            _ => Err(error),
        }
    }

    /// The network of a task.
    ///
    /// # Errors
    /// When there is no such task.
    pub async fn task_network(&self, task_id: &str) -> Result<TaskNetwork, Error> {
        self.set_task_network(task_id, &NetworkChange::default()).await
    }

    /// Changes what the guest of a task may reach, at once and for its later starts. Open connections that are not allowed
    /// any more are reset.
    ///
    /// # Errors
    /// When there is no such task, it was made without a network, or a rule cannot be understood.
    pub async fn set_task_network(
        &self,
        task_id: &str,
        change: &NetworkChange,
    ) -> Result<TaskNetwork, Error> {
        match self.find_task(task_id).await? {
            Found::Supervised(client) => self.unless_expired(task_id, client.network(change).await).await,
            Found::Alone(lock, mut file) => {
                let (engine, change) = (self.clone(), change.clone());
                self.blocking(move || {
                    let old = file.network.clone();
                    let changed = !change.is_empty();
                    if changed {
                        file.network = change.applied(&old)?;
                        let directory = engine.inner.registry.task_directory(&file.task_id)?;
                        file.write(&directory).map_err(|error| Error::state(directory.path(), &error))?;
                    }
                    drop(lock);
                    Ok(TaskNetwork {
                        network_policy: NetworkPolicy::from(&file.network),
                        old_digest: changed.then(|| old.digest()),
                        new_digest: changed.then(|| file.network.digest()),
                        closed_connections: changed.then_some(0),
                        counts: None,
                        task_id: file.task_id,
                    })
                })
                .await
            }
        }
    }

    /// Publishes ports of a task's guest, or publishes them no more; with an empty change it only tells. Those of a stopped
    /// task are taken at its next start.
    ///
    /// # Errors
    /// When there is no such task, a port is in use, or a change names no port.
    pub async fn change_task_ports(&self, task_id: &str, change: &PortChange) -> Result<TaskPorts, Error> {
        match self.find_task(task_id).await? {
            Found::Supervised(client) => self.unless_expired(task_id, client.ports(change).await).await,
            Found::Alone(lock, mut file) => {
                let (engine, change) = (self.clone(), change.clone());
                self.blocking(move || {
                    if !change.is_empty() {
                        let (left, add) = change.applied(&file.ports)?;
                        file.ports = [left, add].concat();
                        ports::check(&file.ports)?;
                        let directory = engine.inner.registry.task_directory(&file.task_id)?;
                        file.write(&directory).map_err(|error| Error::state(directory.path(), &error))?;
                    }
                    drop(lock);
                    Ok(TaskPorts { task_id: file.task_id, ports: file.ports })
                })
                .await
            }
        }
    }

    /// Reads what the guest of a task did on its network, from this offset of the log on.
    ///
    /// # Errors
    /// When there is no such task, or the log cannot be read.
    pub async fn network_log(&self, task_id: &str, offset: u64) -> Result<NetworkLog, Error> {
        let (engine, id) = (self.clone(), task_id.to_owned());
        self.blocking(move || {
            let path = engine.inner.registry.task_directory(&id)?.path().join(network::LOG);
            let read = pyro_net::log::read(&path, offset, MOST_LOG);
            let (entries, next_offset) = read.map_err(|error| Error::state(&path, &error))?;
            Ok(NetworkLog { task_id: id, count: entries.len(), entries, next_offset })
        })
        .await
    }

    /// The records of all tasks, as they are on disk.
    pub(crate) fn task_files(&self) -> Vec<TaskFile> {
        let ids = self.inner.registry.task_ids();
        let directories = ids.iter().filter_map(|id| self.inner.registry.task_directory(id).ok());
        directories.filter_map(|directory| TaskFile::read(&directory).ok().flatten()).collect()
    }

    /// A connection to a task's supervisor, or its lock where it has none.
    async fn find_task(&self, task_id: &str) -> Result<Found, Error> {
        let until = Instant::now() + APPEARS;
        while Instant::now() < until {
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
        let directory = self.inner.registry.task_path(task_id);
        Err(client::silent(directory, APPEARS, false).await)
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
        if !ready::is_listed(&file) {
            return Err(registry.missing("task", task_id));
        }
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
