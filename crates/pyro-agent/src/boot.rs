//! From the first instruction of init to a guest root that commands can run in.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change, mount_move};
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::UnshareFlags;

use crate::cgroup::GuestCgroup;
use crate::channel::Channel;
use crate::network;

/// Where the writable disk is mounted, in the agent's own namespace.
pub(crate) const DISK: &str = "/upper";
/// Where the guest's root is mounted, in the agent's own namespace.
pub(crate) const ROOT: &str = "/guest";

/// A booted guest.
#[derive(Debug)]
pub(crate) struct Guest {
    /// The mount namespace in which commands run.
    pub(crate) namespace: OwnedFd,
    /// Their control group namespace.
    pub(crate) cgroup_namespace: OwnedFd,
    /// The null device as it was at boot: a guest may do anything to its own.
    pub(crate) null: File,
    pub(crate) cgroup: GuestCgroup,
    /// How the host talks to the agent.
    pub(crate) channel: Channel,
    pub(crate) init_micros: u64,
    pub(crate) root_micros: u64,
}

/// What failed, and in which phase.
#[derive(Debug)]
pub(crate) struct BootError {
    pub(crate) phase: &'static str,
    pub(crate) cause: String,
}

/// Names the phase of an error.
trait Phase<T> {
    fn phase(self, phase: &'static str, what: &str) -> Result<T, BootError>;
}

impl<T, E: Into<io::Error>> Phase<T> for Result<T, E> {
    fn phase(self, phase: &'static str, what: &str) -> Result<T, BootError> {
        self.map_err(|error| BootError { phase, cause: format!("{what}: {}", error.into()) })
    }
}

pub(crate) fn boot() -> Result<Guest, BootError> {
    let init_micros = uptime_micros();
    for directory in ["/dev", "/proc", "/sys", "/base", "/cgroup", DISK, ROOT] {
        make_directory(directory).phase("init", directory)?;
    }
    // devtmpfs may be there already, where the kernel mounts it by itself.
    match attach("devtmpfs", "/dev", "devtmpfs", MountFlags::NOSUID, "mode=0755") {
        Ok(()) | Err(Errno::BUSY) => {}
        Err(error) => Err(error).phase("init", "/dev")?,
    }
    let hardened = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    attach("proc", "/proc", "proc", hardened, "").phase("init", "/proc")?;
    attach("sysfs", "/sys", "sysfs", hardened, "").phase("init", "/sys")?;
    let channel = Channel::announced().phase("init", "/proc/cmdline")?;
    load_modules("order")?;
    if matches!(channel, Channel::Vsock { .. }) {
        load_modules("order.vsock")?;
    }
    let has_nic = network::has_nic();
    if has_nic {
        load_modules("order.network")?;
    }
    mount_root(has_nic)?;
    let cgroup = GuestCgroup::new().phase("cgroup", "/cgroup")?;
    let (cgroup_namespace, namespace) =
        GuestCgroup::namespace(guest_namespace).phase("cgroup", "namespace")?;
    let namespace = namespace?;
    let null = File::options().read(true).write(true).open("/dev/null").phase("init", "/dev/null")?;
    network::raise(has_nic).phase("network", "eth0")?;
    raise_file_limit();
    let root_micros = uptime_micros();
    Ok(Guest { namespace, cgroup_namespace, null, cgroup, channel, init_micros, root_micros })
}

fn load_modules(list: &str) -> Result<(), BootError> {
    let list = format!("/modules/{list}");
    let order = File::open(&list).and_then(io::read_to_string).phase("modules", &list)?;
    for name in order.lines().filter(|line| !line.is_empty()) {
        let file = File::open(format!("/modules/{name}")).phase("modules", name)?;
        match rustix::system::finit_module(&file, c"", 0) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => Err(error).phase("modules", name)?,
        }
    }
    Ok(())
}

/// The read-only image below, the private disk above.
fn mount_root(has_nic: bool) -> Result<(), BootError> {
    // Which virtio disk comes first is the VMM's affair: the image is the one that mounts as EROFS.
    let mut disk = "/dev/vdb";
    if let Err(first) = attach("/dev/vda", "/base", "erofs", MountFlags::RDONLY, "") {
        disk = "/dev/vda";
        attach("/dev/vdb", "/base", "erofs", MountFlags::RDONLY, "")
            .map_err(|_second| first)
            .phase("root", "the read-only image")?;
    }
    // Without noinit_itable a kernel thread would write the inode tables of every fresh disk.
    attach(disk, DISK, "ext4", MountFlags::NOATIME, "noinit_itable").phase("root", "the writable disk")?;
    let is_new = rustix::fs::access(format!("{DISK}/upper"), rustix::fs::Access::EXISTS).is_err();
    for directory in ["upper", "work"] {
        make_directory(&format!("{DISK}/{directory}")).phase("root", directory)?;
    }
    if is_new {
        prepare_identity();
    }
    if has_nic {
        // Before the overlay, which finds it there; afterwards it is the guest's to change.
        network::name_the_resolver(&format!("{DISK}/upper/etc")).phase("network", "resolv.conf")?;
    }
    let layers = format!("lowerdir=/base,upperdir={DISK}/upper,workdir={DISK}/work");
    attach("overlay", ROOT, "overlay", MountFlags::NOATIME, &layers).phase("root", "the overlay")
}

/// Puts the files of the guest's identity into the upper layer of a new disk, as they are in the image: to copy them
/// up when the identity comes would take three times as long. Where this fails, that is what happens.
fn prepare_identity() {
    let upper = format!("{DISK}/upper/etc");
    if make_directory(&upper).is_err() {
        return;
    }
    for file in ["hostname", "machine-id", "hosts"] {
        // What the image has as anything but a plain file stays as it is.
        let source = format!("/base/etc/{file}");
        let Ok(found) = rustix::fs::lstat(&source) else { continue };
        if rustix::fs::FileType::from_raw_mode(found.st_mode).is_file() {
            // Read and written: a copy would take ways through the kernel that nothing else here takes.
            let mut options = File::options();
            options.write(true).create_new(true).mode(found.st_mode & 0o777);
            let copied = File::open(&source).and_then(io::read_to_string).and_then(|text| {
                let mut copy = options.open(format!("{upper}/{file}"))?;
                io::Write::write_all(&mut copy, text.as_bytes())
            });
            drop(copied);
        }
    }
}

/// Makes the namespace that commands run in: the guest's root is its root, not a chroot, so that a guest may
/// make namespaces of its own, and nothing of the agent can be seen from it.
fn guest_namespace() -> Result<OwnedFd, BootError> {
    let own = File::open("/proc/self/ns/mnt").phase("namespace", "/proc/self/ns/mnt")?;
    unshare_mounts().phase("namespace", "unshare")?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .phase("namespace", "private")?;
    let hardened = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    let mounts = [
        ("proc", "proc", "proc", hardened, ""),
        ("sysfs", "sys", "sysfs", hardened, ""),
        ("cgroup2", "sys/fs/cgroup", "cgroup2", hardened, ""),
        ("devtmpfs", "dev", "devtmpfs", MountFlags::NOSUID, "mode=0755"),
        (
            "devpts",
            "dev/pts",
            "devpts",
            MountFlags::NOSUID | MountFlags::NOEXEC,
            "gid=5,mode=620,ptmxmode=666",
        ),
        ("tmpfs", "dev/shm", "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, "mode=1777"),
        ("tmpfs", "run", "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, "mode=0755"),
    ];
    for (source, target, kind, flags, data) in mounts {
        let target = format!("{ROOT}/{target}");
        make_directory(&target).phase("namespace", &target)?;
        attach(source, &target, kind, flags, data).phase("namespace", &target)?;
    }
    make_directory(&format!("{ROOT}/workspace")).phase("namespace", "/workspace")?;
    make_directory(&format!("{ROOT}/tmp")).phase("namespace", "/tmp")?;
    for (link, target) in [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")]
    {
        match rustix::fs::symlink(target, format!("{ROOT}/dev/{link}")) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => Err(error).phase("namespace", link)?,
        }
    }
    rustix::process::chdir(ROOT).phase("namespace", "chdir")?;
    mount_move(".", "/").phase("namespace", "move")?;
    let guest = rustix::fs::openat(CWD, "/proc/self/ns/mnt", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .phase("namespace", "open")?;
    // Setting the namespace also sets the root and the working directory back to the initramfs.
    rustix::thread::move_into_link_name_space(
        std::os::fd::AsFd::as_fd(&own),
        Some(rustix::thread::LinkNameSpaceType::Mount),
    )
    .phase("namespace", "return")?;
    Ok(guest)
}

#[expect(unsafe_code, reason = "unshare of the file system attributes needs a single thread")]
fn unshare_mounts() -> rustix::io::Result<()> {
    // SAFETY: no other thread exists yet, so none can lose its file descriptors or its directory.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }
}

/// What a command may have open by default, as on other Linux systems; it may raise it itself.
pub(crate) const COMMAND_FILES: Rlimit = Rlimit { current: Some(1024), maximum: Some(MOST_FILES) };
const MOST_FILES: u64 = 1 << 20;

/// The agent holds several descriptors for each command.
fn raise_file_limit() {
    let limit = Rlimit { current: Some(MOST_FILES), maximum: Some(MOST_FILES) };
    // Without it, fewer commands run at the same time.
    _ = setrlimit(Resource::Nofile, limit);
}

fn attach(source: &str, target: &str, kind: &str, flags: MountFlags, data: &str) -> Result<(), Errno> {
    let data = CString::new(data).map_err(|_nul| Errno::INVAL)?;
    mount(source, target, kind, flags, Some::<&CStr>(&data))
}

fn make_directory(path: &str) -> io::Result<()> {
    match rustix::fs::mkdir(path, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn uptime_micros() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = Duration::from_secs(time.tv_sec.unsigned_abs());
    u64::try_from((seconds + Duration::from_nanos(time.tv_nsec.unsigned_abs())).as_micros())
        .unwrap_or(u64::MAX)
}
