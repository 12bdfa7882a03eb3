//! The layer on top of a Debian root file system: nothing of the build host stays in it.

use std::io;

use tar::{Builder, EntryType, Header};

use super::{SOURCE_DATE_EPOCH, Sources};

/// What the tools leave of the host or of the build itself.
const REMOVED: &[&str] = &[
    // The agent mounts the guest's own devices.
    "dev/.wh..wh..opq",
    "etc/apt/apt.conf.d/.wh.99mmdebstrap",
    "etc/apt/sources.list.d/.wh..wh..opq",
    "etc/apt/.wh.sources.list",
    "etc/.wh.packages.txt",
    "var/cache/debconf/.wh.config.dat-old",
    "var/cache/debconf/.wh.passwords.dat-old",
    "var/cache/debconf/.wh.templates.dat-old",
    "var/cache/ldconfig/.wh.aux-cache",
    "var/lib/dpkg/.wh.available-old",
    "var/lib/dpkg/.wh.diversions-old",
    "var/lib/dpkg/.wh.statoverride-old",
    "var/lib/dpkg/.wh.status-old",
];
const FILES: &[(&str, &str)] = &[
    ("etc/hostname", "pyro\n"),
    ("etc/hosts", "127.0.0.1 localhost pyro\n::1 localhost ip6-localhost ip6-loopback\n"),
    ("etc/resolv.conf", ""),
    ("etc/machine-id", ""),
];
const DIRECTORIES: &[&str] = &["", "dev/", "proc/", "sys/", "workspace/"];

/// The layer as an uncompressed archive.
pub(super) fn layer(sources: &Sources) -> io::Result<Vec<u8>> {
    let mut archive = Builder::new(Vec::new());
    for path in REMOVED {
        add(&mut archive, path, EntryType::Regular, 0o644, b"")?;
    }
    for path in DIRECTORIES {
        let path = if path.is_empty() { "./" } else { path };
        add(&mut archive, path, EntryType::Directory, 0o755, b"")?;
    }
    for (path, text) in FILES {
        add(&mut archive, path, EntryType::Regular, 0o644, text.as_bytes())?;
    }
    let (path, text) = sources.for_guest();
    add(&mut archive, path, EntryType::Regular, 0o644, text.as_bytes())?;
    archive.into_inner()
}

fn add(
    archive: &mut Builder<Vec<u8>>,
    path: &str,
    kind: EntryType,
    mode: u32,
    bytes: &[u8],
) -> io::Result<()> {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_mtime(SOURCE_DATE_EPOCH.parse().map_err(io::Error::other)?);
    header.set_size(bytes.len() as u64);
    header.set_uid(0);
    header.set_gid(0);
    archive.append_data(&mut header, path, bytes)
}
