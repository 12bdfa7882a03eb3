//! Ways in for the fuzz targets, to what is not public.

use std::io;
use std::time::Duration;

use hyper::Request;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use crate::http::{self, Authority, Protocol, Upstream};

/// Reads the answers of netlink to messages.
pub fn netlink_answers(bytes: &[u8]) {
    _ = crate::namespace::answers(bytes);
}

/// Speaks HTTP with a guest that says this; no request reaches a server. Returns what the guest hears.
///
/// # Panics
/// When a request is neither answered nor ends the connection.
pub fn http(bytes: &[u8]) -> Vec<u8> {
    talk(bytes, Protocol::Http1)
}

/// As [`http`], over HTTP/2.
///
/// # Panics
/// As [`http`].
pub fn http2(bytes: &[u8]) -> Vec<u8> {
    talk(bytes, Protocol::Http2)
}

fn talk(bytes: &[u8], protocol: Protocol) -> Vec<u8> {
    const WITHIN: Duration = Duration::from_secs(5);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    let talk = async {
        let (guest, own) = tokio::io::duplex(1 << 20);
        let (mut hears, mut says) = tokio::io::split(guest);
        let authority = Authority { name: "example.test".to_owned(), port: 80, usual_port: 80 };
        let mut heard = Vec::new();
        let say = async {
            // A connection that has ended takes no more.
            says.write_all(bytes).await.ok();
            says.shutdown().await.ok();
        };
        let hear = async { hears.read_to_end(&mut heard).await.ok() };
        let (_served, (), _) = tokio::join!(http::serve(own, authority, NoServer, protocol), say, hear);
        heard
    };
    runtime.block_on(async { tokio::time::timeout(WITHIN, talk).await }).expect("a guest that has ended")
}

/// A server that is never there.
struct NoServer;

impl Upstream for NoServer {
    type Stream = DuplexStream;

    async fn connect(&self) -> io::Result<DuplexStream> {
        Err(io::ErrorKind::ConnectionRefused.into())
    }

    fn decide<B>(&self, _: &mut Request<B>, refused: Option<&'static str>) -> Result<(), String> {
        refused.map_or(Ok(()), |why| Err(why.to_owned()))
    }
}
