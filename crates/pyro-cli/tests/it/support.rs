//! A pyro of a test's own, and ways to look for what it leaves behind.

use fs_err as fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// How long something may take that takes a moment on a quiet machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Pyro {
    state: TempDir,
    /// What other tests promise to their machines is no concern of this one's.
    runtime: TempDir,
    cache: PathBuf,
    /// Words before the command: what it is run by.
    wrapper: Vec<String>,
}

impl Pyro {
    pub(crate) fn new() -> Self {
        Self::at(tempfile::tempdir().expect("a state directory"))
    }

    pub(crate) fn at(state: TempDir) -> Self {
        let runtime = tempfile::tempdir().expect("a runtime directory");
        Self { state, runtime, cache: environments(), wrapper: Vec::new() }
    }

    /// One that finds no QEMU: in a mount namespace of its own, something else is in its place.
    pub(crate) fn without_qemu() -> Self {
        let hide = "mount --bind /dev/null /usr/bin/qemu-system-x86_64 && exec \"$@\"";
        let flags = if is_root() { "-m" } else { "-rm" };
        Self::behind(&["unshare", flags, "sh", "-c", hide, "sh"])
    }

    /// One that is started by these words.
    pub(crate) fn behind(wrapper: &[&str]) -> Self {
        let mut pyro = Self::new();
        pyro.wrapper = wrapper.iter().copied().map(str::to_owned).collect();
        pyro
    }

    /// One with environments of its own in a directory: those of all tests, without their templates.
    pub(crate) fn with_cache(cache: &Path) -> Self {
        let copied = run(Command::new("cp").arg("-al").arg(environments()).arg(cache));
        assert!(copied, "the environments can be linked");
        // Locks are on files, and a link to one is the same file.
        for own in ["templates", "locks"] {
            fs::remove_dir_all(cache.join(own)).expect("removed");
            fs::create_dir(cache.join(own)).expect("made");
        }
        let mut pyro = Self::new();
        cache.clone_into(&mut pyro.cache);
        pyro
    }

    pub(crate) fn state(&self) -> &Path {
        self.state.path()
    }

    /// Where this pyro writes down what it has promised.
    pub(crate) fn runtime(&self) -> &Path {
        self.runtime.path()
    }

    pub(crate) fn task_file(&self, id: &str, name: &str) -> PathBuf {
        self.state().join("tasks").join(id).join(name)
    }

    pub(crate) fn command(&self, line: &[&str]) -> Command {
        let pyro = assert_cmd::cargo::cargo_bin!("pyro");
        let mut command = match self.wrapper.split_first() {
            Some((program, rest)) => {
                let mut command = Command::new(program);
                command.args(rest).arg(pyro);
                command
            }
            None => Command::new(pyro),
        };
        command
            .args(line)
            .env("PYRO_STATE_DIR", self.state())
            .env("PYRO_RUNTIME_DIR", self.runtime.path())
            .env("PYRO_ENVIRONMENT_CACHE_DIR", &self.cache)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    pub(crate) fn spawn(&self, line: &[&str]) -> Child {
        start(&mut self.command(line))
    }

    pub(crate) fn run(&self, line: &[&str]) -> Output {
        self.spawn(line).wait_with_output().expect("pyro ends")
    }

    pub(crate) fn json(&self, line: &[&str]) -> Value {
        parse(&self.run(line))
    }

    /// What a command that must succeed prints, without its last newline.
    pub(crate) fn ok(&self, line: &[&str]) -> String {
        let output = self.run(line);
        assert!(output.status.success(), "{line:?}: {output:?}");
        text(&output.stdout).trim_end_matches('\n').to_owned()
    }

    /// A new task; its id.
    pub(crate) fn create(&self) -> String {
        self.ok(&["task", "create", "debian:12", "--mem-mib", "512", "--id-only"])
    }

    /// Runs a shell string in a task.
    pub(crate) fn exec(&self, id: &str, script: &str) -> Output {
        self.run(&["task", "exec", id, "--timeout-seconds", "60", "--", "sh", "-c", script])
    }

    pub(crate) fn status(&self, id: &str) -> Value {
        self.json(&["task", "status", id, "--json"])
    }

    pub(crate) fn logs(&self, id: &str) -> Vec<Value> {
        let logs = self.json(&["task", "logs", id, "--json"]);
        logs["entries"].as_array().unwrap_or_else(|| panic!("{logs}")).clone()
    }

    /// The processes that belong to a task: its supervisor, and its VMM.
    pub(crate) fn supervisor(&self, id: &str) -> Option<i32> {
        let copies =
            processes(|_, words| matches!(words, [_, verb, task, ..] if verb == "supervise" && task == id));
        // What guards its VMM are copies of it, with the same command line.
        copies.iter().find(|pid| parent(**pid).is_some_and(|parent| !copies.contains(&parent))).copied()
    }

    pub(crate) fn vmm(&self, id: &str) -> Option<i32> {
        let name = format!("pyro-{id}");
        processes(|_, words| words.contains(&name)).pop()
    }

    /// Waits until a condition holds that an event elsewhere makes true.
    pub(crate) fn until(&self, what: &str, mut holds: impl FnMut(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !holds(self) {
            assert!(Instant::now() < deadline, "never came true: {what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Nothing of any machine or task is left. A supervisor ends when its last answer is on its way.
    pub(crate) fn assert_empty(&self) {
        for kind in ["vms", "tasks", "trash", "quarantine"] {
            let left: Vec<_> = fs::read_dir(self.state().join(kind)).expect("there").collect();
            assert!(left.is_empty(), "{kind}: {left:?}");
        }
        self.until("no process is left", |pyro| pyro.processes().is_empty());
    }

    /// All processes that have something to do with this state directory.
    pub(crate) fn processes(&self) -> Vec<i32> {
        let directory = self.state().to_string_lossy().into_owned();
        let own = i32::try_from(std::process::id()).expect("small");
        let inside = |pid: &i32| {
            let link = |name: &str| fs::read_link(format!("/proc/{pid}/{name}")).unwrap_or_default();
            let fds = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
            let mut held = fds.filter_map(|fd| fs::read_link(fd.path()).ok());
            link("cwd").starts_with(&directory)
                || held.any(|path| path.starts_with(&directory))
                || shows_files_of(*pid, &directory)
        };
        processes(|_, _| true).into_iter().filter(|pid| *pid != own).filter(inside).collect()
    }
}

impl Drop for Pyro {
    fn drop(&mut self) {
        // What a failed test leaves must not disturb the others.
        for pid in self.processes() {
            kill(pid, "KILL");
        }
    }
}

/// A small disk, so that it can be filled. Dropping it kills what still uses it.
pub(crate) struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Mounts one there. Returns `None` if this user cannot mount.
    pub(crate) fn mount(on: &Path, mib: u64) -> Option<Self> {
        let mounted = is_root()
            && run(Command::new("mount")
                .args(["-t", "tmpfs", "-o", &format!("size={mib}m,mode=700"), "tmpfs"])
                .arg(on));
        mounted.then(|| Self(on.to_owned()))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        run(Command::new("umount").arg("-l").arg(&self.0));
        // While it was mounted, whoever owns the directory could not remove it.
        fs::remove_dir(&self.0).ok();
    }
}

pub(crate) fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    fs::metadata("/proc/self").expect("proc").uid() == 0
}

/// Starts a child that the test ends or awaits itself.
pub(crate) fn start(command: &mut Command) -> Child {
    #[expect(clippy::disallowed_methods, reason = "the test decides about its end")]
    command.spawn().expect("it runs")
}

/// Runs a short tool; whether it succeeded.
pub(crate) fn run(command: &mut Command) -> bool {
    #[expect(clippy::disallowed_methods, reason = "short tools of the tests")]
    let status = command.status();
    status.is_ok_and(|status| status.success())
}

pub(crate) fn kill(pid: i32, signal: &str) {
    #[expect(clippy::disallowed_methods, reason = "kill(1) needs no owner")]
    let killed =
        Command::new("kill").args([format!("-{signal}"), pid.to_string()]).stderr(Stdio::null()).status();
    killed.expect("kill runs");
}

/// All processes whose name and arguments are of this kind.
/// Whether a process is in a jail that shows a machine's disk from below this directory: of such a process nothing else names
/// the directory. The kernel tells each mount's device, and its path on that device.
fn shows_files_of(pid: i32, directory: &str) -> bool {
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
    let device = |path: &str| fs::metadata(path).map(|found| found.dev()).ok();
    let own = device(directory).filter(|own| Some(*own) != device("/"));
    let own = own.map(|own| format!("{}:{}", rustix::fs::major(own), rustix::fs::minor(own)));
    mounts.lines().any(|line| {
        let fields: Vec<&str> = line.split(' ').collect();
        let [_, _, device, root, ..] = fields[..] else { return false };
        // On a file system of its own the path begins there.
        root.ends_with("/overlay.ext4") && (root.contains(directory) || Some(device) == own.as_deref())
    })
}

fn parent(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
}

pub(crate) fn processes(kind: impl Fn(&str, &[String]) -> bool) -> Vec<i32> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").expect("proc").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
        let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        let words: Vec<String> = line.split(|byte| *byte == 0).map(text).collect();
        if kind(name.trim(), &words) {
            found.push(pid);
        }
    }
    found
}

/// Built once and kept beside the compiler's output.
pub(crate) fn environments() -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("environments")
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub(crate) fn parse(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

/// The largest resident size that a process has had, in KiB; none when it is gone.
pub(crate) fn peak_kib(pid: i32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// Numbers that look random and are the same for the same seed.
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `limit`.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        // xorshift64*: good enough for choosing moments.
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit
    }

    pub(crate) fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}
