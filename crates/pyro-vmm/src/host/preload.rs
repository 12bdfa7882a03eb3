//! The library that is loaded into older QEMUs, as a file.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use fs_err::os::unix::fs::OpenOptionsExt;
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
        let beside = dir.join(format!(".qemu-open-{digest}.{}", std::process::id()));
        let mut file = fs_err::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            // Every machine's user reads it; the directory hides it from others.
            .mode(0o444)
            .open(&beside)?;
        file.write_all(LIBRARY)?;
        fs_err::rename(&beside, &path)?;
    }
    Ok(path)
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
