//! Control groups: what keeps a fork bomb or a memory hog from taking the agent with it.
//!
//! `/cgroup/guest` holds all commands together and leaves a share of the memory and of the process numbers to
//! the agent; below it each command has a group of its own, by which all of its processes are killed at once.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::mount::{MountFlags, mount};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

const MOUNT: &str = "/cgroup";

/// Memory that commands cannot take: the kernel's own needs and the agent, in bytes.
const RESERVE: u64 = 64 << 20;
/// How long killed commands may take to be gone.
const ENDED_WITHIN: Duration = Duration::from_secs(5);

/// The group of all commands.
#[derive(Debug)]
pub(crate) struct GuestCgroup {
    /// Groups of commands that have ended and left processes in the background.
    left: Arc<Mutex<Vec<PathBuf>>>,
}

/// The group of one command.
#[derive(Debug)]
pub(crate) struct ExecCgroup {
    path: PathBuf,
    /// Its directory, by which a child begins in the group.
    directory: File,
    left: Arc<Mutex<Vec<PathBuf>>>,
}

impl GuestCgroup {
    pub(crate) fn new() -> io::Result<Self> {
        let flags = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
        // Delegation: what commands see of the hierarchy begins at their own group, whose limits they cannot change.
        mount("cgroup2", MOUNT, "cgroup2", flags, Some(c"nsdelegate"))?;
        set(&format!("{MOUNT}/cgroup.subtree_control"), "+memory +pids")?;
        let guest = format!("{MOUNT}/guest");
        make(&guest)?;
        let memory = total_memory()?;
        set(&format!("{guest}/memory.max"), &memory.saturating_sub(RESERVE).max(64 << 20).to_string())?;
        // A process costs the kernel some 100 KiB at least; the memory limit decides where this is generous.
        set(&format!("{guest}/pids.max"), &(memory >> 19).clamp(512, 16_384).to_string())?;
        Ok(Self { left: Arc::default() })
    }

    /// Makes the control group namespace of commands, whose root is their common group; `within` runs in it.
    pub(crate) fn namespace<T>(within: impl FnOnce() -> T) -> io::Result<(OwnedFd, T)> {
        let kind = Some(LinkNameSpaceType::ControlGroup);
        let own = File::open("/proc/self/ns/cgroup")?;
        set(&format!("{MOUNT}/guest/cgroup.procs"), "0")?;
        unshare_cgroup()?;
        let namespace = OwnedFd::from(File::open("/proc/self/ns/cgroup")?);
        let result = within();
        move_into_link_name_space(own.as_fd(), kind)?;
        set(&format!("{MOUNT}/cgroup.procs"), "0")?;
        // A group that gives its controllers to groups below it may hold no process itself.
        set(&format!("{MOUNT}/guest/cgroup.subtree_control"), "+memory +pids")?;
        Ok((namespace, result))
    }

    /// A fresh group for one command.
    pub(crate) fn exec(&self) -> io::Result<ExecCgroup> {
        // A name that the guest cannot have made a group of, and set limits to, beforehand; it is no secret, and not waited for.
        let mut name = [0; 8];
        rustix::rand::getrandom(&mut name, rustix::rand::GetRandomFlags::INSECURE)?;
        let path = PathBuf::from(format!("{MOUNT}/guest/{:016x}", u64::from_ne_bytes(name)));
        rustix::fs::mkdir(&path, rustix::fs::Mode::from_raw_mode(0o755))?;
        let directory = File::open(&path)?;
        Ok(ExecCgroup { path, directory, left: Arc::clone(&self.left) })
    }

    /// Kills every process of every command.
    pub(crate) fn kill_all(&self) {
        drop(set(&format!("{MOUNT}/guest/cgroup.kill"), "1"));
    }

    /// Kills every process of every command, and waits until none is left.
    pub(crate) async fn end_all(&self) -> io::Result<()> {
        self.kill_all();
        tokio::time::timeout(ENDED_WITHIN, emptied(Path::new(MOUNT).join("guest"))).await??;
        self.forget_left();
        Ok(())
    }

    /// Removes the groups of earlier commands that are empty by now.
    pub(crate) fn forget_left(&self) {
        // The kernel refuses to remove a group that still holds a process; one that is gone was removed by the guest.
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        left.retain(|path| rustix::fs::rmdir(path) == Err(rustix::io::Errno::BUSY));
    }
}

impl ExecCgroup {
    /// The directory, by which a child begins in the group.
    pub(crate) fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Kills every process of the command, whatever session it has moved to.
    pub(crate) fn kill(&self) {
        drop(set(&self.path.join("cgroup.kill").to_string_lossy(), "1"));
    }

    /// Waits until no process of the command is left.
    pub(crate) async fn emptied(&self) -> io::Result<()> {
        emptied(self.path.clone()).await
    }

    /// How many processes of the command the kernel has killed for want of memory.
    pub(crate) fn oom_kills(&self) -> u64 {
        let events = File::open(self.path.join("memory.events")).and_then(io::read_to_string);
        let count = |text: &str| text.lines().find_map(|line| line.strip_prefix("oom_kill "))?.parse().ok();
        events.ok().as_deref().and_then(count).unwrap_or(0)
    }
}

impl Drop for ExecCgroup {
    fn drop(&mut self) {
        // Where a process that the command left in the background still lives, the group stays with it; and nobody
        // should have to wait for its end.
        self.left.lock().unwrap_or_else(PoisonError::into_inner).push(std::mem::take(&mut self.path));
    }
}

/// Waits until no process is left in a group, nor below it.
async fn emptied(group: PathBuf) -> io::Result<()> {
    let events = File::open(group.join("cgroup.events"))?;
    #[expect(unsafe_code, reason = "tokio asks for a promise about the descriptor")]
    // SAFETY: the file owns its descriptor, and lives in what is made here.
    let events = unsafe { AsyncFd::register_with_interest(events, Interest::PRIORITY) }?;
    loop {
        let mut text = String::new();
        let mut file = events.get_ref();
        file.seek(SeekFrom::Start(0))?;
        file.read_to_string(&mut text)?;
        if text.lines().any(|line| line == "populated 0") {
            return Ok(());
        }
        events.ready(Interest::PRIORITY).await?.clear_ready();
    }
}

#[expect(unsafe_code, reason = "unshare of a namespace needs a single thread")]
fn unshare_cgroup() -> rustix::io::Result<()> {
    // SAFETY: no other thread exists yet.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWCGROUP) }
}

fn make(path: &str) -> io::Result<()> {
    match rustix::fs::mkdir(path, rustix::fs::Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn set(path: &str, value: &str) -> io::Result<()> {
    OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| file.write_all(value.as_bytes()))
        .map_err(|error| io::Error::new(error.kind(), format!("{path}: {error}")))
}

fn total_memory() -> io::Result<u64> {
    let info = rustix::system::sysinfo();
    Ok(info.totalram.saturating_mul(u64::from(info.mem_unit.max(1))))
}
