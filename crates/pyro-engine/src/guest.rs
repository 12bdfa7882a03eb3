//! The host's end of the guest channel: handshake, identity, commands.
//!
//! Everything from the guest is hostile. Messages are bounded by the protocol's limits before they are
//! allocated, output is taken only as fast as it is consumed, and each wait has a deadline that the guest
//! cannot move.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hyper_util::rt::TokioIo;
use pyro_proto::agent_client::AgentClient;
use pyro_proto::resync::{self, Step};
use pyro_proto::{
    DialEvent, DialInput, ENVIRONMENT_AND_DIAL, EnvVar, ExecExited, ExecInput, ExecRefused, ExecStart,
    GENERATION, HelloRequest, IdentifyRequest, PowerOffRequest, RestRequest, SetClockRequest, SignalRequest,
    StdinEnd, USER_AND_LATER_OUTPUT, dial_event, dial_input, exec_event, exec_input, limits,
};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};

use crate::error::chain;
use crate::guest_stream::GuestStream;
use crate::spec::{Command, ExecSpec};

/// How long the agent waits between TERM and KILL when a command's time is up.
const KILL_AFTER: Duration = Duration::from_secs(2);
/// A guest that does not answer these is dead or hostile; a crowded host may make it slow.
const KEEP_ALIVE: Duration = Duration::from_secs(20);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(60);

const NO_USERS: &str = "the environment was built by an older pyro, whose guests run commands as root only; build it anew: \
                        pyro env prune, then pyro env pull";
const OLD_AGENT: &str = "the environment was built by an older pyro, whose guests cannot be given secrets or be dialled; \
                         build it anew: pyro env prune, then pyro env pull";

/// How far the clock of a guest may be off, and how often it is set anew where it may be further off.
const CLOCK_ERROR: Duration = Duration::from_millis(50);
const CLOCK_ATTEMPTS: usize = 4;

/// Which of the two output streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A piece of output as it arrived.
#[derive(Clone, Debug)]
pub struct Chunk {
    /// Where it was written.
    pub stream: Stream,
    /// What was written.
    pub bytes: Vec<u8>,
}

/// A guest that has its identity.
#[derive(Clone, Debug)]
pub(crate) struct Guest {
    client: AgentClient<Channel>,
    /// Of the protocol, which its agent speaks.
    generation: u32,
}

/// A connection to a port of the guest.
pub(crate) struct Dialled {
    pub(crate) events: Streaming<DialEvent>,
    pub(crate) inputs: mpsc::Sender<DialInput>,
}

/// Why a port of the guest is not reached.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    #[error("the guest refuses it: {0}")]
    Refused(String),
    #[error("{}", OLD_AGENT)]
    OldAgent,
    #[error("the guest does not answer as it should")]
    Channel(#[from] Status),
}

/// A running command. Dropping it ends the command at once.
pub(crate) struct Exec {
    events: Streaming<pyro_proto::ExecEvent>,
    client: AgentClient<Channel>,
    /// The command's process in the guest, once it has started.
    pid: Option<u32>,
    /// Resolves when its input breaks off.
    broken: Option<oneshot::Receiver<io::Error>>,
    _feeder: AbortOnDrop,
}

/// A task that ends with its owner.
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What makes a guest unlike every other.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) hostname: String,
    /// 32 hexadecimal digits.
    pub(crate) machine_id: String,
    /// A certificate in PEM that its programs trust.
    pub(crate) authority: Option<String>,
    /// Variables of all its commands.
    pub(crate) environment: Vec<(String, String)>,
}

/// What a command did next.
pub(crate) enum Event {
    Output(Chunk),
    /// Its input broke off; it has not been told of an end.
    StdinBroken,
    Exited(ExecExited),
    Refused(ExecRefused),
}

impl Guest {
    /// Meets the agent on a fresh stream and gives the guest its identity.
    pub(crate) async fn meet(stream: UnixStream, identity: &Identity) -> io::Result<Self> {
        let stream = GuestStream::new(begin(stream).await?);
        let stream = Mutex::new(Some(stream));
        let connector = tower::service_fn(move |_| {
            let stream = stream.lock().ok().and_then(|mut stream| stream.take());
            let gone = || io::Error::new(io::ErrorKind::NotConnected, "the guest channel is gone");
            std::future::ready(stream.map(TokioIo::new).ok_or_else(gone))
        });
        let channel = Endpoint::from_static("http://guest")
            .initial_stream_window_size(limits::STREAM_WINDOW)
            .initial_connection_window_size(limits::CONNECTION_WINDOW)
            .http2_max_header_list_size(limits::HEADERS)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
            .connect_with_connector(connector)
            .await
            .map_err(other)?;
        let mut client = AgentClient::new(channel)
            .max_decoding_message_size(limits::EVENT)
            .max_encoding_message_size(limits::MESSAGE);
        let hello = client.hello(HelloRequest { generation: GENERATION }).await.map_err(other)?;
        let generation = hello.get_ref().generation;
        if !(1..=GENERATION).contains(&generation) {
            return Err(io::Error::other("the guest agent speaks another generation of the protocol"));
        }
        let mut guest = Self { client, generation };
        guest.identify(identity).await?;
        Ok(guest)
    }

    async fn identify(&mut self, identity: &Identity) -> io::Result<()> {
        let mut entropy = vec![0; 64];
        getrandom::fill(&mut entropy).map_err(io::Error::other)?;
        let environment = identity.environment.iter().cloned().map(variable);
        let identity = IdentifyRequest {
            entropy: entropy.into(),
            realtime_nanos: realtime_nanos(),
            hostname: identity.hostname.clone(),
            machine_id: identity.machine_id.clone(),
            authority: identity.authority.clone().unwrap_or_default().into(),
            environment: environment.collect(),
        };
        let needs_environment = !identity.authority.is_empty() || !identity.environment.is_empty();
        if needs_environment && self.generation < ENVIRONMENT_AND_DIAL {
            return Err(io::Error::new(io::ErrorKind::Unsupported, OLD_AGENT));
        }
        let mut asked = Instant::now();
        self.client.identify(identity).await.map_err(other)?;
        // A guest's clock is behind by no more than the time between question and answer: on a crowded host, that may
        // be too much.
        for _ in 0..CLOCK_ATTEMPTS {
            if asked.elapsed() <= CLOCK_ERROR {
                break;
            }
            asked = Instant::now();
            self.set_clock().await.map_err(other)?;
        }
        Ok(())
    }

    /// Sets the guest's clock to the host's.
    pub(crate) async fn set_clock(&self) -> Result<(), Status> {
        let request = SetClockRequest { realtime_nanos: realtime_nanos() };
        self.client.clone().set_clock(request).await.map(drop)
    }

    /// Sends a command, once. Where `later_output` is wanted, events go on after an end that tells of more to come.
    pub(crate) async fn exec(&self, spec: ExecSpec, later_output: bool) -> Result<Exec, Status> {
        if spec.user.is_some() && self.generation < USER_AND_LATER_OUTPUT {
            return Err(Status::failed_precondition(NO_USERS));
        }
        let (argv, shell) = match spec.command {
            Command::Argv(words) => (words.into_iter().map(Into::into).collect(), Default::default()),
            Command::Shell(text) => (Vec::new(), text.into()),
        };
        let timeout = Duration::from_secs_f64(spec.timeout_seconds.min(1e9));
        let start = ExecStart {
            argv,
            shell,
            env: spec.env.into_iter().map(variable).collect(),
            user: spec.user.unwrap_or_default().into(),
            later_output,
            cwd: spec.cwd.into(),
            stdin: spec.stdin.is_some(),
            timeout_millis: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX).max(1),
            kill_after_millis: u64::try_from(KILL_AFTER.as_millis()).unwrap_or(u64::MAX),
        };
        let (inputs, receiver) = mpsc::channel(4);
        let start = ExecInput { kind: Some(exec_input::Kind::Start(start)) };
        drop(inputs.send(start).await);
        let (tell_broken, broken) = oneshot::channel();
        let broken = spec.stdin.is_some().then_some(broken);
        let feeder = AbortOnDrop(tokio::spawn(feed(spec.stdin, inputs, tell_broken)));
        let reply = self.client.clone().exec(ReceiverStream::new(receiver)).await?;
        let events = reply.into_inner();
        Ok(Exec { events, client: self.client.clone(), pid: None, broken, _feeder: feeder })
    }

    /// Connects to a port of the guest's own loopback.
    pub(crate) async fn dial(&self, port: u16) -> Result<Dialled, DialError> {
        if self.generation < ENVIRONMENT_AND_DIAL {
            return Err(DialError::OldAgent);
        }
        let (inputs, receiver) = mpsc::channel(4);
        let first = DialInput { kind: Some(dial_input::Kind::Port(port.into())) };
        drop(inputs.send(first).await);
        let reply = self.client.clone().dial(ReceiverStream::new(receiver)).await?;
        let mut events = reply.into_inner();
        match events.message().await?.and_then(|event| event.kind) {
            Some(dial_event::Kind::Connected(_)) => Ok(Dialled { events, inputs }),
            Some(dial_event::Kind::Refused(refused)) => {
                // A guest may say anything.
                Err(DialError::Refused(
                    refused.message.chars().take(200).filter(|c| !c.is_control()).collect(),
                ))
            }
            _ => Err(Status::unavailable("the guest began in the middle").into()),
        }
    }

    /// Whether ports of it can be dialled.
    pub(crate) fn check_dial(&self) -> Result<(), DialError> {
        if self.generation < ENVIRONMENT_AND_DIAL { Err(DialError::OldAgent) } else { Ok(()) }
    }

    /// Brings the guest to rest, and ends the conversation; nothing of it is used afterwards.
    pub(crate) async fn rest(mut self) -> Result<(), Status> {
        self.client.rest(RestRequest {}).await.map(drop)
    }

    /// Asks the guest to end its commands, write its disks and power off. It answers by ending.
    pub(crate) async fn power_off(&self) {
        drop(self.client.clone().power_off(PowerOffRequest {}).await);
    }
}

impl Exec {
    /// Asks for a signal to the command's process group, and does not wait for it.
    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let Some(pid) = self.pid else { return };
        let request = SignalRequest { pid, signal: u32::try_from(signal.as_raw()).unwrap_or_default() };
        let mut client = self.client.clone();
        drop(tokio::spawn(async move { client.signal(request).await }));
    }

    /// The next thing that happens; an error when the connection broke.
    pub(crate) async fn next(&mut self) -> Result<Event, Status> {
        loop {
            let broken = async {
                match &mut self.broken {
                    Some(broken) => broken.await.is_ok(),
                    None => std::future::pending().await,
                }
            };
            let event = tokio::select! {
                biased;
                is_broken = broken => {
                    self.broken = None;
                    if is_broken {
                        return Ok(Event::StdinBroken);
                    }
                    continue;
                }
                event = self.events.message() => event?,
            };
            let event = event.ok_or_else(|| Status::unavailable("the guest ended the call early"))?;
            let chunk = |stream, bytes: Vec<u8>| Ok(Event::Output(Chunk { stream, bytes }));
            match event.kind {
                Some(exec_event::Kind::Stdout(bytes)) => return chunk(Stream::Stdout, bytes.into()),
                Some(exec_event::Kind::Stderr(bytes)) => return chunk(Stream::Stderr, bytes.into()),
                Some(exec_event::Kind::Exited(exited)) => return Ok(Event::Exited(exited)),
                Some(exec_event::Kind::Refused(refused)) => return Ok(Event::Refused(refused)),
                Some(exec_event::Kind::Started(started)) => self.pid = Some(started.pid),
                None => {}
            }
        }
    }
}

fn variable((name, value): (String, String)) -> EnvVar {
    EnvVar { name: name.into_bytes().into(), value: value.into_bytes().into() }
}

fn realtime_nanos() -> u64 {
    let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// An error with its causes, which the transport keeps to itself.
fn other(error: impl std::error::Error) -> io::Error {
    io::Error::other(chain(&error))
}

/// Finds the beginning of the conversation; see `pyro_proto::resync`.
async fn begin(stream: UnixStream) -> io::Result<BufReader<UnixStream>> {
    let mut stream = BufReader::with_capacity(limits::CHUNK, stream);
    resynchronize(&mut stream, false).await?;
    Ok(stream)
}

/// Waits until the agent of a serial port has ended its conversation and listens for the next one, which is not begun.
/// Whoever keeps the stream keeps the port open.
pub(crate) async fn at_rest(stream: OwnedFd) -> io::Result<UnixStream> {
    let stream = std::os::unix::net::UnixStream::from(stream);
    stream.set_nonblocking(true)?;
    let mut stream = BufReader::with_capacity(limits::CHUNK, UnixStream::from_std(stream)?);
    resynchronize(&mut stream, true).await?;
    Ok(stream.into_inner())
}

async fn resynchronize(stream: &mut BufReader<UnixStream>, until_answered: bool) -> io::Result<()> {
    let mut nonce = [0; resync::NONCE_LEN];
    getrandom::fill(&mut nonce).map_err(io::Error::other)?;
    let mut host = resync::Host::new(nonce);
    let mut again = tokio::time::interval(Duration::from_millis(resync::SYN_INTERVAL_MILLIS));
    loop {
        let available = tokio::select! {
            _ = again.tick(), if host.wants_syn() => {
                stream.get_mut().write_all(&host.syn()).await?;
                continue;
            }
            available = stream.fill_buf() => available?,
        };
        if available.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let (taken, step) = host.feed(available).map_err(io::Error::other)?;
        stream.consume(taken);
        match step {
            Step::Write(..) if until_answered => return Ok(()),
            Step::Write(kind, nonce) | Step::WriteAndBegin(kind, nonce) => {
                stream.get_mut().write_all(&resync::mark(kind, &nonce)).await?;
            }
            Step::Begin => return Ok(()),
            Step::Read => {}
        }
    }
}

/// Gives the caller's input to the command as fast as the command takes it. Input that breaks off has no end: half of it must
/// not look like the whole.
async fn feed(
    stdin: Option<Box<dyn AsyncRead + Send + Unpin>>,
    inputs: mpsc::Sender<ExecInput>,
    broken: oneshot::Sender<io::Error>,
) {
    if let Some(mut stdin) = stdin {
        let mut buffer = vec![0; limits::CHUNK];
        loop {
            let kind = match stdin.read(&mut buffer).await {
                Ok(0) => exec_input::Kind::StdinEnd(StdinEnd {}),
                Ok(length) => exec_input::Kind::Stdin(buffer[..length].to_vec().into()),
                Err(error) => {
                    drop(broken.send(error));
                    break;
                }
            };
            let is_end = matches!(kind, exec_input::Kind::StdinEnd(_));
            if inputs.send(ExecInput { kind: Some(kind) }).await.is_err() {
                return;
            }
            if is_end {
                break;
            }
        }
    }
    // The call's request side stays open, so that its end never looks like the caller's going away.
    inputs.closed().await;
}

#[cfg(test)]
mod tests {
    use pyro_proto::resync::{Kind, MARK_LEN, mark};

    use super::*;

    /// Meets a guest that behaves as `peer` does, and must be told that it cannot be spoken to.
    async fn refused<P: Future<Output = io::Result<()>> + Send + 'static>(
        peer: impl FnOnce(UnixStream) -> P,
    ) {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let identity = Identity::new("pyro-test".to_owned(), "0".repeat(32));
        let peer = tokio::spawn(peer(theirs));
        let met = tokio::time::timeout(Duration::from_secs(30), Guest::meet(ours, &identity)).await;
        met.expect("an answer").expect_err("no agent speaks like this");
        peer.abort();
    }

    /// Does the handshake as an agent would.
    async fn agree(stream: &mut UnixStream) -> io::Result<()> {
        let mut guest = resync::Guest::default();
        let mut byte = [0];
        loop {
            stream.read_exact(&mut byte).await?;
            match guest.feed(&byte).1 {
                Step::Write(kind, nonce) => stream.write_all(&mark(kind, &nonce)).await?,
                Step::WriteAndBegin(kind, nonce) => return stream.write_all(&mark(kind, &nonce)).await,
                Step::Read | Step::Begin => {}
            }
        }
    }

    #[tokio::test]
    async fn a_guest_that_floods_is_cut_off() {
        refused(async |mut stream| {
            loop {
                stream.write_all(&[0x5a; 65_536]).await?;
            }
        })
        .await;
    }

    #[tokio::test]
    async fn a_guest_that_goes_away_half_way_is_an_error() {
        refused(async |mut stream| stream.write_all(&mark(Kind::Ack, &[0; 16])[..MARK_LEN / 2]).await).await;
    }

    #[tokio::test]
    async fn marks_of_another_epoch_do_not_begin_a_conversation() {
        refused(async |mut stream| {
            for kind in [Kind::Ack, Kind::Started, Kind::Syn] {
                stream.write_all(&mark(kind, &[1; 16])).await?;
            }
            stream.shutdown().await
        })
        .await;
    }

    #[tokio::test]
    async fn garbage_after_the_handshake_is_an_error() {
        refused(async |mut stream| {
            agree(&mut stream).await?;
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await?;
            stream.shutdown().await
        })
        .await;
    }

    #[tokio::test]
    async fn a_frame_of_a_giant_length_is_an_error() {
        refused(async |mut stream| {
            agree(&mut stream).await?;
            // SETTINGS, then a DATA frame that claims 16 MiB.
            stream.write_all(b"\0\0\0\x04\0\0\0\0\0\xff\xff\xff\0\0\0\0\0\x01").await?;
            loop {
                stream.write_all(&[0; 65_536]).await?;
            }
        })
        .await;
    }
}
