//! Firecracker's hybrid virtio socket, seen from the host: a unix socket on which a connection to a port of the guest
//! is asked for by a line.

use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::short::ShortPath;

/// How long an answer may take. A guest without a driver yet never answers a connection that was asked for too early.
const ANSWER_DEADLINE: Duration = Duration::from_secs(1);
/// The pause before the next attempt: a guest that does not listen yet refuses, and tells nobody when it does.
const BEAT: Duration = Duration::from_millis(5);
/// `OK`, a port, a line feed.
const ANSWER_BYTES_MAX: usize = 32;

/// Connects to a port of the guest, again and again until it listens. Nothing but the request for the connection has
/// been sent on an attempt that failed, so no attempt repeats anything.
pub(super) async fn connect(socket: &Path, port: u32) -> UnixStream {
    loop {
        match tokio::time::timeout(ANSWER_DEADLINE, attempt(socket, port)).await {
            Ok(Ok(stream)) => return stream,
            Ok(Err(_)) => tokio::time::sleep(BEAT).await,
            Err(_elapsed) => {}
        }
    }
}

async fn attempt(socket: &Path, port: u32) -> io::Result<UnixStream> {
    let path = ShortPath::of(socket)?;
    let mut stream = UnixStream::connect(path.path()).await?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    let mut answer = Vec::new();
    // Byte by byte: what follows the line is the guest's.
    loop {
        match stream.read_u8().await? {
            b'\n' => break,
            byte if answer.len() < ANSWER_BYTES_MAX => answer.push(byte),
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
    }
    if answer.starts_with(b"OK ") { Ok(stream) } else { Err(io::ErrorKind::InvalidData.into()) }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncBufReadExt;
    use tokio::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn attempts_are_made_until_the_guest_listens() {
        let dir = tempfile::tempdir().expect("a directory");
        let socket = dir.path().join("vsock.sock");
        let connecting = tokio::spawn({
            let socket = socket.clone();
            async move { connect(&socket, 5005).await }
        });
        tokio::time::sleep(Duration::from_millis(20)).await;
        let listener = UnixListener::bind(&socket).expect("bound");
        // One that closes, one that talks nonsense, one that talks for ever, one that works.
        for answer in ["", "NO\n", "OK 1024567890123456789012345678901234567890", "OK 1024\nhello"] {
            let (stream, _) = listener.accept().await.expect("accepted");
            let mut stream = tokio::io::BufReader::new(stream);
            let mut line = String::new();
            stream.read_line(&mut line).await.expect("read");
            assert_eq!(line, "CONNECT 5005\n");
            stream.get_mut().write_all(answer.as_bytes()).await.expect("written");
            if answer.ends_with("hello") {
                let mut hello = [0; 5];
                let mut connected = connecting.await.expect("no panic");
                connected.read_exact(&mut hello).await.expect("read");
                assert_eq!(&hello, b"hello", "not a byte of the guest's is lost");
                return;
            }
        }
    }
}
