//! What keeps a VMM apart from the host. A driver declares what its VMM needs ([`Needs`]); the jail that holds just that
//! is made here, in the same way for every VMM, and so is the list of what it must be found to be confined by.

mod cgroup;
mod observed;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use pyro_process::{Bind, Jail, Namespaces, Resource};
use rustix::fs::{CWD, FileType, Mode};

use self::cgroup::{Group, Limits};
pub use self::cgroup::{control_group_of, remove_control_group};
pub(crate) use self::observed::{CORE_MAX, FILES_MAX};
pub use self::observed::{Confinement, Element};
use crate::LaunchError;
use crate::spec::{MachineSpec, Nic, Tap};

/// Below a machine's directory: where the jail's root is mounted, in the VMM's own mount namespace.
const JAIL: &str = "jail";
/// Where taps come from.
pub(crate) const TUN: &str = "/dev/net/tun";
/// Below [`JAIL`]: the directory that a VMM may write to, where it needs one.
const RUN: &str = "run";
/// The user of a machine is this and what its name comes to: far above what hosts give to people and containers.
const FIRST_USER: u32 = 2_000_000_000;
const USERS: u32 = 100_000_000;
/// What a VMM may write to a file beyond the length that its files have, in bytes: the state of the devices.
const FILE_SLACK: u64 = 64 << 20;

/// Whether a VMM is kept apart from the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Confine {
    /// In a jail: as root with a user of its own, else in a user namespace.
    Jail {
        /// An element that is left out, for tests of whether a launch misses it. It always does.
        #[doc(hidden)]
        omitted: Option<Element>,
    },
    /// Not at all: it runs as the calling user, with nothing around it. For hosts that refuse what a jail needs, and
    /// only where the user has asked for it.
    Nothing,
}

impl Confine {
    /// A jail with nothing left out.
    pub const JAIL: Self = Self::Jail { omitted: None };

    pub(crate) fn gives(&self, element: Element) -> bool {
        matches!(self, Self::Jail { omitted } if *omitted != Some(element))
    }

    /// What a VMM of this process must be found to be confined by: one list for every VMM.
    pub fn required(&self) -> Vec<Element> {
        if !self.jails() {
            return Vec::new();
        }
        let user = if as_root() { Element::OwnUser } else { Element::UserNamespace };
        let group = cgroup::home().map(|_| Element::Cgroup);
        ALWAYS.into_iter().chain([user]).chain(group).collect()
    }

    fn jails(&self) -> bool {
        matches!(self, Self::Jail { .. })
    }
}

/// What a VMM needs of the host, and nothing else.
#[derive(Debug)]
pub(crate) struct Needs<'a> {
    /// The machine's own directory, whose name is that of the machine.
    pub(crate) dir: &'a Path,
    /// Programs and what they are run with, which may be anybody's: only read, each at a path of its own below the root.
    pub(crate) programs: Vec<(PathBuf, PathBuf)>,
    /// Files of pyro's own that are shown in the same way.
    pub(crate) files: Vec<(PathBuf, PathBuf, Bind)>,
    /// Devices, under their own paths.
    pub(crate) devices: Vec<&'static str>,
    /// The network namespace that it enters in place of an empty one.
    pub(crate) network: Option<Network>,
    /// Whether it makes files that the host uses: sockets. They are below `/run`.
    pub(crate) makes_files: bool,
    /// Guest memory.
    pub(crate) memory_mib: u32,
    /// Virtual processors.
    pub(crate) vcpus: u8,
}

/// A network namespace with a tap in it, and the user namespace that it belongs to where that is not the host's.
#[derive(Debug)]
pub(crate) struct Network {
    net: OwnedFd,
    user: Option<OwnedFd>,
}

impl Network {
    /// That of a machine, where its VMM takes the tap by name.
    ///
    /// # Errors
    /// When there are no more descriptors.
    pub(crate) fn of(spec: &MachineSpec) -> io::Result<Option<Self>> {
        let Some(Nic { tap: Tap::Name { net, user, .. }, .. }) = &spec.nic else { return Ok(None) };
        let user = user.as_ref().map(|user| user.try_clone()).transpose()?;
        Ok(Some(Self { net: net.try_clone()?, user }))
    }

    /// Has a jail enter it; the kinds of namespace that it has no need to make then.
    pub(crate) fn join(self, jail: &mut Jail) -> Namespaces {
        let mut joined = Namespaces::NEWNET;
        if let Some(user) = self.user {
            joined |= Namespaces::NEWUSER;
            jail.join(user, Namespaces::NEWUSER);
        }
        jail.join(self.net, Namespaces::NEWNET);
        joined
    }
}

/// What a VMM must be found to be confined by.
#[derive(Debug)]
pub(crate) struct Expected {
    elements: Vec<Element>,
    landlock: bool,
}

/// What a jail has on the host. Dropping it removes it.
#[derive(Debug)]
pub(crate) struct Place {
    base: PathBuf,
    group: Option<Group>,
}

impl Place {
    /// The place itself.
    pub(crate) fn base(&self) -> &Path {
        &self.base
    }

    /// Where the host finds a file below the VMM's `run`.
    pub(crate) fn of(&self, path: &str) -> PathBuf {
        self.base.join(path)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // What stays is in the machine's directory, and goes with it.
        fs_err::remove_dir_all(&self.base).ok();
        drop(self.group.take());
    }
}

/// The elements that every VMM has.
const ALWAYS: [Element; 10] = [
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

impl Expected {
    pub(crate) fn of(confine: &Confine) -> Self {
        let landlock = confine.jails() && pyro_process::has_landlock();
        Self { elements: confine.required(), landlock }
    }

    /// Looks at a VMM that runs.
    ///
    /// # Errors
    /// When it lacks an element; the VMM must then be ended.
    pub(crate) fn observe(&self, pid: u32) -> Result<Confinement, LaunchError> {
        let unconfined = self.elements.is_empty();
        let found = Confinement::observed(pid).with_landlock(self.landlock).with_unconfined(unconfined);
        match found.lacks(&self.elements) {
            None => Ok(found),
            Some(missing) => Err(LaunchError::Unconfined { missing }),
        }
    }
}

/// Makes the jail of a VMM.
///
/// # Errors
/// When the machine's directory cannot be written, or the host refuses a control group.
pub(crate) fn jail(confine: &Confine, needs: Needs<'_>) -> io::Result<(Jail, Place)> {
    // An earlier start has left it, if it is there: its process is dead, as the directory's lock is ours.
    forget_soon(needs.dir)?;
    let base = needs.dir.join(JAIL);
    // A machine's directory that is gone is not made again.
    fs_err::create_dir(&base)?;
    let mut place = Place { base, group: None };
    let root = place.base.join("root");
    fs_err::create_dir(&root)?;
    let mut jail = Jail::new(&root);
    jail.empty_root();
    let user = as_root().then(|| if confine.gives(Element::OwnUser) { user(needs.dir) } else { 0 });
    for (source, target) in &needs.programs {
        if user.is_some() {
            check_readable(source)?;
        }
        jail.bind(source, target, Bind::Read);
    }
    for (source, target, bind) in &needs.files {
        if let Some(user) = user {
            let source = needs.dir.join(source);
            match bind {
                Bind::Read => make_readable(&source)?,
                Bind::Write => lchown(&source, Some(user), Some(user))?,
            }
        }
        jail.bind(&needs.dir.join(source), target, *bind);
    }
    let mut groups = Vec::new();
    for device in &needs.devices {
        let device = Path::new(device);
        let mut source = device.to_owned();
        if let Some(user) = user {
            match own_device(device, &place.base, user)? {
                Some(own) => source = own,
                None => groups.extend(group_of_device(device)?),
            }
        }
        jail.bind(&source, device, Bind::Write);
    }
    if needs.makes_files {
        let run = place.base.join(RUN);
        fs_err::create_dir(&run)?;
        if let Some(user) = user {
            lchown(&run, Some(user), Some(user))?;
        }
        jail.bind(&run, Path::new(RUN), Bind::Write);
    }
    let mut made = namespaces(confine);
    match user {
        Some(user) => _ = jail.user(user, &groups),
        None => made |= Namespaces::NEWUSER,
    }
    if confine.gives(Element::NoCapabilities) {
        jail.drop_privileges().landlock();
    }
    if confine.gives(Element::Limits) {
        jail.limit(Resource::Nofile, FILES_MAX).limit(Resource::Core, CORE_MAX);
        jail.limit(Resource::Fsize, longest(&needs));
    }
    if confine.gives(Element::Cgroup)
        && let Some(group) = control_group_of(needs.dir)
    {
        let group = place.group.insert(Group::make(group, &Limits::of(needs.memory_mib, needs.vcpus))?);
        jail.control_group(group.path());
    }
    if let Some(network) = needs.network {
        made = made.difference(network.join(&mut jail));
    }
    jail.namespaces(made);
    Ok((jail, place))
}

/// Makes a jail with nothing in it. That there is no program in it to run shows that all else was granted.
pub(crate) fn probe(confine: &Confine, dir: &Path) -> Result<(), LaunchError> {
    const PROGRAM: &str = "/program";
    if *confine == Confine::Nothing {
        return Ok(());
    }
    let refused = |source| LaunchError::of_spawn(confine, PROGRAM.into(), source);
    let (programs, files, devices) = (Vec::new(), Vec::new(), Vec::new());
    let needs =
        Needs { dir, programs, files, devices, network: None, makes_files: false, memory_mib: 0, vcpus: 1 };
    let (jail, _place) = jail(confine, needs).map_err(refused)?;
    let mut spawn = pyro_process::Spawn::new(PROGRAM, dir);
    spawn.jail(jail);
    match spawn.spawn() {
        // Where the directory is gone, it was that which was not found.
        Err(error) if error.kind() == io::ErrorKind::NotFound && dir.is_dir() => Ok(()),
        Err(error) => Err(refused(error)),
        Ok(child) => {
            drop(child.kill());
            Err(refused(io::Error::other("a jail with nothing in it ran a program")))
        }
    }
}

/// What a VMM that is not confined needs in its place: its files under the names that the jail would show them by, so that
/// what it saves names the same files. Its working directory is [`Place::base`].
pub(crate) fn unconfined(needs: &Needs<'_>) -> io::Result<Place> {
    forget_soon(needs.dir)?;
    let base = needs.dir.join(JAIL);
    fs_err::create_dir(&base)?;
    let place = Place { base, group: None };
    let files = needs.files.iter().map(|(source, target, _)| (source, target));
    for (source, target) in files {
        let target = target.strip_prefix("/").unwrap_or(target);
        if target.components().count() == 1 {
            fs_err::os::unix::fs::symlink(needs.dir.join(source), place.base.join(target))?;
        }
    }
    fs_err::create_dir(place.base.join(RUN))?;
    Ok(place)
}

/// The namespaces that are made, but for one that is left out to see whether it is missed.
fn namespaces(confine: &Confine) -> Namespaces {
    let all = [
        (Element::MountNamespace, Namespaces::NEWNS),
        (Element::NetworkNamespace, Namespaces::NEWNET),
        (Element::IpcNamespace, Namespaces::NEWIPC),
        (Element::UtsNamespace, Namespaces::NEWUTS),
    ];
    let made = all.into_iter().filter(|(element, _)| confine.gives(*element));
    made.fold(Namespaces::empty(), |all, (_, namespace)| all | namespace)
}

/// The length that no file of a VMM's may pass, in bytes.
fn longest(needs: &Needs<'_>) -> u64 {
    let written = needs.files.iter().filter(|(_, _, bind)| *bind == Bind::Write);
    let lengths = written.filter_map(|(source, _, _)| fs_err::metadata(needs.dir.join(source)).ok());
    let memory = u64::from(needs.memory_mib) << 20;
    lengths.map(|file| file.len()).max().unwrap_or(0).max(memory) + FILE_SLACK
}

/// Whether this process is root and may be every user: not where it is root in a user namespace that knows few users.
fn as_root() -> bool {
    static AS_ROOT: OnceLock<bool> = OnceLock::new();
    let covers = |map: &str| {
        let map = fs_err::read_to_string(map).unwrap_or_default();
        // Lines of: first number inside, first outside, how many.
        map.lines().any(|line| {
            let numbers: Vec<u64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
            let [first, _, count] = numbers[..] else { return false };
            first <= u64::from(FIRST_USER) && first + count >= u64::from(FIRST_USER + USERS)
        })
    };
    *AS_ROOT.get_or_init(|| {
        rustix::process::geteuid().is_root() && covers("/proc/self/uid_map") && covers("/proc/self/gid_map")
    })
}

/// A device of the host that only root can use although it gives no power over the host, as the tap device where nothing
/// has opened it to all: made again below `base`, for this user alone. None where the device is another, or all can use it.
fn own_device(device: &Path, base: &Path, user: u32) -> io::Result<Option<PathBuf>> {
    let found = fs_err::metadata(device)?;
    if device != Path::new(TUN) || found.mode() & 0o006 == 0o006 {
        return Ok(None);
    }
    let own = base.join("tun");
    let mode = Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(CWD, &own, FileType::CharacterDevice, mode, found.rdev())?;
    lchown(&own, Some(user), Some(user))?;
    Ok(Some(own))
}

/// The group that may use a device, as whoever is neither its owner nor in that group; none where all users may.
fn group_of_device(device: &Path) -> io::Result<Option<u32>> {
    let metadata = fs_err::metadata(device)?;
    let may = |bits: u32| metadata.mode() & bits == bits;
    if may(0o006) {
        return Ok(None);
    }
    if may(0o060) {
        return Ok(Some(metadata.gid()));
    }
    let text = format!("{} can be used by its owner alone: chmod g+rw {0}", device.display());
    Err(io::Error::new(io::ErrorKind::PermissionDenied, text))
}

/// Removes what a dead VMM may have left of its confinement: its jail, and its control group, which is outside of the
/// machine's directory.
///
/// # Errors
/// When something is there and cannot be removed, as while the VMM is still dying.
pub fn forget(dir: &Path) -> io::Result<()> {
    if let Some(group) = control_group_of(dir) {
        remove_control_group(&group)?;
    }
    match fs_err::remove_dir_all(dir.join(JAIL)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// As [`forget`], and waits for a VMM whose owner has just been killed.
fn forget_soon(dir: &Path) -> io::Result<()> {
    if let Some(group) = control_group_of(dir) {
        cgroup::remove_soon(&group)?;
    }
    forget(dir)
}

/// What a machine is called outside of its directory: that directory's name, or what is allowed of it.
pub(crate) fn machine_name(dir: &Path) -> String {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let allowed: String = name.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').take(64).collect();
    if allowed.is_empty() { "machine".to_owned() } else { allowed }
}

/// The user and the group of a machine, by its name: two that live at once do not have the same, but for a chance of
/// one in a hundred million.
fn user(dir: &Path) -> u32 {
    let hash = machine_name(dir).bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    FIRST_USER + u32::try_from(hash % u64::from(USERS)).unwrap_or(0)
}

/// Makes an empty file in place of any that is there.
pub(crate) fn make_empty(path: &Path) -> io::Result<()> {
    match fs_err::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => fs_err::File::create_new(path).map(drop),
    }
}

/// Takes a file back that a VMM's user was given to write a saved machine to: nothing may change it from now on.
pub(crate) fn take_back(path: &Path) -> io::Result<()> {
    if as_root() {
        lchown(path, Some(0), Some(0))?;
    }
    fs_err::set_permissions(path, std::fs::Permissions::from_mode(0o444))
}

/// Refuses a program that only its owner can read: it is not pyro's to change.
fn check_readable(path: &Path) -> io::Result<()> {
    if fs_err::metadata(path)?.mode() & 0o004 != 0 {
        return Ok(());
    }
    let text = format!("{} can be read by its owner alone: chmod a+rX {0}", path.display());
    Err(io::Error::new(io::ErrorKind::PermissionDenied, text))
}

/// Lets every user read a file of ours, where its directory does not hide it.
fn make_readable(path: &Path) -> io::Result<()> {
    let mode = fs_err::metadata(path)?.permissions().mode();
    if mode & 0o004 != 0 {
        return Ok(());
    }
    fs_err::set_permissions(path, std::fs::Permissions::from_mode(mode | 0o444))
}
