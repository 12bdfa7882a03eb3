//! What a child tells its owner between fork and exec, over a socket pair that its program does not get.
//!
//! The standard library learns of a failed exec too, but then waits for the child by its number, and panics where the
//! owner ignores `SIGCHLD` or another part of it has reaped the child.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use rustix::process::PidfdFlags;

/// One message.
#[derive(Debug)]
pub(crate) enum Message {
    /// The process that is waited for, its number and its pidfd.
    Child(i32, OwnedFd),
    /// The keeper of its status: see [`crate::spawn`].
    Keeper(OwnedFd),
    /// Why the program was not executed.
    Failed(io::Error),
    /// How the program has ended, as `waitpid` tells it; only a keeper says this.
    Ended(i32),
}

const CHILD: u8 = 1;
const KEEPER: u8 = 2;
const FAILED: u8 = 3;
const ENDED: u8 = 4;
const LENGTH: usize = 5;

/// The owner's end.
#[derive(Debug)]
pub(crate) struct Report(OwnedFd);

/// The child's end. Its methods make system calls only.
#[derive(Debug)]
pub(crate) struct Teller(OwnedFd);

/// A pair whose second end has a number of `floor` or more.
pub(crate) fn pair(floor: RawFd) -> io::Result<(Report, Teller)> {
    let (own, other) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    Ok((Report(own), Teller(rustix::io::fcntl_dupfd_cloexec(other, floor)?)))
}

impl Report {
    /// The next message that was sent already, if there is one.
    pub(crate) fn next(&self) -> io::Result<Option<Message>> {
        let mut bytes = [0; LENGTH];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut parts = [IoSliceMut::new(&mut bytes)];
            match rustix::net::recvmsg(&self.0, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                received => break received?,
            }
        };
        let descriptor = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        let [kind, value @ ..] = bytes;
        let value = i32::from_ne_bytes(value);
        match (received.bytes, kind, descriptor) {
            (0, ..) => Ok(None),
            (LENGTH, CHILD, Some(pidfd)) => Ok(Some(Message::Child(value, pidfd))),
            (LENGTH, KEEPER, Some(pidfd)) => Ok(Some(Message::Keeper(pidfd))),
            (LENGTH, FAILED, None) => Ok(Some(Message::Failed(io::Error::from_raw_os_error(value)))),
            (LENGTH, ENDED, None) => Ok(Some(Message::Ended(value))),
            // The host lacks a descriptor for what was sent.
            _ => Err(Errno::MFILE.into()),
        }
    }
}

impl Teller {
    /// Names this process as the child.
    pub(crate) fn child(&self) -> io::Result<()> {
        self.this_process(CHILD)
    }

    /// Names this process as the keeper.
    pub(crate) fn keeper(&self) -> io::Result<()> {
        self.this_process(KEEPER)
    }

    /// Says why the program was not executed.
    pub(crate) fn failed(&self, error: &io::Error) {
        self.send(FAILED, error.raw_os_error().unwrap_or(libc::EINVAL));
    }

    /// Says how the program has ended.
    pub(crate) fn ended(&self, status: i32) {
        self.send(ENDED, status);
    }

    pub(crate) fn number(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    fn this_process(&self, kind: u8) -> io::Result<()> {
        let own = rustix::process::getpid();
        let pidfd = rustix::process::pidfd_open(own, PidfdFlags::empty())?;
        let descriptors = [pidfd.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
        let bytes = message(kind, own.as_raw_nonzero().get());
        rustix::net::sendmsg(&self.0, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    fn send(&self, kind: u8, value: i32) {
        // An owner that is gone needs no answer.
        _ = rustix::net::send(&self.0, &message(kind, value), SendFlags::NOSIGNAL);
    }
}

fn message(kind: u8, value: i32) -> [u8; LENGTH] {
    let [a, b, c, d] = value.to_ne_bytes();
    [kind, a, b, c, d]
}
