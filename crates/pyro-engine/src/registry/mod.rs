//! The machine-wide registry: one SQLite database that decides who gets a slot, and one directory for each
//! machine, whose lock tells whether its owner lives.
//!
//! ```text
//! STATE_DIR/registry.db        rows: vms (id, state, record, expiry), tasks (id, state), expired ids; for each of vms, tasks
//!                              and machines that become a template: what it was promised, its owner, what was made for
//!                              it elsewhere
//! STATE_DIR/registry.db.init   lock for opening and migrating it
//! STATE_DIR/vms/ID/            a machine of one process, locked by it for life
//! STATE_DIR/tasks/ID/          a task, locked by its supervisor for life; see `task`
//! STATE_DIR/trash/ID/          what is being removed
//! STATE_DIR/quarantine/ID/     a task whose record cannot be read
//! STATE_DIR/repair.lock        held by whoever takes the lock of a task without a supervisor
//! ```
//!
//! The lock is taken before the row becomes visible. Whoever finds a row or a directory whose lock is free
//! knows that its owner is dead, and finishes the clean-up: the VMM has died with its owner. A lock may be held although
//! the owner is dead, by a copy of the owner that was forked: so the row names the owner, by number, start and boot, and a
//! dead owner's lock does not count. A directory leaves its place whole, by a rename, before anything in it is removed.

mod database;
mod owner;
mod resources;
mod shared;
mod slots;
mod sweep;
mod tasks;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use pyro_image::Trust;
use rusqlite::{Connection, OptionalExtension, params};

use self::database::Found;
use self::slots::Asking;
use crate::budget::Promise;
use crate::error::{Error, ErrorKind};
use crate::files;
use crate::lock::{self, Attempt};
use crate::record::{VmRecord, VmState};

pub(crate) use self::owner::Owner;
pub(crate) use self::resources::Resource;
pub(crate) use self::slots::{Bounds, this_process};
pub(crate) use self::sweep::Swept;
pub(crate) use self::tasks::TaskLock;

/// How long an expired machine is remembered, so that one caller can be told, in seconds.
const TOMBSTONE_SECONDS: f64 = 86_400.0;

/// Everything that holds a slot.
const LIVE: &str = "SELECT (SELECT count(*) FROM vms WHERE state <> 'stopped')
                         + (SELECT count(*) FROM tasks WHERE state <> 'stopped')";

#[derive(Debug)]
pub(crate) struct Registry {
    state_dir: PathBuf,
    /// The same without links, by which other state directories know this one.
    key: PathBuf,
    bounds: Bounds,
    database: Mutex<Database>,
}

/// An open database, and which file it is.
#[derive(Debug)]
struct Database {
    connection: Connection,
    file: Option<(u64, u64)>,
}

/// The ownership of one machine: its directory and the lock on it.
#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) id: String,
    pub(crate) dir: PathBuf,
    pub(crate) lock: File,
}

impl Registry {
    pub(crate) fn open(state_dir: &Path, bounds: Bounds) -> Result<Self, Error> {
        let failed = |error: io::Error| Error::state(state_dir, &error);
        let state_dir = std::path::absolute(state_dir).map_err(failed)?;
        let distrusted = match Trust::of(&state_dir).map_err(failed)? {
            Ok(Trust::Own) => None,
            Ok(Trust::ReadOnly) => Some((format!("'{}' can only be read", state_dir.display()), None)),
            Err(distrust) => Some((distrust.to_string(), distrust.remedy())),
        };
        if let Some((what, remedy)) = distrusted {
            let remedy = remedy.map_or_else(String::new, |remedy| format!("{remedy}, or "));
            return Err(Error::new(ErrorKind::Host, format!("the state directory {what}"))
                .hint(format!("{remedy}set PYRO_STATE_DIR to one of your own")));
        }
        refuse_anothers(&state_dir)?;
        make_directories(&state_dir).map_err(failed)?;
        let key = fs_err::canonicalize(&state_dir).map_err(failed)?;
        Ok(Self { database: Mutex::new(Database::open(&state_dir)?), state_dir, key, bounds })
    }

    /// The directory that everything is in.
    pub(crate) fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    /// Takes a slot for a new machine: directory, lock, row. `record` makes the row's text from the id.
    pub(crate) fn admit(
        &self,
        cap: u32,
        promise: Promise,
        record: impl FnOnce(&str) -> VmRecord,
    ) -> Result<(Lease, VmRecord), Error> {
        let lease = self.new_lease("vms")?;
        let record = record(&lease.id);
        let row = encode(&record)?;
        let asking = Asking { id: &lease.id, kind: "vms", cap: Some(cap), promise: Some(promise) };
        let admitted = self.take_slot(asking, |connection| {
            let sql = "INSERT OR REPLACE INTO vms (id, state, record, expires_at) VALUES (?1, ?2, ?3, ?4)";
            connection.execute(sql, params![record.vm_id, record.state.as_str(), row, record.expires_at])
        });
        self.keep_if(admitted, lease).map(|lease| (lease, record))
    }

    /// A directory and its lock for a machine that becomes a template: it takes nobody's slot, counts as to memory and disk,
    /// and goes by the sweep like any other's.
    pub(crate) fn lease_directory(&self, promise: Promise) -> Result<Lease, Error> {
        let lease = self.new_lease("vms")?;
        let asking = Asking { id: &lease.id, kind: "vms", cap: None, promise: Some(promise) };
        let admitted = self.take_slot(asking, |_| Ok(0));
        self.keep_if(admitted, lease)
    }

    /// The lease of a machine that was admitted. That of one that was not is removed, and why it was not is what is told:
    /// what cannot be removed now is found by the next sweep.
    fn keep_if(&self, admitted: Result<(), Error>, lease: Lease) -> Result<Lease, Error> {
        match admitted {
            Ok(()) => Ok(lease),
            Err(error) => {
                drop(self.remove(lease));
                Err(error)
            }
        }
    }

    /// Replaces a machine's row.
    pub(crate) fn update(&self, record: &VmRecord) -> Result<(), Error> {
        self.connection().execute(
            "UPDATE vms SET state = ?2, record = ?3 WHERE id = ?1",
            params![record.vm_id, record.state.as_str(), encode(record)?],
        )?;
        self.set_counts(&record.vm_id, record.state != VmState::Stopped)
    }

    /// Gives a stopped machine its slot back, if one is free.
    pub(crate) fn readmit(&self, cap: u32, vm_id: &str) -> Result<(), Error> {
        let asking = Asking { id: vm_id, kind: "vms", cap: Some(cap), promise: None };
        self.take_slot(asking, |connection| {
            connection.execute("UPDATE vms SET state = 'started' WHERE id = ?1", [vm_id])
        })
    }

    /// Reads one machine's row. An expired one is told of once.
    pub(crate) fn get(&self, id: &str) -> Result<VmRecord, Error> {
        let sql = "SELECT record FROM vms WHERE id = ?1";
        let row: Option<String> = self.connection().query_row(sql, [id], |row| row.get(0)).optional()?;
        match row.map(|text| serde_json::from_str(&text)) {
            Some(Ok(record)) => Ok(record),
            Some(Err(error)) => {
                let text = format!("the record of vm '{id}' cannot be read: {error}");
                Err(Error::new(ErrorKind::Damaged, text)
                    .hint("end the process that owns it, or wait for its TTL"))
            }
            None => Err(self.missing("vm", id)),
        }
    }

    /// Ends a machine's record and files; its VMM must be gone.
    pub(crate) fn remove(&self, lease: Lease) -> Result<(), Error> {
        self.discard(&lease.id, &lease.dir, lease.lock)?;
        // Where the disk is too full for this, the next sweep finds a row without a directory.
        drop(self.connection().execute("DELETE FROM vms WHERE id = ?1", [&lease.id]));
        Ok(())
    }

    /// As [`Registry::remove`], and remembers that its time was up.
    pub(crate) fn expire(&self, lease: Lease) -> Result<(), Error> {
        drop(self.bury(&lease.id));
        self.remove(lease)
    }

    /// Machines that count towards the cap.
    pub(crate) fn live(&self) -> Result<u32, Error> {
        Ok(self.connection().query_row(LIVE, [], |row| row.get(0))?)
    }

    fn entries(&self, kind: &str, problems: &mut Vec<String>) -> Vec<(String, PathBuf)> {
        entries_of(&self.state_dir, kind, problems)
    }

    /// Makes a directory with a new id and takes its lock.
    fn new_lease(&self, kind: &str) -> Result<Lease, Error> {
        let failed = |error: io::Error| Error::state(&self.state_dir, &error);
        loop {
            let id = files::random_hex(6).map_err(|error| Error::host("random numbers", &error))?;
            let dir = self.path(kind, &id);
            match std::fs::DirBuilder::new().mode(0o700).create(&dir) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                made => made.map_err(failed)?,
            }
            // A sweeper may take the directory for a dead one's before the lock is held: then again.
            if let Attempt::Locked(lock) = lock::attempt(&dir).map_err(failed)? {
                return Ok(Lease { id, dir, lock });
            }
        }
    }

    /// Remembers that a machine's time was up, for the one caller who is told.
    fn bury(&self, id: &str) -> Result<(), Error> {
        let sql = "INSERT OR REPLACE INTO expired (id, at) VALUES (?1, ?2)";
        self.connection().execute(sql, params![id, now()])?;
        Ok(())
    }

    fn bury_if_expired(&self, id: &str) -> Result<(), Error> {
        let sql = "SELECT expires_at FROM vms WHERE id = ?1";
        let expiry: Option<f64> = self.connection().query_row(sql, [id], |row| row.get(0)).optional()?;
        if expiry.is_some_and(|expiry| expiry <= now()) { self.bury(id) } else { Ok(()) }
    }

    /// Why there is no such machine or task: it never was, or its time was up, which is told once.
    pub(crate) fn missing(&self, noun: &str, id: &str) -> Error {
        match self.connection().execute("DELETE FROM expired WHERE id = ?1", [id]) {
            Ok(1..) => {
                let text = format!("{noun} '{id}' expired and was automatically deleted");
                Error::new(ErrorKind::Expired, text)
            }
            Ok(_) => Error::new(ErrorKind::NotFound, format!("{noun} '{id}' does not exist")),
            Err(error) => error.into(),
        }
    }

    fn ids(&self, table: &str) -> Result<Vec<String>, Error> {
        let connection = self.connection();
        let mut rows = connection.prepare(&format!("SELECT id FROM {table}"))?;
        let ids = rows.query_map([], |row| row.get(0))?;
        Ok(ids.collect::<Result<_, _>>()?)
    }

    fn path(&self, kind: &str, id: &str) -> PathBuf {
        self.state_dir.join(kind).join(id)
    }

    /// The database. One that was removed or replaced since it was opened is opened anew: what was written to it
    /// otherwise, nobody would ever read.
    fn connection(&self) -> impl DerefMut<Target = Connection> + '_ {
        let mut database = self.database.lock().unwrap_or_else(PoisonError::into_inner);
        if database.file != database::identity(&self.state_dir)
            && let Ok(again) = Database::open(&self.state_dir)
        {
            *database = again;
        }
        Opened(database)
    }
}

impl Database {
    fn open(state_dir: &Path) -> Result<Self, Error> {
        let (connection, found) = database::open(state_dir)?;
        if found != Found::Newest {
            find_vms_again(&connection, found, &entries_of(state_dir, "vms", &mut Vec::new()))?;
            tasks::find_tasks_again(&connection, &entries_of(state_dir, "tasks", &mut Vec::new()))?;
        }
        Ok(Self { connection, file: database::identity(state_dir) })
    }
}

/// After the database was lost, or found with an older layout: who is there all the same counts again. What a machine was
/// promised is in its row, if that is left; its owner is unknown then, and its lock alone says whether it lives.
fn find_vms_again(connection: &Connection, found: Found, vms: &[(String, PathBuf)]) -> rusqlite::Result<()> {
    for (id, path) in vms {
        if !matches!(lock::attempt(path), Ok(Attempt::Held)) {
            continue;
        }
        if found == Found::Nothing {
            let row = "INSERT OR IGNORE INTO vms VALUES (?1, 'started', '', ?2)";
            connection.execute(row, params![id, f64::MAX])?;
        }
        let sql = "SELECT record FROM vms WHERE id = ?1";
        let record: Option<String> = connection.query_row(sql, [id], |row| row.get(0)).optional()?;
        let record = record.and_then(|text| serde_json::from_str::<VmRecord>(&text).ok());
        let promise = record.as_ref().map_or_else(Promise::default, |record| Promise::of(record.mem_mib, 0));
        let counts = record.is_none_or(|record| record.state != VmState::Stopped);
        connection.execute(
            "INSERT OR IGNORE INTO machines VALUES (?1, 'vms', ?2, ?3, ?4, '')",
            params![id, promise.mem_mib, promise.disk_mib, counts],
        )?;
    }
    Ok(())
}

/// A lock on the database that looks like its connection.
struct Opened<'a>(MutexGuard<'a, Database>);

impl Deref for Opened<'_> {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.0.connection
    }
}

impl DerefMut for Opened<'_> {
    fn deref_mut(&mut self) -> &mut Connection {
        &mut self.0.connection
    }
}

/// Directories with an id for a name; what else lies there is none of ours to touch, and is told.
fn entries_of(state_dir: &Path, kind: &str, problems: &mut Vec<String>) -> Vec<(String, PathBuf)> {
    let mut found = Vec::new();
    let entries = match fs_err::read_dir(state_dir.join(kind)) {
        Ok(entries) => entries,
        Err(error) => {
            problems.push(error.to_string());
            return found;
        }
    };
    for entry in entries.flatten() {
        let path = entry.path();
        match entry.file_name().to_str().filter(|name| is_id(name)) {
            Some(id) if entry.file_type().is_ok_and(|kind| kind.is_dir()) => {
                found.push((id.to_owned(), path));
            }
            _ => problems.push(format!("'{}' is not pyro's: remove it", path.display())),
        }
    }
    found.sort();
    found
}

/// A directory that holds other things is not made private and filled.
fn refuse_anothers(state_dir: &Path) -> Result<(), Error> {
    let Ok(entries) = fs_err::read_dir(state_dir) else { return Ok(()) };
    // What another process has just begun to make is ours; and a disk of its own has `lost+found`.
    let ours = ["vms", "tasks", "trash", "quarantine", "cache", "lost+found"];
    let mut others = entries.flatten().filter(|entry| !ours.iter().any(|name| entry.file_name() == *name));
    if others.next().is_none()
        || state_dir.join("vms").is_dir()
        || state_dir.join("registry.db.init").exists()
    {
        return Ok(());
    }
    let text = format!("the state directory '{}' holds other things", state_dir.display());
    Err(Error::new(ErrorKind::Host, text)
        .hint("set PYRO_STATE_DIR to a directory that is empty or does not exist"))
}

/// Makes the directories, which only their owner may look into.
fn make_directories(state_dir: &Path) -> io::Result<()> {
    for directory in ["vms", "tasks", "trash", "quarantine"] {
        let directory = state_dir.join(directory);
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    }
    let mode = fs_err::metadata(state_dir)?.permissions().mode();
    if mode & 0o077 != 0 {
        fs_err::set_permissions(state_dir, std::fs::Permissions::from_mode(0o700))?;
    }
    Ok(())
}

fn encode(record: &VmRecord) -> Result<String, Error> {
    serde_json::to_string(record).map_err(|error| Error::host("a record", &error))
}

/// Whether a text can be an id; only then may it become part of a path.
pub(crate) fn is_id(text: &str) -> bool {
    text.len() == 12 && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// Epoch seconds.
pub(crate) fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}
