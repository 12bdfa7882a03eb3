//! What dead owners have left, found and removed by whoever looks next.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rusqlite::params;

use super::owner::Owner;
use super::slots::this_process;
use super::{Lease, Registry, TOMBSTONE_SECONDS, now};
use crate::error::Error;
use crate::lock::{self, Attempt};

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
    /// Removes what dead owners have left; what cannot be removed is told and left to the next sweep.
    pub(crate) fn sweep(&self) -> Swept {
        let mut swept = Swept::default();
        self.sweep_vms(&mut swept);
        self.sweep_tasks(&mut swept);
        self.sweep_trash(&mut swept);
        let old = now() - TOMBSTONE_SECONDS;
        let forgotten = self.connection().execute("DELETE FROM expired WHERE at < ?1", [old]);
        for error in [forgotten.err().map(Error::from), self.sweep_rows().err()].into_iter().flatten() {
            swept.problems.push(error.to_string());
        }
        swept
    }

    fn sweep_vms(&self, swept: &mut Swept) {
        let mut seen = BTreeSet::new();
        for (id, path) in self.entries("vms", &mut swept.problems) {
            match self.attempt(&id, &path) {
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
        for (id, path) in self.entries("trash", &mut swept.problems) {
            let removed = match self.attempt(&id, &path) {
                Ok(Attempt::Locked(_lock)) => self.remove_tree(&id, &path),
                Ok(Attempt::Held | Attempt::Gone) => Ok(()),
                Err(error) => Err(error),
            };
            if let Err(error) = removed {
                swept.problems.push(format!("{}: {error}", path.display()));
            }
        }
    }

    /// Rows of machines that have no directory anywhere, and what is written down for them.
    fn sweep_rows(&self) -> Result<(), Error> {
        let mut ids: BTreeSet<String> = self.ids("machines")?.into_iter().collect();
        ids.extend(self.ids("resources")?);
        for id in ids {
            // In the order in which a directory moves.
            if ["vms", "tasks", "quarantine", "trash"].iter().any(|kind| self.path(kind, &id).exists()) {
                continue;
            }
            let path = self.path("trash", &id);
            self.remove_tree(&id, &path).map_err(|error| Error::state(&path, &error))?;
        }
        Ok(())
    }

    /// Tries to lock the directory of a machine, and becomes its owner with the lock. Where the owner that is written down has
    /// died and the lock is held all the same, a forked copy of the owner holds it: then it is taken away.
    pub(super) fn attempt(&self, id: &str, path: &Path) -> io::Result<Attempt> {
        let lock = match lock::attempt(path)? {
            Attempt::Locked(lock) => Some(lock),
            Attempt::Held => None,
            Attempt::Gone => return Ok(Attempt::Gone),
        };
        let written = self.owner_of(id).map_err(io::Error::other)?;
        let owner = || written.as_deref().and_then(Owner::parse);
        let is_dead = || owner().is_some_and(|owner| owner.is_dead_in_this_boot());
        if lock.is_none() && !is_dead() {
            return Ok(Attempt::Held);
        }
        let Some(written) = written else { return Ok(lock.map_or(Attempt::Held, Attempt::Locked)) };
        // Of all who have found the lock free or its owner dead, one becomes the owner. So may a supervisor that was about to.
        let sql = "UPDATE machines SET owner = ?3 WHERE id = ?1 AND owner = ?2";
        let claimed = self.connection().execute(sql, params![id, written, this_process()]);
        match (claimed, lock) {
            (Ok(0), _) => Ok(Attempt::Held),
            (Ok(_), None) => lock::renew(path).map(Attempt::Locked),
            // Where the disk is too full for this, the lock must do: a machine is removable to make room.
            (Ok(_) | Err(_), Some(lock)) => Ok(Attempt::Locked(lock)),
            (Err(error), None) => Err(io::Error::other(error)),
        }
    }

    /// Moves a directory out of its place, then removes it. A failure of the second half is the next sweep's.
    pub(super) fn discard(&self, id: &str, dir: &Path, _lock: File) -> Result<(), Error> {
        let trash = self.set_aside(id, dir)?;
        drop(self.remove_tree(id, &trash));
        Ok(())
    }

    /// Moves a directory into the trash; returns where it is now. Whoever does this is its owner from now on.
    pub(super) fn set_aside(&self, id: &str, dir: &Path) -> Result<PathBuf, Error> {
        let trash = self.path("trash", id);
        match fs_err::rename(dir, &trash) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::state(&self.state_dir, &error));
            }
            _ => {}
        }
        let sql = "UPDATE machines SET counts = 0, owner = ?2 WHERE id = ?1";
        // Where the disk is too full for this, it counts until the directory is removed.
        drop(self.connection().execute(sql, params![id, this_process()]));
        Ok(trash)
    }

    /// Removes a machine's directory, in the trash by now, and what was made for it elsewhere. A VMM whose owner has just
    /// been killed may still be dying: then it stays for the next sweep.
    pub(super) fn remove_tree(&self, id: &str, path: &Path) -> io::Result<()> {
        let resources = self.remove_resources(id, path);
        match fs_err::remove_dir_all(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // The rows stay until what stands outside of the directory is gone too, and the next sweep finds them.
        resources?;
        // Where the disk is too full for this, the next sweep finds a row without a directory.
        drop(self.connection().execute("DELETE FROM machines WHERE id = ?1", [id]));
        Ok(())
    }
}
