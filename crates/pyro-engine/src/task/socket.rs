//! The unix socket of a task's supervisor. The address of a unix socket has room for 107 bytes, a state directory may
//! be longer: so the socket is named through a descriptor of its directory.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use rustix::fs::{CWD, Mode, OFlags};
use tokio::net::UnixStream;

use crate::files;
use crate::task::TaskDirectory;

const NAME: &str = "control.sock";

/// Makes the socket, in the place of one that a dead supervisor has left. From here on callers wait instead of being
/// refused.
pub(crate) fn bind(directory: &TaskDirectory) -> io::Result<UnixListener> {
    files::remove_if_there(&directory.path().join(NAME))?;
    let (_held, path) = short_path(directory)?;
    let listener = UnixListener::bind(&path)?;
    rustix::fs::chmodat(CWD, &path, Mode::from_raw_mode(0o600), rustix::fs::AtFlags::empty())?;
    Ok(listener)
}

/// Connects; `ConnectionRefused` or `NotFound` where there is no supervisor.
pub(crate) async fn connect(directory: &TaskDirectory) -> io::Result<UnixStream> {
    let (_held, path) = short_path(directory)?;
    UnixStream::connect(path).await
}

fn short_path(directory: &TaskDirectory) -> io::Result<(OwnedFd, PathBuf)> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(CWD, directory.path(), flags, Mode::empty())?;
    let path = PathBuf::from(format!("/proc/self/fd/{}/{NAME}", fd.as_raw_fd()));
    Ok((fd, path))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[tokio::test]
    async fn a_socket_in_a_directory_of_any_length_is_private_and_found() {
        let root = tempfile::tempdir().expect("a directory");
        let deep = root.path().join("x".repeat(120));
        fs_err::create_dir(&deep).expect("made");
        let directory = TaskDirectory::new(deep.clone());
        let refused = connect(&directory).await.expect_err("nobody is there");
        assert_eq!(refused.kind(), io::ErrorKind::NotFound);
        drop(bind(&directory).expect("bound"));
        let refused = connect(&directory).await.expect_err("it has gone");
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        let _listener = bind(&directory).expect("bound in its place");
        connect(&directory).await.expect("connected");
        let mode = fs_err::metadata(deep.join(NAME)).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
