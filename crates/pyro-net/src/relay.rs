//! Bytes between a guest's connection and its upstream, both ways, until both have ended.
//!
//! All connections of a thread share one buffer: a thousand that are idle cost no memory for bytes that are not there.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};

use rustix::net::Shutdown;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

const BUFFER_BYTES: usize = 256 << 10;
/// Bytes that receivers have not taken yet, of all connections of this process; beyond [`HELD_BYTES`] of them only little is
/// read at once, so that receivers who take nothing cannot make this process hold much.
static HELD: AtomicUsize = AtomicUsize::new(0);
const HELD_BYTES: usize = 16 << 20;
const LITTLE_BYTES: usize = 16 << 10;

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; BUFFER_BYTES]);
}

/// Bytes that a connection has carried.
#[derive(Debug, Default)]
pub(crate) struct Carried {
    /// To the guest.
    pub(crate) to_guest: AtomicU64,
    /// From the guest.
    pub(crate) from_guest: AtomicU64,
}

/// A stream to the server whose bytes are counted.
#[derive(Debug)]
pub(crate) struct Counted<S> {
    stream: S,
    carried: Arc<Carried>,
}

impl<S> Counted<S> {
    pub(crate) fn new(stream: S, carried: Arc<Carried>) -> Self {
        Self { stream, carried }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(context, buffer);
        self.carried.to_guest.fetch_add((buffer.filled().len() - before) as u64, Ordering::Relaxed);
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(context, bytes);
        if let Poll::Ready(Ok(written)) = polled {
            self.carried.from_guest.fetch_add(written as u64, Ordering::Relaxed);
        }
        polled
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// What came of one attempt to move bytes.
enum Moved {
    Nothing,
    All(usize),
    /// The receiver did not take these.
    Rest(usize, Vec<u8>),
    End,
}

/// Carries bytes until both sides have ended. An error of either side ends both: the caller resets what is left.
pub(crate) async fn carry(guest: &TcpStream, upstream: &TcpStream, carried: &Carried) -> io::Result<()> {
    tokio::try_join!(
        carry_one_way(guest, upstream, &carried.from_guest),
        carry_one_way(upstream, guest, &carried.to_guest),
    )?;
    Ok(())
}

/// Carries bytes from one side to the other until the first has no more, and then says so to the other.
pub(crate) async fn carry_one_way(from: &TcpStream, to: &TcpStream, count: &AtomicU64) -> io::Result<()> {
    loop {
        from.readable().await?;
        match move_some(from, to)? {
            Moved::Nothing => {}
            Moved::All(bytes) => _ = count.fetch_add(bytes as u64, Ordering::Relaxed),
            Moved::Rest(bytes, rest) => {
                count.fetch_add(bytes as u64, Ordering::Relaxed);
                let _held = Held::new(rest.len());
                write_all(to, &rest).await?;
                count.fetch_add(rest.len() as u64, Ordering::Relaxed);
            }
            Moved::End => break,
        }
    }
    match rustix::net::shutdown(to, Shutdown::Write) {
        // The other side has reset it; what it sent before is for its own direction to find.
        Err(rustix::io::Errno::NOTCONN) | Ok(()) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Counts bytes for as long as they are held.
struct Held(usize);

impl Held {
    fn new(bytes: usize) -> Self {
        HELD.fetch_add(bytes, Ordering::Relaxed);
        Self(bytes)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        HELD.fetch_sub(self.0, Ordering::Relaxed);
    }
}

/// Resets a connection when it is dropped, unless it has ended as it should: a server must not take half of an upload for
/// the whole.
pub(crate) struct ResetOnDrop {
    pub(crate) stream: TcpStream,
    pub(crate) is_whole: bool,
}

impl Drop for ResetOnDrop {
    fn drop(&mut self) {
        if !self.is_whole {
            reset(&self.stream);
        }
    }
}

fn move_some(from: &TcpStream, to: &TcpStream) -> io::Result<Moved> {
    BUFFER.with_borrow_mut(|buffer| {
        let most = if HELD.load(Ordering::Relaxed) > HELD_BYTES { LITTLE_BYTES } else { BUFFER_BYTES };
        let read = match from.try_read(&mut buffer[..most]) {
            Ok(0) => return Ok(Moved::End),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Moved::Nothing),
            Err(error) => return Err(error),
        };
        match to.try_write(&buffer[..read]) {
            Ok(written) if written == read => Ok(Moved::All(read)),
            Ok(written) => Ok(Moved::Rest(written, buffer[written..read].to_vec())),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                Ok(Moved::Rest(0, buffer[..read].to_vec()))
            }
            Err(error) => Err(error),
        }
    })
}

/// Writes all of it.
pub(crate) async fn write_all(to: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        to.writable().await?;
        match to.try_write(bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Has a connection end with a reset, so that the other side sees an error and not an end.
pub(crate) fn reset(stream: &TcpStream) {
    // One that is reset already has nothing to be set.
    drop(stream.set_zero_linger());
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("bound");
        let (one, other) = tokio::join!(TcpStream::connect(address), listener.accept());
        (one.expect("connected"), other.expect("accepted").0)
    }

    #[tokio::test]
    async fn bytes_go_both_ways_and_a_half_that_ended_leaves_the_other_open() {
        let ((mut client, guest), (upstream, mut server)) = (pair().await, pair().await);
        let carried = Carried::default();
        let sent = vec![7; 3 << 20];
        let relay = async {
            carry(&guest, &upstream, &carried).await.expect("carried");
            drop((guest, upstream));
        };
        let talk = async {
            let (got, ()) = tokio::join!(
                async {
                    let mut got = Vec::new();
                    server.read_to_end(&mut got).await.expect("read");
                    got
                },
                async {
                    client.write_all(&sent).await.expect("written");
                    client.shutdown().await.expect("ended");
                }
            );
            assert!(got == sent);
            // The client has ended its half, and still hears.
            server.write_all(b"answer").await.expect("written");
            server.shutdown().await.expect("ended");
            let mut answer = String::new();
            client.read_to_string(&mut answer).await.expect("read");
            assert_eq!(answer, "answer");
        };
        tokio::join!(relay, talk);
        assert_eq!(carried.from_guest.into_inner(), 3 << 20);
        assert_eq!(carried.to_guest.into_inner(), 6);
    }

    #[tokio::test]
    async fn an_error_of_one_side_reaches_the_other_as_an_error() {
        let ((mut client, guest), (upstream, server)) = (pair().await, pair().await);
        server.set_zero_linger().expect("set");
        drop(server);
        let carried = Carried::default();
        assert!(carry(&guest, &upstream, &carried).await.is_err());
        reset(&guest);
        drop(guest);
        let error = client.read(&mut [0]).await.expect_err("reset");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }
}
