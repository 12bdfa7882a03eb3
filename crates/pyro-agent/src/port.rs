//! The virtio-serial port as an asynchronous byte stream.
//!
//! Two threads do blocking reads and writes: event notification on such a port was seen to lose wake-ups.
//! Bounded channels join them to the runtime, so that neither side can fill the guest's memory.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::SinkExt;
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
    let writer = reader.try_clone()?;
    let (received, incoming) = mpsc::channel(QUEUE);
    let (outgoing, to_send) = mpsc::channel(QUEUE);
    std::thread::Builder::new().stack_size(64 << 10).spawn(move || read_all(reader, &received)).map(drop)?;
    std::thread::Builder::new().stack_size(64 << 10).spawn(move || write_all(writer, to_send)).map(drop)?;
    let sink = PollSender::new(outgoing).sink_map_err(|_closed| io::Error::from(io::ErrorKind::BrokenPipe));
    let to_host = KeptOpen(SinkWriter::new(CopyToBytes::new(sink)));
    Ok((StreamReader::new(ReceiverStream::new(incoming)), Box::pin(to_host)))
}

/// A writer that outlives the conversations on it: the end of one does not close the port.
struct KeptOpen<W>(W);

impl<W: AsyncWrite + Unpin> AsyncWrite for KeptOpen<W> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }
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

fn write_all(mut port: File, mut to_send: mpsc::Receiver<Bytes>) {
    while let Some(bytes) = to_send.blocking_recv() {
        if port.write_all(&bytes).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    #[tokio::test]
    async fn the_end_of_a_conversation_does_not_close_the_port() {
        let (outgoing, mut to_send) = mpsc::channel::<Bytes>(4);
        let sink =
            PollSender::new(outgoing).sink_map_err(|_closed| io::Error::from(io::ErrorKind::BrokenPipe));
        let mut to_host = KeptOpen(SinkWriter::new(CopyToBytes::new(sink)));
        to_host.write_all(b"first").await.expect("written");
        to_host.shutdown().await.expect("flushed");
        to_host.write_all(b"second").await.expect("written all the same");
        to_host.flush().await.expect("flushed");
        assert_eq!(to_send.recv().await.as_deref(), Some(&b"first"[..]));
        assert_eq!(to_send.recv().await.as_deref(), Some(&b"second"[..]));
    }
}
