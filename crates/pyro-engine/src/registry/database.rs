//! Opening the database: by many processes at once, of an older layout, or damaged beyond use.

use std::io;
use std::path::Path;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, TransactionBehavior};

use crate::error::{Error, ErrorKind};
use crate::lock::{BUSY, Moment};

const FILE: &str = "registry.db";

/// The statements that lead from each layout to the next.
const MIGRATIONS: &[&str] = &[
    "
    CREATE TABLE vms (
        id TEXT PRIMARY KEY,
        state TEXT NOT NULL,
        record TEXT NOT NULL,
        expires_at REAL NOT NULL
    ) STRICT;
    CREATE TABLE expired (id TEXT PRIMARY KEY, at REAL NOT NULL) STRICT;
    ",
    "
    CREATE TABLE tasks (id TEXT PRIMARY KEY, state TEXT NOT NULL) STRICT;
    ",
    "
    CREATE TABLE machines (
        id TEXT PRIMARY KEY,
        kind TEXT NOT NULL,
        mem_mib INTEGER NOT NULL,
        disk_mib INTEGER NOT NULL,
        counts INTEGER NOT NULL,
        owner TEXT NOT NULL
    ) STRICT;
    CREATE TABLE resources (
        id TEXT NOT NULL,
        kind TEXT NOT NULL,
        value TEXT NOT NULL,
        PRIMARY KEY (id, kind, value)
    ) STRICT;
    ",
];

/// The layout that a database had when it was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// There was none: perhaps it was lost.
    Nothing,
    /// An older one, without what was promised to machines.
    Older,
    Newest,
}

/// Opens the database of a state directory; tells what was there.
pub(super) fn open(state_dir: &Path) -> Result<(Connection, Found), Error> {
    let failed = |error: io::Error| Error::state(state_dir, &error);
    // Two processes that switch a new database to WAL at once fail; so the first open is for one alone.
    let init = Moment::wait(&state_dir.join("registry.db.init"))?;
    let opened = match open_once(state_dir) {
        Err(Failed::NoDatabase) => {
            // Nothing in it can be trusted. It is kept for whoever wants to know why, and made anew.
            for end in ["", "-wal", "-shm"] {
                let old = state_dir.join(format!("{FILE}{end}"));
                let aside = state_dir.join(format!("{FILE}{end}.damaged"));
                match fs_err::rename(&old, &aside) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
                    _ => {}
                }
            }
            open_once(state_dir)
        }
        opened => opened,
    };
    drop(init);
    opened.map_err(|failed| match failed {
        Failed::NoDatabase => Error::new(ErrorKind::Host, "the registry is damaged"),
        Failed::Other(error) => error,
    })
}

/// Which file the database is now; none where there is none.
pub(super) fn identity(state_dir: &Path) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;

    std::fs::metadata(state_dir.join(FILE)).ok().map(|found| (found.dev(), found.ino()))
}

/// Why the database could not be opened.
enum Failed {
    /// The file is something else, or damaged beyond use.
    NoDatabase,
    Other(Error),
}

impl From<rusqlite::Error> for Failed {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => Self::NoDatabase,
            _ => Self::Other(error.into()),
        }
    }
}

fn open_once(state_dir: &Path) -> Result<(Connection, Found), Failed> {
    let mut connection = Connection::open(state_dir.join(FILE))?;
    connection.busy_timeout(BUSY)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    // A machine does not survive the host, so its row need not either; a task's row can be made again.
    connection.pragma_update(None, "synchronous", "NORMAL")?;
    // Closing it would remove the log by its name, which may be that of a newer database by then.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    let found = migrate(&mut connection)?;
    Ok((connection, found))
}

fn migrate(connection: &mut Connection) -> Result<Found, Failed> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let version: i64 = transaction.pragma_query_value(None, "user_version", |row| row.get(0))?;
    let version = usize::try_from(version).unwrap_or(usize::MAX);
    if version > MIGRATIONS.len() {
        let text = format!("the registry has layout {version}; this pyro knows {}", MIGRATIONS.len());
        let error = Error::new(ErrorKind::Host, text);
        return Err(Failed::Other(error.hint("use the newer pyro that wrote it, or another PYRO_STATE_DIR")));
    }
    if version < MIGRATIONS.len() {
        for statements in &MIGRATIONS[version..] {
            transaction.execute_batch(statements)?;
        }
        let newest = i64::try_from(MIGRATIONS.len()).unwrap_or(i64::MAX);
        transaction.pragma_update(None, "user_version", newest)?;
        transaction.commit()?;
    }
    Ok(match version {
        0 => Found::Nothing,
        _ if version < MIGRATIONS.len() => Found::Older,
        _ => Found::Newest,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newer_layout_is_refused_and_not_touched() {
        let dir = tempfile::tempdir().expect("a directory");
        let (connection, found) = open(dir.path()).expect("opened");
        assert_eq!(found, Found::Nothing);
        connection.pragma_update(None, "user_version", 99).expect("set");
        let error = open(dir.path()).expect_err("refused");
        assert_eq!(error.to_string(), "the registry has layout 99; this pyro knows 3");
        let version: i64 =
            connection.pragma_query_value(None, "user_version", |row| row.get(0)).expect("read");
        assert_eq!(version, 99);
    }

    #[test]
    fn an_older_layout_is_carried_over_with_its_rows() {
        let dir = tempfile::tempdir().expect("a directory");
        let connection = Connection::open(dir.path().join(FILE)).expect("opened");
        connection.execute_batch(MIGRATIONS[0]).expect("layout 1");
        connection.pragma_update(None, "user_version", 1).expect("set");
        let row = "INSERT INTO vms VALUES ('0123456789ab', 'started', '{}', 0.0)";
        connection.execute(row, []).expect("inserted");
        drop(connection);
        let (connection, found) = open(dir.path()).expect("migrated");
        assert_eq!(found, Found::Older);
        let count = |table: &str| -> i64 {
            let sql = format!("SELECT count(*) FROM {table}");
            connection.query_row(&sql, [], |row| row.get(0)).expect("counted")
        };
        assert_eq!((count("vms"), count("tasks"), count("machines")), (1, 0, 0));
    }

    #[test]
    fn what_is_no_database_is_put_aside() {
        let dir = tempfile::tempdir().expect("a directory");
        fs_err::write(dir.path().join(FILE), vec![0x5a; 8192]).expect("written");
        let (_connection, found) = open(dir.path()).expect("made anew");
        assert!(found == Found::Nothing && dir.path().join("registry.db.damaged").exists());
    }

    #[test]
    fn many_may_open_a_new_one_at_once() {
        let dir = tempfile::tempdir().expect("a directory");
        std::thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| open(dir.path()).expect("opened by many at once"));
            }
        });
    }
}
