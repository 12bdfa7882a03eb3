//! A guest's HTTP, read and written anew by one parser, so that each request is for the host that the connection was
//! allowed for.
//!
//! A connection to an allowed name may carry requests for any other name of the same server, as with content delivery
//! networks. So every request is parsed, its host is held against the name, and what is passed on is what was understood.
//! The server hears the same version of HTTP that the guest speaks.

mod authority;
mod sender;
mod tasks;
#[cfg(test)]
mod tests;

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::TrySendError;
use hyper::header::{CONNECTION, CONTENT_TYPE, HeaderName, HeaderValue, UPGRADE};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Mutex;

pub(crate) use self::authority::Authority;
use self::sender::Sender;
use self::tasks::{Keeper, Tasks};

/// How long the head of a request may take to arrive, and a connection may be idle between two: as long as servers wait, since a
/// tool that thinks meanwhile may not send what it sends to a closed connection again.
const HEAD_WITHIN: Duration = Duration::from_secs(75);
const HEAD_BYTES: usize = 64 << 10;
const HEADERS: usize = 100;
const HEAD_LIST_BYTES: u32 = 64 << 10;
/// What a side of an HTTP/2 connection may send before it is read: of one request, and of all.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;
/// Requests of one HTTP/2 connection at the same time.
const STREAMS: u32 = 128;
/// A silent HTTP/2 connection is asked after so long whether its other side is there.
const PING: Duration = Duration::from_secs(60);

type Body = BoxBody<Bytes, hyper::Error>;
/// What came of a request; one that was not sent comes back.
type Tried = Result<Response<Incoming>, TrySendError<Request<Incoming>>>;

/// The version of HTTP that a connection speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Protocol {
    Http1,
    Http2,
}

impl Protocol {
    /// Its name where the two sides of TLS agree upon it.
    pub(crate) fn alpn(self) -> &'static [u8] {
        match self {
            Self::Http1 => b"http/1.1",
            Self::Http2 => b"h2",
        }
    }
}

/// What a guest speaks HTTP with.
pub(crate) trait Upstream: Send + Sync + 'static {
    /// The connection's kind.
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// Connects to the server. It is called once more when the server has closed the connection.
    fn connect(&self) -> impl Future<Output = io::Result<Self::Stream>> + Send;

    /// Decides about a request, and writes the decision down, before any of it is sent. One that is allowed may get other
    /// headers.
    ///
    /// # Errors
    /// Why it is refused.
    fn decide<B>(&self, request: &mut Request<B>, refused: Option<&'static str>) -> Result<(), String>;
}

/// Speaks HTTP with a guest until one side has ended. `authority` is what each request must name as its host.
pub(crate) async fn serve<U: Upstream>(
    guest: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    authority: Authority,
    upstream: U,
    protocol: Protocol,
) -> Result<(), hyper::Error> {
    let keeper = Keeper::new();
    let tasks = keeper.0.clone();
    let session =
        Arc::new(Session { authority, upstream, protocol, sender: Mutex::new(None), tasks: tasks.clone() });
    let service = service_fn(|request| {
        let session = Arc::clone(&session);
        async move { Ok::<_, Infallible>(session.answer(request).await) }
    });
    let guest = TokioIo::new(guest);
    let served = match protocol {
        Protocol::Http1 => {
            hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_WITHIN)
                .max_buf_size(HEAD_BYTES)
                .max_headers(HEADERS)
                .preserve_header_case(true)
                .auto_date_header(false)
                .serve_connection(guest, service)
                .with_upgrades()
                .await
        }
        Protocol::Http2 => {
            hyper::server::conn::http2::Builder::new(tasks)
                .timer(TokioTimer::new())
                .initial_stream_window_size(STREAM_WINDOW)
                .initial_connection_window_size(CONNECTION_WINDOW)
                .max_concurrent_streams(STREAMS)
                .max_header_list_size(HEAD_LIST_BYTES)
                .keep_alive_interval(PING)
                .auto_date_header(false)
                .serve_connection(guest, service)
                .await
        }
    };
    // What has taken over the connection goes on after HTTP has ended.
    drop(session.sender.lock().await.take());
    keeper.finish().await;
    served
}

/// One connection of a guest, and the one to the server.
struct Session<U> {
    authority: Authority,
    upstream: U,
    protocol: Protocol,
    sender: Mutex<Option<Sender>>,
    /// Connections to the server, and what has taken over one of them.
    tasks: Tasks,
}

impl<U: Upstream> Session<U> {
    async fn answer(&self, mut request: Request<Incoming>) -> Response<Body> {
        let refused = self.authority.refuses(&request);
        if let Err(why) = self.upstream.decide(&mut request, refused) {
            return self.refusal(StatusCode::FORBIDDEN, &format!("pyro: {why}\n"));
        }
        let upgrades = keep_websocket_only(&mut request);
        let from_guest = hyper::upgrade::on(&mut request);
        let mut response = match self.send(request).await {
            Ok(response) => response,
            Err(error) => {
                let text = format!("pyro: the server could not be reached: {error}\n");
                return self.refusal(StatusCode::BAD_GATEWAY, &text);
            }
        };
        if response.status() == StatusCode::SWITCHING_PROTOCOLS && !upgrades {
            let text = "pyro: the server has changed the protocol unasked\n";
            return self.refusal(StatusCode::BAD_GATEWAY, text);
        }
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            let from_server = hyper::upgrade::on(&mut response);
            self.tasks.spawn(async move {
                let (Ok(guest), Ok(server)) = tokio::join!(from_guest, from_server) else { return };
                let (mut guest, mut server) = (TokioIo::new(guest), TokioIo::new(server));
                // Either side's end or error ends both.
                drop(tokio::io::copy_bidirectional(&mut guest, &mut server).await);
            });
        }
        response.map(BodyExt::boxed)
    }

    /// Sends a request over the connection that is there, or a new one. One that the server has closed before it took anything
    /// of the request is no reason to fail.
    async fn send(&self, mut request: Request<Incoming>) -> Result<Response<Incoming>, SendError> {
        let mut is_second = false;
        loop {
            match self.try_send(request).await? {
                Ok(response) => return Ok(response),
                Err(mut refused) => match refused.take_message() {
                    Some(again) if !is_second => {
                        (request, is_second) = (again, true);
                        drop(self.sender.lock().await.take());
                    }
                    _ => return Err(refused.into_error().into()),
                },
            }
        }
    }

    async fn try_send(&self, request: Request<Incoming>) -> Result<Tried, SendError> {
        let mut kept = self.sender.lock().await;
        let ready = match kept.as_mut() {
            Some(sender) => sender.is_ready().await,
            None => false,
        };
        if !ready {
            let stream = self.upstream.connect().await?;
            let (sender, connection) = Sender::meet(stream, self.protocol, self.tasks.clone()).await?;
            // It ends with the server, or with its sender.
            self.tasks.spawn(connection);
            *kept = Some(sender);
        }
        match kept.as_mut() {
            Some(Sender::Http1(sender)) => Ok(sender.try_send_request(request).await),
            Some(Sender::Http2(sender)) => {
                let mut sender = sender.clone();
                // Requests of HTTP/2 do not wait for each other.
                drop(kept);
                Ok(sender.try_send_request(request).await)
            }
            None => Err(io::Error::from(io::ErrorKind::NotConnected).into()),
        }
    }

    /// An answer of pyro's own, after which a connection of HTTP/1.1 ends.
    fn refusal(&self, status: StatusCode, text: &str) -> Response<Body> {
        let body = Full::from(Bytes::copy_from_slice(text.as_bytes())).map_err(|never| match never {});
        let mut response = Response::new(body.boxed());
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        if self.protocol == Protocol::Http1 {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
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
