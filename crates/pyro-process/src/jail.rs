//! What keeps a child apart from the rest of the host: namespaces, a root of its own, no privileges.
//!
//! ```text
//!   owner ──► warden ──► init of the process namespace ──► the program
//! ```
//!
//! A process can enter a new process namespace only by being born into it, and a program that drops its user loses
//! the signal that would end it with its owner. So two processes stand in between, copies of the owner that only wait:
//! the *warden*, which dies with the owner, and the *init*, which dies with the warden and whose death ends everything
//! in the namespace. The warden ends as the program has ended; when it has, the program is gone.
//!
//! All that runs between the fork and the program's execution makes system calls only: whatever needs memory is
//! prepared before.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI32, Ordering};

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr,
};
use rustix::event::{PollFd, PollFlags};
use rustix::fs::StatVfsMountFlags;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::{Pid, Resource, Rlimit, Signal, WaitOptions};
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags};

/// How a child is kept apart. An empty one keeps nothing apart but the process numbers.
#[derive(Debug)]
pub struct Jail {
    dir: PathBuf,
    own_user: bool,
    namespaces: UnshareFlags,
    binds: Vec<(PathBuf, PathBuf, Bind)>,
    becomes_root: bool,
    drops_privileges: bool,
    landlock: bool,
    limits: Vec<(Resource, u64)>,
}

/// What a child may do to a file that it is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bind {
    /// Read it, or execute it.
    Read,
    /// Read and write it; also for devices.
    Write,
}

impl Jail {
    /// A jail whose files are below `dir`, an existing directory.
    pub fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            own_user: false,
            namespaces: UnshareFlags::NEWPID,
            binds: Vec::new(),
            becomes_root: false,
            drops_privileges: false,
            landlock: false,
            limits: Vec::new(),
        }
    }

    /// Adds namespaces; [`UnshareFlags::NEWUSER`] maps the owner's own user and group and nothing else.
    pub fn namespaces(&mut self, namespaces: UnshareFlags) -> &mut Self {
        self.own_user |= namespaces.contains(UnshareFlags::NEWUSER);
        self.namespaces |= namespaces;
        self
    }

    /// Shows a file of the host at `target` below the jail's directory. It needs a mount namespace.
    pub fn bind(&mut self, source: &Path, target: &Path, bind: Bind) -> &mut Self {
        self.binds.push((source.to_owned(), self.dir.join(target), bind));
        self
    }

    /// Makes the jail's directory the child's root and working directory, so that it sees nothing else.
    pub fn become_root(&mut self) -> &mut Self {
        self.becomes_root = true;
        self
    }

    /// Takes every capability away, and the way to new ones.
    pub fn drop_privileges(&mut self) -> &mut Self {
        self.drops_privileges = true;
        self
    }

    /// Confines access to files to the jail's directory, and takes the network away, as far as this kernel's Landlock
    /// can; it takes effect together with [`Jail::drop_privileges`] only.
    pub fn landlock(&mut self) -> &mut Self {
        self.landlock = true;
        self
    }

    /// Limits a resource for good.
    pub fn limit(&mut self, resource: Resource, value: u64) -> &mut Self {
        self.limits.push((resource, value));
        self
    }

    /// Makes everything ready that needs memory or the host's files.
    pub(crate) fn prepare(self) -> io::Result<Prepared> {
        let mounts = !self.binds.is_empty() || self.becomes_root;
        if mounts && !self.namespaces.contains(UnshareFlags::NEWNS) {
            // They would be the host's.
            let text = "a jail that shows files needs a mount namespace";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let mut binds = Vec::new();
        for (source, target, bind) in &self.binds {
            if let Some(parent) = target.parent() {
                fs_err::create_dir_all(parent)?;
            }
            fs_err::OpenOptions::new().write(true).create(true).truncate(false).open(target)?;
            binds.push(PreparedBind {
                source: c_string(source)?,
                target: c_string(target)?,
                read_only: match bind {
                    Bind::Read => Some(kept_flags(source)?),
                    Bind::Write => None,
                },
            });
        }
        let landlock = if self.landlock { ruleset(&self.dir)? } else { None };
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Ok(Prepared {
            dir: c_string(&self.dir)?,
            namespaces: self.namespaces,
            maps: self.own_user.then(|| [format!("{uid} {uid} 1"), format!("{gid} {gid} 1")]),
            binds,
            becomes_root: self.becomes_root,
            drops_privileges: self.drops_privileges,
            landlock,
            limits: self.limits,
        })
    }
}

/// Whether this kernel has Landlock.
pub fn has_landlock() -> bool {
    // SAFETY: asks for a version number; no memory is read.
    #[expect(unsafe_code, reason = "no library asks without making a ruleset")]
    let version = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<libc::c_void>(), 0_usize, 1_u32)
    };
    version > 0
}

/// Everything below `dir`, and nothing else; none where the kernel has no Landlock.
fn ruleset(dir: &Path) -> io::Result<Option<OwnedFd>> {
    let handled = ABI::V5;
    let made = || -> Result<Option<OwnedFd>, Box<dyn std::error::Error + Send + Sync>> {
        let ruleset = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(handled))?
            .handle_access(AccessNet::from_all(handled))?
            .create()?
            .add_rule(PathBeneath::new(PathFd::new(dir)?, AccessFs::from_all(handled)))?;
        Ok(ruleset.into())
    };
    made().map_err(io::Error::other)
}

/// The flags that a read-only view of a file's mount has to keep: a user namespace may not drop them.
fn kept_flags(source: &Path) -> io::Result<MountFlags> {
    let flags = rustix::fs::statvfs(source)?.f_flag;
    let pairs = [
        (StatVfsMountFlags::NOSUID, MountFlags::NOSUID),
        (StatVfsMountFlags::NODEV, MountFlags::NODEV),
        (StatVfsMountFlags::NOEXEC, MountFlags::NOEXEC),
        (StatVfsMountFlags::NOATIME, MountFlags::NOATIME),
        (StatVfsMountFlags::NODIRATIME, MountFlags::NODIRATIME),
        (StatVfsMountFlags::RELATIME, MountFlags::RELATIME),
    ];
    let kept = pairs.into_iter().filter(|(has, _)| flags.contains(*has)).map(|(_, keep)| keep);
    Ok(kept.fold(MountFlags::RDONLY, |all, flag| all | flag))
}

fn c_string(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

/// A jail that needs no more memory.
#[derive(Debug)]
pub(crate) struct Prepared {
    dir: CString,
    namespaces: UnshareFlags,
    /// The maps of users and groups, where there is a user namespace.
    maps: Option<[String; 2]>,
    binds: Vec<PreparedBind>,
    becomes_root: bool,
    drops_privileges: bool,
    landlock: Option<OwnedFd>,
    limits: Vec<(Resource, u64)>,
}

#[derive(Debug)]
struct PreparedBind {
    source: CString,
    target: CString,
    /// The flags of its mount, where it may not be written.
    read_only: Option<MountFlags>,
}

impl Prepared {
    /// Goes on as the program-to-be in the jail's process namespace; this process and its child stay behind as warden
    /// and init, and never return. The caller has one thread.
    pub(crate) fn enter(&self) -> io::Result<()> {
        default_signals();
        #[expect(unsafe_code, reason = "unshare of files needs a single thread, which a fork has")]
        // SAFETY: this process has one thread.
        unsafe {
            rustix::thread::unshare_unsafe(self.namespaces)?;
        }
        if let Some([users, groups]) = &self.maps {
            write(c"/proc/self/setgroups", b"deny")?;
            write(c"/proc/self/uid_map", users.as_bytes())?;
            write(c"/proc/self/gid_map", groups.as_bytes())?;
        }
        let (status, tell_status) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let (life, hold_life) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        if let Some(init) = fork()? {
            drop((tell_status, life));
            be_warden(init, &status, &hold_life);
        }
        drop((status, hold_life));
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        if is_closed(life.as_fd()) {
            end(0);
        }
        if let Some(program) = fork()? {
            be_init(program, &tell_status);
        }
        Ok(())
    }

    /// What is done in the program's own process, at last.
    pub(crate) fn settle(&self) -> io::Result<()> {
        if self.namespaces.contains(UnshareFlags::NEWNS) {
            rustix::mount::mount_change(c"/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        }
        for bind in &self.binds {
            rustix::mount::mount_bind(&bind.source, &bind.target)?;
            if let Some(flags) = bind.read_only {
                rustix::mount::mount_remount(&bind.target, MountFlags::BIND | flags, c"")?;
            }
        }
        if self.becomes_root {
            rustix::mount::mount_bind_recursive(&self.dir, &self.dir)?;
            rustix::process::chdir(&self.dir)?;
            rustix::process::pivot_root(c".", c".")?;
            rustix::mount::unmount(c".", UnmountFlags::DETACH)?;
            rustix::process::chdir(c"/")?;
        }
        for (resource, value) in &self.limits {
            let limit = Rlimit { current: Some(*value), maximum: Some(*value) };
            rustix::process::setrlimit(*resource, limit)?;
        }
        if self.drops_privileges {
            for capability in CapabilitySet::all().iter() {
                // Those that this kernel does not know are refused.
                _ = rustix::thread::remove_capability_from_bounding_set(capability);
            }
            let none = CapabilitySet::empty();
            let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
            rustix::thread::set_capabilities(None, sets)?;
            rustix::thread::set_no_new_privs(true)?;
            if let Some(ruleset) = &self.landlock {
                restrict(ruleset.as_fd())?;
            }
        }
        Ok(())
    }
}

/// The process that the warden ends when it is told to.
static INIT: AtomicI32 = AtomicI32::new(0);

/// Waits for the end of the program, and ends like it.
fn be_warden(init: Pid, status: &OwnedFd, life: &OwnedFd) -> ! {
    INIT.store(init.as_raw_nonzero().get(), Ordering::Relaxed);
    on_terminate(end_init);
    // What the owner has open must not stay open here: it waits for the ends of its pipes.
    keep_only([status.as_raw_fd(), life.as_raw_fd()]);
    let mut told = [0; 4];
    let told = match retry(|| rustix::io::read(status, &mut told)) {
        Ok(4) => i32::from_ne_bytes(told),
        // The init was killed, and the program with it.
        _ => libc::SIGKILL,
    };
    // Its number is another's once it is reaped.
    ignore_terminate();
    _ = retry(|| rustix::process::waitpid(Some(init), WaitOptions::empty()));
    if libc::WIFSIGNALED(told) {
        end_by(libc::WTERMSIG(told));
    }
    end(libc::WEXITSTATUS(told));
}

/// Reaps whatever ends in the namespace, until the program has; then tells how it ended and ends the rest.
fn be_init(program: Pid, tell: &OwnedFd) -> ! {
    keep_only([tell.as_raw_fd(), tell.as_raw_fd()]);
    loop {
        match retry(|| rustix::process::wait(WaitOptions::empty())) {
            Ok(Some((pid, status))) if pid == program => {
                _ = rustix::io::write(tell, &status.as_raw().to_ne_bytes());
                end(0);
            }
            Ok(_) => {}
            Err(_) => end(0),
        }
    }
}

/// Runs in the warden when it is told to end: the program's end ends it.
extern "C" fn end_init(_signal: libc::c_int) {
    if let Some(init) = Pid::from_raw(INIT.load(Ordering::Relaxed)) {
        _ = rustix::process::kill_process(init, Signal::KILL);
    }
}

fn is_closed(pipe: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(pipe, PollFlags::empty())];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().contains(PollFlags::HUP)
}

fn write(path: &std::ffi::CStr, text: &[u8]) -> io::Result<()> {
    let flags = rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, rustix::fs::Mode::empty())?;
    rustix::io::write(file, text)?;
    Ok(())
}

fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            result => return result,
        }
    }
}

/// The child's number in the parent, none in the child.
#[expect(unsafe_code, reason = "rustix has no fork")]
pub(crate) fn fork() -> io::Result<Option<Pid>> {
    // SAFETY: this process has one thread; both sides make system calls only.
    match unsafe { libc::fork() } {
        0 => Ok(None),
        pid @ 1.. => Ok(Pid::from_raw(pid)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A copy of a program that handles signals has its handlers, which must not run in the copy.
#[expect(unsafe_code, reason = "signal dispositions")]
fn default_signals() {
    for signal in 1..=64 {
        // SAFETY: sets a disposition; those that cannot be set are refused.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

#[expect(unsafe_code, reason = "a signal handler")]
fn on_terminate(handler: extern "C" fn(libc::c_int)) {
    // SAFETY: the handler makes one system call and reads one atomic number.
    unsafe { libc::signal(libc::SIGTERM, handler as libc::sighandler_t) };
}

#[expect(unsafe_code, reason = "a signal disposition")]
fn ignore_terminate() {
    // SAFETY: sets a disposition.
    unsafe { libc::signal(libc::SIGTERM, libc::SIG_IGN) };
}

pub(crate) fn keep_only(mut kept: [i32; 2]) {
    kept.sort_unstable();
    let mut first = 0_u32;
    for fd in kept {
        let fd = fd.unsigned_abs();
        if fd > first {
            close_range(first, fd - 1);
        }
        first = fd + 1;
    }
    close_range(first, u32::MAX);
}

#[expect(unsafe_code, reason = "descriptors of a process that will never use them")]
fn close_range(first: u32, last: u32) {
    // SAFETY: a system call on numbers that this process does not use any more.
    if unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } == 0 {
        return;
    }
    // A kernel before 5.9, or a filter that does not know the call.
    let most = rustix::process::getrlimit(Resource::Nofile).current.and_then(|most| u32::try_from(most).ok());
    for number in first..=last.min(most.unwrap_or(FILES_MAX).min(FILES_MAX)) {
        // SAFETY: as above; one that is not open is refused.
        unsafe { libc::close(number.cast_signed()) };
    }
}

/// Descriptors that are closed one by one where the kernel cannot do it at once.
const FILES_MAX: u32 = 65_536;

#[expect(unsafe_code, reason = "a Landlock ruleset that was made before the fork")]
fn restrict(ruleset: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: a system call on a descriptor.
    match unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0_u32) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn end_by(signal: i32) -> ! {
    // No core file of a process that only waited.
    _ = rustix::process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
    default_signals();
    #[expect(unsafe_code, reason = "a signal by its number")]
    // SAFETY: signals this process itself.
    unsafe {
        libc::kill(libc::getpid(), signal);
    }
    end(128 + signal);
}

#[expect(unsafe_code, reason = "the end of a copy of a program, without running anything that belongs to it")]
fn end(code: i32) -> ! {
    // SAFETY: ends this process.
    unsafe { libc::_exit(code) }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::process::Stdio;

    use super::*;
    use crate::Spawn;

    fn all() -> UnshareFlags {
        UnshareFlags::NEWUSER
            | UnshareFlags::NEWNS
            | UnshareFlags::NEWNET
            | UnshareFlags::NEWIPC
            | UnshareFlags::NEWUTS
    }

    fn shell(script: &str) -> Spawn {
        let dir = std::env::temp_dir();
        let mut jail = Jail::new(&dir);
        jail.namespaces(all()).drop_privileges().landlock().limit(Resource::Nofile, 64);
        let mut spawn = Spawn::new("/bin/sh", &dir);
        spawn.args(["-c", script]).stdout(Stdio::piped()).jail(jail);
        spawn
    }

    #[test]
    fn the_child_ends_as_its_program_ends() {
        // Landlock shows a shell nothing outside of the jail, not even itself: so these have none.
        for (script, expected) in [("exit 7", "exit status: 7"), ("kill -SEGV $$", "signal: 11 (SIGSEGV)")] {
            let mut spawn = Spawn::new("/bin/sh", Path::new("/"));
            spawn.args(["-c", script]);
            let mut jail = Jail::new(Path::new("/tmp"));
            jail.namespaces(all()).drop_privileges();
            spawn.jail(jail);
            let status = spawn.spawn().expect("started").wait().expect("reaped");
            assert_eq!(status.to_string(), expected);
        }
    }

    #[test]
    fn a_program_outside_of_the_jail_is_not_run() {
        if !has_landlock() {
            return;
        }
        let error = shell("exit 0").spawn().expect_err("refused");
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn what_was_asked_for_is_there() {
        let script = "echo $$; ulimit -n; grep -E '^(CapEff|CapBnd|NoNewPrivs)' /proc/self/status; \
                      readlink /proc/self/ns/net /proc/self/ns/user /proc/self/ns/uts";
        let mut spawn = Spawn::new("/bin/sh", Path::new("/"));
        spawn.args(["-c", script]).stdout(Stdio::piped());
        let mut jail = Jail::new(Path::new("/tmp"));
        jail.namespaces(all()).drop_privileges().limit(Resource::Nofile, 64);
        spawn.jail(jail);
        let mut child = spawn.spawn().expect("started");
        let mut text = String::new();
        child.take_stdout().expect("piped").read_to_string(&mut text).expect("read");
        assert!(child.wait().expect("reaped").success());
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[..2], ["2", "64"], "the init has number 1");
        assert!(lines[2].ends_with("0000000000000000") && lines[3].ends_with("0000000000000000"), "{text}");
        assert!(lines[4].ends_with('1'), "{text}");
        for (line, name) in lines[5..].iter().zip(["net", "user", "uts"]) {
            let own = fs_err::read_link(format!("/proc/self/ns/{name}")).expect("read");
            assert_ne!(Path::new(line), own);
        }
    }

    #[test]
    fn the_program_is_gone_when_its_child_is() {
        let mut spawn = Spawn::new("/bin/sleep", Path::new("/"));
        spawn.arg("1000");
        spawn.jail(Jail::new(Path::new("/tmp")));
        let mut child = spawn.spawn().expect("started");
        let program = child.program().expect("it runs");
        assert_ne!(program, child.id());
        assert!(Path::new(&format!("/proc/{program}")).exists());
        child.kill().expect("told");
        assert_eq!(child.wait().expect("reaped").to_string(), "signal: 9 (SIGKILL)");
        assert!(!Path::new(&format!("/proc/{program}")).exists());
    }

    #[test]
    fn the_program_dies_with_its_warden() {
        let mut spawn = Spawn::new("/bin/sh", Path::new("/"));
        spawn.args(["-c", "trap '' TERM; sleep 1000 & wait"]).stdout(Stdio::piped());
        spawn.jail(Jail::new(Path::new("/tmp")));
        let mut child = spawn.spawn().expect("started");
        child.signal(Signal::KILL).expect("killed");
        child.wait().expect("reaped");
        // The pipe ends when the last process that has it open is gone.
        let mut rest = Vec::new();
        child.take_stdout().expect("piped").read_to_end(&mut rest).expect("read");
    }

    #[test]
    fn a_missing_program_is_an_error_of_spawn() {
        let mut spawn = Spawn::new("/nonexistent/program", Path::new("/"));
        spawn.jail(Jail::new(Path::new("/tmp")));
        assert_eq!(spawn.spawn().expect_err("no such program").kind(), io::ErrorKind::NotFound);
    }
}
