//! The library that is loaded into older QEMUs, as a file.

use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

/// `preload/open.rs`, built.
const LIBRARY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/open.so"));

/// Whether a QEMU of this version opens the memory of a template for writing.
pub(crate) fn is_needed(version: &str) -> bool {
    let mut numbers = version.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    (numbers.next(), numbers.next().unwrap_or(0)) < (Some(8), 2)
}

/// The library's file in this directory, which is made where it is missing. Its name says which one it is.
///
/// # Errors
/// When the directory cannot be written.
pub fn preload_library(dir: &Path) -> io::Result<PathBuf> {
    let digest: String = Sha256::digest(LIBRARY).iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    let path = dir.join(format!("qemu-open-{digest}.so"));
    let is_whole = |path: &Path| fs_err::metadata(path).is_ok_and(|file| file.len() == LIBRARY.len() as u64);
    if !is_whole(&path) {
        match make_whole(dir, &path) {
            // Not every file system has files without a name.
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOSYS) => {
                let beside = dir.join(format!(".qemu-open.{}", std::process::id()));
                fs_err::write(&beside, LIBRARY)?;
                fs_err::rename(&beside, &path)?;
            }
            made => made?,
        }
    }
    Ok(path)
}

/// Makes the file at once whole: it has no name before, so nothing is left of a process that is killed here.
fn make_whole(dir: &Path, path: &Path) -> rustix::io::Result<()> {
    let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
    // Every machine's user reads it; the directory hides it from others.
    let file = rustix::fs::open(dir, flags, Mode::from_raw_mode(0o444))?;
    let mut rest = LIBRARY;
    while !rest.is_empty() {
        rest = &rest[rustix::io::write(&file, rest)?..];
    }
    let open = format!("/proc/self/fd/{}", file.as_raw_fd());
    match rustix::fs::linkat(CWD, open.as_str(), CWD, path, AtFlags::SYMLINK_FOLLOW) {
        // Another process was faster.
        Err(Errno::EXIST) => Ok(()),
        linked => linked,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemus_before_8_2_need_it() {
        for (version, needed) in
            [("7.2.22", true), ("8.1", true), ("8.2.0", false), ("10.0.2", false), ("9", false)]
        {
            assert_eq!(is_needed(version), needed, "{version}");
        }
    }

    #[test]
    fn the_file_is_made_once() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = preload_library(dir.path()).expect("made");
        assert_eq!(fs_err::read(&path).expect("read"), LIBRARY);
        assert_eq!(preload_library(dir.path()).expect("there"), path);
        assert_eq!(fs_err::read_dir(dir.path()).expect("listed").count(), 1);
    }
}
