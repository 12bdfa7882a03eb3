//! A guest's HTTP, read and written anew by one parser, so that each request is for the host that the connection was
//! allowed for.
//!
//! A connection to an allowed name may carry requests for any other name of the same server, as with content delivery
//! networks. So every request is parsed, its `Host` is held against the name, and what is passed on is what was understood.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST, HeaderName, HeaderValue, UPGRADE};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Mutex;
use tokio::task::JoinSet;

/// How long the head of a request may take to arrive.
const HEAD_WITHIN: Duration = Duration::from_secs(10);
const HEAD_BYTES: usize = 64 << 10;
const HEADERS: usize = 100;

type Body = BoxBody<Bytes, hyper::Error>;

/// What a guest speaks HTTP with.
pub(crate) trait Upstream: Send + Sync + 'static {
    /// The connection's kind.
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// Connects to the server. It is called once more when the server has closed the connection.
    fn connect(&self) -> impl Future<Output = io::Result<Self::Stream>> + Send;

    /// Decides about a request, and writes the decision down, before any of it is sent.
    ///
    /// # Errors
    /// Why it is refused.
    fn decide(&self, method: &str, path: &str, refused: Option<&'static str>) -> Result<(), String>;
}

/// Speaks HTTP with a guest until one side has ended. `authority` is what each request must name as its host.
pub(crate) async fn serve<U: Upstream>(
    guest: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    authority: Authority,
    upstream: U,
) -> Result<(), hyper::Error> {
    let session =
        Arc::new(Session { authority, upstream, sender: Mutex::new(None), tasks: StdMutex::default() });
    let service = service_fn(|request| {
        let session = Arc::clone(&session);
        async move { Ok::<_, Infallible>(session.answer(request).await) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_WITHIN)
        .max_buf_size(HEAD_BYTES)
        .max_headers(HEADERS)
        .preserve_header_case(true)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(guest), service)
        .with_upgrades()
        .await;
    // What has taken over the connection goes on after HTTP has ended.
    session.finish().await;
    served
}

/// The host that requests must name, and the port of the connection.
#[derive(Clone, Debug)]
pub(crate) struct Authority {
    pub(crate) name: String,
    pub(crate) port: u16,
    /// The port that need not be named.
    pub(crate) usual_port: u16,
}

impl Authority {
    /// Why a request is not for this host.
    fn refuses<B>(&self, request: &Request<B>) -> Option<&'static str> {
        if request.method() == Method::CONNECT {
            return Some("CONNECT asks for another connection");
        }
        if request.uri().authority().is_some() {
            return Some("the request line names a host of its own");
        }
        let headers = request.headers();
        let mut hosts = headers.get_all(HOST).iter();
        match (hosts.next(), hosts.next()) {
            (Some(host), None) if self.is(host) => None,
            (Some(_), None) => Some("Host names another host"),
            (Some(_), Some(_)) => Some("there are two Hosts"),
            (None, _) => Some("there is no Host"),
        }
    }

    fn is(&self, host: &HeaderValue) -> bool {
        let Ok(text) = host.to_str() else { return false };
        let (name, port) = match text.rsplit_once(':') {
            Some((name, port)) => (name, port.parse().ok()),
            None => (text, Some(self.usual_port)),
        };
        let name = name.strip_suffix('.').unwrap_or(name);
        name.eq_ignore_ascii_case(&self.name) && port == Some(self.port)
    }
}

/// One connection of a guest, and the one to the server.
struct Session<U> {
    authority: Authority,
    upstream: U,
    sender: Mutex<Option<SendRequest<Incoming>>>,
    /// Connections to the server, and what has taken over one of them. They end with the session.
    tasks: StdMutex<JoinSet<()>>,
}

impl<U: Upstream> Session<U> {
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that have ended are let go of.
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task);
    }

    async fn finish(&self) {
        drop(self.sender.lock().await.take());
        let mut tasks = std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        while tasks.join_next().await.is_some() {}
    }

    async fn answer(&self, mut request: Request<Incoming>) -> Response<Body> {
        let refused = self.authority.refuses(&request);
        let decided = self.upstream.decide(request.method().as_str(), request.uri().path(), refused);
        if let Err(why) = decided {
            return refusal(StatusCode::FORBIDDEN, &format!("pyro: {why}\n"));
        }
        let upgrades = keep_websocket_only(&mut request);
        let from_guest = hyper::upgrade::on(&mut request);
        let mut response = match self.send(request).await {
            Ok(response) => response,
            Err(error) => {
                let text = format!("pyro: the server could not be reached: {error}\n");
                return refusal(StatusCode::BAD_GATEWAY, &text);
            }
        };
        if response.status() == StatusCode::SWITCHING_PROTOCOLS && !upgrades {
            return refusal(StatusCode::BAD_GATEWAY, "pyro: the server has changed the protocol unasked\n");
        }
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            let from_server = hyper::upgrade::on(&mut response);
            self.spawn(async move {
                let (Ok(guest), Ok(server)) = tokio::join!(from_guest, from_server) else { return };
                let (mut guest, mut server) = (TokioIo::new(guest), TokioIo::new(server));
                // Either side's end or error ends both.
                drop(tokio::io::copy_bidirectional(&mut guest, &mut server).await);
            });
        }
        response.map(BodyExt::boxed)
    }

    /// Sends a request over the connection that is there, or a new one.
    async fn send(&self, request: Request<Incoming>) -> Result<Response<Incoming>, SendError> {
        let mut kept = self.sender.lock().await;
        let ready = match kept.as_mut() {
            Some(sender) => sender.ready().await.is_ok(),
            None => false,
        };
        if !ready {
            let stream = self.upstream.connect().await?;
            let (sender, connection) = hyper::client::conn::http1::Builder::new()
                .preserve_header_case(true)
                .max_headers(HEADERS)
                .handshake(TokioIo::new(stream))
                .await?;
            // It ends with the server, or with its sender.
            self.spawn(async move { drop(connection.with_upgrades().await) });
            *kept = Some(sender);
        }
        match kept.as_mut() {
            Some(sender) => Ok(sender.send_request(request).await?),
            None => Err(io::Error::from(io::ErrorKind::NotConnected).into()),
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum SendError {
    #[error("{0}")]
    Connect(#[from] io::Error),
    #[error("{0}")]
    Http(#[from] hyper::Error),
}

/// Takes the wish for another protocol out of a request, unless it is for the one that carries no requests of its own: HTTP/2
/// on the same connection could name any host. Returns whether the wish stays.
fn keep_websocket_only<B>(request: &mut Request<B>) -> bool {
    let headers = request.headers_mut();
    let Some(wished) = headers.get(UPGRADE) else { return false };
    if wished.as_bytes().eq_ignore_ascii_case(b"websocket") && headers.get_all(UPGRADE).iter().count() == 1 {
        return true;
    }
    for name in [UPGRADE, CONNECTION, HeaderName::from_static("http2-settings")] {
        headers.remove(name);
    }
    false
}

/// An answer of pyro's own, after which the connection ends.
fn refusal(status: StatusCode, text: &str) -> Response<Body> {
    let body = Full::from(Bytes::copy_from_slice(text.as_bytes())).map_err(|never| match never {});
    let mut response = Response::new(body.boxed());
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    response
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

    use super::*;

    /// A server that answers each request with its bytes, and remembers that it was called.
    #[derive(Clone, Default)]
    struct Server(Arc<StdMutex<Vec<DuplexStream>>>);

    impl Upstream for Server {
        type Stream = DuplexStream;

        async fn connect(&self) -> io::Result<DuplexStream> {
            let (own, other) = tokio::io::duplex(64 << 10);
            self.0.lock().expect("no panic").push(other);
            Ok(own)
        }

        fn decide(&self, _method: &str, _path: &str, refused: Option<&'static str>) -> Result<(), String> {
            refused.map_or(Ok(()), |why| Err(why.to_owned()))
        }
    }

    fn authority() -> Authority {
        Authority { name: "example.test".to_owned(), port: 80, usual_port: 80 }
    }

    /// What comes back for these bytes, and whether the server saw anything.
    async fn talk(request: &str) -> (String, bool) {
        let server = Server::default();
        let (mut guest, own) = tokio::io::duplex(64 << 10);
        let task = tokio::spawn(serve(own, authority(), server.clone()));
        guest.write_all(request.as_bytes()).await.expect("written");
        let mut answer = vec![0; 4096];
        let read = async {
            let length = guest.read(&mut answer).await.expect("read");
            String::from_utf8_lossy(&answer[..length]).into_owned()
        };
        let text = tokio::time::timeout(Duration::from_millis(200), read).await.unwrap_or_default();
        task.abort();
        let reached = !server.0.lock().expect("no panic").is_empty();
        (text, reached)
    }

    #[tokio::test]
    async fn a_request_for_another_host_reaches_nobody() {
        for request in [
            "GET / HTTP/1.1\r\nHost: other.test\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: example.test.other.test\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: example.test:81\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: example.test\r\nHost: other.test\r\n\r\n",
            "GET / HTTP/1.1\r\n\r\n",
            "GET http://other.test/ HTTP/1.1\r\nHost: example.test\r\n\r\n",
            "CONNECT other.test:443 HTTP/1.1\r\nHost: example.test\r\n\r\n",
            "no HTTP at all\r\n\r\n",
        ] {
            let (answer, reached) = talk(request).await;
            assert!(answer.starts_with("HTTP/1.1 4"), "{request:?}: {answer:?}");
            assert!(!reached, "{request:?}");
        }
    }

    #[tokio::test]
    async fn a_request_for_the_host_is_passed_on_and_a_second_one_for_another_is_not() {
        let server = Server::default();
        let (mut guest, own) = tokio::io::duplex(64 << 10);
        drop(tokio::spawn(serve(own, authority(), server.clone())));
        let requests = "GET /a HTTP/1.1\r\nHost: EXAMPLE.test\r\nX-Odd-Case: 1\r\n\r\n\
                        GET /b HTTP/1.1\r\nHost: other.test\r\n\r\n";
        guest.write_all(requests.as_bytes()).await.expect("written");
        let mut upstream = loop {
            if let Some(upstream) = server.0.lock().expect("no panic").pop() {
                break upstream;
            }
            tokio::task::yield_now().await;
        };
        let mut seen = vec![0; 4096];
        let length = upstream.read(&mut seen).await.expect("read");
        let seen = String::from_utf8_lossy(&seen[..length]).into_owned();
        assert!(seen.starts_with("GET /a HTTP/1.1\r\n") && seen.contains("X-Odd-Case: 1"), "{seen}");
        upstream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.expect("written");
        let mut answers = String::new();
        guest.read_to_string(&mut answers).await.expect("read");
        assert!(answers.contains("\r\n\r\nok") && answers.contains("403 Forbidden"), "{answers}");
        let more = tokio::time::timeout(Duration::from_millis(100), upstream.read_u8()).await;
        assert!(!matches!(more, Ok(Ok(_))), "the second request reached the server");
    }

    #[test]
    fn only_a_websocket_may_take_over_a_connection() {
        let request = |upgrade: &str| {
            let mut request = Request::new(());
            let headers = request.headers_mut();
            headers.insert(UPGRADE, HeaderValue::from_str(upgrade).expect("a value"));
            headers.insert(CONNECTION, HeaderValue::from_static("Upgrade, HTTP2-Settings"));
            headers.insert("http2-settings", HeaderValue::from_static("AAMAAABkAAQAAP__"));
            request
        };
        assert!(keep_websocket_only(&mut request("WebSocket")));
        for other in ["h2c", "websocket, h2c", "tls/1.2"] {
            let mut request = request(other);
            assert!(!keep_websocket_only(&mut request), "{other}");
            assert!(request.headers().is_empty(), "{other}");
        }
    }

    #[tokio::test]
    async fn a_protocol_that_takes_over_the_connection_does() {
        let server = Server::default();
        let (mut guest, own) = tokio::io::duplex(64 << 10);
        drop(tokio::spawn(serve(own, authority(), server.clone())));
        let request =
            "GET /chat HTTP/1.1\r\nHost: example.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
        guest.write_all(request.as_bytes()).await.expect("written");
        let mut upstream = loop {
            if let Some(upstream) = server.0.lock().expect("no panic").pop() {
                break upstream;
            }
            tokio::task::yield_now().await;
        };
        let mut buffer = vec![0; 4096];
        let length = upstream.read(&mut buffer).await.expect("read");
        assert!(String::from_utf8_lossy(&buffer[..length]).to_lowercase().contains("upgrade: websocket"));
        let switch =
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nhello";
        upstream.write_all(switch).await.expect("written");
        let mut text = String::new();
        while !text.contains("hello") {
            let length = guest.read(&mut buffer).await.expect("read");
            assert_ne!(length, 0, "{text}");
            text.push_str(&String::from_utf8_lossy(&buffer[..length]));
        }
        guest.write_all(b"from the guest").await.expect("written");
        let length = upstream.read(&mut buffer).await.expect("read");
        assert_eq!(&buffer[..length], b"from the guest");
    }
}
