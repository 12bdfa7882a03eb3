//! The machine-wide registry: one SQLite database that decides who gets a slot, and one directory for each
//! machine, whose lock tells whether its owner lives.
//!
//! ```text
//! STATE_DIR/registry.db        rows: vms (id, state, record, expiry), tasks (id, state), expired ids
//! STATE_DIR/registry.db.init   lock for opening and migrating it
//! STATE_DIR/vms/ID/            a machine of one process, locked by it for life
//! STATE_DIR/tasks/ID/          a task, locked by its supervisor for life; see `task`
//! STATE_DIR/trash/ID/          what is being removed
//! STATE_DIR/quarantine/ID/     a task whose record cannot be read
//! STATE_DIR/repair.lock        held by whoever takes the lock of a task without a supervisor
//! ```
//!
//! The lock is taken before the row becomes visible. Whoever finds a row or a directory whose lock is free
//! knows that its owner is dead, and finishes the clean-up: the VMM has died with its owner. A directory leaves its
//! place whole, by a rename, before anything in it is removed.

mod database;
mod tasks;

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};

use crate::error::{Error, ErrorKind};
use crate::files;
use crate::lock::{self, Attempt};
use crate::record::VmRecord;

pub(crate) use self::tasks::TaskLock;

/// How long an expired machine is remembered, so that one caller can be told, in seconds.
const TOMBSTONE_SECONDS: f64 = 86_400.0;

/// Everything that holds a slot.
const LIVE: &str = "SELECT (SELECT count(*) FROM vms WHERE state <> 'stopped')
                         + (SELECT count(*) FROM tasks WHERE state <> 'stopped')";

#[derive(Debug)]
pub(crate) struct Registry {
    state_dir: PathBuf,
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

/// What a sweep has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Swept {
    /// Machines that dead owners have left.
    pub(crate) vm_ids: Vec<String>,
    /// Tasks whose time was up or that never came to be.
    pub(crate) task_ids: Vec<String>,
    /// What could not be mended, one sentence each.
    pub(crate) problems: Vec<String>,
}

impl Registry {
    pub(crate) fn open(state_dir: &Path) -> Result<Self, Error> {
        let state_dir = std::path::absolute(state_dir).map_err(|error| Error::state(state_dir, &error))?;
        refuse_anothers(&state_dir)?;
        make_directories(&state_dir).map_err(|error| Error::state(&state_dir, &error))?;
        let owner = fs_err::metadata(&state_dir).map_err(|error| Error::state(&state_dir, &error))?.uid();
        if owner != rustix::process::geteuid().as_raw() {
            let text = format!("the state directory '{}' belongs to another user", state_dir.display());
            return Err(Error::new(ErrorKind::Host, text).hint("set PYRO_STATE_DIR to one of your own"));
        }
        Ok(Self { database: Mutex::new(Database::open(&state_dir)?), state_dir })
    }

    /// The directory that everything is in.
    pub(crate) fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    /// Takes a slot for a new machine: directory, lock, row. `record` makes the row's text from the id.
    pub(crate) fn admit(
        &self,
        cap: u32,
        record: impl FnOnce(&str) -> VmRecord,
    ) -> Result<(Lease, VmRecord), Error> {
        let lease = self.new_lease("vms")?;
        let record = record(&lease.id);
        let row = encode(&record)?;
        let admitted = self.take_slot(cap, |connection| {
            let sql = "INSERT OR REPLACE INTO vms (id, state, record, expires_at) VALUES (?1, ?2, ?3, ?4)";
            connection.execute(sql, params![record.vm_id, record.state.as_str(), row, record.expires_at])
        });
        match admitted {
            Ok(()) => Ok((lease, record)),
            Err(error) => {
                self.remove(lease)?;
                Err(error)
            }
        }
    }

    /// A machine's directory and its lock without a row: it takes no slot, and goes by the sweep like any other's.
    pub(crate) fn lease_directory(&self) -> Result<Lease, Error> {
        self.new_lease("vms")
    }

    /// Replaces a machine's row.
    pub(crate) fn update(&self, record: &VmRecord) -> Result<(), Error> {
        self.connection().execute(
            "UPDATE vms SET state = ?2, record = ?3 WHERE id = ?1",
            params![record.vm_id, record.state.as_str(), encode(record)?],
        )?;
        Ok(())
    }

    /// Gives a stopped machine its slot back, if one is free.
    pub(crate) fn readmit(&self, cap: u32, vm_id: &str) -> Result<(), Error> {
        self.take_slot(cap, |connection| {
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
        self.discard(&lease.dir, lease.lock)?;
        // Where the disk is too full for this, the next sweep finds a row without a directory.
        drop(self.connection().execute("DELETE FROM vms WHERE id = ?1", [&lease.id]));
        Ok(())
    }

    /// As [`Registry::remove`], and remembers that its time was up.
    pub(crate) fn expire(&self, lease: Lease) -> Result<(), Error> {
        drop(self.bury(&lease.id));
        self.remove(lease)
    }

    /// Removes what dead owners have left; what cannot be removed is told and left to the next sweep.
    pub(crate) fn sweep(&self) -> Swept {
        let mut swept = Swept::default();
        self.sweep_vms(&mut swept);
        self.sweep_tasks(&mut swept);
        self.sweep_trash(&mut swept);
        let old = now() - TOMBSTONE_SECONDS;
        if let Err(error) = self.connection().execute("DELETE FROM expired WHERE at < ?1", [old]) {
            swept.problems.push(format!("the registry: {error}"));
        }
        swept
    }

    /// Machines that count towards the cap.
    pub(crate) fn live(&self) -> Result<u32, Error> {
        Ok(self.connection().query_row(LIVE, [], |row| row.get(0))?)
    }

    fn sweep_vms(&self, swept: &mut Swept) {
        let mut seen = BTreeSet::new();
        for (id, path) in self.entries("vms", &mut swept.problems) {
            match lock::attempt(&path) {
                Ok(Attempt::Locked(lock)) => {
                    let removed = self
                        .bury_if_expired(&id)
                        .and_then(|()| self.remove(Lease { id: id.clone(), dir: path, lock }));
                    match removed {
                        Ok(()) => swept.vm_ids.push(id),
                        Err(error) => swept.problems.push(error.to_string()),
                    }
                }
                Ok(Attempt::Held) => {
                    seen.insert(id);
                }
                Ok(Attempt::Gone) => {}
                Err(error) => swept.problems.push(format!("{}: {error}", path.display())),
            }
        }
        // A row without a directory: its owner died between the two halves of a removal.
        let orphans = self.ids("vms").map(|ids| {
            ids.into_iter()
                .filter(|id| !seen.contains(id) && !self.path("vms", id).exists())
                .collect::<Vec<_>>()
        });
        let removed = orphans.and_then(|ids| {
            for id in &ids {
                self.bury_if_expired(id)?;
                self.connection().execute("DELETE FROM vms WHERE id = ?1", [id])?;
            }
            Ok(ids)
        });
        match removed {
            Ok(ids) => swept.vm_ids.extend(ids),
            Err(error) => swept.problems.push(error.to_string()),
        }
        swept.vm_ids.sort();
        swept.vm_ids.dedup();
    }

    /// What was on its way out when its remover died.
    fn sweep_trash(&self, swept: &mut Swept) {
        for (_, path) in self.entries("trash", &mut swept.problems) {
            let removed = match lock::attempt(&path) {
                Ok(Attempt::Locked(_lock)) => remove_tree(&path),
                Ok(Attempt::Held | Attempt::Gone) => Ok(()),
                Err(error) => Err(error),
            };
            if let Err(error) = removed {
                swept.problems.push(format!("{}: {error}", path.display()));
            }
        }
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

    /// Counts and inserts in one transaction, so that two processes never share the last slot. What dead owners
    /// have left is removed first.
    fn take_slot(
        &self,
        cap: u32,
        insert: impl FnOnce(&Connection) -> rusqlite::Result<usize>,
    ) -> Result<(), Error> {
        if self.live()? >= cap {
            drop(self.sweep());
        }
        let mut connection = self.connection();
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        if transaction.query_row(LIVE, [], |row| row.get::<_, u32>(0))? >= cap {
            let text = format!("max active VMs reached ({cap}); delete old VMs first");
            return Err(Error::new(ErrorKind::CapReached, text)
                .hint("wait for one to end, stop or delete a task, or raise PYRO_MAX_ACTIVE_VMS"));
        }
        insert(&transaction)?;
        Ok(transaction.commit()?)
    }

    /// Moves a directory out of its place, then removes it. A failure of the second half is the next sweep's.
    fn discard(&self, dir: &Path, _lock: File) -> Result<(), Error> {
        drop(remove_tree(&self.set_aside(dir)?));
        Ok(())
    }

    /// Moves a directory into the trash; returns where it is now.
    fn set_aside(&self, dir: &Path) -> Result<PathBuf, Error> {
        let trash = self.state_dir.join("trash").join(dir.file_name().unwrap_or_default());
        match fs_err::rename(dir, &trash) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::state(&self.state_dir, &error))
            }
            _ => Ok(trash),
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
        let (connection, fresh) = database::open(state_dir)?;
        if fresh {
            // It was lost, perhaps: who is there all the same counts again.
            for (id, path) in entries_of(state_dir, "vms", &mut Vec::new()) {
                if matches!(lock::attempt(&path), Ok(Attempt::Held)) {
                    let row = "INSERT OR IGNORE INTO vms VALUES (?1, 'started', '', ?2)";
                    connection.execute(row, params![id, f64::MAX])?;
                }
            }
            tasks::find_tasks_again(&connection, &entries_of(state_dir, "tasks", &mut Vec::new()))?;
        }
        Ok(Self { connection, file: database::identity(state_dir) })
    }
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
    let ours = ["vms", "tasks", "trash", "quarantine", "lost+found"];
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

/// Removes a machine's directory, in the trash by now, and what a VMM may have left outside of it. A VMM whose owner has
/// just been killed may still be dying: then it stays for the next sweep.
fn remove_tree(path: &Path) -> io::Result<()> {
    pyro_vmm::forget(path)?;
    match fs_err::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::VmSpec;

    fn record(id: &str) -> VmRecord {
        VmRecord::new(id, &VmSpec::new("debian:12"), "1.0.0", "qemu-tcg", now())
    }

    #[test]
    fn sixteen_at_once_never_pass_a_cap_of_four() {
        let dir = tempfile::tempdir().expect("a directory");
        let barrier = std::sync::Barrier::new(16);
        let admitted = std::thread::scope(|scope| {
            let one = || {
                let registry = Registry::open(dir.path()).expect("opened by many at once");
                barrier.wait();
                registry.admit(4, record)
            };
            let threads: Vec<_> = (0..16).map(|_| scope.spawn(one)).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect::<Vec<_>>()
        });
        let (held, refused): (Vec<_>, Vec<_>) = admitted.into_iter().partition(Result::is_ok);
        assert_eq!((held.len(), refused.len()), (4, 12));
        for error in refused.into_iter().filter_map(Result::err) {
            assert_eq!(error.to_string(), "max active VMs reached (4); delete old VMs first");
        }
        let registry = Registry::open(dir.path()).expect("opened");
        assert_eq!(fs_err::read_dir(dir.path().join("vms")).expect("read").count(), 4);
        drop(held);
        assert_eq!(registry.sweep().vm_ids.len(), 4);
        assert_eq!(registry.live().expect("counted"), 0);
    }

    #[test]
    fn an_expired_machine_is_told_of_once() {
        let dir = tempfile::tempdir().expect("a directory");
        let registry = Registry::open(dir.path()).expect("opened");
        let (lease, record) = registry.admit(1, record).expect("admitted");
        registry.expire(lease).expect("expired");
        let id = record.vm_id;
        let text = registry.get(&id).expect_err("gone").to_string();
        assert_eq!(text, format!("vm '{id}' expired and was automatically deleted"));
        assert_eq!(registry.get(&id).expect_err("gone").to_string(), format!("vm '{id}' does not exist"));
    }

    #[test]
    fn a_machine_that_expired_after_its_owner_died_is_told_of_too() {
        let dir = tempfile::tempdir().expect("a directory");
        let registry = Registry::open(dir.path()).expect("opened");
        let old = |id: &str| VmRecord::new(id, &VmSpec::new("debian:12"), "1.0.0", "qemu-tcg", 0.0);
        let (lease, record) = registry.admit(1, old).expect("admitted");
        drop(lease);
        assert_eq!(registry.sweep().vm_ids, std::slice::from_ref(&record.vm_id));
        assert_eq!(registry.get(&record.vm_id).expect_err("gone").kind(), ErrorKind::Expired);
    }

    #[test]
    fn what_lies_about_without_an_owner_is_swept() {
        let dir = tempfile::tempdir().expect("a directory");
        let registry = Registry::open(dir.path()).expect("opened");
        let (lease, record) = registry.admit(4, record).expect("admitted");
        fs_err::create_dir_all(dir.path().join("vms/0123456789ab/deep")).expect("made");
        fs_err::create_dir_all(dir.path().join("trash/ba9876543210/deep")).expect("made");
        assert_eq!(registry.sweep().vm_ids, ["0123456789ab"]);
        assert_eq!(fs_err::read_dir(dir.path().join("trash")).expect("read").count(), 0);
        registry.get(&record.vm_id).expect("the live one stays");
        fs_err::remove_dir_all(&lease.dir).expect("removed");
        assert_eq!(registry.sweep().vm_ids, [record.vm_id]);
    }

    #[test]
    fn what_is_not_pyros_is_told_and_stops_nobody() {
        let dir = tempfile::tempdir().expect("a directory");
        let registry = Registry::open(dir.path()).expect("opened");
        fs_err::write(dir.path().join("vms/junk"), "").expect("written");
        fs_err::write(dir.path().join("vms/0123456789ab"), "").expect("written");
        let swept = registry.sweep();
        assert_eq!((swept.vm_ids.len(), swept.problems.len()), (0, 2), "{swept:?}");
        drop(registry.admit(1, record).expect("admitted all the same"));
    }

    #[test]
    fn a_lost_database_forgets_nobody_who_lives() {
        let dir = tempfile::tempdir().expect("a directory");
        let registry = Registry::open(dir.path()).expect("opened");
        let _held = registry.admit(1, record).expect("admitted");
        drop(registry);
        for end in ["", "-wal", "-shm"] {
            drop(fs_err::remove_file(dir.path().join(format!("registry.db{end}"))));
        }
        let registry = Registry::open(dir.path()).expect("made anew");
        assert_eq!(registry.live().expect("counted"), 1);
        assert_eq!(registry.admit(1, record).expect_err("full").kind(), ErrorKind::CapReached);
    }

    #[test]
    fn a_state_directory_is_private() {
        let dir = tempfile::tempdir().expect("a directory");
        let state = dir.path().join("state");
        fs_err::create_dir(&state).expect("made");
        fs_err::set_permissions(&state, std::fs::Permissions::from_mode(0o755)).expect("opened up");
        drop(Registry::open(&state).expect("opened"));
        assert_eq!(fs_err::metadata(&state).expect("there").permissions().mode() & 0o777, 0o700);
    }

    #[test]
    fn removals_and_sweeps_at_once_disturb_nobody() {
        let dir = tempfile::tempdir().expect("a directory");
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let registry = Registry::open(dir.path()).expect("opened");
                    for _ in 0..50 {
                        let (lease, _) = registry.admit(8, record).expect("admitted");
                        fs_err::write(lease.dir.join("file"), "x").expect("still ours");
                        let id = lease.id.clone();
                        assert!(!registry.sweep().vm_ids.contains(&id), "a living owner is left alone");
                        registry.remove(lease).expect("removed");
                    }
                });
            }
        });
        let registry = Registry::open(dir.path()).expect("opened");
        assert_eq!((registry.live().expect("counted"), registry.sweep()), (0, Swept::default()));
    }
}
