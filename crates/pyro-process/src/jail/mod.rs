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
//! All that runs between the fork and the program's execution makes system calls only: [`Jail::prepare`] does whatever
//! needs memory before.

mod guards;
mod landlock;
mod prepared;

use std::ffi::CString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::StatVfsMountFlags;
use rustix::mount::MountFlags;
use rustix::process::Resource;
use rustix::thread::UnshareFlags;

pub(crate) use self::guards::{default_signals, fork, keep_only};
pub use self::landlock::has_landlock;
pub(crate) use self::prepared::Prepared;
use self::prepared::{PreparedBind, PreparedRoot};

/// How a child is kept apart. An empty one keeps nothing apart but the process numbers.
#[derive(Debug)]
pub struct Jail {
    dir: PathBuf,
    root: Root,
    own_user: bool,
    namespaces: UnshareFlags,
    joined: Vec<(OwnedFd, UnshareFlags)>,
    binds: Vec<(PathBuf, PathBuf, Bind)>,
    user: Option<User>,
    control_group: Option<PathBuf>,
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

/// What the child's root directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Root {
    /// The host's.
    Host,
    /// The jail's directory, with whatever is in it.
    Directory,
    /// A file system in memory that holds the files which are shown and nothing else, and cannot be written.
    Empty,
}

/// A user of the host, with its own group and further groups.
#[derive(Debug)]
struct User {
    id: u32,
    groups: Vec<u32>,
}

impl Jail {
    /// A jail whose files are below `dir`, an existing directory.
    pub fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            root: Root::Host,
            own_user: false,
            namespaces: UnshareFlags::NEWPID,
            joined: Vec::new(),
            binds: Vec::new(),
            user: None,
            control_group: None,
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

    /// Enters an existing namespace, a descriptor of a file below `/proc/PID/ns`, instead of making one of this kind.
    /// A user namespace comes before the namespaces that belong to it.
    pub fn join(&mut self, namespace: OwnedFd, kind: UnshareFlags) -> &mut Self {
        self.joined.push((namespace, kind));
        self
    }

    /// Shows a file or a directory of the host at `target` below the child's root. It needs a mount namespace.
    pub fn bind(&mut self, source: &Path, target: &Path, bind: Bind) -> &mut Self {
        let target = target.strip_prefix("/").unwrap_or(target);
        self.binds.push((source.to_owned(), target.to_owned(), bind));
        self
    }

    /// Makes the jail's directory the child's root and working directory, so that it sees nothing else.
    pub fn become_root(&mut self) -> &mut Self {
        self.root = Root::Directory;
        self
    }

    /// Makes the child's root and working directory a file system in memory, mounted over the jail's directory in the
    /// child's mount namespace. It holds the bound files alone, nothing of it is on a disk, and it cannot be written.
    pub fn empty_root(&mut self) -> &mut Self {
        self.root = Root::Empty;
        self
    }

    /// Runs the program as this user and the group of the same number, with these further groups and no others. It
    /// needs privilege, and is no use in a user namespace, which knows only the owner's own.
    pub fn user(&mut self, id: u32, groups: &[u32]) -> &mut Self {
        self.user = Some(User { id, groups: groups.to_owned() });
        self
    }

    /// Moves the program into a control group of the second version: an existing directory.
    pub fn control_group(&mut self, group: &Path) -> &mut Self {
        self.control_group = Some(group.to_owned());
        self
    }

    /// Takes every capability away, and the way to new ones.
    pub fn drop_privileges(&mut self) -> &mut Self {
        self.drops_privileges = true;
        self
    }

    /// Confines access to files to those that are shown (and to the jail's directory, where that is the root), and takes
    /// away the network and signals to others, as far as this kernel's Landlock can. It takes effect together with
    /// [`Jail::drop_privileges`] only.
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
        let mounts = !self.binds.is_empty() || self.root != Root::Host;
        if mounts && !self.namespaces.contains(UnshareFlags::NEWNS) {
            // They would be the host's.
            let text = "a jail that shows files needs a mount namespace";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let root = match self.root {
            Root::Host => PreparedRoot::Host,
            Root::Directory => PreparedRoot::Directory(c_string(&self.dir)?),
            Root::Empty => PreparedRoot::Empty { at: c_string(&self.dir)?, dirs: self.directories()? },
        };
        let mut binds = Vec::new();
        for (source, target, bind) in &self.binds {
            let target = self.dir.join(target);
            if self.root != Root::Empty {
                if let Some(parent) = target.parent() {
                    fs_err::create_dir_all(parent)?;
                }
                fs_err::OpenOptions::new().write(true).create(true).truncate(false).open(&target)?;
            }
            binds.push(PreparedBind {
                source: c_string(source)?,
                target: c_string(&target)?,
                makes_target: self.root == Root::Empty && !source.is_dir(),
                read_only: match bind {
                    Bind::Read => Some(kept_flags(source)?),
                    Bind::Write => None,
                },
            });
        }
        let landlock = if self.landlock { self.ruleset()? } else { None };
        let group = self.control_group.map(|group| {
            fs_err::OpenOptions::new()
                .write(true)
                .open(group.join("cgroup.procs"))
                .map(fs_err::File::into_file)
        });
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Ok(Prepared {
            root,
            namespaces: self.namespaces,
            joined: self.joined,
            maps: self.own_user.then(|| [format!("{uid} {uid} 1"), format!("{gid} {gid} 1")]),
            binds,
            user: self.user.map(|user| (user.id, user.groups)),
            control_group: group.transpose()?.map(Into::into),
            drops_privileges: self.drops_privileges,
            landlock,
            limits: self.limits,
        })
    }

    /// The directories that hold the shown files, each after the one that it is in.
    fn directories(&self) -> io::Result<Vec<CString>> {
        let mut dirs = std::collections::BTreeSet::new();
        for (_, target, _) in &self.binds {
            dirs.extend(target.ancestors().skip(1).filter(|dir| !dir.as_os_str().is_empty()));
        }
        let shown = self.binds.iter().filter(|(source, _, _)| source.is_dir());
        dirs.extend(shown.map(|(_, target, _)| target.as_path()));
        dirs.into_iter().map(|dir| c_string(&self.dir.join(dir))).collect()
    }

    fn ruleset(&self) -> io::Result<Option<OwnedFd>> {
        let root = (self.root != Root::Empty).then_some(self.dir.as_path());
        let files = self.binds.iter().map(|(source, _, bind)| (source.as_path(), *bind));
        landlock::ruleset(root, files)
    }
}

/// The flags that a read-only view of a file's mount has to keep: a user namespace may not drop them.
fn kept_flags(source: &Path) -> io::Result<MountFlags> {
    let flags = rustix::fs::statvfs(source)
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", source.display())))?
        .f_flag;
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

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::process::Stdio;

    use rustix::process::Signal;

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

    /// What `script` prints in a root that holds busybox and one file that may be written.
    fn in_empty_root(script: &str, adjust: impl FnOnce(&mut Jail)) -> String {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("disk");
        fs_err::write(&file, "before").expect("written");
        fs_err::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o666))
            .expect("opened up");
        let at = dir.path().join("root");
        fs_err::create_dir(&at).expect("made");
        let mut jail = Jail::new(&at);
        jail.namespaces(all().difference(UnshareFlags::NEWUSER)).empty_root().drop_privileges().landlock();
        if !rustix::process::geteuid().is_root() {
            jail.namespaces(UnshareFlags::NEWUSER);
        }
        jail.bind(Path::new("/bin/busybox"), Path::new("/bin/busybox"), Bind::Read);
        jail.bind(&file, Path::new("disk"), Bind::Write);
        adjust(&mut jail);
        let mut spawn = Spawn::new("/bin/busybox", Path::new("/"));
        spawn.args(["sh", "-c", script]).stdout(Stdio::piped()).stderr(Stdio::null()).jail(jail);
        let mut child = spawn.spawn().expect("started");
        let mut text = String::new();
        child.take_stdout().expect("piped").read_to_string(&mut text).expect("read");
        child.wait().expect("reaped");
        text + &fs_err::read_to_string(&file).expect("read")
    }

    #[test]
    fn an_empty_root_holds_what_is_shown_and_only_the_disk_can_be_written() {
        let script = "cd /; for f in * */*; do echo $f; done; echo x > /new; echo x >> /bin/busybox; \
                      echo after > /disk; ls /proc; true";
        // Landlock lets nobody list a directory.
        let text = in_empty_root(script, |jail| jail.landlock = false);
        assert_eq!(text, "bin\ndisk\nbin/busybox\nafter\n");
        if has_landlock() {
            assert_eq!(in_empty_root(script, |_| {}), "*\n*/*\nafter\n");
        }
    }

    #[test]
    fn a_program_runs_as_the_user_that_was_asked_for_and_cannot_signal_its_owner() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let script = format!("id -u; id -G; kill -9 {} || echo refused", std::process::id());
        let text = in_empty_root(&script, |jail| _ = jail.user(2_000_000_123, &[7]));
        assert_eq!(text, "2000000123\n2000000123 7\nrefused\nbefore");
    }

    #[test]
    fn a_prepared_network_is_entered_and_not_made() {
        let mut holder = Spawn::new("/bin/sleep", Path::new("/"));
        holder.arg("1000");
        let mut jail = Jail::new(Path::new("/tmp"));
        jail.namespaces(all());
        holder.jail(jail);
        let mut holder = holder.spawn().expect("started");
        let program = holder.program().expect("it runs");
        let of = |name: &str| fs_err::File::open(format!("/proc/{program}/ns/{name}")).expect("opened");
        let link = fs_err::read_link(format!("/proc/{program}/ns/net")).expect("read");
        let mut jail = Jail::new(Path::new("/tmp"));
        jail.join(of("user").into_file().into(), UnshareFlags::NEWUSER)
            .join(of("net").into_file().into(), UnshareFlags::NEWNET)
            .namespaces(UnshareFlags::NEWNS)
            .drop_privileges();
        let mut spawn = Spawn::new("/bin/readlink", Path::new("/"));
        spawn.arg("/proc/self/ns/net").stdout(Stdio::piped()).jail(jail);
        let mut child = spawn.spawn().expect("started");
        let mut text = String::new();
        child.take_stdout().expect("piped").read_to_string(&mut text).expect("read");
        assert_eq!(Path::new(text.trim_end()), link);
        child.wait().expect("reaped");
        holder.kill().expect("told");
        holder.wait().expect("reaped");
    }

    #[test]
    fn a_missing_program_is_an_error_of_spawn() {
        let mut spawn = Spawn::new("/nonexistent/program", Path::new("/"));
        spawn.jail(Jail::new(Path::new("/tmp")));
        assert_eq!(spawn.spawn().expect_err("no such program").kind(), io::ErrorKind::NotFound);
    }
}
