//! Files that grow by whole lines.

use std::fs::File;
use std::io;
use std::path::Path;

use fs_err::OpenOptions;
use fs_err::os::unix::fs::OpenOptionsExt;
use rustix::fs::OFlags;

/// Opens a file for reading and appending; makes it for its owner alone if it does not exist. A link is refused, because
/// the directory may be one that a guest's data is copied to.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    // Opening a FIFO or a terminal must not wait.
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(flags.bits().cast_signed())
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other(format!("'{}' is not a regular file", path.display())));
    }
    Ok(file.into_file())
}
