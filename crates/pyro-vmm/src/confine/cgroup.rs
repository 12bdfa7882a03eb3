//! Control groups of the second version: one for each VMM, with limits, below a directory that this process may use.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rustix::fs::Access;

use super::machine_name;

/// Where the second version of control groups is mounted alone. Hosts with both versions keep their controllers
/// with the first.
pub(super) const GROUPS: &str = "/sys/fs/cgroup";
/// The directory of the groups of all machines.
pub(super) const PARENT: &str = "pyro";
/// The controllers that a group must have.
const CONTROLLERS: [&str; 2] = ["memory", "pids"];
/// Memory that a VMM itself may take beside its guest's, in MiB.
const VMM_MIB: u64 = 320;
/// Processes and threads of a VMM beside those of its processors: QEMU's workers, which do its disk's input and output.
const THREADS: u32 = 96;
/// The period over which processor time is given out, in microseconds; a VMM's own threads get a fifth of one.
const PERIOD: u32 = 100_000;
/// How long a killed VMM may take to be gone, and the pause before it is looked for again.
const DYING_MAX: Duration = Duration::from_secs(5);
const BEAT: Duration = Duration::from_millis(10);

/// What a VMM may take.
#[derive(Debug)]
pub(super) struct Limits {
    memory: u64,
    processes: u32,
    time: u32,
}

impl Limits {
    pub(super) fn of(memory_mib: u32, vcpus: u8) -> Self {
        Self {
            memory: (u64::from(memory_mib) + VMM_MIB) << 20,
            processes: THREADS + u32::from(vcpus),
            time: u32::from(vcpus) * PERIOD + PERIOD / 5,
        }
    }
}

/// A group that exists. Dropping it removes it, if it is empty.
#[derive(Debug)]
pub(super) struct Group(PathBuf);

impl Group {
    /// Makes a group with limits, empty.
    pub(super) fn make(path: PathBuf, limits: &Limits) -> io::Result<Self> {
        if let Some(parent) = path.parent() {
            enable(parent)?;
        }
        fs_err::create_dir(&path)?;
        let group = Self(path);
        let set = |file: &str, value: String| fs_err::write(group.0.join(file), value);
        set("memory.max", limits.memory.to_string())?;
        set("pids.max", limits.processes.to_string())?;
        if group.0.join("cpu.max").exists() {
            set("cpu.max", format!("{} {PERIOD}", limits.time))?;
        }
        Ok(group)
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // One whose VMM is still dying is found by the next sweep.
        fs_err::remove_dir(&self.0).ok();
    }
}

/// The control group that a machine's VMM would have; none where this process can make none.
pub fn control_group_of(dir: &Path) -> Option<PathBuf> {
    home().map(|home| home.join(machine_name(dir)))
}

/// Removes a control group, if it is there.
///
/// # Errors
/// When a process is still in it.
pub fn remove_control_group(group: &Path) -> io::Result<()> {
    match fs_err::remove_dir(group) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// As [`remove_control_group`], and waits for a VMM that was just killed: a group has no event for its last process that
/// could be waited for without it.
pub(super) fn remove_soon(group: &Path) -> io::Result<()> {
    let deadline = Instant::now() + DYING_MAX;
    loop {
        match remove_control_group(group) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                std::thread::sleep(BEAT);
            }
            done => return done,
        }
    }
}

/// The directory in which this process can make groups: as root below the root of all groups; else below the nearest
/// group above its own that was given to its user with the controllers, as systemd does for a session.
pub(super) fn home() -> Option<&'static Path> {
    static HOME: OnceLock<Option<PathBuf>> = OnceLock::new();
    HOME.get_or_init(|| {
        let root = Path::new(GROUPS);
        if rustix::process::geteuid().is_root() {
            let home = root.join(PARENT);
            // In a container the processes may be in the root group, which then can give no controllers to others.
            let can = has_controllers(&root.join("cgroup.controllers")) && enable(&home).is_ok();
            return can.then_some(home);
        }
        let own = fs_err::read_to_string("/proc/self/cgroup").ok()?;
        let own = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
        delegated(root, Path::new(own)).map(|dir| dir.join(PARENT))
    })
    .as_deref()
}

/// The nearest group above `own` that this user may change, and whose groups have the controllers.
fn delegated(root: &Path, own: &Path) -> Option<PathBuf> {
    let above = own.ancestors().skip(1).map(|path| root.join(path));
    above.take_while(|dir| dir.starts_with(root)).find(|dir| {
        let may = |path: &Path| rustix::fs::access(path, Access::WRITE_OK).is_ok();
        has_controllers(&dir.join("cgroup.subtree_control")) && may(dir) && may(&dir.join("cgroup.procs"))
    })
}

fn has_controllers(file: &Path) -> bool {
    let found = fs_err::read_to_string(file).unwrap_or_default();
    CONTROLLERS.iter().all(|name| found.split_ascii_whitespace().any(|controller| controller == *name))
}

/// Makes the directory of all groups, and gives the controllers to those below it.
fn enable(parent: &Path) -> io::Result<()> {
    match fs_err::create_dir(parent) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let switches = parent.ancestors().take(2).collect::<Vec<_>>();
    for dir in switches.into_iter().rev() {
        let file = dir.join("cgroup.subtree_control");
        if !has_controllers(&file) {
            fs_err::write(&file, "+memory +pids")?;
        }
        // Processor time is not always given away; without it the scheduler shares as ever.
        fs_err::write(&file, "+cpu").ok();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_group_that_was_given_to_the_user_is_used() {
        let root = tempfile::tempdir().expect("a directory");
        let own = Path::new("user.slice/user-1000.slice/user@1000.service/app.slice/term.scope");
        fs_err::create_dir_all(root.path().join(own)).expect("made");
        let give = |dir: &str, controllers: &str| {
            let dir = root.path().join(dir);
            fs_err::write(dir.join("cgroup.subtree_control"), controllers).expect("written");
            fs_err::write(dir.join("cgroup.procs"), "").expect("written");
        };
        assert_eq!(delegated(root.path(), own), None);
        give("user.slice/user-1000.slice/user@1000.service", "cpu memory pids");
        let service = root.path().join("user.slice/user-1000.slice/user@1000.service");
        assert_eq!(delegated(root.path(), own), Some(service));
        give("user.slice/user-1000.slice/user@1000.service/app.slice", "memory pids");
        let slice = root.path().join("user.slice/user-1000.slice/user@1000.service/app.slice");
        assert_eq!(delegated(root.path(), own), Some(slice));
    }
}
