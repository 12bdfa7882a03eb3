//! One connection of a guest, from its first packet to its end.
//!
//! The decision is made and written down before anything is dialled. A connection to a name must then prove that it is for
//! that name: by its TLS hello on port 443, by the `Host` of each request on port 80. Elsewhere a TLS hello is held against
//! the name where there is one.

mod server;
#[cfg(test)]
mod tests;

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio_rustls::TlsAcceptor;

use self::server::{Server, TlsServer, dial, dial_tls};
use crate::address::GATEWAY;
use crate::certificates::CertificateError;
use crate::dial::{DialError, Dialled, Target, keep_alive};
use crate::hello::{Hello, HelloStep};
use crate::http::{self, Authority, Protocol};
use crate::log::{Entry, Kind};
use crate::network::Shared;
use crate::policy::{Decision, HOST_NAME, NameCheck, Policy, Why};
use crate::relay::{Carried, ResetOnDrop, carry, carry_one_way, reset, write_all};
use crate::resolver;
use crate::secret;

/// How long a TLS hello may take, once a connection that must begin with one is there. A busy guest under emulation that opens
/// 50 connections at once, and reads its bundle of authorities for each, takes more than 10 s for the last of them.
const HELLO_WITHIN: Duration = Duration::from_secs(60);
const HELLO_BYTES: usize = 16 << 10;
const DNS: u16 = 53;
const HTTP: u16 = 80;
const HTTPS: u16 = 443;

/// Where a connection goes, as far as the policy is concerned.
#[derive(Clone, Debug)]
pub(crate) struct Destination {
    pub(crate) target: Target,
    /// What the guest dialled.
    pub(crate) address: Ipv4Addr,
    pub(crate) port: u16,
}

/// What is known of an open connection, by which a change of policy ends it.
#[derive(Debug)]
pub(crate) struct Opened {
    destination: Destination,
    /// Whether what goes over it is held against its name.
    is_checked: bool,
    /// Whether its TLS ends here.
    is_read: bool,
    /// The server's address, once it is dialled.
    peer: Mutex<Option<IpAddr>>,
}

impl Opened {
    /// Whether a policy allows it as it is.
    pub(crate) fn is_allowed(&self, policy: &Policy) -> bool {
        let Destination { target, port, .. } = &self.destination;
        let peer = *self.peer.lock().unwrap_or_else(PoisonError::into_inner);
        let peer_is_allowed = match (target, peer) {
            (Target::Name(name), Some(peer)) => {
                policy.pinned(name, *port).is_some() || policy.admits_address(peer, *port, true)
            }
            _ => true,
        };
        self.destination.decide(policy).allowed
            && peer_is_allowed
            && (self.is_checked || !self.destination.must_match(policy))
    }

    fn note_peer(&self, peer: Option<IpAddr>) {
        *self.peer.lock().unwrap_or_else(PoisonError::into_inner) = peer;
    }
}

/// Why a connection ended otherwise than by its two sides.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error("{0}")]
    Hello(String),
    /// No decision about the connection: the guest was slow.
    #[error("no TLS hello within {} s", HELLO_WITHIN.as_secs())]
    LateHello,
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("{0}")]
    Http(#[from] hyper::Error),
    #[error("the guest's TLS failed: {0}")]
    GuestTls(io::Error),
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    #[error("the policy does not allow it any more")]
    Revoked,
}

impl Destination {
    /// What this address means here. None for the gateway itself, which has no services but name queries.
    pub(crate) fn of(shared: &Shared, policy: &Policy, dialled: SocketAddr) -> Option<Self> {
        let SocketAddr::V4(dialled) = dialled else { return None };
        let (address, port) = (*dialled.ip(), dialled.port());
        if address == GATEWAY {
            return None;
        }
        let name = shared.names().name_of(address).map(str::to_owned);
        let target = match name {
            Some(name) if name == HOST_NAME => Target::Host,
            Some(name) => {
                let by_name = policy.by_name(&name, port);
                // The alias of a name may be an address that it really has, which a rule of its own may allow; but not where
                // the name itself is denied.
                let is_decided = by_name.allowed || matches!(by_name.why, Why::DeniedBy(_));
                if !is_decided && policy.by_address(address.into(), port).allowed {
                    Target::Address(address)
                } else {
                    Target::Name(name)
                }
            }
            None => Target::Address(address),
        };
        Some(Self { target, address, port })
    }

    /// What the policy says of it.
    pub(crate) fn decide(&self, policy: &Policy) -> Decision {
        match &self.target {
            Target::Name(name) => policy.by_name(name, self.port),
            Target::Address(address) => policy.by_address((*address).into(), self.port),
            Target::Host => policy.host_service(self.port),
        }
    }

    /// Whether TLS ends here, because requests are read or get secrets.
    fn is_read(&self, shared: &Shared, policy: &Policy) -> bool {
        match &self.target {
            Target::Name(name) if self.port == HTTPS => {
                secret::covers(&shared.secrets, name) || policy.inspected(name).is_some()
            }
            _ => false,
        }
    }

    /// Whether a connection must prove that it is for the name.
    fn must_match(&self, policy: &Policy) -> bool {
        matches!(&self.target, Target::Name(name) if policy.check(name) == NameCheck::MustMatch
            || policy.inspected(name).is_some())
    }

    fn name(&self) -> Option<&str> {
        match &self.target {
            Target::Name(name) => Some(name),
            Target::Host => Some(HOST_NAME),
            Target::Address(_) => None,
        }
    }

    /// An entry of the log about it.
    fn entry(&self, kind: Kind, decision: &Decision) -> Entry {
        Entry {
            name: self.name().map(str::to_owned),
            address: Some(self.address.into()),
            port: Some(self.port),
            rule: decision.rule.clone(),
            allowed: Some(decision.allowed),
            why: Some(decision.why.to_string()),
            ..Entry::now(kind)
        }
    }
}

/// Serves a connection to its end. Where it is not allowed, or goes wrong, the guest sees a reset.
pub(crate) async fn serve(shared: Arc<Shared>, guest: TcpStream) {
    let Ok(dialled) = guest.local_addr() else { return reset(&guest) };
    if dialled.port() == DNS {
        return resolver::serve_stream(&shared, guest).await;
    }
    // Listed under the lock of the policy, so that a change ends each connection that was decided by the one before.
    let listed = shared.with_policy(|policy| {
        let destination = Destination::of(&shared, policy, dialled)?;
        let decision = destination.decide(policy);
        let is_read = destination.is_read(&shared, policy);
        let opened = Arc::new(Opened {
            is_checked: is_read || destination.must_match(policy),
            is_read,
            destination,
            peer: Mutex::default(),
        });
        let listed = decision.allowed.then(|| shared.enlist(Arc::clone(&opened)));
        Some((opened, decision, listed))
    });
    let Some((opened, decision, listed)) = listed else { return reset(&guest) };
    let destination = &opened.destination;
    shared.record(destination.entry(Kind::Connect, &decision));
    let Some((number, revoked)) = listed else { return reset(&guest) };
    drop(guest.set_nodelay(true));
    keep_alive(&guest);
    let carried = Arc::<Carried>::default();
    let connection = Connection { shared: &shared, opened: &opened, carried: &carried };
    let result = if opened.is_read {
        connection.serve_tls(guest, decision.clone(), revoked).await
    } else if opened.is_checked && destination.port == HTTP {
        connection.serve_http(guest, decision.clone(), revoked).await
    } else {
        tokio::select! {
            carried = connection.pass_on(&guest) => {
                if carried.is_err() {
                    reset(&guest);
                }
                carried
            }
            _ = revoked => {
                reset(&guest);
                Err(Failed::Revoked)
            }
        }
    };
    shared.delist(number);
    if let Err(error @ (Failed::Hello(_) | Failed::Dial(DialError::Forbidden | DialError::Revoked))) = &result
    {
        // A decision of its own: what was allowed turned out to be something else.
        let mut entry = destination.entry(Kind::Connect, &decision);
        entry.allowed = Some(false);
        entry.why = Some(error.to_string());
        shared.record(entry);
    }
    let mut entry = destination.entry(Kind::Connect, &decision);
    entry.bytes_in = Some(carried.to_guest.load(Ordering::Relaxed));
    entry.bytes_out = Some(carried.from_guest.load(Ordering::Relaxed));
    entry.why = match &result {
        Ok(()) => Some("ended".to_owned()),
        Err(error) => Some(error_text(error)),
    };
    shared.record(entry);
}

fn error_text(error: &Failed) -> String {
    match error {
        Failed::Dial(
            DialError::Connect(cause)
            | DialError::Unresolved(cause)
            | DialError::Proxy(cause)
            | DialError::Tls(cause),
        ) => format!("{error}: {cause}"),
        _ => error.to_string(),
    }
}

struct Connection<'a> {
    shared: &'a Arc<Shared>,
    opened: &'a Arc<Opened>,
    carried: &'a Arc<Carried>,
}

impl Connection<'_> {
    /// Carries bytes unread, once it is known that they are for the name.
    async fn pass_on(&self, guest: &TcpStream) -> Result<(), Failed> {
        let expected = match &self.opened.destination.target {
            Target::Name(name) if self.opened.is_checked => Some(name.as_str()),
            _ => None,
        };
        let mut first = Vec::new();
        if let (Some(name), HTTPS) = (expected, self.opened.destination.port) {
            // Before anything is dialled: the server must not even see a connection that is for another name.
            (first, _) = read_hello(guest, name, Vec::new()).await?;
        }
        let Dialled { stream, first: said, .. } = dial(self.shared, self.opened).await?;
        let mut upstream = ResetOnDrop { stream, is_whole: false };
        let carried = async {
            let upstream = &upstream.stream;
            if !said.is_empty() {
                write_all(guest, &said).await?;
                self.carried.to_guest.fetch_add(said.len() as u64, Ordering::Relaxed);
            }
            if !first.is_empty() {
                self.send_first(upstream, &first).await?;
                return Ok(carry(guest, upstream, self.carried).await?);
            }
            match expected {
                // Whichever side speaks first: what the guest says first is looked at.
                Some(name) => {
                    tokio::try_join!(
                        async { Ok(carry_one_way(upstream, guest, &self.carried.to_guest).await?) },
                        self.carry_checked(guest, upstream, name),
                    )?;
                    Ok(())
                }
                None => Ok(carry(guest, upstream, self.carried).await?),
            }
        };
        let carried: Result<(), Failed> = carried.await;
        upstream.is_whole = carried.is_ok();
        carried
    }

    async fn send_first(&self, upstream: &TcpStream, bytes: &[u8]) -> io::Result<()> {
        write_all(upstream, bytes).await?;
        self.carried.from_guest.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Carries what the guest sends. Where it begins with a TLS hello, that must be for this name.
    async fn carry_checked(&self, guest: &TcpStream, upstream: &TcpStream, name: &str) -> Result<(), Failed> {
        const TLS_HANDSHAKE: u8 = 22;
        let mut first = read_some(guest).await?;
        if first.first() == Some(&TLS_HANDSHAKE) {
            (first, _) = read_hello(guest, name, first).await?;
        }
        self.send_first(upstream, &first).await?;
        Ok(carry_one_way(guest, upstream, &self.carried.from_guest).await?)
    }

    async fn serve_http(
        &self,
        guest: TcpStream,
        decision: Decision,
        revoked: oneshot::Receiver<()>,
    ) -> Result<(), Failed> {
        let Target::Name(name) = &self.opened.destination.target else { return Ok(()) };
        // Of the same socket: the stream itself is the parser's from here on.
        let socket = guest.as_fd().try_clone_to_owned()?;
        let authority = Authority { name: name.clone(), port: HTTP, usual_port: HTTP };
        let server = Server::new(self, name, decision);
        tokio::select! {
            served = http::serve(guest, authority, server, Protocol::Http1) => Ok(served?),
            _ = revoked => {
                _ = rustix::net::sockopt::set_socket_linger(socket, Some(Duration::ZERO));
                Err(Failed::Revoked)
            }
        }
    }

    /// Ends TLS on both sides and reads the requests between.
    async fn serve_tls(
        &self,
        guest: TcpStream,
        decision: Decision,
        mut revoked: oneshot::Receiver<()>,
    ) -> Result<(), Failed> {
        let Target::Name(name) = &self.opened.destination.target else { return Ok(()) };
        let Some(authority) = &self.shared.authority else {
            reset(&guest);
            return Err(Failed::Revoked);
        };
        let socket = guest.as_fd().try_clone_to_owned()?;
        let prepared = async {
            let (hello, offers_http2) = read_hello(&guest, name, Vec::new()).await?;
            // The server first: a guest that is answered may rely on it. It speaks what the guest does.
            let offered =
                if offers_http2 { &[Protocol::Http2, Protocol::Http1][..] } else { &[Protocol::Http1] };
            let (stream, protocol) = dial_tls(self.shared, self.opened, name, offered).await?;
            Ok((hello, stream, protocol, authority.server(name, protocol)?))
        };
        let prepared: Result<_, Failed> = tokio::select! {
            prepared = prepared => prepared,
            _ = &mut revoked => Err(Failed::Revoked),
        };
        let (hello, stream, protocol, config) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => {
                reset(&guest);
                return Err(error);
            }
        };
        let server = TlsServer {
            server: Server::new(self, name, decision),
            first: Mutex::new(Some(stream)),
            protocol,
        };
        let served = async {
            let (reads, writes) = guest.into_split();
            let guest = tokio::io::join(io::Cursor::new(hello).chain(reads), writes);
            let accepted = tokio::time::timeout(HELLO_WITHIN, TlsAcceptor::from(config).accept(guest)).await;
            let guest =
                accepted.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())).map_err(Failed::GuestTls)?;
            let authority = Authority { name: name.clone(), port: HTTPS, usual_port: HTTPS };
            Ok(http::serve(guest, authority, server, protocol).await?)
        };
        tokio::select! {
            served = served => served,
            _ = revoked => {
                _ = rustix::net::sockopt::set_socket_linger(socket, Some(Duration::ZERO));
                Err(Failed::Revoked)
            }
        }
    }
}

/// Waits for bytes of the guest; none at its end.
async fn read_some(guest: &TcpStream) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; HELLO_BYTES];
    loop {
        guest.readable().await?;
        match guest.try_read(&mut bytes) {
            Ok(length) => {
                bytes.truncate(length);
                return Ok(bytes);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// Reads a TLS hello that must be for this name; returns all bytes that were read, `begun` among them, and whether the guest
/// can speak HTTP/2.
async fn read_hello(guest: &TcpStream, name: &str, begun: Vec<u8>) -> Result<(Vec<u8>, bool), Failed> {
    let read = async {
        let (mut hello, mut all, mut fresh) = (Hello::new(), Vec::new(), begun);
        loop {
            if fresh.is_empty() {
                fresh = read_some(guest).await?;
                if fresh.is_empty() {
                    return Err(Failed::Hello("it ended before its TLS hello did".to_owned()));
                }
            }
            let step = hello.feed(&fresh);
            all.append(&mut fresh);
            match step {
                HelloStep::NeedMore => {}
                HelloStep::Name(Some(found)) if found == name => return Ok((all, hello.offers_http2())),
                HelloStep::Name(Some(found)) => {
                    return Err(Failed::Hello(format!("its TLS hello names {found}")));
                }
                HelloStep::Name(None) => return Err(Failed::Hello("its TLS hello names no host".to_owned())),
                HelloStep::NotTls(reason) => return Err(Failed::Hello(format!("it is not TLS: {reason}"))),
            }
        }
    };
    tokio::time::timeout(HELLO_WITHIN, read).await.unwrap_or(Err(Failed::LateHello))
}
