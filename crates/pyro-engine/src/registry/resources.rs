//! What was made for a machine outside of its directory. It is written down before it is made, and one routine removes
//! whatever a dead owner has left.

use std::fmt;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use rusqlite::params;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::Registry;
use super::owner::Owner;
use crate::error::Error;

/// How long a killed process may take to be gone.
const DYING_MAX: Duration = Duration::from_secs(2);
const CGROUPS: &str = "/sys/fs/cgroup";

/// One thing outside of a machine's directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Resource {
    /// A control group of the second version, by its path.
    ControlGroup(PathBuf),
    /// A process that serves this machine alone. Only this one can be written down no sooner than it runs; until then it
    /// dies with its owner by the kernel's hand.
    Process(Owner),
}

impl Resource {
    fn kind(&self) -> &'static str {
        match self {
            Self::ControlGroup(_) => "control_group",
            Self::Process(_) => "process",
        }
    }

    fn read(kind: &str, value: &str) -> Option<Self> {
        match kind {
            "control_group" => Some(Self::ControlGroup(value.into())),
            "process" => Owner::parse(value).map(Self::Process),
            _ => None,
        }
    }

    /// Removes it; that it is gone already is no error.
    fn remove(&self) -> io::Result<()> {
        match self {
            Self::ControlGroup(path) => remove_control_group(path),
            Self::Process(process) => kill(process),
        }
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ControlGroup(path) => path.display().fmt(formatter),
            Self::Process(process) => process.fmt(formatter),
        }
    }
}

impl Registry {
    /// Writes down what is about to be made for a machine.
    pub(crate) fn note_resource(&self, id: &str, resource: &Resource) -> Result<(), Error> {
        self.connection().execute(
            "INSERT OR IGNORE INTO resources VALUES (?1, ?2, ?3)",
            params![id, resource.kind(), resource.to_string()],
        )?;
        Ok(())
    }

    /// Removes what was made for a machine outside of its directory, whose owner is dead or done with it.
    ///
    /// What cannot be removed stays written down for the next sweep.
    pub(super) fn remove_resources(&self, id: &str, dir: &Path) -> io::Result<()> {
        // Of a machine whose rows were lost with the database, the names still tell what there may be.
        let mut result = pyro_vmm::forget(dir);
        for (kind, value) in self.resources_of(id).map_err(io::Error::other)? {
            // A kind that only a newer pyro knows is that pyro's to remove.
            let Some(resource) = Resource::read(&kind, &value) else { continue };
            let removed = resource.remove();
            if removed.is_ok() {
                self.connection()
                    .execute(
                        "DELETE FROM resources WHERE id = ?1 AND kind = ?2 AND value = ?3",
                        params![id, kind, value],
                    )
                    .map_err(io::Error::other)?;
            }
            result = result.and(removed);
        }
        result
    }

    fn resources_of(&self, id: &str) -> rusqlite::Result<Vec<(String, String)>> {
        let connection = self.connection();
        let mut rows = connection.prepare_cached("SELECT kind, value FROM resources WHERE id = ?1")?;
        let rows = rows.query_map([id], |row| Ok((row.get(0)?, row.get(1)?)))?;
        rows.collect()
    }
}

/// Removes an empty control group. One that still holds a process has it killed, and goes with a later sweep.
fn remove_control_group(path: &Path) -> io::Result<()> {
    let is_plain = |part| matches!(part, Component::RootDir | Component::Normal(_));
    if !path.starts_with(CGROUPS) || !path.components().all(is_plain) {
        let text = format!("'{}' is no control group", path.display());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    match fs_err::remove_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
            // A kernel before 5.14 has no such file; there, what is left dies with its owner.
            drop(fs_err::write(path.join("cgroup.kill"), "1"));
            Err(error)
        }
        removed => removed,
    }
}

/// Kills a process and waits until it is gone.
fn kill(process: &Owner) -> io::Result<()> {
    let Some(pid) = i32::try_from(process.pid).ok().and_then(Pid::from_raw) else { return Ok(()) };
    let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        Err(Errno::SRCH) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    // Whether the process behind the descriptor is the one that was written down, and lives.
    if process.is_dead() || Owner::numbered(process.pid).as_ref() != Some(process) {
        return Ok(());
    }
    match pidfd_send_signal(&pidfd, Signal::KILL) {
        Ok(()) | Err(Errno::SRCH) => {}
        Err(error) => return Err(error.into()),
    }
    let limit = Timespec { tv_sec: i64::try_from(DYING_MAX.as_secs()).unwrap_or(1), tv_nsec: 0 };
    if poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit))? == 0 {
        let text = format!("process {} did not end within {} s of SIGKILL", process.pid, DYING_MAX.as_secs());
        return Err(io::Error::new(io::ErrorKind::TimedOut, text));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use pyro_process::Spawn;

    use super::super::tests::{admit, opened};
    use super::*;

    #[test]
    fn a_helper_process_of_a_dead_owner_is_ended_and_no_other() {
        let dir = tempfile::tempdir().expect("a directory");
        let registry = opened(dir.path());
        let (lease, record) = admit(&registry, 1).expect("admitted");
        let [mut helper, mut other] = [(); 2].map(|()| {
            let mut spawn = Spawn::new("sleep", Path::new("/"));
            spawn.arg("99");
            spawn.spawn().expect("it runs")
        });
        let named = |id: u32| Owner::numbered(id).expect("it lives");
        let stranger = named(other.id());
        let stranger = Owner { start_time: stranger.start_time + 1, ..stranger };
        for process in [named(helper.id()), stranger] {
            registry.note_resource(&record.vm_id, &Resource::Process(process)).expect("noted");
        }
        drop(lease);
        assert_eq!(registry.sweep().vm_ids, std::slice::from_ref(&record.vm_id));
        assert!(!helper.wait().expect("reaped").success());
        assert!(other.try_wait().expect("its state").is_none(), "its number was used again");
        assert_eq!(registry.resources_of(&record.vm_id).expect("read"), []);
        other.kill().expect("killed");
        other.wait().expect("reaped");
    }

    #[test]
    fn a_control_group_of_a_dead_owner_is_removed_also_where_it_has_another_name_than_its_machine() {
        let group = Path::new("/sys/fs/cgroup/pyro-test-of-resources");
        if fs_err::create_dir(group).is_err() {
            println!("skipped: no control group can be made here");
            return;
        }
        let dir = tempfile::tempdir().expect("a directory");
        let registry = opened(dir.path());
        let (lease, record) = admit(&registry, 1).expect("admitted");
        registry.note_resource(&record.vm_id, &Resource::ControlGroup(group.into())).expect("noted");
        drop(lease);
        assert_eq!(registry.sweep().problems, Vec::<String>::new());
        assert!(!group.exists());
    }

    #[test]
    fn a_path_that_is_no_control_group_is_not_removed() {
        let dir = tempfile::tempdir().expect("a directory");
        Resource::ControlGroup(dir.path().into()).remove().expect_err("refused");
        Resource::ControlGroup("/sys/fs/cgroup/../../..".into()).remove().expect_err("refused");
        assert!(dir.path().exists());
    }
}
