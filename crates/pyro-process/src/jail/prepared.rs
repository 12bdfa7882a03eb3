//! What is done between the fork and the program: in the child, by system calls alone.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::{Resource, Rlimit, Signal};
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags};

use super::guards::{be_init, be_warden, default_signals, end, fork, is_closed};
use super::landlock::restrict;

/// A jail that needs no more memory.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(super) root: PreparedRoot,
    pub(super) namespaces: UnshareFlags,
    /// Namespaces that are entered, in this order.
    pub(super) joined: Vec<(OwnedFd, UnshareFlags)>,
    /// The maps of users and groups, where there is a user namespace.
    pub(super) maps: Option<[String; 2]>,
    pub(super) binds: Vec<PreparedBind>,
    /// The user, and its further groups.
    pub(super) user: Option<(u32, Vec<u32>)>,
    /// The file through which a process enters its control group.
    pub(super) control_group: Option<OwnedFd>,
    pub(super) drops_privileges: bool,
    pub(super) landlock: Option<OwnedFd>,
    pub(super) limits: Vec<(Resource, u64)>,
}

#[derive(Debug)]
pub(super) enum PreparedRoot {
    Host,
    Directory(CString),
    /// A file system in memory, and the directories in it.
    Empty {
        at: CString,
        dirs: Vec<CString>,
    },
}

#[derive(Debug)]
pub(super) struct PreparedBind {
    pub(super) source: CString,
    pub(super) target: CString,
    /// Whether an empty file must be made, over which the file is mounted.
    pub(super) makes_target: bool,
    /// The flags of its mount, where it may not be written.
    pub(super) read_only: Option<MountFlags>,
}

impl Prepared {
    /// Goes on as the program-to-be in the jail's process namespace; this process and its child stay behind as warden
    /// and init, and never return. The caller has one thread.
    pub(crate) fn enter(&self) -> io::Result<()> {
        default_signals();
        for (namespace, kind) in &self.joined {
            join(namespace, *kind)?;
        }
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
        if let Some(group) = &self.control_group {
            // Zero stands for the process that writes.
            rustix::io::write(group, b"0")?;
        }
        if self.namespaces.contains(UnshareFlags::NEWNS) {
            rustix::mount::mount_change(c"/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        }
        self.show_files()?;
        for (resource, value) in &self.limits {
            let limit = Rlimit { current: Some(*value), maximum: Some(*value) };
            rustix::process::setrlimit(*resource, limit)?;
        }
        if self.drops_privileges {
            for capability in CapabilitySet::all().iter() {
                // Those that this kernel does not know are refused.
                _ = rustix::thread::remove_capability_from_bounding_set(capability);
            }
        }
        if let Some((id, groups)) = &self.user {
            become_user(*id, groups)?;
        }
        if self.drops_privileges {
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

    fn show_files(&self) -> io::Result<()> {
        // The program may be another user, who must be able to pass through the directories.
        let umask = rustix::process::umask(Mode::from_raw_mode(0o022));
        let shown = self.mount_files();
        rustix::process::umask(umask);
        shown
    }

    fn mount_files(&self) -> io::Result<()> {
        if let PreparedRoot::Empty { at, dirs } = &self.root {
            let flags = MountFlags::NOSUID | MountFlags::NODEV;
            rustix::mount::mount(c"tmpfs", at, c"tmpfs", flags, c"size=64k,nr_inodes=4096,mode=755")?;
            for dir in dirs {
                rustix::fs::mkdirat(CWD, dir, Mode::from_raw_mode(0o755))?;
            }
        }
        for bind in &self.binds {
            if bind.makes_target {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                drop(rustix::fs::open(&bind.target, flags, Mode::from_raw_mode(0o444))?);
            }
            rustix::mount::mount_bind(&bind.source, &bind.target)?;
            if let Some(flags) = bind.read_only {
                rustix::mount::mount_remount(&bind.target, MountFlags::BIND | flags, c"")?;
            }
        }
        let root = match &self.root {
            PreparedRoot::Host => return Ok(()),
            PreparedRoot::Directory(dir) => {
                // The new root must be a mount.
                rustix::mount::mount_bind_recursive(dir, dir)?;
                dir
            }
            PreparedRoot::Empty { at, .. } => {
                let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
                rustix::mount::mount_remount(at, flags, c"")?;
                at
            }
        };
        rustix::process::chdir(root)?;
        rustix::process::pivot_root(c".", c".")?;
        rustix::mount::unmount(c".", UnmountFlags::DETACH)?;
        rustix::process::chdir(c"/")?;
        Ok(())
    }
}

#[expect(unsafe_code, reason = "rustix moves a thread, which in a process of one is the process")]
fn join(namespace: &OwnedFd, kind: UnshareFlags) -> io::Result<()> {
    use std::os::fd::AsRawFd;

    // SAFETY: a system call on a descriptor; this process has one thread, so nothing else of it is left behind.
    match unsafe { libc::setns(namespace.as_raw_fd(), kind.bits().cast_signed()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Becomes a user, its group and these further groups. As the last of its privileges go by this, whatever needs them
/// comes before.
#[expect(unsafe_code, reason = "the library's calls change the calling thread alone, or all by a signal")]
fn become_user(id: u32, groups: &[u32]) -> io::Result<()> {
    // SAFETY: the list is as long as it says; these are system calls of a process of one thread.
    let done = unsafe {
        libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) == 0
            && libc::syscall(libc::SYS_setresgid, id, id, id) == 0
            && libc::syscall(libc::SYS_setresuid, id, id, id) == 0
    };
    if done { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn write(path: &CStr, text: &[u8]) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty())?;
    rustix::io::write(file, text)?;
    Ok(())
}
