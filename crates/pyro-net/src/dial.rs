//! Connections to the outside: the host resolves a name anew at each of them, and dials what its policy admits.

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rustls::ClientConfig;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::outbound::{Outbound, Proxy, Roots};
use crate::policy::Policy;

/// How long a name may take to be resolved.
const RESOLVED_WITHIN: Duration = Duration::from_secs(10);
/// How long all attempts to connect may take together.
const CONNECTED_WITHIN: Duration = Duration::from_secs(30);
/// After so long without an answer, the next address is tried beside the one before.
const STAGGER: Duration = Duration::from_millis(250);
/// Names that are resolved at the same time: each takes a thread.
const LOOKUPS: usize = 32;
/// Addresses of a name that are tried, and how many of them at the same time: each takes a descriptor.
const ADDRESSES: usize = 6;
const AT_ONCE: usize = 2;
/// A connection that carries nothing is asked after so long whether its other side is there, in seconds.
const KEEPALIVE: Duration = Duration::from_secs(60);

/// Where the connections of a guest go to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// A name, which the host resolves.
    Name(String),
    /// An address that the guest has dialled without a name.
    Address(Ipv4Addr),
    /// A service of the host, on its loopback.
    Host,
}

/// Why nothing was connected.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    #[error("the name does not resolve")]
    Unresolved(#[source] io::Error),
    #[error("the name resolves to forbidden addresses only")]
    Forbidden,
    #[error("the policy does not allow it any more")]
    Revoked,
    #[error("the connection failed")]
    Connect(#[source] io::Error),
    #[error("the host's proxy does not connect")]
    Proxy(#[source] io::Error),
    #[error("TLS with the server failed")]
    Tls(#[source] io::Error),
    #[error("no answer within {} s", .0.as_secs())]
    Timeout(Duration),
}

/// A connection to the outside.
#[derive(Debug)]
pub(crate) struct Dialled {
    pub(crate) stream: TcpStream,
    /// What the server has said already.
    pub(crate) first: Bytes,
    /// The server's address; none where a proxy knows it.
    pub(crate) peer: Option<IpAddr>,
}

/// Resolves and connects for one guest.
#[derive(Debug)]
pub(crate) struct Dialer {
    lookups: Arc<Semaphore>,
    outbound: Outbound,
    roots: Roots,
}

impl Dialer {
    pub(crate) fn new(outbound: Outbound) -> Self {
        Self { lookups: Arc::new(Semaphore::new(LOOKUPS)), outbound, roots: Roots::default() }
    }

    /// How to speak TLS with servers.
    pub(crate) async fn tls(&self) -> io::Result<Arc<ClientConfig>> {
        self.roots.client(&self.outbound).await
    }

    /// The addresses of a name, as the host knows them now.
    pub(crate) async fn resolve(&self, name: &str) -> Result<Vec<IpAddr>, DialError> {
        let lookup = async {
            let permit = Arc::clone(&self.lookups).acquire_owned().await;
            let name = name.to_owned();
            // The resolver has limits of its own, and cannot be told to end: the thread keeps its permit until then.
            let lookup = tokio::task::spawn_blocking(move || {
                let _permit = permit;
                #[expect(
                    clippy::disallowed_methods,
                    reason = "the host's own resolver, on a thread that may wait"
                )]
                let found = (name.as_str(), 0).to_socket_addrs();
                found.map(|found| found.map(|address| address.ip().to_canonical()).collect())
            });
            lookup.await.unwrap_or_else(|error| Err(io::Error::other(error)))
        };
        match tokio::time::timeout(RESOLVED_WITHIN, lookup).await {
            Ok(Ok(found)) => Ok(found),
            Ok(Err(error)) => Err(DialError::Unresolved(error)),
            Err(_elapsed) => Err(DialError::Timeout(RESOLVED_WITHIN)),
        }
    }

    /// Connects to a target that the policy allows.
    pub(crate) async fn dial(
        &self,
        policy: &Policy,
        target: &Target,
        port: u16,
    ) -> Result<Dialled, DialError> {
        if let Target::Name(name) = target
            && let Some(pinned) = policy.pinned(name, port)
        {
            return self.connect(vec![pinned]).await;
        }
        let proxy = match target {
            Target::Host => None,
            Target::Address(address) => Some(address.to_string()),
            Target::Name(name) => Some(name.clone()),
        };
        let proxy = match proxy {
            Some(host) => {
                let proxy = self.outbound.proxy_for(&host, port).map_err(DialError::Proxy)?;
                proxy.map(|proxy| (proxy, host))
            }
            None => None,
        };
        let addresses = match target {
            Target::Host => vec![IpAddr::V4(Ipv4Addr::LOCALHOST)],
            Target::Address(address) => vec![IpAddr::V4(*address)],
            Target::Name(name) => match self.resolve(name).await {
                Ok(found) => {
                    let admitted =
                        found.into_iter().filter(|address| policy.admits_address(*address, port, true));
                    in_turn(admitted.collect())
                }
                Err(error) => match proxy {
                    // Where a proxy leads out, the host itself may know no name of the outside.
                    Some((proxy, host)) => return self.tunnel(&proxy, &host, port).await,
                    None => return Err(error),
                },
            },
        };
        // What the host itself is reached by is no part of the internet, unless a rule for addresses names it.
        let is_foreign = |address: &IpAddr| {
            *target == Target::Host || policy.by_address(*address, port).rule.is_some() || !is_own(*address)
        };
        let addresses: Vec<IpAddr> = addresses.into_iter().filter(is_foreign).take(ADDRESSES).collect();
        if addresses.is_empty() {
            return Err(DialError::Forbidden);
        }
        match proxy {
            Some((proxy, host)) => self.tunnel(&proxy, &host, port).await,
            None => {
                self.connect(addresses.into_iter().map(|address| SocketAddr::new(address, port)).collect())
                    .await
            }
        }
    }

    /// Connects through the host's proxy, which the user has named: its own address needs no rule.
    async fn tunnel(&self, proxy: &Proxy, host: &str, port: u16) -> Result<Dialled, DialError> {
        let addresses = match proxy.host.parse() {
            Ok(address) => vec![address],
            Err(_) => in_turn(self.resolve(&proxy.host).await?),
        };
        let targets =
            addresses.into_iter().take(ADDRESSES).map(|address| SocketAddr::new(address, proxy.port));
        let dialled = self.connect(targets.collect()).await?;
        let tunnel = tokio::time::timeout(CONNECTED_WITHIN, proxy.tunnel(dialled.stream, host, port)).await;
        let (stream, first) =
            tunnel.map_err(|_elapsed| DialError::Timeout(CONNECTED_WITHIN))?.map_err(DialError::Proxy)?;
        Ok(Dialled { stream, first, peer: None })
    }

    async fn connect(&self, targets: Vec<SocketAddr>) -> Result<Dialled, DialError> {
        match tokio::time::timeout(CONNECTED_WITHIN, first_of(targets, TcpStream::connect)).await {
            Ok(Ok(stream)) => {
                // What a guest sends in pieces is passed on in pieces.
                drop(stream.set_nodelay(true));
                keep_alive(&stream);
                let peer = stream.peer_addr().ok().map(|peer| peer.ip().to_canonical());
                Ok(Dialled { stream, first: Bytes::new(), peer })
            }
            Ok(Err(error)) => Err(DialError::Connect(error)),
            Err(_elapsed) => Err(DialError::Timeout(CONNECTED_WITHIN)),
        }
    }
}

/// Whether an address is one of this host's own interfaces: only such a one can be bound.
fn is_own(address: IpAddr) -> bool {
    std::net::UdpSocket::bind((address, 0)).is_ok()
}

/// Has the kernel find out when the other side of a connection that carries nothing is gone.
pub(crate) fn keep_alive(stream: &TcpStream) {
    use rustix::net::sockopt::{set_socket_keepalive, set_tcp_keepidle, set_tcp_keepintvl};
    // Without it, a connection whose other side is gone stays open for longer.
    _ = set_socket_keepalive(stream, true);
    _ = set_tcp_keepidle(stream, KEEPALIVE);
    _ = set_tcp_keepintvl(stream, KEEPALIVE / 4);
}

/// Addresses of both families in turn, each family in the order of the resolver, which puts the better ones first.
fn in_turn(addresses: Vec<IpAddr>) -> Vec<IpAddr> {
    let first_is_v6 = addresses.first().is_some_and(IpAddr::is_ipv6);
    let (first, second): (Vec<_>, Vec<_>) =
        addresses.into_iter().partition(|address| address.is_ipv6() == first_is_v6);
    let mut turns = Vec::new();
    let (mut first, mut second) = (first.into_iter(), second.into_iter());
    loop {
        let pair = (first.next(), second.next());
        if pair == (None, None) {
            return turns;
        }
        turns.extend(pair.0);
        turns.extend(pair.1);
    }
}

/// The first connection that succeeds. Another address is tried when one fails, or has not answered for a moment.
async fn first_of<T: Send + 'static, F: Future<Output = io::Result<T>> + Send + 'static>(
    addresses: Vec<SocketAddr>,
    connect: impl Fn(SocketAddr) -> F,
) -> io::Result<T> {
    let mut left = addresses.into_iter();
    let mut attempts = JoinSet::new();
    let mut failed = io::Error::from(io::ErrorKind::AddrNotAvailable);
    loop {
        match left.next() {
            Some(address) => drop(attempts.spawn(connect(address))),
            None if attempts.is_empty() => return Err(failed),
            None => {}
        }
        tokio::select! {
            Some(done) = attempts.join_next() => match done {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(error)) => failed = error,
                Err(error) => failed = io::Error::other(error),
            },
            () = tokio::time::sleep(STAGGER), if left.len() > 0 && attempts.len() < AT_ONCE => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, last], 443))
    }

    #[test]
    fn families_take_turns() {
        let addresses = |texts: &[&str]| -> Vec<IpAddr> {
            texts.iter().map(|text| text.parse().expect("an address")).collect()
        };
        let found = addresses(&["2001:db8::1", "2001:db8::2", "192.0.2.1", "2001:db8::3"]);
        let expected = addresses(&["2001:db8::1", "192.0.2.1", "2001:db8::2", "2001:db8::3"]);
        assert_eq!(in_turn(found), expected);
        assert!(in_turn(Vec::new()).is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_that_fails_is_followed_at_once_and_a_silent_one_after_a_moment() {
        let began = tokio::time::Instant::now();
        let won =
            first_of(vec![address(1), address(2)], async |address| match address.ip().to_string().as_str() {
                "192.0.2.1" => Err(io::Error::from(io::ErrorKind::ConnectionRefused)),
                _ => Ok(address),
            });
        assert_eq!(won.await.expect("connected"), address(2));
        assert_eq!(began.elapsed(), Duration::ZERO);
        let won = first_of(vec![address(1), address(2)], async |tried| {
            if tried == address(1) {
                std::future::pending::<()>().await;
            }
            Ok(tried)
        });
        assert_eq!(won.await.expect("connected"), address(2));
        assert_eq!(began.elapsed(), STAGGER);
        let lost = first_of(vec![address(1)], async |_| {
            Err::<(), _>(io::Error::from(io::ErrorKind::ConnectionRefused))
        });
        assert_eq!(lost.await.expect_err("refused").kind(), io::ErrorKind::ConnectionRefused);
    }
}
