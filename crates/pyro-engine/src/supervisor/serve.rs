//! The socket: callers in, answers out; and the two ends that come by themselves, that of the task's life and that of
//! the host's session.

use std::io::{self, Write};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{UnixListener as TokioListener, UnixStream};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tokio_util::io::StreamReader;
use tonic::{Request, Response, Status, Streaming};

use super::Supervisor;
use super::command::Events;
use crate::boot_clock::Alarm;
use crate::ending::{Ending, Noun};
use crate::error::Error;
use crate::network::NetworkChange;
use crate::place::Place;
use crate::spec::{Command, ExecSpec};
use crate::task::supervisor_proto::supervisor_server::{Supervisor as Service, SupervisorServer};
use crate::task::supervisor_proto::{
    CancelRequest, ClaimRequest, Claimed, DeleteRequest, Done, ExecInput, FollowRequest, HelloReply,
    HelloRequest, NetworkReply, NetworkRequest, PortsReply, PortsRequest, ReleaseRequest, StartRequest,
    StopRequest, exec_input,
};
use crate::task::{GENERATION, to_status};

/// How long callers may take to read their last answer: at once, and seconds where the host is crowded.
const LAST_ANSWER: Duration = Duration::from_secs(10);
/// How long descriptors are given to become free.
const NO_DESCRIPTORS: Duration = Duration::from_millis(50);
const WINDOW: u32 = 1 << 20;
/// How long a guest may take to write its disks when this process was told to end, and how long everything may take then:
/// who sent the signal waits two seconds.
const GUEST_SYNCS: Duration = Duration::from_secs(1);
const TERMINATED: Duration = Duration::from_millis(1600);

/// Answers callers until the task is gone.
///
/// `unclaimed`: a machine that is kept ready ends when nobody has claimed it for so long.
pub(super) async fn until_gone(
    supervisor: Arc<Supervisor>,
    listener: UnixListener,
    unclaimed: Option<Duration>,
) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = TokioListener::from_std(listener)?;
    let mut gone = supervisor.gone.subscribe();
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let mut life = Alarm::after(supervisor.file().life_left())?;
    let mut claimed = supervisor.claimed.subscribe();
    let unclaimed = unclaimed.map(Alarm::after).transpose()?;
    let nobody_came = async {
        match &unclaimed {
            Some(alarm) => alarm.wait().await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(nobody_came);
    let mut is_kept = true;
    drop(tokio::spawn(super::clock::follow(Arc::clone(&supervisor))));
    let mut connections = JoinSet::new();
    let mut removal = JoinSet::new();
    loop {
        tokio::select! {
            _ = gone.wait_for(|gone| *gone) => break,
            accepted = listener.accept() => {
                // A caller that went away again, or no descriptor left for it: the next may fare better.
                match accepted {
                    Ok((stream, _)) => {
                        connections.spawn(answer(Arc::clone(&supervisor), stream));
                    }
                    Err(_) => tokio::time::sleep(NO_DESCRIPTORS).await,
                }
            }
            // Connections that have ended are let go of.
            Some(_) = connections.join_next() => {}
            // Its time to live begins with its owner's.
            Ok(()) = claimed.changed() => life = Alarm::after(supervisor.file().life_left())?,
            over = &mut nobody_came, if is_kept => {
                over?;
                is_kept = false;
                let supervisor = Arc::clone(&supervisor);
                // One that is claimed at this moment stays.
                drop(tokio::spawn(async move { drop(supervisor.release().await) }));
            }
            over = life.wait(), if removal.is_empty() => {
                over?;
                let supervisor = Arc::clone(&supervisor);
                removal.spawn(async move { supervisor.owner.remove(Ending::TtlExpired).await });
            }
            Some(removed) = removal.join_next() => {
                let error = match removed {
                    Ok(Ok(())) => continue,
                    Ok(Err(error)) => error.to_string(),
                    Err(panic) => panic.to_string(),
                };
                // Once this process has ended, the next command of any kind removes the task.
                complain(&format!("the task's time is up, and it cannot be removed: {error}"));
                return Ok(());
            }
            _ = terminate.recv() => {
                terminated(&supervisor).await;
                return Ok(());
            }
        }
    }
    let last_answers = async { while connections.join_next().await.is_some() {} };
    // Whoever does not read its answer is not waited for.
    drop(tokio::time::timeout(LAST_ANSWER, last_answers).await);
    Ok(())
}

/// Stops the task because the host goes down, or an administrator wants this process gone: its disk is left as whole as there
/// is time for.
async fn terminated(supervisor: &Arc<Supervisor>) {
    let place = supervisor.place.borrow().clone();
    let stop = supervisor.stop(Some("supervisor_terminated: the task's supervisor was told to end"));
    let end_guest = async {
        if let Place::Guest(running) = place {
            // At once, not after its commands: the guest kills these, writes its disks, and ends.
            drop(tokio::time::timeout(GUEST_SYNCS, running.guest.power_off()).await);
            running.machine.kill().await;
        }
    };
    match tokio::time::timeout(TERMINATED, async { tokio::join!(stop, end_guest) }).await {
        Ok((Ok(()), ())) => {}
        Ok((Err(error), ())) => complain(&format!("the task could not be stopped: {error}")),
        Err(_elapsed) => complain("the task could not be stopped in time; its VMM dies with this process"),
    }
}

/// One connection, until its caller goes away or the task does.
async fn answer(supervisor: Arc<Supervisor>, stream: UnixStream) {
    let mut gone = supervisor.gone.subscribe();
    let service = TowerToHyperService::new(SupervisorServer::new(Calls(supervisor)));
    let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    tokio::select! {
        // A caller that breaks the protocol has only its own connection to lose.
        _ = &mut connection => return,
        _ = gone.wait_for(|gone| *gone) => {}
    }
    connection.as_mut().graceful_shutdown();
    drop(connection.await);
}

/// A line for `supervisor.log`.
pub(super) fn complain(line: &str) {
    drop(writeln!(io::stderr(), "{line}"));
}

/// The calls of the protocol.
struct Calls(Arc<Supervisor>);

#[tonic::async_trait]
impl Service for Calls {
    type ExecStream = Events;
    type FollowStream = Events;
    type ClaimStream = ReceiverStream<Result<Claimed, Status>>;

    async fn exec(&self, request: Request<Streaming<ExecInput>>) -> Result<Response<Events>, Status> {
        let mut inputs = request.into_inner();
        let Some(ExecInput { kind: Some(exec_input::Kind::Start(start)) }) = inputs.message().await? else {
            return Err(Status::invalid_argument("the first input must be a start"));
        };
        let command = if start.argv.is_empty() {
            Command::Shell(String::from_utf8_lossy(&start.shell).into_owned())
        } else {
            Command::Argv(start.argv.into_iter().map(Into::into).collect())
        };
        let mut exec = ExecSpec::new(command);
        exec.timeout_seconds = start.timeout_seconds;
        exec.cwd = String::from_utf8_lossy(&start.cwd).into_owned();
        let text = |bytes: &bytes::Bytes| String::from_utf8_lossy(bytes).into_owned();
        exec.env = start.env.iter().map(|variable| (text(&variable.name), text(&variable.value))).collect();
        exec.user = (!start.user.is_empty()).then(|| text(&start.user));
        if start.stdin {
            let input = StreamReader::new(stdin(inputs));
            exec.stdin = Some(if start.attached {
                Box::new(input)
            } else {
                Box::new(self.0.take_input(input).await.map_err(|error| to_status(&error))?)
            });
        }
        let supervisor = Arc::clone(&self.0);
        // A number that is being given is given, or the next command would ask for the same.
        on_its_own(async move { supervisor.exec(exec, start.request_id, start.attached).await })
            .await
            .map(Response::new)
    }

    async fn follow(&self, request: Request<FollowRequest>) -> Result<Response<Events>, Status> {
        let FollowRequest { sequence, stdout_offset, stderr_offset } = request.into_inner();
        Ok(Response::new(self.0.follow(sequence, [stdout_offset, stderr_offset])))
    }

    async fn hello(&self, _: Request<HelloRequest>) -> Result<Response<HelloReply>, Status> {
        Ok(Response::new(HelloReply { generation: GENERATION }))
    }

    async fn cancel(&self, request: Request<CancelRequest>) -> Result<Response<Done>, Status> {
        self.0.cancel(request.into_inner().sequence).await;
        Ok(Response::new(Done {}))
    }

    async fn start(&self, request: Request<StartRequest>) -> Result<Response<Done>, Status> {
        done(self.0.start(Some(request.into_inner().cap)).await)
    }

    async fn stop(&self, _: Request<StopRequest>) -> Result<Response<Done>, Status> {
        done(self.0.stop(None).await)
    }

    async fn network(&self, request: Request<NetworkRequest>) -> Result<Response<NetworkReply>, Status> {
        let change = request.into_inner().change;
        let supervisor = Arc::clone(&self.0);
        on_its_own(async move {
            let text = |error: serde_json::Error| Error::host("a request about the network", &error);
            let change = if change.is_empty() {
                NetworkChange::default()
            } else {
                serde_json::from_slice(&change).map_err(text)?
            };
            let answer = supervisor.change_network(&change).await?;
            Ok(NetworkReply { answer: serde_json::to_vec(&answer).map_err(text)?.into() })
        })
        .await
        .map(Response::new)
    }

    async fn ports(&self, request: Request<PortsRequest>) -> Result<Response<PortsReply>, Status> {
        let change = request.into_inner().change;
        let supervisor = Arc::clone(&self.0);
        on_its_own(async move {
            let text = |error: serde_json::Error| Error::host("a request about ports", &error);
            let answer = supervisor.change_ports(&serde_json::from_slice(&change).map_err(text)?).await?;
            Ok(PortsReply { answer: serde_json::to_vec(&answer).map_err(text)?.into() })
        })
        .await
        .map(Response::new)
    }

    async fn claim(&self, request: Request<ClaimRequest>) -> Result<Response<Self::ClaimStream>, Status> {
        let wish = serde_json::from_slice(&request.into_inner().wish)
            .map_err(|error| to_status(&Error::host("a request for a machine", &error)))?;
        self.0.claim(&wish).map(Response::new).map_err(|error| to_status(&error))
    }

    async fn release(&self, _: Request<ReleaseRequest>) -> Result<Response<Done>, Status> {
        done(self.0.release().await)
    }

    async fn delete(&self, _: Request<DeleteRequest>) -> Result<Response<Done>, Status> {
        done(self.0.owner.remove(Ending::Deleted(Noun::Task)).await)
    }
}

/// Brings a change to its end also when its caller goes away in the middle.
async fn on_its_own<T: Send + 'static>(
    change: impl Future<Output = Result<T, crate::Error>> + Send + 'static,
) -> Result<T, Status> {
    match tokio::spawn(change).await {
        Ok(changed) => changed.map_err(|error| to_status(&error)),
        Err(panic) => Err(Status::internal(panic.to_string())),
    }
}

fn done(done: Result<(), crate::Error>) -> Result<Response<Done>, Status> {
    done.map(|()| Response::new(Done {})).map_err(|error| to_status(&error))
}

/// The bytes of a caller's stdin. It ends when the caller says so; one that goes away before has left it broken.
fn stdin(inputs: Streaming<ExecInput>) -> impl Stream<Item = io::Result<bytes::Bytes>> + Send + Unpin {
    let broken = || Some(Err(io::ErrorKind::BrokenPipe.into()));
    Box::pin(inputs.map(Some).chain(tokio_stream::once(None)).map_while(move |input| match input {
        Some(Ok(input)) => match input.kind {
            Some(exec_input::Kind::Stdin(bytes)) => Some(Ok(bytes)),
            Some(exec_input::Kind::StdinEnd(_)) => None,
            Some(exec_input::Kind::Start(_)) | None => broken(),
        },
        Some(Err(_)) | None => broken(),
    }))
}
