//! The server behind a guest's connection: how it is dialled, and what of the guest's requests it hears.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use hyper::Request;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::{Connection, HELLO_WITHIN, Opened};
use crate::dial::{DialError, Dialled};
use crate::http::{self, Protocol};
use crate::log::Kind;
use crate::network::Shared;
use crate::policy::{Decision, judge};
use crate::relay::{Carried, Counted};
use crate::secret;

/// Dials under the policy of this moment, which may have changed since the connection was accepted.
pub(super) async fn dial(shared: &Shared, opened: &Opened) -> Result<Dialled, DialError> {
    let (policy, destination) = (shared.policy(), &opened.destination);
    if !destination.decide(&policy).allowed {
        return Err(DialError::Revoked);
    }
    let dialled = shared.dialer.dial(&policy, &destination.target, destination.port).await?;
    opened.note_peer(dialled.peer);
    // A change that came meanwhile has not seen where it leads.
    if opened.is_allowed(&shared.policy()) { Ok(dialled) } else { Err(DialError::Revoked) }
}

/// As [`dial`], with TLS to a server that must prove its name; tells which of the versions of HTTP the server took.
pub(super) async fn dial_tls(
    shared: &Shared,
    opened: &Opened,
    name: &str,
    offered: &[Protocol],
) -> Result<(TlsStream<TcpStream>, Protocol), DialError> {
    let mut config = ClientConfig::clone(&*shared.dialer.tls().await.map_err(DialError::Tls)?);
    config.alpn_protocols = offered.iter().map(|protocol| protocol.alpn().to_vec()).collect();
    let server =
        ServerName::try_from(name.to_owned()).map_err(|error| DialError::Tls(io::Error::other(error)))?;
    let dialled = dial(shared, opened).await?;
    if !dialled.first.is_empty() {
        let text = "the server spoke before it was asked";
        return Err(DialError::Tls(io::Error::new(io::ErrorKind::InvalidData, text)));
    }
    let met = TlsConnector::from(Arc::new(config)).connect(server, dialled.stream);
    let stream = match tokio::time::timeout(HELLO_WITHIN, met).await {
        Ok(met) => met.map_err(DialError::Tls)?,
        Err(_elapsed) => return Err(DialError::Timeout(HELLO_WITHIN)),
    };
    let is_http2 = stream.get_ref().1.alpn_protocol() == Some(Protocol::Http2.alpn());
    Ok((stream, if is_http2 { Protocol::Http2 } else { Protocol::Http1 }))
}

/// The server behind a connection whose requests are read.
pub(super) struct Server {
    shared: Arc<Shared>,
    opened: Arc<Opened>,
    name: String,
    decision: Decision,
    carried: Arc<Carried>,
}

impl Server {
    pub(super) fn new(connection: &Connection<'_>, name: &str, decision: Decision) -> Self {
        Self {
            shared: Arc::clone(connection.shared),
            opened: Arc::clone(connection.opened),
            name: name.to_owned(),
            decision,
            carried: Arc::clone(connection.carried),
        }
    }

    /// Writes down that a server which was allowed is not.
    fn note_dial(&self, error: DialError) -> io::Error {
        if matches!(error, DialError::Forbidden | DialError::Revoked) {
            let mut entry = self.opened.destination.entry(Kind::Connect, &self.decision);
            entry.allowed = Some(false);
            entry.why = Some(error.to_string());
            self.shared.record(entry);
        }
        io::Error::other(error)
    }

    /// Judges a request by the rules of its host, and writes that down.
    fn judge<B>(
        &self,
        request: &Request<B>,
        refused: Option<&'static str>,
        used: &[String],
    ) -> Result<(), String> {
        let (method, path) = (request.method().as_str(), request.uri().path());
        let policy = self.shared.policy();
        let rules = policy.inspected(&self.name).unwrap_or_default();
        let judged = refused.map_or_else(|| judge(rules, method, path), Err);
        let mut entry = self.opened.destination.entry(Kind::Http, &self.decision);
        entry.method = Some(method.to_owned());
        entry.path = Some(path.to_owned());
        if let Err(why) = judged {
            entry.allowed = Some(false);
            entry.why = Some(why.to_owned());
        } else if !used.is_empty() {
            entry.why = Some(format!("{}, with secret {}", self.decision.why, used.join(", ")));
        }
        self.shared.record(entry);
        judged.map_err(str::to_owned)
    }
}

impl http::Upstream for Server {
    type Stream = Counted<TcpStream>;

    async fn connect(&self) -> io::Result<Self::Stream> {
        let dialled = dial(&self.shared, &self.opened).await.map_err(|error| self.note_dial(error))?;
        Ok(Counted::new(dialled.stream, Arc::clone(&self.carried)))
    }

    fn decide<B>(&self, request: &mut Request<B>, refused: Option<&'static str>) -> Result<(), String> {
        self.judge(request, refused, &[])
    }
}

/// The same, over TLS: the only kind that gets secrets.
pub(super) struct TlsServer {
    pub(super) server: Server,
    /// The connection that was there before the guest was answered.
    pub(super) first: Mutex<Option<TlsStream<TcpStream>>>,
    pub(super) protocol: Protocol,
}

impl http::Upstream for TlsServer {
    type Stream = Counted<TlsStream<TcpStream>>;

    async fn connect(&self) -> io::Result<Self::Stream> {
        let Server { shared, opened, name, carried, .. } = &self.server;
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner).take();
        let stream = match first {
            Some(first) => first,
            None => {
                let dialled = dial_tls(shared, opened, name, &[self.protocol]).await;
                let (stream, protocol) = dialled.map_err(|error| self.server.note_dial(error))?;
                if protocol != self.protocol {
                    return Err(io::Error::other("the server speaks another version of HTTP than before"));
                }
                stream
            }
        };
        Ok(Counted::new(stream, Arc::clone(carried)))
    }

    fn decide<B>(&self, request: &mut Request<B>, refused: Option<&'static str>) -> Result<(), String> {
        // Judged before a secret is put in, and written down with the secrets that it would get.
        let Server { shared, name, .. } = &self.server;
        let mut headers = request.headers().clone();
        let filled = match refused {
            None => secret::fill(&shared.secrets, name, &mut headers),
            Some(why) => Err(why),
        };
        self.server.judge(request, filled.as_ref().err().copied(), filled.as_deref().unwrap_or_default())?;
        *request.headers_mut() = headers;
        Ok(())
    }
}
