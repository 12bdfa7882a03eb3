//! The two processes between an owner and a jailed program: they wait, and pass an end on.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, Resource, Rlimit, Signal, WaitOptions};

/// The process that the warden ends when it is told to.
static INIT: AtomicI32 = AtomicI32::new(0);

/// Waits for the end of the program, and ends like it.
pub(super) fn be_warden(init: Pid, status: &OwnedFd, life: &OwnedFd) -> ! {
    INIT.store(init.as_raw_nonzero().get(), Ordering::Relaxed);
    on_terminate(end_init);
    // What the owner has open must not stay open here: it waits for the ends of its pipes.
    keep_only([status.as_raw_fd(), life.as_raw_fd()]);
    let mut told = [0; 4];
    let told = match retry(|| rustix::io::read(status, &mut told)) {
        Ok(4) => i32::from_ne_bytes(told),
        // The init was killed, and the program with it.
        _ => libc::SIGKILL,
    };
    // Its number is another's once it is reaped.
    ignore_terminate();
    _ = retry(|| rustix::process::waitpid(Some(init), WaitOptions::empty()));
    if libc::WIFSIGNALED(told) {
        end_by(libc::WTERMSIG(told));
    }
    end(libc::WEXITSTATUS(told));
}

/// Reaps whatever ends in the namespace, until the program has; then tells how it ended and ends the rest.
pub(super) fn be_init(program: Pid, tell: &OwnedFd) -> ! {
    keep_only([tell.as_raw_fd(), tell.as_raw_fd()]);
    loop {
        match retry(|| rustix::process::wait(WaitOptions::empty())) {
            Ok(Some((pid, status))) if pid == program => {
                _ = rustix::io::write(tell, &status.as_raw().to_ne_bytes());
                end(0);
            }
            Ok(_) => {}
            Err(_) => end(0),
        }
    }
}

/// Runs in the warden when it is told to end: the program's end ends it.
extern "C" fn end_init(_signal: libc::c_int) {
    if let Some(init) = Pid::from_raw(INIT.load(Ordering::Relaxed)) {
        _ = rustix::process::kill_process(init, Signal::KILL);
    }
}

pub(super) fn is_closed(pipe: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(pipe, PollFlags::empty())];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().contains(PollFlags::HUP)
}

fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            result => return result,
        }
    }
}

/// The child's number in the parent, none in the child.
#[expect(unsafe_code, reason = "rustix has no fork")]
pub(crate) fn fork() -> io::Result<Option<Pid>> {
    // SAFETY: this process has one thread; both sides make system calls only.
    match unsafe { libc::fork() } {
        0 => Ok(None),
        pid @ 1.. => Ok(Pid::from_raw(pid)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A copy of a program that handles signals has its handlers, which must not run in the copy.
#[expect(unsafe_code, reason = "signal dispositions")]
pub(crate) fn default_signals() {
    for signal in 1..=64 {
        // SAFETY: sets a disposition; those that cannot be set are refused.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

#[expect(unsafe_code, reason = "a signal handler")]
fn on_terminate(handler: extern "C" fn(libc::c_int)) {
    // SAFETY: the handler makes one system call and reads one atomic number.
    unsafe { libc::signal(libc::SIGTERM, handler as libc::sighandler_t) };
}

#[expect(unsafe_code, reason = "a signal disposition")]
fn ignore_terminate() {
    // SAFETY: sets a disposition.
    unsafe { libc::signal(libc::SIGTERM, libc::SIG_IGN) };
}

pub(crate) fn keep_only(mut kept: [i32; 2]) {
    kept.sort_unstable();
    let mut first = 0_u32;
    for fd in kept {
        let fd = fd.unsigned_abs();
        if fd > first {
            close_range(first, fd - 1);
        }
        first = fd + 1;
    }
    close_range(first, u32::MAX);
}

#[expect(unsafe_code, reason = "descriptors of a process that will never use them")]
fn close_range(first: u32, last: u32) {
    // SAFETY: a system call on numbers that this process does not use any more.
    if unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } == 0 {
        return;
    }
    // A kernel before 5.9, or a filter that does not know the call.
    let most = rustix::process::getrlimit(Resource::Nofile).current.and_then(|most| u32::try_from(most).ok());
    for number in first..=last.min(most.unwrap_or(FILES_MAX).min(FILES_MAX)) {
        // SAFETY: as above; one that is not open is refused.
        unsafe { libc::close(number.cast_signed()) };
    }
}

/// Descriptors that are closed one by one where the kernel cannot do it at once.
const FILES_MAX: u32 = 65_536;

fn end_by(signal: i32) -> ! {
    // No core file of a process that only waited.
    _ = rustix::process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
    default_signals();
    #[expect(unsafe_code, reason = "a signal by its number")]
    // SAFETY: signals this process itself.
    unsafe {
        libc::kill(libc::getpid(), signal);
    }
    end(128 + signal);
}

#[expect(unsafe_code, reason = "the end of a copy of a program, without running anything that belongs to it")]
pub(super) fn end(code: i32) -> ! {
    // SAFETY: ends this process.
    unsafe { libc::_exit(code) }
}
