//! The guest's resolver: answers from the policy and the alias table, never from a server that the guest can reach.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket as StdUdpSocket};
use std::sync::Arc;
use std::time::Duration;

use quinn_udp::{RecvMeta, Transmit, UdpSocketState};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{TcpStream, UdpSocket};
use tokio::task::JoinSet;

use crate::dial::DialError;
use crate::dns::{Kind as QueryKind, MAX_TCP, MAX_UDP, Plan, Query, Reply, reply_for};
use crate::log::{Entry, Kind};
use crate::names::NamesError;
use crate::network::Shared;
use crate::policy::HOST_NAME;

/// The pause after an error of the socket, so that a lasting error does not keep a processor busy.
const AFTER_ERROR: Duration = Duration::from_millis(10);
/// How long a connection may be idle.
const STREAM_IDLE: Duration = Duration::from_secs(10);

/// A socket on which a guest's queries arrive, to whatever address.
pub(crate) struct Queries {
    socket: UdpSocket,
    state: UdpSocketState,
}

impl Queries {
    pub(crate) fn new(socket: StdUdpSocket) -> io::Result<Self> {
        let state = UdpSocketState::new((&socket).into())?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket: UdpSocket::from_std(socket)?, state })
    }

    /// Answers queries for ever.
    pub(crate) async fn serve(self, shared: Arc<Shared>) {
        let queries = Arc::new(self);
        // They end with this: an answer of a network that has ended must not add to its table of names.
        let mut answers = JoinSet::new();
        loop {
            let received = tokio::select! {
                received = queries.receive() => received,
                Some(_) = answers.join_next() => continue,
            };
            let (bytes, from, to) = match received {
                Ok(received) => received,
                // A reply that was refused comes back as an error of the socket.
                Err(_) => {
                    tokio::time::sleep(AFTER_ERROR).await;
                    continue;
                }
            };
            if bytes.len() > MAX_UDP {
                continue;
            }
            let query = match Query::read(&bytes) {
                Ok(query) => query,
                Err(malformed) => {
                    if let Some(reply) = malformed.reply {
                        drop(queries.send(&reply, from, to).await);
                    }
                    continue;
                }
            };
            let Some(permit) = shared.query_permit() else { continue };
            let (queries, shared) = (Arc::clone(&queries), Arc::clone(&shared));
            // A name that takes long to resolve must not hold up the others.
            answers.spawn(async move {
                let reply = answer(&shared, &query).await;
                drop(queries.send(&reply, from, to).await);
                drop(permit);
            });
        }
    }

    /// One datagram, who sent it, and to which address.
    async fn receive(&self) -> io::Result<(Vec<u8>, SocketAddr, Option<IpAddr>)> {
        // One byte more than a query may have: a longer one is seen to be too long.
        let mut bytes = [0; MAX_UDP + 1];
        let mut meta = [RecvMeta::default()];
        self.socket
            .async_io(Interest::READABLE, || {
                let mut buffers = [IoSliceMut::new(&mut bytes)];
                self.state.recv((&self.socket).into(), &mut buffers, &mut meta)
            })
            .await?;
        let [meta] = meta;
        Ok((bytes[..meta.len.min(bytes.len())].to_vec(), meta.addr, meta.dst_ip))
    }

    async fn send(&self, reply: &[u8], to: SocketAddr, from: Option<IpAddr>) -> io::Result<()> {
        let transmit =
            Transmit { destination: to, ecn: None, contents: reply, segment_size: None, src_ip: from };
        self.socket
            .async_io(Interest::WRITABLE, || self.state.try_send((&self.socket).into(), &transmit))
            .await
    }
}

/// Answers queries over a connection, each with its length before it.
pub(crate) async fn serve_stream(shared: &Arc<Shared>, mut guest: TcpStream) {
    let served = async {
        loop {
            let length = tokio::time::timeout(STREAM_IDLE, guest.read_u16()).await??;
            let length = usize::from(length);
            if length > MAX_TCP {
                return Err(io::Error::from(io::ErrorKind::InvalidData));
            }
            let mut bytes = vec![0; length];
            tokio::time::timeout(STREAM_IDLE, guest.read_exact(&mut bytes)).await??;
            let query = Query::read(&bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
            let reply = answer(shared, &query).await;
            let length = u16::try_from(reply.len()).unwrap_or(u16::MAX);
            guest.write_all(&[&length.to_be_bytes()[..], &reply].concat()).await?;
        }
    };
    let _ended: Result<(), io::Error> = served.await;
}

/// The reply to a query, which is written down first. A name that the policy does not allow is asked of nobody.
async fn answer(shared: &Shared, query: &Query) -> Vec<u8> {
    let name = query.name();
    // A service of an allowed name, such as `_http._tcp.deb.debian.org`: it has none here, which is no denial.
    let host = name.split_once("._tcp.").or_else(|| name.split_once("._udp.")).map(|(_, host)| host);
    let is_service = host.is_some_and(|host| shared.policy().answers(host));
    let allowed = is_service || shared.policy().answers(name);
    let mut address = None;
    let mut why = if allowed { "the policy allows it" } else { "the policy does not allow it" }.to_owned();
    let plan = if is_service { Plan::Reply(Reply::Empty) } else { reply_for(query.kind(), allowed) };
    let reply = match plan {
        Plan::Reply(reply) => reply,
        Plan::Alias => match alias(shared, name).await {
            Ok(found) => {
                address = Some(found);
                Reply::Address(found)
            }
            Err(failed) => {
                why = failed.why();
                failed.reply()
            }
        },
    };
    let is_reverse = query.kind() == QueryKind::Pointer;
    if is_reverse && !allowed {
        // Programs look up the names of addresses by themselves. There are none, and the log must not call that a denial.
        why = "addresses have no names here".to_owned();
    }
    let allowed = allowed || is_reverse;
    shared.record(Entry {
        name: Some(name.to_owned()),
        address: address.map(IpAddr::V4),
        allowed: Some(allowed),
        why: Some(why),
        ..Entry::now(Kind::Dns)
    });
    query.reply(reply)
}

enum Failed {
    Unresolved,
    Names(NamesError),
    TooMany,
}

impl Failed {
    fn why(&self) -> String {
        match self {
            Self::Unresolved => "the name does not resolve".to_owned(),
            Self::Names(error) => error.to_string(),
            Self::TooMany => "too many new names in a short time".to_owned(),
        }
    }

    fn reply(&self) -> Reply {
        match self {
            Self::Unresolved => Reply::NoSuchName,
            Self::Names(_) | Self::TooMany => Reply::Failure,
        }
    }
}

/// The address of a name in this sandbox. A name that it has is not asked for again: the host resolves it when the guest
/// connects.
async fn alias(shared: &Shared, name: &str) -> Result<Ipv4Addr, Failed> {
    if let Some(known) = shared.names().alias_of(name) {
        return Ok(known);
    }
    if !shared.may_add_name() {
        return Err(Failed::TooMany);
    }
    let mut real = Vec::new();
    if name != HOST_NAME && !shared.policy().hosts().contains_key(name) {
        let found = match shared.dialer.resolve(name).await {
            Ok(found) => found,
            Err(DialError::Unresolved(_)) => return Err(Failed::Unresolved),
            // What the host could not find out in time, it may know when the guest connects.
            Err(_) => Vec::new(),
        };
        real.extend(found.into_iter().filter_map(|address| match address {
            IpAddr::V4(address) => Some(address),
            IpAddr::V6(_) => None,
        }));
    }
    shared.names().alias(name, &real).map_err(Failed::Names)
}
