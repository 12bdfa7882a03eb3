//! The standard streams of a command that runs elsewhere: its output to ours as it arrives, ours to its input.

use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsFd;

use pyro_engine::{Chunk, Stream};
use tokio::io::AsyncRead;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::io::StreamReader;

/// Pieces that may wait for a slow reader or writer.
const QUEUE: usize = 8;
const PIECE: usize = 64 << 10;

/// What became of output.
#[derive(Debug)]
pub(crate) enum Written {
    /// All of it is written.
    All,
    /// Whoever read it has gone away.
    Unread,
    /// It cannot be written.
    Failed(io::Error),
}

/// Writes output as it arrives, on a thread of its own: a reader that stalls must not keep signals from being heard.
#[derive(Debug)]
pub(crate) struct Forwarder(oneshot::Receiver<Written>);

impl Forwarder {
    /// Starts to write what comes on the channel.
    pub(crate) fn start() -> (mpsc::Sender<Chunk>, Self) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let (done, ended) = oneshot::channel();
        // A thread that cannot be had drops its end, which counts as written: there was nothing to write.
        drop(std::thread::spawn(move || done.send(write_all(receiver))));
        (sender, Self(ended))
    }

    /// Waits until everything is written, once all senders are gone.
    pub(crate) async fn finish(self) -> Written {
        self.0.await.unwrap_or(Written::All)
    }
}

fn write_all(mut chunks: mpsc::Receiver<Chunk>) -> Written {
    while let Some(chunk) = chunks.blocking_recv() {
        let written = match chunk.stream {
            Stream::Stdout => {
                let mut stdout = io::stdout().lock();
                stdout.write_all(&chunk.bytes).and_then(|()| stdout.flush())
            }
            Stream::Stderr => io::stderr().write_all(&chunk.bytes),
        };
        match written {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Written::Unread,
            Err(error) => return Written::Failed(error),
        }
    }
    Written::All
}

/// Our stdin, unless it is a terminal: the command would wait for keys that nobody knows to press. The null device is what a
/// command without input has anyway.
pub(crate) fn stdin() -> Option<Box<dyn AsyncRead + Send + Unpin>> {
    if io::stdin().is_terminal() || is_null(io::stdin()) { None } else { Some(Box::new(read_stdin())) }
}

fn is_null(file: impl AsFd) -> bool {
    let null = rustix::fs::stat("/dev/null");
    let own = rustix::fs::fstat(file);
    matches!((own, null), (Ok(own), Ok(null)) if own.st_rdev == null.st_rdev && own.st_mode == null.st_mode)
}

/// Our stdin and our stdout for a protocol, which then has stdout for itself: whatever else is printed goes to stderr.
pub(crate) fn protocol() -> io::Result<(impl AsyncRead + Send + Unpin, tokio::fs::File)> {
    let stdout = rustix::io::fcntl_dupfd_cloexec(io::stdout(), 3)?;
    rustix::stdio::dup2_stdout(io::stderr())?;
    Ok((read_stdin(), tokio::fs::File::from_std(stdout.into())))
}

/// Reads stdin on a thread that nobody waits for, so that a pipe that stays open does not hold the exit up.
fn read_stdin() -> impl AsyncRead + Send + Unpin {
    let (sender, receiver) = mpsc::channel::<io::Result<bytes::Bytes>>(QUEUE);
    drop(std::thread::spawn(move || {
        let mut buffer = vec![0; PIECE];
        loop {
            let read = io::stdin().lock().read(&mut buffer);
            let piece = match read {
                Ok(0) => return,
                Ok(length) => Ok(bytes::Bytes::copy_from_slice(&buffer[..length])),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => Err(error),
            };
            let failed = piece.is_err();
            if sender.blocking_send(piece).is_err() || failed {
                return;
            }
        }
    }));
    StreamReader::new(ReceiverStream::new(receiver))
}
