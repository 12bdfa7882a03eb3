//! The machine-wide registry: one SQLite database that decides who gets a slot, and one directory with one
//! lock for each machine, which tells whether its owner lives.
//!
//! ```text
//! STATE_DIR/registry.db        rows: id, state, record, expiry
//! STATE_DIR/registry.db.init   lock for the first open and for migrations
//! STATE_DIR/vms/ID/lock        held by the owner for life
//! STATE_DIR/vms/ID/...         the machine's own files
//! ```
//!
//! The lock is taken before the row becomes visible. Whoever finds a row or a directory whose lock is free
//! knows that its owner is dead, and finishes the clean-up: the VMM has died with its owner.

use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};

use crate::error::{Error, ErrorKind};
use crate::record::VmRecord;

/// How long another process may hold the database.
const BUSY: Duration = Duration::from_secs(10);
/// How long an expired machine is remembered, so that one caller can be told, in seconds.
const TOMBSTONE_SECONDS: f64 = 86_400.0;

/// The statements that lead from each layout to the next.
const MIGRATIONS: [&str; 1] = ["
    CREATE TABLE vms (
        id TEXT PRIMARY KEY,
        state TEXT NOT NULL,
        record TEXT NOT NULL,
        expires_at REAL NOT NULL
    ) STRICT;
    CREATE TABLE expired (id TEXT PRIMARY KEY, at REAL NOT NULL) STRICT;
"];

#[derive(Debug)]
pub(crate) struct Registry {
    dir: PathBuf,
    connection: Mutex<Connection>,
}

/// The ownership of one machine: its directory and its lock. Dropping it removes both and the row.
#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) id: String,
    pub(crate) dir: PathBuf,
    _lock: File,
}

impl Registry {
    pub(crate) fn open(state_dir: &Path) -> Result<Self, Error> {
        let failed = |error: io::Error| Error::host("the state directory", &error);
        let vms = state_dir.join("vms");
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&vms).map_err(failed)?;
        let path = state_dir.join("registry.db");
        // Two processes that switch a new database to WAL at once fail; so the first open is for one alone.
        let init = File::create(state_dir.join("registry.db.init")).map_err(failed)?;
        init.lock().map_err(failed)?;
        let mut connection = Connection::open(path)?;
        connection.busy_timeout(BUSY)?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        // A machine does not survive the host, so its row need not either; tasks raise this for theirs.
        connection.pragma_update(None, "synchronous", "NORMAL")?;
        migrate(&mut connection)?;
        drop(init);
        Ok(Self { dir: vms, connection: Mutex::new(connection) })
    }

    /// Takes a slot for a new machine: directory, lock, row. `record` makes the row's text from the id.
    pub(crate) fn admit(
        &self,
        cap: u32,
        record: impl FnOnce(&str) -> VmRecord,
    ) -> Result<(Lease, VmRecord), Error> {
        let lease = self.new_lease()?;
        let record = record(&lease.id);
        self.sweep()?;
        let mut connection = self.connection();
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let live: u32 =
            transaction
                .query_row("SELECT count(*) FROM vms WHERE state <> 'stopped'", [], |row| row.get(0))?;
        if live >= cap {
            drop(transaction);
            drop(connection);
            self.remove(lease)?;
            return Err(Error::new(
                ErrorKind::CapReached,
                format!("max active VMs reached ({cap}); delete old VMs first"),
            )
            .hint("wait for one to end, or raise PYRO_MAX_ACTIVE_VMS"));
        }
        transaction.execute(
            "INSERT INTO vms (id, state, record, expires_at) VALUES (?1, ?2, ?3, ?4)",
            params![record.vm_id, record.state.as_str(), encode(&record)?, record.expires_at],
        )?;
        transaction.commit()?;
        Ok((lease, record))
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
    pub(crate) fn readmit(&self, cap: u32, record: &VmRecord) -> Result<(), Error> {
        let changed = self.connection().execute(
            "UPDATE vms SET state = 'started'
             WHERE id = ?1 AND (SELECT count(*) FROM vms WHERE state <> 'stopped' AND id <> ?1) < ?2",
            params![record.vm_id, cap],
        )?;
        if changed == 0 {
            let text = format!("max active VMs reached ({cap}); delete old VMs first");
            return Err(Error::new(ErrorKind::CapReached, text));
        }
        Ok(())
    }

    /// Reads one machine's row. An expired one is told of once.
    pub(crate) fn get(&self, id: &str) -> Result<VmRecord, Error> {
        let connection = self.connection();
        let text: Option<String> = connection
            .query_row("SELECT record FROM vms WHERE id = ?1", [id], |row| row.get(0))
            .optional()?;
        if let Some(record) = text.as_deref().and_then(|text| serde_json::from_str(text).ok()) {
            return Ok(record);
        }
        if connection.execute("DELETE FROM expired WHERE id = ?1", [id])? > 0 {
            let text = format!("vm '{id}' expired and was automatically deleted");
            return Err(Error::new(ErrorKind::Expired, text));
        }
        Err(Error::new(ErrorKind::NotFound, format!("vm '{id}' does not exist")))
    }

    /// Ends a machine's record and files; its VMM must be gone.
    pub(crate) fn remove(&self, lease: Lease) -> Result<(), Error> {
        self.remove_row(&lease.id)?;
        remove_directory(&lease.dir)
    }

    /// As [`Registry::remove`], and remembers that its time was up.
    pub(crate) fn expire(&self, lease: Lease) -> Result<(), Error> {
        self.connection()
            .execute("INSERT OR REPLACE INTO expired (id, at) VALUES (?1, ?2)", params![lease.id, now()])?;
        self.remove(lease)
    }

    /// Removes what dead owners have left. Returns the ids.
    pub(crate) fn sweep(&self) -> Result<Vec<String>, Error> {
        let failed = |error: io::Error| Error::host("the state directory", &error);
        let mut removed = Vec::new();
        for entry in fs_err::read_dir(&self.dir).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if let Some(_lock) = lock_if_dead(&path).map_err(failed)? {
                let id = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                self.remove_row(&id)?;
                remove_directory(&path)?;
                removed.push(id);
            }
        }
        // A row without a directory: its owner died between the two halves of a removal.
        let connection = self.connection();
        let mut rows = connection.prepare_cached("SELECT id FROM vms")?;
        let ids: Vec<String> = rows.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?;
        for id in ids.into_iter().filter(|id| !self.dir.join(id).exists()) {
            connection.execute("DELETE FROM vms WHERE id = ?1", [&id])?;
            removed.push(id);
        }
        connection.execute("DELETE FROM expired WHERE at < ?1", [now() - TOMBSTONE_SECONDS])?;
        removed.sort();
        removed.dedup();
        Ok(removed)
    }

    /// Machines that count towards the cap.
    pub(crate) fn live(&self) -> Result<u32, Error> {
        let count = "SELECT count(*) FROM vms WHERE state <> 'stopped'";
        Ok(self.connection().query_row(count, [], |row| row.get(0))?)
    }

    fn new_lease(&self) -> Result<Lease, Error> {
        let failed = |error: io::Error| Error::host("the state directory", &error);
        loop {
            let id = random_id()?;
            let dir = self.dir.join(&id);
            std::fs::DirBuilder::new().mode(0o700).create(&dir).map_err(failed)?;
            let path = dir.join("lock");
            // A sweeper may have taken the directory for a dead one's before the lock was held: then again.
            let Ok(lock) = File::create(&path) else { continue };
            if lock.try_lock().is_err() {
                continue;
            }
            let same = std::fs::metadata(&path)
                .is_ok_and(|there| lock.metadata().is_ok_and(|here| here.ino() == there.ino()));
            if same {
                return Ok(Lease { id, dir, _lock: lock });
            }
        }
    }

    fn remove_row(&self, id: &str) -> Result<(), Error> {
        self.connection().execute("DELETE FROM vms WHERE id = ?1", [id])?;
        Ok(())
    }

    fn connection(&self) -> MutexGuard<'_, Connection> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes the lock of a machine's directory if nobody holds it.
fn lock_if_dead(dir: &Path) -> io::Result<Option<File>> {
    let lock =
        match File::options().read(true).write(true).create(true).truncate(false).open(dir.join("lock")) {
            Ok(lock) => lock,
            // Removed by someone else meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
    match lock.try_lock() {
        Ok(()) => Ok(Some(lock)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

fn remove_directory(path: &Path) -> Result<(), Error> {
    match fs_err::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::host("a machine's files could not be removed", &error))
        }
        _ => Ok(()),
    }
}

fn migrate(connection: &mut Connection) -> Result<(), Error> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let version: i64 = transaction.pragma_query_value(None, "user_version", |row| row.get(0))?;
    let version = usize::try_from(version).unwrap_or(usize::MAX);
    if version > MIGRATIONS.len() {
        let text = format!("the registry has layout {version}; this pyro knows {}", MIGRATIONS.len());
        return Err(Error::new(ErrorKind::Host, text).hint("use the newer pyro that wrote it"));
    }
    for statements in &MIGRATIONS[version..] {
        transaction.execute_batch(statements)?;
    }
    transaction.pragma_update(None, "user_version", i64::try_from(MIGRATIONS.len()).unwrap_or(i64::MAX))?;
    Ok(transaction.commit()?)
}

fn encode(record: &VmRecord) -> Result<String, Error> {
    serde_json::to_string(record).map_err(|error| Error::host("a record", &error))
}

/// Twelve hexadecimal digits that nobody can guess.
fn random_id() -> Result<String, Error> {
    let mut bytes = [0; 6];
    getrandom::fill(&mut bytes).map_err(|error| Error::host("random numbers", &error))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
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
        VmRecord::new(id, &VmSpec::new("debian:12"), "1.0.0", "qemu-tcg", 0.0)
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
        assert_eq!(registry.sweep().expect("swept").len(), 4);
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
    fn a_newer_layout_is_refused_and_not_touched() {
        let dir = tempfile::tempdir().expect("a directory");
        let registry = Registry::open(dir.path()).expect("opened");
        registry.connection().pragma_update(None, "user_version", 99).expect("set");
        let error = Registry::open(dir.path()).expect_err("refused");
        assert_eq!(error.to_string(), "the registry has layout 99; this pyro knows 1");
    }

    #[test]
    fn what_lies_about_without_an_owner_is_swept() {
        let dir = tempfile::tempdir().expect("a directory");
        let registry = Registry::open(dir.path()).expect("opened");
        let (lease, record) = registry.admit(4, record).expect("admitted");
        fs_err::create_dir_all(dir.path().join("vms/0123456789ab/deep")).expect("made");
        assert_eq!(registry.sweep().expect("swept"), ["0123456789ab"]);
        registry.get(&record.vm_id).expect("the live one stays");
        fs_err::remove_dir_all(&lease.dir).expect("removed");
        assert_eq!(registry.sweep().expect("swept"), [record.vm_id]);
    }
}
