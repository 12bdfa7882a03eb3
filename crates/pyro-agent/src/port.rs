//! The virtio-serial port as an asynchronous byte stream.
//!
//! Two threads do blocking reads and writes: event notification on such a port was seen to lose wake-ups.
//! Bounded channels join them to the runtime, so that neither side can fill the guest's memory. What the port takes at
//! once is written without the detour.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::SinkExt;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::io::AsyncWrite;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::io::{CopyToBytes, SinkWriter, StreamReader};
use tokio_util::sync::PollSender;

use pyro_proto::limits::CHUNK;

/// The name under which the VMM announces the port.
const PORT_NAME: &str = "agent";
/// Chunks that may wait in each direction.
const QUEUE: usize = 8;

/// What the host writes.
pub(crate) type FromHost = StreamReader<ReceiverStream<io::Result<Bytes>>, Bytes>;
/// What the host reads.
pub(crate) type ToHost = std::pin::Pin<Box<dyn tokio::io::AsyncWrite + Send>>;

/// How long the port's name may take to come: it is announced after the port itself.
const NAMED_WITHIN: Duration = Duration::from_secs(5);
const BEAT: Duration = Duration::from_millis(5);

/// Opens the port and starts its two threads.
pub(crate) fn open() -> io::Result<(FromHost, ToHost)> {
    let began = Instant::now();
    let path = loop {
        match find() {
            // There is nothing to wait on before there is a port.
            Err(_) if began.elapsed() < NAMED_WITHIN => std::thread::sleep(BEAT),
            found => break found?,
        }
    };
    let reader = File::options().read(true).write(true).open(&path)?;
    let (writer, port) = (reader.try_clone()?, reader.try_clone()?);
    let queued = Arc::new(AtomicUsize::new(0));
    let written = Arc::clone(&queued);
    let (received, incoming) = mpsc::channel(QUEUE);
    let (outgoing, to_send) = mpsc::channel(QUEUE);
    std::thread::Builder::new().stack_size(64 << 10).spawn(move || read_all(reader, &received)).map(drop)?;
    std::thread::Builder::new()
        .stack_size(64 << 10)
        .spawn(move || write_all(writer, to_send, &written))
        .map(drop)?;
    let sink = PollSender::new(outgoing).sink_map_err(|_closed| io::Error::from(io::ErrorKind::BrokenPipe));
    let to_host = Writer { port, queue: SinkWriter::new(CopyToBytes::new(sink)), queued };
    Ok((StreamReader::new(ReceiverStream::new(incoming)), Box::pin(to_host)))
}

/// A writer that outlives the conversations on it: the end of one does not close the port.
struct Writer<W> {
    port: File,
    /// Takes what the port would block on, one chunk with each write.
    queue: W,
    /// Chunks that are in the queue, or are being written from it.
    queued: Arc<AtomicUsize>,
}

impl<W: AsyncWrite + Unpin> AsyncWrite for Writer<W> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        // Nothing may overtake what is queued.
        if self.queued.load(Ordering::Acquire) == 0 && takes_more(&self.port) {
            return Poll::Ready(self.port.write(&bytes[..bytes.len().min(CHUNK)]));
        }
        let queued = Arc::clone(&self.queued);
        queued.fetch_add(1, Ordering::AcqRel);
        let written = Pin::new(&mut self.queue).poll_write(context, bytes);
        if !matches!(written, Poll::Ready(Ok(_))) {
            queued.fetch_sub(1, Ordering::AcqRel);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.queue).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.queue).poll_flush(context)
    }
}

/// Whether a write would not block: a host is there and has taken what was written before. Nobody else writes, so it stays
/// true until this does, or until the host goes away, without whom there is nothing to do.
fn takes_more(port: &File) -> bool {
    let mut polled = [PollFd::new(port, PollFlags::OUT)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut polled, Some(&now)).is_ok() && polled[0].revents() == PollFlags::OUT
}

fn find() -> io::Result<PathBuf> {
    for entry in std::fs::read_dir("/sys/class/virtio-ports")? {
        let entry = entry?;
        let name = File::open(entry.path().join("name")).and_then(io::read_to_string).unwrap_or_default();
        if name.trim() == PORT_NAME {
            return Ok(PathBuf::from("/dev").join(entry.file_name()));
        }
    }
    Err(io::Error::new(io::ErrorKind::NotFound, format!("no virtio port is named {PORT_NAME}")))
}

fn read_all(mut port: File, received: &mpsc::Sender<io::Result<Bytes>>) {
    let mut buffer = vec![0; CHUNK];
    loop {
        match port.read(&mut buffer) {
            // No host is connected. The port has no event for its coming that can be relied on.
            Ok(0) => std::thread::sleep(Duration::from_millis(20)),
            Ok(length) => {
                if received.blocking_send(Ok(Bytes::copy_from_slice(&buffer[..length]))).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                drop(received.blocking_send(Err(error)));
                return;
            }
        }
    }
}

fn write_all(mut port: File, mut to_send: mpsc::Receiver<Bytes>, queued: &AtomicUsize) {
    while let Some(bytes) = to_send.blocking_recv() {
        if port.write_all(&bytes).is_err() {
            return;
        }
        queued.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    /// A pipe in the port's place.
    fn writer() -> (Writer<impl AsyncWrite + Unpin>, mpsc::Receiver<Bytes>, File) {
        let (read, write) = rustix::pipe::pipe().expect("a pipe");
        let (outgoing, to_send) = mpsc::channel::<Bytes>(4);
        let sink =
            PollSender::new(outgoing).sink_map_err(|_closed| io::Error::from(io::ErrorKind::BrokenPipe));
        let queue = SinkWriter::new(CopyToBytes::new(sink));
        (Writer { port: write.into(), queue, queued: Arc::default() }, to_send, read.into())
    }

    #[tokio::test]
    async fn the_end_of_a_conversation_does_not_close_the_port() {
        let (mut to_host, _queue, mut port) = writer();
        to_host.write_all(b"first").await.expect("written");
        to_host.shutdown().await.expect("flushed");
        to_host.write_all(b"second").await.expect("written all the same");
        to_host.flush().await.expect("flushed");
        let mut both = [0; 11];
        port.read_exact(&mut both).expect("read");
        assert_eq!(&both, b"firstsecond");
    }

    #[tokio::test]
    async fn what_the_port_does_not_take_is_queued_and_not_overtaken() {
        let (mut to_host, mut queue, mut port) = writer();
        while takes_more(&to_host.port) {
            to_host.write_all(&[0; 4096]).await.expect("written");
        }
        to_host.write_all(b"one").await.expect("queued");
        port.read_exact(&mut [0; 8192]).expect("read");
        to_host.write_all(b"two").await.expect("queued behind it");
        assert_eq!(queue.recv().await.as_deref(), Some(&b"one"[..]));
        assert_eq!(queue.recv().await.as_deref(), Some(&b"two"[..]));
        to_host.queued.store(0, Ordering::Release);
        to_host.write_all(b"three").await.expect("written");
        assert!(queue.try_recv().is_err());
    }
}
