//! One conversation with the host, over whatever channel.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use pyro_proto::agent_server::{Agent, AgentServer};
use pyro_proto::resync::{self, Step};
use pyro_proto::{
    DialEvent, DialInput, EnvVar, ExecEvent, ExecInput, GENERATION, HelloReply, HelloRequest, IdentifyReply,
    IdentifyRequest, PowerOffReply, PowerOffRequest, RestReply, RestRequest, SetClockReply, SetClockRequest,
    SignalReply, SignalRequest, dial_input, exec_input, limits,
};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

use crate::boot::Guest;
use crate::reaper::Reaper;
use crate::{dial, exec, identity, power};

/// Serves until the guest ends. Whatever else ends it, the disk is written out first.
pub(crate) async fn serve(guest: Guest) -> io::Result<()> {
    let guest = Arc::new(guest);
    let served = match Reaper::start() {
        Ok(reaper) => {
            // Whoever comes next gives the guest its identity anew: it may be the first after a restore.
            let conversation = || {
                Conversation(Service {
                    guest: Arc::clone(&guest),
                    reaper: reaper.clone(),
                    identified: Arc::default(),
                    environment: Arc::default(),
                    rests: Arc::default(),
                })
            };
            guest.channel.serve(conversation).await
        }
        Err(error) => Err(error),
    };
    if let Err(error) = &served {
        crate::say(&format!("phase=serve failed: {error}"));
    }
    power::off(&guest.cgroup);
    served
}

/// All that the host may ask for in one conversation.
pub(crate) struct Conversation(Service);

/// Holds one conversation: a resync, then calls until the host is gone or speaks nonsense. An error is one of the
/// channel itself, before the conversation has begun.
pub(crate) async fn converse(
    from_host: &mut (impl AsyncBufRead + Unpin + Send),
    to_host: &mut (impl AsyncWrite + Unpin + Send),
    conversation: Conversation,
) -> io::Result<()> {
    meet(from_host, to_host).await?;
    let rests = Arc::clone(&conversation.0.rests);
    let agent = AgentServer::new(conversation.0)
        .max_decoding_message_size(limits::MESSAGE)
        .max_encoding_message_size(limits::MESSAGE);
    let stream = tokio::io::join(from_host, to_host);
    let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        // Nobody asks for it.
        .auto_date_header(false)
        .initial_stream_window_size(limits::STREAM_WINDOW)
        .initial_connection_window_size(limits::CONNECTION_WINDOW)
        .max_concurrent_streams(limits::STREAMS)
        .max_header_list_size(limits::HEADERS)
        .max_send_buf_size(limits::CHUNK * 2)
        // Against a client that floods a server. Here it is the host, which may give up many calls at once.
        .max_pending_accept_reset_streams(None)
        .keep_alive_interval(Some(Duration::from_secs(20)))
        .keep_alive_timeout(Duration::from_secs(60))
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(agent));
    tokio::pin!(connection);
    tokio::select! {
        _ended = connection.as_mut() => {}
        () = rests.notified() => {
            connection.as_mut().graceful_shutdown();
            drop(connection.await);
        }
    }
    Ok(())
}

/// Reads until the host and the guest agree where a conversation begins.
async fn meet(
    from_host: &mut (impl AsyncBufRead + Unpin),
    to_host: &mut (impl AsyncWrite + Unpin),
) -> io::Result<()> {
    let mut guest = resync::Guest::default();
    loop {
        let available =
            poll_fn(|context| Pin::new(&mut *from_host).poll_fill_buf(context).map_ok(<[u8]>::len));
        if available.await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let (taken, step) = guest.feed(from_host.fill_buf().await?);
        from_host.consume(taken);
        match step {
            Step::Read => {}
            Step::Write(kind, nonce) => {
                to_host.write_all(&resync::mark(kind, &nonce)).await?;
                to_host.flush().await?;
            }
            Step::WriteAndBegin(kind, nonce) => {
                to_host.write_all(&resync::mark(kind, &nonce)).await?;
                return to_host.flush().await;
            }
            Step::Begin => return Ok(()),
        }
    }
}

/// Takes what comes in the first moment, so that the whole answer of a short command travels in one piece: each piece
/// costs the guest a write to the port, and its VMM a wake-up. Where the processor is emulated on a slow host, a short command
/// takes 20 ms; nobody sees that of a longer one the first output is so much later.
async fn gather(events: &mut mpsc::Receiver<Result<ExecEvent, Status>>) -> Vec<Result<ExecEvent, Status>> {
    const MOMENT: Duration = Duration::from_millis(25);
    const MOST: usize = 4;
    let mut first = Vec::new();
    let moment = tokio::time::sleep(MOMENT);
    tokio::pin!(moment);
    while first.len() < MOST {
        tokio::select! {
            biased;
            event = events.recv() => match event {
                Some(event) => first.push(event),
                None => break,
            },
            () = &mut moment => break,
        }
    }
    first
}

#[derive(Clone, Debug)]
struct Service {
    guest: Arc<Guest>,
    reaper: Reaper,
    identified: Arc<AtomicBool>,
    /// The variables that every command gets.
    environment: Arc<Mutex<Arc<[EnvVar]>>>,
    /// Told when the conversation shall end because the guest is at rest.
    rests: Arc<Notify>,
}

#[tonic::async_trait]
impl Agent for Service {
    type DialStream = ReceiverStream<Result<DialEvent, Status>>;
    type ExecStream = Pin<Box<dyn Stream<Item = Result<ExecEvent, Status>> + Send>>;

    async fn hello(&self, request: Request<HelloRequest>) -> Result<Response<HelloReply>, Status> {
        if request.get_ref().generation == 0 {
            return Err(Status::invalid_argument("generation 0 does not exist"));
        }
        let kernel = rustix::system::uname();
        Ok(Response::new(HelloReply {
            generation: GENERATION.min(request.get_ref().generation),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_release: kernel.release().to_string_lossy().into_owned(),
            init_micros: self.guest.init_micros,
            root_micros: self.guest.root_micros,
        }))
    }

    async fn identify(&self, request: Request<IdentifyRequest>) -> Result<Response<IdentifyReply>, Status> {
        let environment = identity::assume(request.get_ref())
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        *self.environment.lock().unwrap_or_else(PoisonError::into_inner) = environment.into();
        self.identified.store(true, Ordering::Release);
        Ok(Response::new(IdentifyReply {}))
    }

    async fn set_clock(&self, request: Request<SetClockRequest>) -> Result<Response<SetClockReply>, Status> {
        let refused = |error: io::Error| Status::internal(format!("the kernel refused the clock: {error}"));
        identity::set_clock(request.get_ref().realtime_nanos).map_err(refused)?;
        Ok(Response::new(SetClockReply {}))
    }

    async fn exec(
        &self,
        request: Request<Streaming<ExecInput>>,
    ) -> Result<Response<Self::ExecStream>, Status> {
        if !self.identified.load(Ordering::Acquire) {
            return Err(Status::failed_precondition("the guest has no identity yet"));
        }
        let mut inputs = request.into_inner();
        let Some(ExecInput { kind: Some(exec_input::Kind::Start(start)) }) = inputs.message().await? else {
            return Err(Status::invalid_argument("the first input must be a start"));
        };
        let environment = Arc::clone(&self.environment.lock().unwrap_or_else(PoisonError::into_inner));
        let command = exec::Command::check(start, environment).map_err(Status::invalid_argument)?;
        let (telling, told) = oneshot::channel();
        let mut events = exec::run(Arc::clone(&self.guest), self.reaper.clone(), command, inputs, told);
        let first = gather(&mut events).await;
        let events = tokio_stream::iter(first).chain(ReceiverStream::new(events));
        // Dropped with the stream, when all of it was taken for the host or the host is gone.
        let held = events.map(move |event| {
            let _telling: &oneshot::Sender<()> = &telling;
            event
        });
        Ok(Response::new(Box::pin(held)))
    }

    async fn dial(
        &self,
        request: Request<Streaming<DialInput>>,
    ) -> Result<Response<Self::DialStream>, Status> {
        if !self.identified.load(Ordering::Acquire) {
            return Err(Status::failed_precondition("the guest has no identity yet"));
        }
        let mut inputs = request.into_inner();
        let port = match inputs.message().await?.and_then(|input| input.kind) {
            Some(dial_input::Kind::Port(port)) => u16::try_from(port).ok().filter(|port| *port > 0),
            _ => None,
        };
        let port = port.ok_or_else(|| Status::invalid_argument("the first input must be a port"))?;
        Ok(Response::new(ReceiverStream::new(dial::run(port, inputs))))
    }

    async fn signal(&self, request: Request<SignalRequest>) -> Result<Response<SignalReply>, Status> {
        let SignalRequest { pid, signal } = request.into_inner();
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let signal = i32::try_from(signal).ok().and_then(Signal::from_named_raw);
        let (Some(pid), Some(signal)) = (pid, signal) else {
            return Err(Status::invalid_argument("no such process or signal"));
        };
        // Only a command that has not been reaped: its number names nothing else.
        if self.reaper.watches(pid) {
            _ = kill_process_group(pid, signal);
        }
        Ok(Response::new(SignalReply {}))
    }

    async fn rest(&self, _: Request<RestRequest>) -> Result<Response<RestReply>, Status> {
        let refused =
            |error: io::Error| Status::unavailable(format!("the guest does not come to rest: {error}"));
        self.guest.cgroup.end_all().await.map_err(refused)?;
        rustix::fs::sync();
        self.rests.notify_one();
        Ok(Response::new(RestReply {}))
    }

    async fn power_off(&self, _: Request<PowerOffRequest>) -> Result<Response<PowerOffReply>, Status> {
        power::off(&self.guest.cgroup);
        Err(Status::internal("the kernel did not power off"))
    }
}
