//! The place in which a Firecracker runs: a directory that is its root, with the files of its machine shown in it.
//!
//! With privilege, Firecracker's own jailer finishes the confinement: a user of its own, a control group. Without, the
//! namespaces of a user namespace take its place. Both begin in a jail of [`pyro_process::Jail`], so that both die with
//! their owner, and both show the same files under the same names: a snapshot that was taken in one place can be
//! restored in any other.

use std::io;
use std::os::unix::fs::{PermissionsExt, lchown};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pyro_process::{Bind, Jail, Namespaces, Resource, Spawn};
use rustix::fs::{CWD, FileType, Mode};

use super::{Confine, FirecrackerConfig};
use crate::confinement::{CGROUP_PARENT, CGROUPS, Element, FILES_MAX};
use crate::spec::{MachineSpec, Snapshot};

/// The names of a machine's files in its root.
pub(super) const KERNEL: &str = "vmlinux";
pub(super) const INITRAMFS: &str = "initramfs";
pub(super) const ROOTFS: &str = "rootfs";
pub(super) const OVERLAY: &str = "overlay";
pub(super) const API: &str = "api.sock";
pub(super) const VSOCK: &str = "vsock.sock";
pub(super) const LOG: &str = "log";
pub(super) const STATE: &str = "state";
pub(super) const MEMORY: &str = "memory";

/// Below a machine's directory.
const JAIL: &str = "jail";
/// The user of a machine is this and what its name comes to: far above what hosts give to people and containers.
const FIRST_USER: u32 = 2_000_000_000;
const USERS: u32 = 100_000_000;
/// Memory that the VMM itself may take beside the guest's, in MiB.
const VMM_MIB: u64 = 128;
/// The period over which processor time is given out, in microseconds; the VMM's own threads get a fifth of one.
const PERIOD: u32 = 100_000;
/// How long a killed VMM may take to be gone, and the pause before it is looked for again.
const DYING_MAX: Duration = Duration::from_secs(5);
const BEAT: Duration = Duration::from_millis(10);

/// A place that is ready. Dropping it removes it.
#[derive(Debug)]
pub(super) struct Place {
    base: PathBuf,
    root: PathBuf,
    cgroup: Option<PathBuf>,
}

impl Place {
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // What stays is in the machine's directory, and goes with it.
        fs_err::remove_dir_all(&self.base).ok();
        if let Some(cgroup) = &self.cgroup {
            fs_err::remove_dir(cgroup).ok();
        }
    }
}

/// A process that is about to be started, and what it must be found to be confined by.
#[derive(Debug)]
pub(super) struct Jailed {
    pub(super) spawn: Spawn,
    pub(super) place: Place,
    pub(super) expected: Vec<Element>,
    pub(super) landlock: bool,
}

/// Makes the place.
pub(super) fn make(
    config: &FirecrackerConfig,
    spec: &MachineSpec,
    from: Option<&Snapshot>,
) -> io::Result<Jailed> {
    // What an earlier start has left behind; its process is dead, as the directory's lock is ours.
    forget_soon(&spec.dir)?;
    let base = spec.dir.join(JAIL);
    let root = match &config.confine {
        Confine::Jailer(_) => {
            let program = config.binary.file_name().unwrap_or_default();
            base.join(program).join(id(&spec.dir)).join("root")
        }
        Confine::Namespaces => base.join("root"),
    };
    // Where the machine's directory is gone meanwhile, it is not made again.
    fs_err::create_dir(&base)?;
    fs_err::create_dir_all(&root)?;
    let place = Place { base, root, cgroup: None };
    let mut jail = Jail::new(&place.root);
    if spec.savable && from.is_none() {
        for file in make_saved(spec)? {
            if let Confine::Jailer(_) = config.confine {
                give_to(user(&id(&spec.dir)), &file)?;
            }
        }
    }
    show_files(&mut jail, spec, from);
    make_fifo(&place.path(LOG))?;
    let jailed = match &config.confine {
        Confine::Jailer(jailer) => with_jailer(config, jailer, spec, place, jail)?,
        Confine::Namespaces => in_namespaces(config, spec, place, jail),
    };
    Ok(jailed)
}

fn show_files(jail: &mut Jail, spec: &MachineSpec, from: Option<&Snapshot>) {
    let mut show = |source: &Path, name: &str, bind| {
        jail.bind(&spec.dir.join(source), Path::new(name), bind);
    };
    show(&spec.rootfs, ROOTFS, Bind::Read);
    show(&spec.overlay, OVERLAY, Bind::Write);
    match from {
        Some(snapshot) => {
            show(&snapshot.state, STATE, Bind::Read);
            show(&snapshot.memory, MEMORY, Bind::Read);
        }
        None => {
            show(&spec.kernel, KERNEL, Bind::Read);
            show(&spec.initramfs, INITRAMFS, Bind::Read);
            if spec.savable {
                show(Path::new(STATE), STATE, Bind::Write);
                show(Path::new(MEMORY), MEMORY, Bind::Write);
            }
        }
    }
}

/// The files that a machine is saved to: pyro's own, outside of the directory that its VMM owns and may turn elsewhere.
fn make_saved(spec: &MachineSpec) -> io::Result<[PathBuf; 2]> {
    let files = [STATE, MEMORY].map(|name| spec.dir.join(name));
    for file in &files {
        match fs_err::remove_file(file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => drop(fs_err::File::create_new(file)?),
        }
    }
    Ok(files)
}

/// Elements that both ways have.
const ALWAYS: &[Element] = &[
    Element::IpcNamespace,
    Element::Limits,
    Element::MountNamespace,
    Element::NetworkNamespace,
    Element::NoCapabilities,
    Element::NoNewPrivileges,
    Element::PidNamespace,
    Element::Root,
    Element::Seccomp,
    Element::UtsNamespace,
];

/// The namespaces that are made, but for one that is left out to see whether it is missed.
fn namespaces(config: &FirecrackerConfig) -> Namespaces {
    let all = [
        (Element::MountNamespace, Namespaces::NEWNS),
        (Element::NetworkNamespace, Namespaces::NEWNET),
        (Element::IpcNamespace, Namespaces::NEWIPC),
        (Element::UtsNamespace, Namespaces::NEWUTS),
    ];
    let made = all.into_iter().filter(|(element, _)| config.gives(*element));
    made.fold(Namespaces::empty(), |all, (_, namespace)| all | namespace)
}

/// Firecracker's arguments, with paths as its root has them.
fn arguments(config: &FirecrackerConfig) -> Vec<&'static str> {
    let mut words = vec!["--api-sock", API, "--log-path", LOG, "--level", "Warn"];
    words.extend((!config.gives(Element::Seccomp)).then_some("--no-seccomp"));
    words
}

fn in_namespaces(config: &FirecrackerConfig, spec: &MachineSpec, place: Place, mut jail: Jail) -> Jailed {
    let landlock = pyro_process::has_landlock();
    jail.bind(&config.binary, Path::new("firecracker"), Bind::Read);
    jail.bind(Path::new("/dev/kvm"), Path::new("dev/kvm"), Bind::Write);
    jail.bind(Path::new("/dev/urandom"), Path::new("dev/urandom"), Bind::Read);
    jail.namespaces(Namespaces::NEWUSER | namespaces(config)).become_root();
    if config.gives(Element::NoCapabilities) {
        jail.drop_privileges();
    }
    if landlock {
        jail.landlock();
    }
    if config.gives(Element::Limits) {
        jail.limit(Resource::Nofile, FILES_MAX).limit(Resource::Core, 0);
    }
    let mut spawn = Spawn::new("/firecracker", &spec.dir);
    spawn.args(["--id", &id(&spec.dir)]).args(arguments(config)).jail(jail);
    let expected = ALWAYS.iter().copied().chain([Element::UserNamespace]).collect();
    Jailed { spawn, place, expected, landlock }
}

fn with_jailer(
    config: &FirecrackerConfig,
    jailer: &Path,
    spec: &MachineSpec,
    mut place: Place,
    mut jail: Jail,
) -> io::Result<Jailed> {
    let id = id(&spec.dir);
    let user = if config.gives(Element::OwnUser) { user(&id) } else { 0 };
    give_to(user, &place.path(LOG))?;
    give_to(user, &place.root)?;
    give_to(user, &spec.dir.join(&spec.overlay))?;
    jail.namespaces(namespaces(config));
    let mut spawn = Spawn::new(jailer, &spec.dir);
    spawn.args(["--id", &id, "--uid", &user.to_string(), "--gid", &user.to_string()]);
    spawn.arg("--exec-file").arg(&config.binary).arg("--chroot-base-dir").arg(&place.base);
    if config.gives(Element::Limits) {
        spawn.args(["--resource-limit", &format!("no-file={FILES_MAX}")]);
        jail.limit(Resource::Core, 0);
    }
    let mut expected: Vec<Element> = ALWAYS.iter().copied().chain([Element::OwnUser]).collect();
    if has_cgroups() {
        expected.push(Element::Cgroup);
    }
    if has_cgroups() && config.gives(Element::Cgroup) {
        spawn.args(["--cgroup-version", "2", "--parent-cgroup", CGROUP_PARENT]);
        let memory = (u64::from(spec.memory_mib) + VMM_MIB) << 20;
        let time = u32::from(spec.vcpus) * PERIOD + PERIOD / 5;
        for limit in [
            format!("memory.max={memory}"),
            format!("pids.max={}", 32 + u32::from(spec.vcpus)),
            format!("cpu.max={time} {PERIOD}"),
        ] {
            spawn.args(["--cgroup", &limit]);
        }
        place.cgroup = Some(Path::new(CGROUPS).join(CGROUP_PARENT).join(&id));
    }
    spawn.arg("--").args(arguments(config)).jail(jail);
    Ok(Jailed { spawn, place, expected, landlock: false })
}

/// Whether control groups of the second version can be given out here.
fn has_cgroups() -> bool {
    let controllers = fs_err::read_to_string(format!("{CGROUPS}/cgroup.controllers")).unwrap_or_default();
    let has = |name| controllers.split_ascii_whitespace().any(|controller| controller == name);
    ["memory", "pids", "cpu"].into_iter().all(has)
}

/// Removes what a dead VMM may have left of its confinement: its jail, and its control group, which is outside of the
/// machine's directory.
///
/// # Errors
/// When something is there and cannot be removed, as while the VMM is still dying.
pub fn forget(dir: &Path) -> io::Result<()> {
    let gone = |result: io::Result<()>| match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    };
    gone(fs_err::remove_dir(Path::new(CGROUPS).join(CGROUP_PARENT).join(id(dir))))?;
    gone(fs_err::remove_dir_all(dir.join(JAIL)))
}

/// As [`forget`], and waits for a VMM whose owner has just been killed: a control group has no event for its last
/// process that could be waited for without it.
fn forget_soon(dir: &Path) -> io::Result<()> {
    let deadline = Instant::now() + DYING_MAX;
    loop {
        match forget(dir) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                std::thread::sleep(BEAT);
            }
            done => return done,
        }
    }
}

/// What the jailer takes for a name: that of the directory, or what of it is allowed.
fn id(dir: &Path) -> String {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let allowed: String = name.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').take(64).collect();
    if allowed.is_empty() { "machine".to_owned() } else { allowed }
}

/// The user and the group of a machine, by its name: two that live at once do not have the same, but for a chance of
/// one in a hundred million.
fn user(id: &str) -> u32 {
    let hash = id.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    FIRST_USER + u32::try_from(hash % u64::from(USERS)).unwrap_or(0)
}

fn give_to(user: u32, path: &Path) -> io::Result<()> {
    lchown(path, Some(user), Some(user))
}

fn make_fifo(path: &Path) -> io::Result<()> {
    rustix::fs::mknodat(CWD, path, FileType::Fifo, Mode::from_raw_mode(0o600), 0)?;
    Ok(())
}

/// Lets every user read a file of ours, where its directory does not hide it.
pub(super) fn make_readable(path: &Path) -> io::Result<()> {
    let mode = fs_err::metadata(path)?.permissions().mode();
    if mode & 0o004 != 0 {
        return Ok(());
    }
    fs_err::set_permissions(path, std::fs::Permissions::from_mode(mode | 0o444))
}
