//! Connections of the host to ports of the guest's own loopback.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use pyro_proto::{DialConnected, DialEnd, DialEvent, DialInput, DialRefused, dial_event, dial_input, limits};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

/// Where a server may listen: most do on the first.
const PLACES: [IpAddr; 3] = [
    IpAddr::V4(Ipv4Addr::LOCALHOST),
    IpAddr::V6(Ipv6Addr::LOCALHOST),
    IpAddr::V4(Ipv4Addr::new(198, 18, 0, 2)),
];

type Events = mpsc::Sender<Result<DialEvent, Status>>;

/// Connects and carries bytes both ways; its events come on the channel. Dropping the receiver resets the connection.
pub(crate) fn run(port: u16, inputs: Streaming<DialInput>) -> mpsc::Receiver<Result<DialEvent, Status>> {
    let (events, receiver) = mpsc::channel(4);
    drop(tokio::spawn(async move {
        match connect(port).await {
            Ok(stream) => {
                if let Err(error) = carry(stream, inputs, &events).await {
                    // Told as the end of the call: the host resets its side.
                    drop(events.send(Err(Status::aborted(error.to_string()))).await);
                }
            }
            Err(error) => {
                let message = error.to_string();
                drop(events.send(event(dial_event::Kind::Refused(DialRefused { message }))).await);
            }
        }
    }));
    receiver
}

async fn connect(port: u16) -> io::Result<TcpStream> {
    let mut first = None;
    for place in PLACES {
        match TcpStream::connect((place, port)).await {
            Ok(stream) => {
                drop(stream.set_nodelay(true));
                return Ok(stream);
            }
            // What the first place says tells most.
            Err(error) => _ = first.get_or_insert(error),
        }
    }
    Err(first.unwrap_or_else(|| io::ErrorKind::AddrNotAvailable.into()))
}

async fn carry(stream: TcpStream, mut inputs: Streaming<DialInput>, events: &Events) -> io::Result<()> {
    let connected = dial_event::Kind::Connected(DialConnected {});
    drop(events.send(event(connected)).await);
    let mut stream = stream;
    let (reads, writes) = stream.split();
    let carried = tokio::select! {
        carried = async { tokio::try_join!(to_host(reads, events), from_host(&mut inputs, writes)) } => carried.map(drop),
        // The host has gone away.
        () = events.closed() => Err(io::ErrorKind::ConnectionReset.into()),
    };
    if carried.is_err() {
        // Half of what was sent must not look like the whole.
        drop(stream.set_zero_linger());
    }
    carried
}

async fn to_host(mut reads: ReadHalf<'_>, events: &Events) -> io::Result<()> {
    let mut buffer = vec![0; limits::CHUNK];
    loop {
        let length = reads.read(&mut buffer).await?;
        let kind = match length {
            0 => dial_event::Kind::End(DialEnd {}),
            _ => dial_event::Kind::Bytes(buffer[..length].to_vec().into()),
        };
        // Taken only as fast as the host takes it.
        events.send(event(kind)).await.map_err(|_gone| io::ErrorKind::ConnectionReset)?;
        if length == 0 {
            return Ok(());
        }
    }
}

async fn from_host(inputs: &mut Streaming<DialInput>, mut writes: WriteHalf<'_>) -> io::Result<()> {
    loop {
        match inputs.message().await.map_err(io::Error::other)?.and_then(|input| input.kind) {
            Some(dial_input::Kind::Bytes(bytes)) => writes.write_all(&bytes).await?,
            Some(dial_input::Kind::End(DialEnd {})) => return writes.shutdown().await,
            Some(dial_input::Kind::Port(_)) | None => return Err(io::ErrorKind::ConnectionReset.into()),
        }
    }
}

fn event(kind: dial_event::Kind) -> Result<DialEvent, Status> {
    Ok(DialEvent { kind: Some(kind) })
}
