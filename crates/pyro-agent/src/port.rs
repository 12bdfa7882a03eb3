//! The virtio-serial port as an asynchronous byte stream.
//!
//! Two threads do blocking reads and writes: event notification on such a port was seen to lose wake-ups.
//! Bounded channels join them to the runtime, so that neither side can fill the guest's memory.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use futures_util::SinkExt;
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

/// Opens the port and starts its two threads.
pub(crate) fn open() -> io::Result<(FromHost, ToHost)> {
    let path = find()?;
    let reader = File::options().read(true).write(true).open(&path)?;
    let writer = reader.try_clone()?;
    let (received, incoming) = mpsc::channel(QUEUE);
    let (outgoing, to_send) = mpsc::channel(QUEUE);
    std::thread::Builder::new().stack_size(64 << 10).spawn(move || read_all(reader, &received)).map(drop)?;
    std::thread::Builder::new().stack_size(64 << 10).spawn(move || write_all(writer, to_send)).map(drop)?;
    let sink = PollSender::new(outgoing).sink_map_err(|_closed| io::Error::from(io::ErrorKind::BrokenPipe));
    Ok((StreamReader::new(ReceiverStream::new(incoming)), Box::pin(SinkWriter::new(CopyToBytes::new(sink)))))
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
            // No host is connected. The port has no event for its coming that can be relied on, so this is
            // the one place that looks again after a while.
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
