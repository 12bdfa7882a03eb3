//! Unix sockets in a directory that a VMM owns, of any length: the address of one has room for 107 bytes, and what the
//! VMM has put in its place must not lead elsewhere. So it is opened as what it is, and named by that descriptor.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags};

/// A short name, good for as long as it lives.
pub(super) struct ShortPath {
    _held: OwnedFd,
    path: PathBuf,
}

impl ShortPath {
    pub(super) fn of(socket: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let held = rustix::fs::openat(CWD, socket, flags, Mode::empty())?;
        let found = FileType::from_raw_mode(rustix::fs::fstat(&held)?.st_mode);
        if found != FileType::Socket {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is no socket"));
        }
        let path = PathBuf::from(format!("/proc/self/fd/{}", held.as_raw_fd()));
        Ok(Self { _held: held, path })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}
