//! Descriptors that only another process can make: of a namespace that this process does not enter.

#![expect(unsafe_code, reason = "code of a forked child")]

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};

use crate::jail::{default_signals, fork, keep_only};

/// The most descriptors that a child hands over.
const MOST: usize = 8;

/// Why a child handed nothing over.
#[derive(Debug)]
pub enum HandOverError {
    /// Its work failed at this step, which the work has named.
    Step(u8, io::Error),
    /// There was no child, it was killed, or it took too long.
    Child(io::Error),
}

/// Forks a child that makes descriptors and ends; returns them in the order in which the work gives them, none left out.
/// Blocks until they are there, at most for `within`.
///
/// # Errors
/// When the work fails, or there can be no child.
///
/// # Safety
/// The child is a copy of one thread of this process: `work` must make system calls only. It may neither allocate nor take a
/// lock. Of this process's descriptors it has none.
pub unsafe fn descriptors_from_child<const N: usize>(
    within: Duration,
    work: impl FnOnce() -> Result<[OwnedFd; N], (u8, Errno)>,
) -> Result<[OwnedFd; N], HandOverError> {
    const { assert!(N <= MOST, "more than a message holds") };
    let failed = |error: Errno| HandOverError::Child(error.into());
    let (own, its) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(failed)?;
    let Some(child) = fork().map_err(HandOverError::Child)? else { be_child(&its, work) };
    drop(its);
    let received = receive(&own, within);
    // It ends when it has sent; one that has not is of no use any more.
    drop(own);
    end(child, matches!(received, Err(Errno::TIME)));
    match received.map_err(failed)? {
        ([_, 0], descriptors) => {
            <[OwnedFd; N]>::try_from(descriptors).map_err(|_fewer| HandOverError::Child(Errno::MFILE.into()))
        }
        ([step, number], _) => Err(HandOverError::Step(step, io::Error::from_raw_os_error(number.into()))),
    }
}

fn be_child<const N: usize>(socket: &OwnedFd, work: impl FnOnce() -> Result<[OwnedFd; N], (u8, Errno)>) -> ! {
    // A handler of the owner's would run on descriptors that are others here.
    default_signals();
    _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
    // A lock or a pipe of the owner must not stay open here.
    keep_only([socket.as_raw_fd(); 2]);
    match work() {
        Ok(made) => send(socket, [0, 0], &made.each_ref().map(AsFd::as_fd)),
        // Each number of an error is below 256 but those of the kernel's own, which no call returns.
        Err((step, error)) => {
            send(socket, [step, u8::try_from(error.raw_os_error()).unwrap_or(u8::MAX)], &[])
        }
    }
    // SAFETY: ends this process without running anything of the program that it was forked from.
    unsafe { libc::_exit(0) }
}

fn send(socket: &OwnedFd, text: [u8; 2], descriptors: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    _ = rustix::net::sendmsg(socket, &[IoSlice::new(&text)], &mut ancillary, SendFlags::NOSIGNAL);
}

fn receive(socket: &OwnedFd, within: Duration) -> rustix::io::Result<([u8; 2], Vec<OwnedFd>)> {
    let within = Timespec::try_from(within).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
    let mut fds = [PollFd::new(socket, PollFlags::IN)];
    let ready = loop {
        match rustix::event::poll(&mut fds, Some(&within)) {
            Err(Errno::INTR) => {}
            ready => break ready?,
        }
    };
    if ready == 0 {
        return Err(Errno::TIME);
    }
    let mut text = [0; 2];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut text)];
    let received = rustix::net::recvmsg(socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(sent) = message {
            descriptors.extend(sent);
        }
    }
    // It was killed before it could say anything.
    if received.bytes < text.len() { Err(Errno::CHILD) } else { Ok((text, descriptors)) }
}

/// Reaps the child. Where somebody else in this process reaps every child, it is gone already.
fn end(child: Pid, kill: bool) {
    let Ok(pidfd) = rustix::process::pidfd_open(child, PidfdFlags::empty()) else {
        // There is no descriptor for it: it is waited for by its number, which is its own until then.
        if kill {
            _ = rustix::process::kill_process(child, Signal::KILL);
        }
        _ = rustix::process::waitpid(Some(child), rustix::process::WaitOptions::empty());
        return;
    };
    if kill {
        _ = rustix::process::pidfd_send_signal(&pidfd, Signal::KILL);
    }
    while let Err(Errno::INTR) = rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED)
    {
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn from_child<const N: usize>(
        work: impl FnOnce() -> Result<[OwnedFd; N], (u8, Errno)>,
    ) -> Result<[OwnedFd; N], HandOverError> {
        // SAFETY: these make system calls only.
        unsafe { descriptors_from_child(Duration::from_secs(1), work) }
    }

    #[test]
    fn what_a_child_opens_is_usable_here() {
        let made = from_child(|| {
            let (read, write) = rustix::pipe::pipe().map_err(|error| (1, error))?;
            rustix::io::write(&write, b"made there").map_err(|error| (2, error))?;
            Ok([read])
        });
        let [pipe] = made.expect("made");
        let mut text = String::new();
        fs_err::File::from_parts(pipe.into(), "pipe").read_to_string(&mut text).expect("read");
        assert_eq!(text, "made there");
    }

    #[test]
    fn a_step_that_fails_is_named_with_its_cause() {
        let failed = from_child::<1>(|| Err((7, Errno::PERM))).expect_err("it fails");
        let HandOverError::Step(7, error) = failed else { panic!("{failed:?}") };
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn a_child_that_is_stuck_or_killed_is_an_error_and_leaves_nothing() {
        let own = std::process::id();
        let children = || {
            let listed = fs_err::read_to_string(format!(
                "/proc/{own}/task/{}/children",
                rustix::thread::gettid().as_raw_nonzero()
            ));
            listed.expect("read")
        };
        let stuck = from_child::<1>(|| {
            loop {
                _ = rustix::thread::nanosleep(&Timespec { tv_sec: 100, tv_nsec: 0 });
            }
        });
        assert!(matches!(stuck, Err(HandOverError::Child(_))), "{stuck:?}");
        let killed = from_child::<1>(|| {
            _ = rustix::process::kill_process(rustix::process::getpid(), Signal::KILL);
            Err((1, Errno::INVAL))
        });
        assert!(matches!(killed, Err(HandOverError::Child(_))), "{killed:?}");
        assert_eq!(children(), "");
    }
}
