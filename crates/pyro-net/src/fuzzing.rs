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

/// As `http`, over HTTP/2.
///
/// # Panics
/// As `http`.
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

/// Puts a secret into headers that a guest has written, for its host and for another.
///
/// # Panics
/// When the value is where it must not be.
pub fn secret(bytes: &[u8]) {
    use hyper::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue};
    const VALUE: &str = "the-value";
    let held = crate::secret::HeldSecret::for_fuzzing(VALUE);
    let find = |text: &[u8]| text.windows(VALUE.len()).any(|window| window == VALUE.as_bytes());
    if find(bytes) {
        return;
    }
    let text = [held.secret.placeholder.as_bytes(), bytes].concat();
    for (name, value) in [(AUTHORIZATION, bytes), (HeaderName::from_static("x-key"), &text)] {
        let Ok(value) = HeaderValue::from_bytes(value) else { continue };
        for host in ["own.test", "other.test"] {
            let mut headers = HeaderMap::new();
            headers.insert(name.clone(), value.clone());
            let used = crate::secret::fill(std::slice::from_ref(&held), host, &mut headers);
            let is_filled = headers.values().any(|value| find(value.as_bytes()));
            assert!(host == "own.test" || (used == Ok(Vec::new()) && !is_filled));
            assert!(!is_filled || used.is_ok_and(|used| used == ["SECRET"]));
        }
    }
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
