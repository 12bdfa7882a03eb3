//! Published ports: sockets of this host that lead to servers on a guest's loopback, through its agent.

use std::collections::HashSet;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener as StdTcpListener};
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pyro_proto::{DialEnd, DialInput, dial_event, dial_input, limits};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{AbortHandle, JoinSet};
use tonic::Streaming;

use crate::error::{Error, ErrorKind};
use crate::guest::{Dialled, Guest};

/// The most ports of one machine.
const MOST: usize = 64;
/// How long a guest may take to connect to its own loopback.
const DIALLED_WITHIN: Duration = Duration::from_secs(30);
/// The pause after an accept that failed for want of descriptors.
const NO_DESCRIPTORS: Duration = Duration::from_millis(50);

/// A port of a guest that is reached by a port of this host. Written as `[IP:]HOSTPORT:GUESTPORT`; without an address it
/// is `127.0.0.1`, and host port 0 stands for one that is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Published {
    /// The address of this host.
    pub host_ip: IpAddr,
    /// The port of this host.
    pub host_port: u16,
    /// The port of the guest.
    pub guest_port: u16,
}

/// The published ports of a task.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TaskPorts {
    /// The task.
    pub task_id: String,
    /// Its ports, in the order in which they were published.
    pub ports: Vec<Published>,
}

/// A change to the published ports of a task, in words. Ports are removed before others are added.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PortChange {
    /// Ports to publish.
    pub add: Vec<String>,
    /// Ports to publish no more: `[IP:]HOSTPORT[:GUESTPORT]`.
    pub remove: Vec<String>,
}

impl Published {
    fn host(&self) -> SocketAddr {
        SocketAddr::new(self.host_ip, self.host_port)
    }

    /// Whether these words name it; what they leave out may be anything.
    fn is_named(&self, text: &str) -> bool {
        text == self.to_string()
            || text == format!("{}:{}", self.host_port, self.guest_port)
            || text == self.host_port.to_string()
            || text == self.host().to_string()
    }
}

impl FromStr for Published {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let refused = |reason: &str| {
            let shown: String = text.chars().take(64).flat_map(char::escape_debug).collect();
            Error::new(ErrorKind::InvalidValue, format!("invalid port '{shown}': {reason}"))
                .hint("write [IP:]HOSTPORT:GUESTPORT, such as 8080:80, or 0:80 for a free port of this host")
        };
        let (host, guest) = text.rsplit_once(':').ok_or_else(|| refused("it has no guest port"))?;
        let (ip, host) = match host.rsplit_once(':') {
            Some((ip, port)) => {
                let bare = ip.strip_prefix('[').and_then(|ip| ip.strip_suffix(']'));
                let ip: IpAddr = bare.unwrap_or(ip).parse().map_err(|_| refused("its address is not one"))?;
                // Without brackets nobody could tell where the address ends.
                if ip.is_ipv6() != bare.is_some() {
                    return Err(refused("an IPv6 address has brackets around it, another has none"));
                }
                (ip, port)
            }
            None => (IpAddr::V4(Ipv4Addr::LOCALHOST), host),
        };
        let number = |text: &str| {
            if text.bytes().all(|byte| byte.is_ascii_digit()) { text.parse().ok() } else { None }
        };
        let host_port = number(host).ok_or_else(|| refused("the host port must be 0 to 65535"))?;
        let guest_port = number(guest).filter(|port: &u16| *port > 0);
        let guest_port = guest_port.ok_or_else(|| refused("the guest port must be 1 to 65535"))?;
        if ip.is_multicast() {
            return Err(refused("nobody can listen on its address"));
        }
        Ok(Self { host_ip: ip, host_port, guest_port })
    }
}

impl fmt::Display for Published {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host(), self.guest_port)
    }
}

/// Ports in words.
///
/// # Errors
/// When one is no port.
pub fn published(texts: &[String]) -> Result<Vec<Published>, Error> {
    texts.iter().map(|text| text.parse()).collect()
}

/// Checks the ports of one machine.
pub(crate) fn check(ports: &[Published]) -> Result<(), Error> {
    let invalid = |text: String| Err(Error::new(ErrorKind::InvalidValue, text));
    if ports.len() > MOST {
        return invalid(format!("a machine has at most {MOST} published ports, not {}", ports.len()));
    }
    let mut seen = HashSet::new();
    match ports.iter().find(|port| port.host_port != 0 && !seen.insert(port.host())) {
        Some(port) => invalid(format!("port {} of {} is published twice", port.host_port, port.host_ip)),
        None => Ok(()),
    }
}

/// A socket that listens, for a guest that is not there yet.
#[derive(Debug)]
pub(crate) struct Bound {
    port: Published,
    listener: StdTcpListener,
}

/// Listens on ports of this host, all of them or none.
pub(crate) fn bind(ports: &[Published]) -> Result<Vec<Bound>, Error> {
    check(ports)?;
    ports.iter().map(bind_one).collect()
}

fn bind_one(port: &Published) -> Result<Bound, Error> {
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::AddrInUse => Error::new(
            ErrorKind::HostResources,
            format!("port {} is in use on {}", port.host_port, port.host_ip),
        )
        .hint("choose another, or 0 for a free one"),
        io::ErrorKind::AddrNotAvailable => {
            Error::new(ErrorKind::InvalidValue, format!("this host has no address {}", port.host_ip))
        }
        io::ErrorKind::PermissionDenied => Error::new(
            ErrorKind::InvalidValue,
            format!("port {} needs rights that this user does not have", port.host_port),
        )
        .hint("choose one of 1024 or more"),
        _ => Error::host(&format!("port {port}"), &error),
    };
    let listener = StdTcpListener::bind(port.host()).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let host_port = listener.local_addr().map_err(failed)?.port();
    Ok(Bound { port: Published { host_port, ..*port }, listener })
}

/// The published ports of a guest that runs. Dropping it closes them, and ends their connections.
#[derive(Debug)]
pub(crate) struct Ports {
    guest: Guest,
    listening: Mutex<Vec<Listening>>,
    /// The right to a stream of the guest's channel.
    streams: Arc<Semaphore>,
}

#[derive(Debug)]
struct Listening {
    port: Published,
    task: AbortHandle,
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Ports {
    pub(crate) fn new(guest: Guest) -> Self {
        Self { guest, listening: Mutex::default(), streams: Arc::new(Semaphore::new(limits::DIALS)) }
    }

    /// Has sockets lead to the guest from now on.
    pub(crate) fn serve(&self, bound: Vec<Bound>) -> Result<(), Error> {
        if !bound.is_empty() {
            self.guest.check_dial().map_err(|error| Error::new(ErrorKind::WrongState, error.to_string()))?;
        }
        for Bound { port, listener } in bound {
            let listener =
                TcpListener::from_std(listener).map_err(|error| Error::host("a socket", &error))?;
            let serve = accept(listener, port.guest_port, self.guest.clone(), Arc::clone(&self.streams));
            let task = tokio::spawn(serve).abort_handle();
            self.listening().push(Listening { port, task });
        }
        Ok(())
    }

    /// What is published.
    pub(crate) fn list(&self) -> Vec<Published> {
        self.listening().iter().map(|listening| listening.port).collect()
    }

    /// Makes a change, whole or not at all; returns what is published then.
    pub(crate) fn change(&self, change: &PortChange) -> Result<Vec<Published>, Error> {
        let (left, add) = change.applied(&self.list())?;
        check(&[&left[..], &add].concat())?;
        let removed: Vec<Listening> = {
            let mut listening = self.listening();
            listening.extract_if(.., |listening| !left.contains(&listening.port)).collect()
        };
        // A port that was closed may be wanted again in the same change.
        let again: Vec<Published> = removed.iter().map(|listening| listening.port).collect();
        drop(removed);
        let served = bind(&add).and_then(|bound| self.serve(bound));
        if let Err(error) = served {
            // What was taken away comes back, as far as nobody else has taken it.
            drop(bind(&again).and_then(|bound| self.serve(bound)));
            return Err(error);
        }
        Ok(self.list())
    }

    fn listening(&self) -> MutexGuard<'_, Vec<Listening>> {
        self.listening.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PortChange {
    /// Whether it changes nothing.
    pub(crate) fn is_empty(&self) -> bool {
        self.add.is_empty() && self.remove.is_empty()
    }

    /// The ports that stay, and those that come.
    pub(crate) fn applied(&self, now: &[Published]) -> Result<(Vec<Published>, Vec<Published>), Error> {
        let mut left = now.to_vec();
        for text in &self.remove {
            let named: Vec<usize> = (0..left.len()).filter(|at| left[*at].is_named(text)).collect();
            match named[..] {
                [at] => _ = left.remove(at),
                _ => {
                    let shown: String = text.chars().take(64).flat_map(char::escape_debug).collect();
                    let have: Vec<String> = now.iter().map(ToString::to_string).collect();
                    let have = if have.is_empty() { "none".to_owned() } else { have.join(", ") };
                    let text =
                        format!("port '{shown}' is not published, or more than one is; published: {have}");
                    return Err(Error::new(ErrorKind::InvalidValue, text));
                }
            }
        }
        Ok((left, published(&self.add)?))
    }
}

/// Accepts connections for ever. They end when this ends.
async fn accept(listener: TcpListener, port: u16, guest: Guest, streams: Arc<Semaphore>) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        match accepted {
            Ok((client, _)) => {
                let guest = guest.clone();
                // Meanwhile others wait in the kernel's queue.
                let Ok(stream) = Arc::clone(&streams).acquire_owned().await else { return };
                connections.spawn(async move {
                    lead(client, port, &guest).await;
                    drop(stream);
                });
            }
            Err(_) => tokio::time::sleep(NO_DESCRIPTORS).await,
        }
    }
}

/// Leads one connection to the guest. Where that fails, its other side sees a reset.
async fn lead(mut client: TcpStream, port: u16, guest: &Guest) {
    drop(client.set_nodelay(true));
    let dialled = match tokio::time::timeout(DIALLED_WITHIN, guest.dial(port)).await {
        Ok(Ok(dialled)) => dialled,
        Ok(Err(_)) | Err(_) => {
            drop(client.set_zero_linger());
            return;
        }
    };
    let Dialled { events, inputs } = dialled;
    let (reads, writes) = client.split();
    // The call is kept until both sides have sent their end.
    let carried = tokio::try_join!(to_guest(reads, &inputs), from_guest(events, writes));
    if carried.is_err() {
        // Half of what was sent must not look like the whole.
        drop(client.set_zero_linger());
    }
}

async fn to_guest(mut reads: ReadHalf<'_>, inputs: &mpsc::Sender<DialInput>) -> io::Result<()> {
    let mut buffer = vec![0; limits::CHUNK];
    loop {
        let length = reads.read(&mut buffer).await?;
        let kind = match length {
            0 => dial_input::Kind::End(DialEnd {}),
            _ => dial_input::Kind::Bytes(buffer[..length].to_vec().into()),
        };
        inputs.send(DialInput { kind: Some(kind) }).await.map_err(|_gone| io::ErrorKind::ConnectionReset)?;
        if length == 0 {
            return Ok(());
        }
    }
}

async fn from_guest(
    mut events: Streaming<pyro_proto::DialEvent>,
    mut writes: WriteHalf<'_>,
) -> io::Result<()> {
    loop {
        match events.message().await.map_err(io::Error::other)?.and_then(|event| event.kind) {
            Some(dial_event::Kind::Bytes(bytes)) => writes.write_all(&bytes).await?,
            Some(dial_event::Kind::End(_)) => return writes.shutdown().await,
            _ => return Err(io::ErrorKind::ConnectionReset.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_survives_its_text_and_others_are_refused() {
        for (text, whole) in [
            ("8080:80", "127.0.0.1:8080:80"),
            ("0:1", "127.0.0.1:0:1"),
            ("0.0.0.0:65535:65535", "0.0.0.0:65535:65535"),
            ("[::1]:1:2", "[::1]:1:2"),
        ] {
            let port: Published = text.parse().expect(text);
            assert_eq!(port.to_string(), whole);
            assert_eq!(whole.parse::<Published>().expect(whole), port);
        }
        for text in [
            "",
            "80",
            ":80",
            "80:",
            "a:80",
            "80:0",
            "80:65536",
            "65536:80",
            "+1:80",
            "localhost:1:2",
            "::1:1:2",
            "[1.2.3.4]:1:2",
            "224.0.0.1:1:2",
            "1:2:3:4",
            " 1:2",
        ] {
            let error = text.parse::<Published>().expect_err(text);
            assert!(error.to_string().starts_with("invalid port '"), "{error}");
        }
    }

    #[test]
    fn ports_of_a_machine_are_few_and_different() {
        let ports = |texts: &[&str]| -> Vec<Published> {
            texts.iter().map(|text| text.parse().expect("a port")).collect()
        };
        check(&ports(&["0:80", "0:80", "8080:80", "[::1]:8080:80"])).expect("good");
        check(&ports(&["8080:80", "8080:81"])).expect_err("twice");
        check(&vec![ports(&["0:80"])[0]; MOST + 1]).expect_err("too many");
    }

    #[test]
    fn a_change_names_ports_as_people_do() {
        let now: Vec<Published> = ["8080:80", "[::1]:9090:90", "9090:91"]
            .iter()
            .map(|text| text.parse().expect("a port"))
            .collect();
        let left = |text: &str| {
            let change = PortChange { add: vec!["0:1".to_owned()], remove: vec![text.to_owned()] };
            change.applied(&now).map(|(left, _)| left.len())
        };
        for text in ["8080", "8080:80", "127.0.0.1:8080", "127.0.0.1:8080:80", "9090:91"] {
            assert_eq!(left(text).expect(text), 2);
        }
        for text in ["9090", "80", "8080:81", ""] {
            let error = left(text).expect_err(text).to_string();
            assert!(error.contains("published: 127.0.0.1:8080:80, [::1]:9090:90"), "{error}");
        }
    }

    #[test]
    fn a_port_that_is_taken_is_told_by_its_number() {
        let taken = StdTcpListener::bind("127.0.0.1:0").expect("bound");
        let number = taken.local_addr().expect("bound").port();
        let port: Published = format!("{number}:80").parse().expect("a port");
        let error = bind(&[port]).expect_err("taken");
        assert_eq!(error.to_string(), format!("port {number} is in use on 127.0.0.1"));
    }
}
