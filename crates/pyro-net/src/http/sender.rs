//! The connection to the server, in either version of HTTP.

use std::pin::Pin;

use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};

use super::tasks::Tasks;
use super::{CONNECTION_WINDOW, HEAD_LIST_BYTES, HEADERS, PING, Protocol, STREAM_WINDOW};

/// What requests are sent by.
pub(super) enum Sender {
    Http1(http1::SendRequest<Incoming>),
    Http2(http2::SendRequest<Incoming>),
}

/// What carries them: it must run until it ends.
pub(super) type Carrier = Pin<Box<dyn Future<Output = ()> + Send>>;

impl Sender {
    /// Begins to speak HTTP with a server.
    pub(super) async fn meet(
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        protocol: Protocol,
        tasks: Tasks,
    ) -> Result<(Self, Carrier), hyper::Error> {
        let stream = TokioIo::new(stream);
        match protocol {
            Protocol::Http1 => {
                let (sender, connection) = http1::Builder::new()
                    .preserve_header_case(true)
                    .max_headers(HEADERS)
                    .handshake(stream)
                    .await?;
                Ok((Self::Http1(sender), Box::pin(async move { drop(connection.with_upgrades().await) })))
            }
            Protocol::Http2 => {
                let (sender, connection) = http2::Builder::new(tasks)
                    .timer(TokioTimer::new())
                    .initial_stream_window_size(STREAM_WINDOW)
                    .initial_connection_window_size(CONNECTION_WINDOW)
                    .max_header_list_size(HEAD_LIST_BYTES)
                    .keep_alive_interval(PING)
                    .handshake(stream)
                    .await?;
                Ok((Self::Http2(sender), Box::pin(async move { drop(connection.await) })))
            }
        }
    }

    /// Waits until another request can be sent; false where none ever can.
    pub(super) async fn is_ready(&mut self) -> bool {
        match self {
            Self::Http1(sender) => sender.ready().await.is_ok(),
            Self::Http2(sender) => sender.ready().await.is_ok(),
        }
    }
}
