//! What was promised to the machines of all state directories of this user on this machine: one small database in a
//! directory that lasts as long as the host's boot does.
//!
//! Each row repeats what the registry of its state directory says, and is written anew with each admission there. So the
//! database may be lost or damaged at any time: it is made again, and misses the other state directories until their next
//! admission. A row whose owner is dead, or whose directory is gone, counts for nothing and is removed.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, params};

use super::owner::Owner;
use crate::budget::{Promise, Promised};
use crate::error::{Error, ErrorKind};

/// Another layout gets another name: its rows mean something else.
const FILE: &str = "promised-1.db";
/// How long another process may hold the database.
const BUSY: Duration = Duration::from_secs(10);
const TABLE: &str = "
    CREATE TABLE IF NOT EXISTS machines (
        dir BLOB PRIMARY KEY,
        state_dir BLOB NOT NULL,
        device INTEGER NOT NULL,
        mem_mib INTEGER NOT NULL,
        disk_mib INTEGER NOT NULL,
        owner TEXT NOT NULL
    ) STRICT;
    ";

/// The directory of the database.
#[derive(Clone, Debug)]
pub(super) struct SharedLedger {
    dir: PathBuf,
}

/// One machine of this state directory.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub(super) dir: PathBuf,
    pub(super) promise: Promise,
    pub(super) owner: String,
}

/// The database, locked for one admission. Dropping it changes nothing.
pub(super) struct Admission(Connection);

impl SharedLedger {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Takes the right to admit a machine, which one process on this machine has at a time.
    pub(super) fn begin(&self) -> Result<Admission, Error> {
        self.check_directory()?;
        match self.open() {
            Err(error)
                if matches!(
                    error.sqlite_error_code(),
                    Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt)
                ) =>
            {
                for end in ["", "-journal"] {
                    drop(fs_err::remove_file(self.dir.join(format!("{FILE}{end}"))));
                }
                self.open()
            }
            opened => opened,
        }
        .map(Admission)
        .map_err(|error| self.failed(&error))
    }

    fn open(&self) -> rusqlite::Result<Connection> {
        let connection = Connection::open(self.dir.join(FILE))?;
        connection.busy_timeout(BUSY)?;
        // It need not survive a loss of power, as no machine does.
        connection.pragma_update(None, "synchronous", "OFF")?;
        connection.execute_batch("BEGIN IMMEDIATE")?;
        connection.execute_batch(TABLE)?;
        Ok(connection)
    }

    /// Makes the directory. One that others could have made or may change is refused: `/tmp` is everybody's.
    fn check_directory(&self) -> Result<(), Error> {
        let refuse = |what: &str| {
            let text = format!("the runtime directory '{}' {what}", self.dir.display());
            Err(Error::new(ErrorKind::Host, text)
                .hint("remove it, or set PYRO_RUNTIME_DIR to one of your own"))
        };
        let made = std::fs::DirBuilder::new().mode(0o700).create(&self.dir);
        if let Err(error) = made
            && error.kind() != std::io::ErrorKind::AlreadyExists
        {
            return refuse(&format!("cannot be made: {error}"));
        }
        match fs_err::symlink_metadata(&self.dir) {
            Err(error) => refuse(&format!("cannot be read: {error}")),
            Ok(found) if !found.is_dir() => refuse("is no directory"),
            Ok(found) if found.uid() != rustix::process::geteuid().as_raw() => {
                refuse("belongs to another user")
            }
            Ok(found) if found.mode() & 0o022 != 0 => refuse("can be changed by other users"),
            Ok(_) => Ok(()),
        }
    }

    fn failed(&self, error: &rusqlite::Error) -> Error {
        let text = format!("the runtime directory '{}': {error}", self.dir.display());
        Error::new(ErrorKind::Host, text).hint("free some disk space there, or set PYRO_RUNTIME_DIR")
    }
}

impl Admission {
    /// What was promised to live machines of other state directories. Their disks count where they share the file system.
    pub(super) fn others(&self, state_dir: &Path) -> Result<Promised, Error> {
        let device = device(state_dir);
        let mut promised = Promised::default();
        let mut gone = Vec::new();
        let sql = "SELECT dir, device, mem_mib, disk_mib, owner FROM machines WHERE state_dir <> ?1";
        let mut rows = self.0.prepare(sql)?;
        let mut rows = rows.query([bytes(state_dir)])?;
        while let Some(row) = rows.next()? {
            let (dir, on): (Vec<u8>, i64) = (row.get(0)?, row.get(1)?);
            let (mem_mib, disk_mib, owner): (u32, u32, String) = (row.get(2)?, row.get(3)?, row.get(4)?);
            let is_there = Path::new(OsStr::from_bytes(&dir)).is_dir();
            if !is_there || Owner::parse(&owner).is_some_and(|owner| owner.is_dead()) {
                gone.push(dir);
                continue;
            }
            let disk_mib = if on == device { disk_mib } else { 0 };
            promised.add(Promise { mem_mib, disk_mib });
        }
        for dir in gone {
            self.0.execute("DELETE FROM machines WHERE dir = ?1", [dir])?;
        }
        Ok(promised)
    }

    /// Replaces the rows of a state directory, and ends the admission.
    pub(super) fn finish(self, state_dir: &Path, rows: &[Row]) -> Result<(), Error> {
        let (state, device) = (bytes(state_dir), device(state_dir));
        self.0.execute("DELETE FROM machines WHERE state_dir = ?1", [state])?;
        for Row { dir, promise, owner } in rows {
            self.0.execute(
                "INSERT OR REPLACE INTO machines VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
                params![bytes(dir), state, device, promise.mem_mib, promise.disk_mib, owner],
            )?;
        }
        Ok(self.0.execute_batch("COMMIT")?)
    }
}

fn bytes(path: &Path) -> &[u8] {
    path.as_os_str().as_bytes()
}

/// The file system of a directory, as a number that SQLite can hold.
fn device(dir: &Path) -> i64 {
    fs_err::metadata(dir).map_or(0, |found| found.dev().cast_signed())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::super::owner::tests::dead_owner;
    use super::*;

    const PROMISE: Promise = Promise { mem_mib: 100, disk_mib: 1000 };

    fn row(dir: &Path, owner: &str) -> Row {
        fs_err::create_dir_all(dir).expect("made");
        Row { dir: dir.to_owned(), promise: PROMISE, owner: owner.to_owned() }
    }

    #[test]
    fn machines_of_other_state_directories_count_while_they_live() {
        let root = tempfile::tempdir().expect("a directory");
        let ledger = SharedLedger::new(root.path().join("pyro"));
        let [one, other] = ["one", "other"].map(|name| root.path().join(name));
        let own = Owner::current().expect("this process").to_string();
        let rows = [
            row(&one.join("vms/000000000001"), &own),
            row(&one.join("vms/000000000002"), &own),
            row(&one.join("vms/000000000003"), &dead_owner().to_string()),
            row(&one.join("tasks/000000000004"), ""),
        ];
        fs_err::create_dir(&other).expect("made");
        ledger.begin().expect("begun").finish(&one, &rows).expect("written");
        let promised = |dir: &Path| ledger.begin().expect("begun").others(dir).expect("read");
        assert_eq!(promised(&other), Promised { machines: 3, mem_mib: 300, disk_mib: 3000 });
        assert_eq!(promised(&one), Promised::default(), "its own are counted by its own registry");
        fs_err::remove_dir(one.join("vms/000000000002")).expect("removed");
        assert_eq!(promised(&other).machines, 2);
        ledger.begin().expect("begun").finish(&one, &rows[..1]).expect("written");
        assert_eq!(promised(&other).machines, 1, "rows are replaced");
    }

    #[test]
    fn a_damaged_ledger_is_made_again() {
        let root = tempfile::tempdir().expect("a directory");
        let ledger = SharedLedger::new(root.path().join("pyro"));
        drop(ledger.begin().expect("begun"));
        fs_err::write(root.path().join("pyro").join(FILE), vec![0x5a; 8192]).expect("written");
        let rows = [row(&root.path().join("state/vms/000000000001"), "")];
        ledger.begin().expect("begun").finish(&root.path().join("state"), &rows).expect("written");
        assert_eq!(ledger.begin().expect("begun").others(root.path()).expect("read").machines, 1);
    }

    #[test]
    fn a_runtime_directory_that_others_could_have_made_is_refused_untouched() {
        let root = tempfile::tempdir().expect("a directory");
        let dir = root.path().join("pyro");
        let refused = || {
            let error = SharedLedger::new(dir.clone()).begin().map(drop).expect_err("refused");
            assert!(error.remedy().is_some_and(|hint| hint.contains("PYRO_RUNTIME_DIR")));
            error.to_string()
        };
        fs_err::create_dir(root.path().join("elsewhere")).expect("made");
        symlink(root.path().join("elsewhere"), &dir).expect("made");
        assert_eq!(refused(), format!("the runtime directory '{}' is no directory", dir.display()));
        fs_err::remove_file(&dir).expect("removed");
        fs_err::create_dir(&dir).expect("made");
        fs_err::set_permissions(&dir, std::fs::Permissions::from_mode(0o777)).expect("opened up");
        assert_eq!(
            refused(),
            format!("the runtime directory '{}' can be changed by other users", dir.display())
        );
        if rustix::process::geteuid().is_root() {
            fs_err::set_permissions(&dir, std::fs::Permissions::from_mode(0o700)).expect("closed");
            std::os::unix::fs::chown(&dir, Some(65_534), None).expect("given away");
            assert_eq!(
                refused(),
                format!("the runtime directory '{}' belongs to another user", dir.display())
            );
        }
        assert_eq!(fs_err::read_dir(&dir).expect("read").count(), 0);
        assert_eq!(fs_err::read_dir(root.path().join("elsewhere")).expect("read").count(), 0);
    }
}
