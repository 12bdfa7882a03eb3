//! Control groups: what keeps a fork bomb or a memory hog from taking the agent with it.
//!
//! `/cgroup/guest` holds all commands together and leaves a share of the memory and of the process numbers to
//! the agent; below it each command has a group of its own, by which all of its processes are killed at once. To make
//! a group and to remove it takes longer than a short command does, so one that is empty again serves the next.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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

/// Empty groups that are kept.
const READY: usize = 4;

/// The group of all commands.
#[derive(Debug)]
pub(crate) struct GuestCgroup {
    next: AtomicU64,
    /// Groups that are ready for the next commands.
    ready: Mutex<Vec<Arc<Group>>>,
    /// Groups of commands that have ended; processes in the background may be in them.
    left: Arc<Mutex<Vec<Arc<Group>>>>,
}

/// The group of one command; once dropped it is another's, as soon as it is empty.
#[derive(Debug)]
pub(crate) struct ExecCgroup {
    group: Arc<Group>,
    left: Arc<Mutex<Vec<Arc<Group>>>>,
}

#[derive(Debug)]
struct Group {
    path: PathBuf,
    /// Its directory, by which a child begins in the group.
    directory: File,
    /// `cgroup.events` and `memory.events`, open because finding a file takes longer than reading it.
    events: File,
    memory: File,
    /// How many processes the kernel had killed for want of memory before the present command.
    oom_kills_before: AtomicU64,
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
        Ok(Self { next: AtomicU64::new(0), ready: Mutex::default(), left: Arc::default() })
    }

    /// Makes the control group namespace of commands, whose root is their common group; `within` runs in it.
    pub(crate) fn namespace<T>(&self, within: impl FnOnce() -> T) -> io::Result<(OwnedFd, T)> {
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
        Group::new(self.next.fetch_add(1, Ordering::Relaxed)).map(|group| self.lend(Arc::new(group)))
    }

    /// A group that is ready, if there is one. A guest may have removed it.
    pub(crate) fn take_ready(&self) -> Option<ExecCgroup> {
        let ready = lock(&self.ready).pop().or_else(|| {
            // That of the command before this one, where nobody had time to look at it.
            let mut left = lock(&self.left);
            left.last().is_some_and(|group| group.is_free()).then(|| left.pop())?
        });
        ready.map(|group| self.lend(group))
    }

    /// What can be done while nobody waits: sees which groups are empty again, and that one is ready.
    pub(crate) fn tidy(&self) {
        let left = std::mem::take(&mut *lock(&self.left));
        let mut ready = lock(&self.ready);
        for group in left {
            if !group.is_free() {
                lock(&self.left).push(group);
            } else if ready.len() < READY {
                ready.push(group);
            } else {
                // One that cannot be removed is empty, and stays as such.
                drop(std::fs::remove_dir(&group.path));
            }
        }
        if ready.is_empty() {
            // Without one, the next command makes its own.
            ready.extend(Group::new(self.next.fetch_add(1, Ordering::Relaxed)).map(Arc::new));
        }
    }

    fn lend(&self, group: Arc<Group>) -> ExecCgroup {
        ExecCgroup { group, left: Arc::clone(&self.left) }
    }

    /// Kills every process of every command.
    pub(crate) fn kill_all(&self) {
        drop(set(&format!("{MOUNT}/guest/cgroup.kill"), "1"));
    }

    /// Kills every process of every command, and waits until none is left, nor a group of one.
    pub(crate) async fn end_all(&self) -> io::Result<()> {
        self.kill_all();
        tokio::time::timeout(ENDED_WITHIN, emptied(Path::new(MOUNT).join("guest"))).await??;
        self.tidy();
        Ok(())
    }
}

impl Group {
    fn new(number: u64) -> io::Result<Self> {
        let path = PathBuf::from(format!("{MOUNT}/guest/{number}"));
        make(&path.to_string_lossy())?;
        let open = |name| File::open(path.join(name));
        let (events, memory) = (open("cgroup.events")?, open("memory.events")?);
        Ok(Self { directory: File::open(&path)?, events, memory, oom_kills_before: AtomicU64::new(0), path })
    }

    /// Whether no process is in it and one could run there; if so, it is as good as new.
    fn is_free(&self) -> bool {
        let is_free = read_short(&self.events)
            .is_ok_and(|text| ["populated 0", "frozen 0"].iter().all(|word| text.lines().any(|line| line == *word)));
        if is_free {
            self.oom_kills_before.store(self.oom_kills(), Ordering::Relaxed);
        }
        is_free
    }

    /// How many of its processes the kernel has ever killed for want of memory.
    fn oom_kills(&self) -> u64 {
        let count = |text: String| text.lines().find_map(|line| line.strip_prefix("oom_kill "))?.parse().ok();
        read_short(&self.memory).ok().and_then(count).unwrap_or(0)
    }
}

impl ExecCgroup {
    /// The directory, by which a child begins in the group.
    pub(crate) fn directory(&self) -> BorrowedFd<'_> {
        self.group.directory.as_fd()
    }

    /// Kills every process of the command, whatever session it has moved to.
    pub(crate) fn kill(&self) {
        drop(set(&self.group.path.join("cgroup.kill").to_string_lossy(), "1"));
    }

    /// Waits until no process of the command is left.
    pub(crate) async fn emptied(&self) -> io::Result<()> {
        emptied(self.group.path.clone()).await
    }

    /// How many processes of the command the kernel has killed for want of memory.
    pub(crate) fn oom_kills(&self) -> u64 {
        self.group.oom_kills().saturating_sub(self.group.oom_kills_before.load(Ordering::Relaxed))
    }
}

impl Drop for ExecCgroup {
    fn drop(&mut self) {
        // Where a process that the command left in the background still lives, the group stays with it; and nobody
        // should have to wait for its end.
        lock(&self.left).push(Arc::clone(&self.group));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A short file of the kernel's from its beginning.
fn read_short(file: &File) -> io::Result<String> {
    let mut bytes = [0; 512];
    let length = file.read_at(&mut bytes, 0)?;
    Ok(String::from_utf8_lossy(&bytes[..length]).into_owned())
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
