//! Limits of this process that it must meet with words.

#![expect(unsafe_code, reason = "the disposition of a signal")]

use rustix::process::{Resource, Rlimit};

/// Raises the number of files that this process may have open as far as it may, for one that serves others. For the main
/// function of a program: it changes the whole process, and what it starts.
pub fn raise_file_limit() {
    let Rlimit { current, maximum } = rustix::process::getrlimit(Resource::Nofile);
    let most = maximum.unwrap_or(MOST_FILES).min(MOST_FILES);
    if current.is_none_or(|current| current >= most) {
        return;
    }
    // What a process may do anyway is not refused.
    _ = rustix::process::setrlimit(Resource::Nofile, Rlimit { current: Some(most), maximum });
}

/// More than a supervisor needs with all connections that its guest may have; tables of a kernel's are sized by it.
const MOST_FILES: u64 = 16_384;

/// Raises the limit on the length of files as far as this process may, and turns a write beyond it into an error of that
/// write (`EFBIG`). Without this the kernel ends the process by `SIGXFSZ`, and no word is said. Programs that this process
/// starts inherit both. For the main function of a program: it changes the whole process.
pub fn make_file_limits_errors() {
    let Rlimit { maximum, .. } = rustix::process::getrlimit(Resource::Fsize);
    // What a process may do anyway is not refused.
    _ = rustix::process::setrlimit(Resource::Fsize, Rlimit { current: maximum, maximum });
    // SAFETY: sets a disposition.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}
