//! Lines of JSON over a stream socket, with a limit that holds before memory is taken.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;

use crate::error::ControlError;

/// The longest line that is taken. QEMU's longest answers are some hundred KiB.
const LINE_BYTES_MAX: usize = 1 << 20;
const READ_BYTES: usize = 4 << 10;

/// A stream socket that carries lines.
#[derive(Debug)]
pub(super) struct Lines {
    stream: UnixStream,
    /// What has been received and not yet been taken as a line.
    received: Vec<u8>,
    /// How much of `received` is known to hold no newline.
    searched: usize,
    /// A command was cut off in the middle: what follows it would be misread.
    broken: bool,
}

impl Lines {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self { stream, received: Vec::new(), searched: 0, broken: false }
    }

    /// The next line, without its newline. Cancelling it loses nothing.
    pub(super) async fn next(&mut self) -> Result<Vec<u8>, ControlError> {
        loop {
            if let Some(at) = self.received[self.searched..].iter().position(|byte| *byte == b'\n') {
                let rest = self.received.split_off(self.searched + at + 1);
                let mut line = std::mem::replace(&mut self.received, rest);
                self.searched = 0;
                line.pop();
                return Ok(line);
            }
            self.searched = self.received.len();
            if self.received.len() >= LINE_BYTES_MAX {
                return Err(ControlError::Protocol { what: "a line of more than 1 MiB" });
            }
            self.received.reserve(READ_BYTES);
            let room = (LINE_BYTES_MAX - self.received.len()).min(READ_BYTES) as u64;
            let count = (&mut self.stream).take(room).read_buf(&mut self.received).await.map_err(lost)?;
            if count == 0 {
                return Err(ControlError::Ended);
            }
        }
    }

    /// Sends one line, and `fd` with its first byte.
    pub(super) async fn send(&mut self, line: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<(), ControlError> {
        if self.broken {
            return Err(ControlError::Protocol { what: "an earlier command was cut off" });
        }
        // Until all of it is written, this future may be dropped at any await. A failure is not that: the
        // socket is gone, and will say so again.
        self.broken = true;
        let result = self.send_whole(line, fd).await;
        self.broken = false;
        result.map_err(lost)
    }

    async fn send_whole(&mut self, line: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let sent = match fd {
            Some(fd) => self.send_with(line, fd).await?,
            None => 0,
        };
        self.stream.write_all(&line[sent..]).await
    }

    async fn send_with(&self, line: &[u8], fd: BorrowedFd<'_>) -> io::Result<usize> {
        let send = || {
            let fds = [fd];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            control.push(SendAncillaryMessage::ScmRights(&fds));
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            Ok(rustix::net::sendmsg(self.stream.as_fd(), &[IoSlice::new(line)], &mut control, flags)?)
        };
        self.stream.async_io(Interest::WRITABLE, send).await
    }
}

/// A socket pair whose other end is closed has lost its process.
fn lost(error: io::Error) -> ControlError {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ControlError::Ended,
        _ => ControlError::Io(error),
    }
}
