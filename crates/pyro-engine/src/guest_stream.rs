//! The byte stream of a conversation with a guest.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, BufReader, ReadBuf};
use tokio::net::UnixStream;

/// More than this is written at once, in bytes.
const MOST_GATHERED: usize = 4096;

/// A stream whose end is that of its last owner: the end of a conversation on it does not close it.
///
/// What is written in short pieces is kept until whoever else is ready has added to it, so that a request and its message
/// are one piece for the guest: each piece is an interrupt there, and two threads that are woken.
pub(crate) struct GuestStream {
    stream: BufReader<UnixStream>,
    gathered: BytesMut,
    /// Others have had their turn since something was gathered.
    waited: bool,
}

impl GuestStream {
    pub(crate) fn new(stream: BufReader<UnixStream>) -> Self {
        Self { stream, gathered: BytesMut::new(), waited: false }
    }

    fn write_gathered(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.gathered.is_empty() {
            let length = ready!(Pin::new(&mut self.stream).poll_write(context, &self.gathered))?;
            if length == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.gathered.advance(length);
        }
        self.waited = false;
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for GuestStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for GuestStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.gathered.len() + bytes.len() <= MOST_GATHERED {
            self.gathered.extend_from_slice(bytes);
            return Poll::Ready(Ok(bytes.len()));
        }
        ready!(self.write_gathered(context))?;
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.gathered.is_empty() && !self.waited {
            self.waited = true;
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        ready!(self.write_gathered(context))?;
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.write_gathered(context))?;
        Pin::new(&mut self.stream).poll_flush(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn short_pieces_arrive_as_one_and_long_ones_in_order() {
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        let mut stream = GuestStream::new(BufReader::new(ours));
        stream.write_all(b"request ").await.expect("gathered");
        let mut buffer = vec![0; 100_000];
        assert!(theirs.try_read(&mut buffer).is_err(), "nothing has come before the flush");
        stream.write_all(b"message").await.expect("gathered");
        stream.flush().await.expect("written");
        let length = theirs.read(&mut buffer).await.expect("read");
        assert_eq!(&buffer[..length], b"request message");

        let long = vec![b'x'; 60_000];
        stream.write_all(b"first").await.expect("gathered");
        stream.write_all(&long).await.expect("written");
        stream.write_all(b"last").await.expect("gathered");
        stream.shutdown().await.expect("flushed, and not closed");
        theirs.read_exact(&mut buffer[..60_009]).await.expect("read");
        assert!(buffer.starts_with(b"firstx") && buffer[..60_009].ends_with(b"xlast"));
        stream.write_all(b"again").await.expect("gathered");
        stream.flush().await.expect("written");
        theirs.read_exact(&mut buffer[..5]).await.expect("read");
    }
}
