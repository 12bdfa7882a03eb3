//! Which QEMU this host has, and which versions its VMMs are.

use std::ffi::OsStr;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use pyro_process::{Child, Exit, Spawn};
use rustix::event::{PollFd, PollFlags, Timespec};
use serde::{Deserialize, Serialize};

use super::cache::Cache;
use super::files::QemuFiles;

const PROGRAM: &str = "qemu-system-x86_64";
const ANSWER_BYTES_MAX: usize = 64 << 10;
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);

/// What a QEMU says about itself, and the files that it needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QemuFacts {
    /// Its version, as in `7.2.22`.
    pub version: String,
    /// Whether it can confine itself with seccomp.
    pub sandbox: bool,
    /// What a jail must hold for it to run; or why a jail cannot hold it.
    pub files: Result<QemuFiles, String>,
}

/// Why the version of a QEMU is not known.
#[derive(Debug, thiserror::Error)]
pub enum VersionError {
    /// The program could not be run.
    #[error("cannot run {}", binary.display())]
    Run {
        /// The program.
        binary: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The program ran and did not say a version.
    #[error("{} does not tell its version", binary.display())]
    NoVersion {
        /// The program.
        binary: PathBuf,
    },
}

/// Which file a remembered version belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BinaryKey {
    path: PathBuf,
    modified: (i64, i64),
    size: u64,
    /// When the loader was last told of new libraries: a program may need others by then.
    loader: Option<(i64, i64)>,
}

/// The first QEMU of `search_path`, which has the form of the variable `PATH`. Relative entries are skipped:
/// they would run what lies in the current directory.
pub fn find_qemu(search_path: &OsStr) -> Option<PathBuf> {
    std::env::split_paths(search_path)
        .filter(|dir| dir.is_absolute())
        .map(|dir| dir.join(PROGRAM))
        .find(|path| path.is_file() && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok())
}

/// Asks `binary` for its version and its files, or `cache_file` if it was asked before and nothing has changed.
///
/// # Errors
/// When it cannot be run, or does not say a version.
pub fn qemu_facts(binary: &Path, cache_file: &Path) -> Result<QemuFacts, VersionError> {
    remembered(binary, cache_file, Cache::qemu, Cache::set_qemu, ask_qemu)
}

/// The version of a Firecracker, by the same way.
///
/// # Errors
/// When it cannot be run, or does not say a version.
pub fn firecracker_version(binary: &Path, cache_file: &Path) -> Result<String, VersionError> {
    let ask = |binary: &Path| {
        let (_, answer) = run(binary, &["--version"], &[])?;
        Ok(answer.strip_prefix("Firecracker v").and_then(plausible))
    };
    remembered(binary, cache_file, Cache::firecracker, Cache::set_firecracker, ask)
}

fn remembered<T: Clone>(
    binary: &Path,
    cache_file: &Path,
    known: impl Fn(&Cache, &BinaryKey) -> Option<T>,
    remember: impl Fn(&mut Cache, BinaryKey, T),
    ask: impl Fn(&Path) -> io::Result<Option<T>>,
) -> Result<T, VersionError> {
    let run_error = |source| VersionError::Run { binary: binary.to_owned(), source };
    let metadata = fs_err::metadata(binary).map_err(run_error)?;
    let key = BinaryKey {
        path: binary.to_owned(),
        modified: (metadata.mtime(), metadata.mtime_nsec()),
        size: metadata.size(),
        loader: fs_err::metadata(super::files::LOADER_CACHE)
            .ok()
            .map(|cache| (cache.mtime(), cache.mtime_nsec())),
    };
    let mut cache = Cache::read(cache_file);
    if let Some(found) = known(&cache, &key) {
        return Ok(found);
    }
    let found = ask(binary).map_err(run_error)?;
    let found = found.ok_or_else(|| VersionError::NoVersion { binary: binary.to_owned() })?;
    remember(&mut cache, key, found.clone());
    cache.write(cache_file);
    Ok(found)
}

/// QEMU reads its options in order, so one run tells both: it refuses `-sandbox` before it sees `-version`.
fn ask_qemu(binary: &Path) -> io::Result<Option<QemuFacts>> {
    let (status, answer) = run(binary, &["-sandbox", "on", "-version"], &[])?;
    let sandbox = status.success();
    let answer = if sandbox { answer } else { run(binary, &["-version"], &[])?.1 };
    let Some(version) = parse_version(&answer) else { return Ok(None) };
    let files = QemuFiles::of(binary).map_err(|error| error.to_string());
    Ok(Some(QemuFacts { version, sandbox, files }))
}

fn parse_version(answer: &str) -> Option<String> {
    plausible(answer.split_once("version ")?.1)
}

/// The first word, where it can be a version.
fn plausible(text: &str) -> Option<String> {
    let version = text.split_whitespace().next()?;
    let plausible = version.starts_with(|c: char| c.is_ascii_digit())
        && version.len() <= 40
        && version.chars().all(|c| c.is_ascii_alphanumeric() || ".-+~_".contains(c));
    plausible.then(|| version.to_owned())
}

/// Runs a program and returns the beginning of its output. Whatever it is, it neither hangs nor floods us.
pub(super) fn run(binary: &Path, args: &[&str], env: &[(&str, &str)]) -> io::Result<(Exit, String)> {
    let mut spawn = Spawn::new(binary, Path::new("/"));
    for (name, value) in env {
        spawn.env(name, value);
    }
    spawn.args(args).stdout(Stdio::piped()).stderr(Stdio::null()).own_process_group();
    let mut child = spawn.spawn()?;
    let answer = read_answer(&mut child);
    if answer.is_err() {
        child.kill()?;
    }
    let status = child.wait()?;
    Ok((status, String::from_utf8_lossy(&answer?).into_owned()))
}

fn read_answer(child: &mut Child) -> io::Result<Vec<u8>> {
    let deadline = Instant::now() + ANSWER_DEADLINE;
    let stdout = child.take_stdout().ok_or(io::ErrorKind::BrokenPipe)?;
    let mut answer = Vec::new();
    let mut buffer = [0; 1024];
    while answer.len() < ANSWER_BYTES_MAX {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        let mut fds = [PollFd::new(&stdout, PollFlags::IN)];
        match rustix::event::poll(&mut fds, Some(&timeout)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        match rustix::io::read(&stdout, &mut buffer)? {
            0 => return Ok(answer),
            count => answer.extend_from_slice(&buffer[..count]),
        }
    }
    Err(io::ErrorKind::FileTooLarge.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn script(dir: &Path, text: &str) -> PathBuf {
        let path = dir.join(PROGRAM);
        fs_err::write(&path, format!("#!/bin/sh\n{text}\n")).expect("written");
        fs_err::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("executable");
        path
    }

    #[test]
    fn a_version_is_asked_for_once_and_again_when_the_program_changes() {
        let dir = tempfile::tempdir().expect("a directory");
        let cache = dir.path().join("cache.json");
        let answer = |version: &str| {
            format!("echo asked >> {}/log; echo 'Firecracker v{version}'", dir.path().display())
        };
        let binary = script(dir.path(), &answer("1.12.1"));
        let version = || firecracker_version(&binary, &cache).expect("a version");
        assert_eq!((version(), version()), ("1.12.1".to_owned(), "1.12.1".to_owned()));
        assert_eq!(fs_err::read_to_string(dir.path().join("log")).expect("a log"), "asked\n");
        script(dir.path(), &answer("1.12.10"));
        assert_eq!(version(), "1.12.10");
    }

    #[test]
    fn a_qemu_says_what_it_can_do_and_a_script_cannot_be_jailed() {
        let dir = tempfile::tempdir().expect("a directory");
        let cache = dir.path().join("cache.json");
        let binary = script(dir.path(), "echo 'QEMU emulator version 7.2.22 (Debian 1:7.2)'");
        let facts = || qemu_facts(&binary, &cache).expect("a version");
        assert_eq!((facts().version.as_str(), facts().sandbox), ("7.2.22", true));
        // It runs a shell, and whatever that runs.
        assert!(facts().files.expect_err("no program").contains("a script"));
        script(dir.path(), "case $1 in -sandbox) exit 1;; esac; echo 'QEMU emulator version 10.0.3'");
        assert_eq!((facts().version.as_str(), facts().sandbox), ("10.0.3", false));
    }

    #[test]
    fn a_program_that_is_no_qemu_is_an_error() {
        let dir = tempfile::tempdir().expect("a directory");
        let cache = dir.path().join("cache.json");
        let binary = script(dir.path(), "echo hello");
        assert!(matches!(qemu_facts(&binary, &cache), Err(VersionError::NoVersion { .. })));
        let binary = script(dir.path(), "exec yes");
        assert!(matches!(qemu_facts(&binary, &cache), Err(VersionError::Run { .. })));
        let missing = dir.path().join("missing");
        assert!(matches!(qemu_facts(&missing, &cache), Err(VersionError::Run { .. })));
    }

    #[test]
    fn the_search_skips_what_cannot_run_and_relative_directories() {
        let dir = tempfile::tempdir().expect("a directory");
        fs_err::create_dir(dir.path().join("a")).expect("made");
        fs_err::create_dir(dir.path().join("b")).expect("made");
        fs_err::write(dir.path().join("a").join(PROGRAM), "").expect("written");
        let binary = script(&dir.path().join("b"), "true");
        let path = std::env::join_paths([
            Path::new(""),
            Path::new("."),
            &dir.path().join("a"),
            &dir.path().join("b"),
        ]);
        assert_eq!(find_qemu(&path.expect("a path")), Some(binary));
        assert_eq!(find_qemu(OsStr::new("")), None);
    }
}
