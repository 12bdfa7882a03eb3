//! Admission: the cap of this state directory, and what was promised to all machines of this user, looked at and written
//! in one go, so that two processes never share the last slot or the last of the memory.

use std::path::PathBuf;

use rusqlite::{Connection, OptionalExtension, Transaction, TransactionBehavior, params};

use super::owner::Owner;
use super::shared::{Row, SharedLedger};
use super::{LIVE, Registry};
use crate::budget::{Capacity, Overcommit, Promise, Promised};
use crate::engine::EngineConfig;
use crate::error::{Error, ErrorKind};

/// What machines may be promised together.
#[derive(Clone, Debug)]
pub(crate) struct Bounds {
    /// Where the promises of all state directories are; none: this state directory counts for itself.
    pub(crate) runtime_dir: Option<PathBuf>,
    pub(crate) overcommit: Overcommit,
}

/// A machine that asks to be admitted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asking<'a> {
    pub(super) id: &'a str,
    /// The directory that its own is in.
    pub(super) kind: &'static str,
    /// How many machines there may be; none: it takes nobody's slot.
    pub(super) cap: Option<u32>,
    /// None: what it was promised before.
    pub(super) promise: Option<Promise>,
}

impl From<&EngineConfig> for Bounds {
    fn from(config: &EngineConfig) -> Self {
        Self {
            runtime_dir: config.runtime_dir.clone(),
            overcommit: Overcommit { memory: config.memory_overcommit, disk: config.disk_overcommit },
        }
    }
}

impl Registry {
    /// Admits a machine and inserts its rows. Where there is no room, what dead owners have left is removed, and it asks
    /// again.
    pub(super) fn take_slot(
        &self,
        asking: Asking<'_>,
        insert: impl Fn(&Connection) -> rusqlite::Result<usize>,
    ) -> Result<(), Error> {
        match self.try_slot(asking, &insert) {
            Err(error) if matches!(error.kind(), ErrorKind::CapReached | ErrorKind::HostResources) => {
                drop(self.sweep());
                self.try_slot(asking, &insert)
            }
            done => done,
        }
    }

    fn try_slot(
        &self,
        asking: Asking<'_>,
        insert: &impl Fn(&Connection) -> rusqlite::Result<usize>,
    ) -> Result<(), Error> {
        let host = Capacity::of_host(&self.state_dir);
        // Always locked before the registry, so that two admissions never wait for each other.
        let shared = self.shared().map(|ledger| ledger.begin()).transpose()?;
        let mut promised = match &shared {
            Some(shared) => shared.others(&self.key)?,
            None => Promised::default(),
        };
        let mut connection = self.connection();
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        check_cap(&transaction, asking.cap)?;
        for (_, promise) in live_rows(&transaction)?.into_iter().filter(|(id, _)| id != asking.id) {
            promised.add(promise);
        }
        let promise = match asking.promise {
            Some(promise) => promise,
            None => promised_before(&transaction, asking.id)?,
        };
        self.bounds.overcommit.check(host, promised, promise)?;
        transaction.execute(
            "INSERT OR REPLACE INTO machines VALUES (?1, ?2, ?3, ?4, 1, ?5)",
            params![asking.id, asking.kind, promise.mem_mib, promise.disk_mib, this_process()],
        )?;
        insert(&transaction)?;
        let rows = self.rows(&transaction)?;
        transaction.commit()?;
        // The machine is admitted. Where the others cannot be told, they only count it too late.
        drop(shared.map(|shared| shared.finish(&self.key, &rows)));
        Ok(())
    }

    /// Makes this process the owner of a machine, in place of the one that began it. Its own lock says nothing about that:
    /// a caller hands it over before this process can write its name down.
    ///
    /// # Errors
    /// When the machine was taken from `former` meanwhile, because it is dead.
    pub(crate) fn adopt(&self, id: &str, former: &str) -> Result<(), Error> {
        let adopted = self.connection().execute(
            "UPDATE machines SET owner = ?2 WHERE id = ?1 AND owner IN (?3, '')",
            params![id, this_process(), former],
        )?;
        if adopted == 0 {
            let text = format!("'{id}' was taken from its owner, which has died");
            return Err(Error::new(ErrorKind::NotFound, text));
        }
        drop(self.share());
        Ok(())
    }

    /// Has a machine count, or not any more.
    pub(super) fn set_counts(&self, id: &str, counts: bool) -> Result<(), Error> {
        let sql = "UPDATE machines SET counts = ?2 WHERE id = ?1 AND counts <> ?2";
        let changed = self.connection().execute(sql, params![id, counts])?;
        if changed > 0 {
            // What was written here stands, whether or not the others can be told.
            drop(self.share());
        }
        Ok(())
    }

    /// Tells other state directories what this one's machines were promised.
    fn share(&self) -> Result<(), Error> {
        let Some(ledger) = self.shared() else { return Ok(()) };
        let admission = ledger.begin()?;
        let rows = self.rows(&self.connection())?;
        admission.finish(&self.key, &rows)
    }

    fn shared(&self) -> Option<SharedLedger> {
        self.bounds.runtime_dir.clone().map(SharedLedger::new)
    }

    fn rows(&self, connection: &Connection) -> Result<Vec<Row>, Error> {
        let sql = "SELECT kind, id, mem_mib, disk_mib, owner FROM machines WHERE counts";
        let mut rows = connection.prepare_cached(sql)?;
        let rows = rows.query_map([], |row| {
            let (kind, id): (String, String) = (row.get(0)?, row.get(1)?);
            Ok(Row {
                dir: self.key.join(kind).join(id),
                promise: Promise { mem_mib: row.get(2)?, disk_mib: row.get(3)? },
                owner: row.get(4)?,
            })
        })?;
        Ok(rows.collect::<rusqlite::Result<_>>()?)
    }

    /// The owner of a machine, as it is written down; none where the machine has no row.
    pub(super) fn owner_of(&self, id: &str) -> rusqlite::Result<Option<String>> {
        let sql = "SELECT owner FROM machines WHERE id = ?1";
        self.connection().query_row(sql, [id], |row| row.get(0)).optional()
    }
}

/// This process, as rows name it; empty where it cannot be named.
pub(crate) fn this_process() -> String {
    Owner::current().map(|owner| owner.to_string()).unwrap_or_default()
}

fn check_cap(transaction: &Transaction<'_>, cap: Option<u32>) -> Result<(), Error> {
    let Some(cap) = cap else { return Ok(()) };
    if transaction.query_row(LIVE, [], |row| row.get::<_, u32>(0))? < cap {
        return Ok(());
    }
    let text = format!("max active VMs reached ({cap}); delete old VMs first");
    Err(Error::new(ErrorKind::CapReached, text)
        .hint("wait for one to end, stop or delete a task, or raise PYRO_MAX_ACTIVE_VMS"))
}

fn live_rows(connection: &Connection) -> rusqlite::Result<Vec<(String, Promise)>> {
    let sql = "SELECT id, mem_mib, disk_mib FROM machines WHERE counts AND mem_mib > 0";
    let mut rows = connection.prepare_cached(sql)?;
    let rows =
        rows.query_map([], |row| Ok((row.get(0)?, Promise { mem_mib: row.get(1)?, disk_mib: row.get(2)? })))?;
    rows.collect()
}

fn promised_before(connection: &Connection, id: &str) -> rusqlite::Result<Promise> {
    let sql = "SELECT mem_mib, disk_mib FROM machines WHERE id = ?1";
    let promise =
        connection.query_row(sql, [id], |row| Ok(Promise { mem_mib: row.get(0)?, disk_mib: row.get(1)? }));
    Ok(promise.optional()?.unwrap_or_default())
}
