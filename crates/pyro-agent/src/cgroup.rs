//! Control groups: what keeps a fork bomb or a memory hog from taking the agent with it.
//!
//! `/cgroup/guest` holds all commands together and leaves a share of the memory and of the process numbers to
//! the agent; below it each command has a group of its own, by which all of its processes are killed at once.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::mount::{MountFlags, mount};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

const MOUNT: &str = "/cgroup";

/// Memory that commands cannot take: the kernel's own needs and the agent, in bytes.
const RESERVE: u64 = 64 << 20;
/// Groups that are kept ready: as many as commands end at about the same time.
const SPARES: usize = 4;
/// What a command could have changed about a group, or that tells of what happened in it; a kernel without swap has not all of
/// it. The first tells whether a process could run in it. Its accounts go on, and a BPF program that a guest has attached
/// to the group of a command, and not taken away, cannot be seen here.
const STATE: &[&str] = &[
    "cgroup.events",
    "cgroup.freeze",
    "cgroup.max.depth",
    "cgroup.max.descendants",
    "cgroup.pressure",
    "cgroup.subtree_control",
    "cgroup.type",
    "memory.events",
    "memory.high",
    "memory.low",
    "memory.max",
    "memory.min",
    "memory.oom.group",
    "memory.swap.events",
    "memory.swap.high",
    "memory.swap.max",
    "pids.events",
    "pids.max",
];
/// Memory that may stay charged to a group that serves again, in bytes: a command may set a limit to its own.
const CHARGED: u64 = 16 << 20;
const MODE: u32 = 0o755;
/// The links of a directory without directories in it.
const NO_GROUP_BELOW: u64 = 2;
/// How long killed commands may take to be gone.
const ENDED_WITHIN: Duration = Duration::from_secs(5);

/// The group of all commands.
#[derive(Debug)]
pub(crate) struct GuestCgroup {
    /// Groups that are ready for the next commands: to make one and remove it takes longer than to start a short program.
    spares: Mutex<Vec<ExecCgroup>>,
    /// What the files of [`STATE`] say of a group that nothing has happened to, learned before there was a command.
    fresh: Vec<(&'static str, Vec<u8>)>,
    /// Groups of commands that have ended and left processes in the background.
    left: Arc<Mutex<Vec<PathBuf>>>,
}

/// The group of one command.
#[derive(Debug)]
pub(crate) struct ExecCgroup {
    path: PathBuf,
    /// Its directory, by which a child begins in the group.
    directory: File,
    /// The files of its state, open once they were asked, because finding a file takes longer than reading it.
    state: Vec<File>,
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
        Ok(Self { spares: Mutex::default(), fresh: Vec::new(), left: Arc::default() })
    }

    /// Makes the control group namespace of commands, whose root is their common group; `within` runs in it.
    pub(crate) fn namespace<T>(&mut self, within: impl FnOnce() -> T) -> io::Result<(OwnedFd, T)> {
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
        let first = self.exec()?;
        for &name in STATE {
            match File::open(first.path.join(name)) {
                Ok(file) => self.fresh.push((name, text(&file)?)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        let first = self.as_new(first);
        self.spares().extend(first);
        Ok((namespace, result))
    }

    /// A fresh group for one command.
    pub(crate) fn exec(&self) -> io::Result<ExecCgroup> {
        // A name that the guest cannot have made a group of, and set limits to, beforehand; it is no secret, and not waited for.
        let mut name = [0; 8];
        rustix::rand::getrandom(&mut name, rustix::rand::GetRandomFlags::INSECURE)?;
        let path = PathBuf::from(format!("{MOUNT}/guest/{:016x}", u64::from_ne_bytes(name)));
        rustix::fs::mkdir(&path, rustix::fs::Mode::from_raw_mode(MODE))?;
        let directory = File::open(&path)?;
        Ok(ExecCgroup { path, directory, state: Vec::new(), left: Arc::clone(&self.left) })
    }

    /// A group that was made ready, if there is one that a command can run in: in a frozen group it would not get as far as its
    /// program, and the agent waits for that; one that the guest has removed says nothing.
    pub(crate) fn take_spare(&self) -> Option<ExecCgroup> {
        let spare = self.spares().pop()?;
        let events = spare.state.first().zip(self.fresh.first());
        events.is_some_and(|(file, (_, fresh))| says(file, fresh)).then_some(spare)
    }

    /// What can be done while nobody waits: makes a group ready, the one of a command that has ended where it is as good as
    /// new, and removes those of others.
    pub(crate) fn tidy(&self, used: Option<ExecCgroup>) {
        let mut spares = self.spares();
        if let Some(used) = used
            && spares.len() < SPARES
        {
            spares.extend(self.as_new(used));
        }
        if spares.is_empty() {
            // Without one, the next command makes its own.
            spares.extend(self.exec().ok().and_then(|group| self.as_new(group)));
        }
        drop(spares);
        self.forget_left();
    }

    /// A group that is empty and as it was made, so that it neither stops nor limits who begins in it, and what it will tell is
    /// of nobody else.
    fn as_new(&self, mut group: ExecCgroup) -> Option<ExecCgroup> {
        if group.state.is_empty() {
            let files = self.fresh.iter().map(|(name, _)| File::open(group.path.join(name)));
            group.state = files.collect::<io::Result<_>>().ok()?;
        }
        let found = rustix::fs::fstat(&group.directory).ok()?;
        // A group that was given to another user of the guest is that user's.
        let is_ours = (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (0, 0, MODE);
        let is_fresh = group.state.iter().zip(&self.fresh).all(|(file, (_, fresh))| says(file, fresh));
        let as_made = is_ours && is_fresh && found.st_nlink == NO_GROUP_BELOW;
        (as_made && group.charged()? <= CHARGED).then_some(group)
    }

    fn spares(&self) -> MutexGuard<'_, Vec<ExecCgroup>> {
        self.spares.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Kills every process of every command.
    pub(crate) fn kill_all(&self) {
        drop(set(&format!("{MOUNT}/guest/cgroup.kill"), "1"));
    }

    /// Kills every process of every command, and waits until none is left; of their groups some may serve again.
    pub(crate) async fn end_all(&self) -> io::Result<()> {
        self.kill_all();
        tokio::time::timeout(ENDED_WITHIN, emptied(Path::new(MOUNT).join("guest"))).await??;
        self.tidy(None);
        Ok(())
    }

    /// Removes the groups of earlier commands that are empty by now.
    fn forget_left(&self) {
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

    /// The memory that is charged to it, in bytes.
    fn charged(&self) -> Option<u64> {
        let current = File::open(self.path.join("memory.current")).and_then(|file| text(&file)).ok()?;
        std::str::from_utf8(&current).ok()?.trim().parse().ok()
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

fn says(file: &File, what: &[u8]) -> bool {
    text(file).is_ok_and(|text| text == what)
}

/// What a file of a group says, from its start.
fn text(file: &File) -> io::Result<Vec<u8>> {
    let mut bytes = [0; 512];
    let length = file.read_at(&mut bytes, 0)?;
    Ok(bytes[..length].to_vec())
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
