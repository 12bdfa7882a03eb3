//! The caller's end of a supervisor's socket.

use std::io;
use std::pin::Pin;
use std::sync::Mutex;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::error::{Error, ErrorKind};
use crate::network::{NetworkChange, TaskNetwork};
use crate::ports::{PortChange, TaskPorts};
use crate::task::ready::Wish;
use crate::task::{TaskDirectory, owner, socket};
use supervisor_proto::supervisor_client::SupervisorClient;
use supervisor_proto::{
    CancelRequest, ClaimRequest, Claimed, DeleteRequest, Done, Event, ExecInput, FollowRequest, HelloRequest,
    NetworkRequest, PortsRequest, ReleaseRequest, StartRequest, StopRequest, event,
};

#[expect(
    unreachable_pub,
    clippy::allow_attributes_without_reason,
    reason = "generated code; the words are in proto/supervisor.proto"
)]
pub(crate) mod supervisor_proto {
    tonic::include_proto!("pyro.supervisor");
}

const WINDOW: u32 = 1 << 20;

/// The generation of the protocol that this code speaks.
pub(crate) const GENERATION: u32 = 2;
/// The one from which on a command has variables and a user, and input that is taken before it is begun.
pub(super) const VARIABLES_AND_USER: u32 = 2;

/// How long a supervisor may say nothing before it is asked whether it lives.
const QUIET: Duration = Duration::from_secs(3);
/// How long it may take to answer that: at once, and seconds where the host is crowded.
const ANSWER: Duration = Duration::from_secs(3);
/// How often it is asked. If this process was stopped itself, the first answer is there and not read yet.
const ATTEMPTS: u32 = 2;

/// A connection to a supervisor. Each call ends with an error once the supervisor has not answered for some seconds,
/// however long the call itself may take.
pub(crate) struct Client {
    calls: SupervisorClient<Channel>,
    directory: TaskDirectory,
}

/// The ownership of a machine that was kept ready. Dropping it has the machine removed.
pub(crate) struct Claim {
    _held: tonic::Streaming<Claimed>,
    _connection: Client,
}

/// What comes of a command that is run or followed.
pub(crate) struct Events {
    events: tonic::Streaming<Event>,
    silence: Pin<Box<dyn Future<Output = Error> + Send>>,
}

impl Events {
    /// The next event; none when the connection broke, or the supervisor has no more to tell.
    ///
    /// # Errors
    /// When the supervisor tells one, or has not answered for some time.
    pub(crate) async fn next(&mut self) -> Result<Option<event::Kind>, Error> {
        loop {
            let message = tokio::select! {
                biased;
                message = self.events.message() => message,
                error = &mut self.silence => return Err(error),
            };
            match message {
                // A newer supervisor may tell what this version does not know.
                Ok(Some(Event { kind: None })) => {}
                Ok(Some(Event { kind })) => return Ok(kind),
                Ok(None) => return Ok(None),
                Err(status) if is_answer(&status) => return Err(from_status(&status)),
                Err(_broken) => return Ok(None),
            }
        }
    }
}

/// An error on its way between two processes.
#[derive(Serialize, Deserialize)]
struct Told {
    code: String,
    hint: Option<String>,
}

impl Client {
    /// Connects; none where there is no supervisor, or so many callers wait for it that no more can.
    pub(crate) async fn connect(directory: &TaskDirectory) -> Result<Option<Self>, Error> {
        let stream = match socket::connect(directory).await {
            Ok(stream) => stream,
            Err(error)
                if matches!(
                    error.kind(),
                    // The last: it died while the connection waited for it.
                    io::ErrorKind::NotFound
                        | io::ErrorKind::ConnectionRefused
                        | io::ErrorKind::WouldBlock
                        | io::ErrorKind::ConnectionReset
                ) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(Error::state(directory.path(), &error)),
        };
        let stream = Mutex::new(Some(stream));
        let connector = tower::service_fn(move |_| {
            let stream = stream.lock().ok().and_then(|mut stream| stream.take());
            // One connection, once: what was sent on it is never sent again on another.
            let gone = || io::Error::new(io::ErrorKind::NotConnected, "the supervisor is gone");
            std::future::ready(stream.map(TokioIo::new).ok_or_else(gone))
        });
        let channel = Endpoint::from_static("http://supervisor")
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW)
            .connect_with_connector(connector)
            .await;
        // It may have died between the two.
        let directory = directory.clone();
        Ok(channel.ok().map(|channel| Self { calls: SupervisorClient::new(channel), directory }))
    }

    /// Runs a command; none when the connection broke over it.
    pub(crate) async fn exec(
        &self,
        inputs: impl tokio_stream::Stream<Item = ExecInput> + Send + 'static,
    ) -> Result<Option<Events>, Error> {
        let mut calls = self.calls.clone();
        self.events(true, calls.exec(inputs)).await
    }

    /// Follows a command; none when the connection broke over it.
    pub(crate) async fn follow(&self, request: FollowRequest) -> Result<Option<Events>, Error> {
        let mut calls = self.calls.clone();
        self.events(false, calls.follow(request)).await
    }

    /// Which generation of the protocol the supervisor speaks.
    pub(crate) async fn generation(&self) -> Result<u32, Error> {
        let mut calls = self.calls.clone();
        tokio::select! {
            biased;
            reply = calls.hello(HelloRequest {}) => match reply {
                Ok(reply) => Ok(reply.get_ref().generation),
                Err(status) if status.code() == Code::Unimplemented => Ok(0),
                Err(status) => Err(from_status(&status)),
            },
            error = self.silence(false) => Err(error),
        }
    }

    pub(crate) async fn cancel(&self, sequence: u64) -> Result<(), Error> {
        let mut calls = self.calls.clone();
        self.done(calls.cancel(CancelRequest { sequence })).await
    }

    pub(crate) async fn start(&self, cap: u32) -> Result<(), Error> {
        let mut calls = self.calls.clone();
        self.done(calls.start(StartRequest { cap })).await
    }

    pub(crate) async fn stop(&self) -> Result<(), Error> {
        let mut calls = self.calls.clone();
        self.done(calls.stop(StopRequest {})).await
    }

    /// Makes a change to the task's network, if there is one; returns the network after it.
    pub(crate) async fn network(&self, change: &NetworkChange) -> Result<TaskNetwork, Error> {
        let text = |error: serde_json::Error| Error::host("an answer about the network", &error);
        let change = if change.is_empty() { Vec::new() } else { serde_json::to_vec(change).map_err(text)? };
        let mut calls = self.calls.clone();
        let reply = tokio::select! {
            biased;
            reply = calls.network(NetworkRequest { change: change.into() }) => reply,
            error = self.silence(false) => return Err(error),
        };
        let reply = reply.map_err(|status| older(&status, "knows no networks"))?.into_inner();
        serde_json::from_slice(&reply.answer).map_err(text)
    }

    /// Makes a change to the task's published ports, if there is one; returns them.
    pub(crate) async fn ports(&self, change: &PortChange) -> Result<TaskPorts, Error> {
        let text = |error: serde_json::Error| Error::host("an answer about ports", &error);
        let change = serde_json::to_vec(change).map_err(text)?;
        let mut calls = self.calls.clone();
        let reply = tokio::select! {
            biased;
            reply = calls.ports(PortsRequest { change: change.into() }) => reply,
            error = self.silence(false) => return Err(error),
        };
        let reply = reply.map_err(|status| older(&status, "publishes no ports"))?.into_inner();
        serde_json::from_slice(&reply.answer).map_err(text)
    }

    /// Asks for a machine that is kept ready.
    pub(crate) async fn claim(self, wish: &Wish) -> Result<Claim, Error> {
        let wish =
            serde_json::to_vec(wish).map_err(|error| Error::host("a request for a machine", &error))?;
        let mut calls = self.calls.clone();
        let reply = calls.claim(ClaimRequest { wish: wish.into() }).await;
        let mut held = reply.map_err(|status| from_status(&status))?.into_inner();
        match held.message().await {
            Ok(Some(Claimed {})) => Ok(Claim { _held: held, _connection: self }),
            Ok(None) => Err(Error::new(ErrorKind::WrongState, "the machine is gone")),
            Err(status) => Err(from_status(&status)),
        }
    }

    /// Asks a machine that is kept ready to end.
    pub(crate) async fn release(&self) -> Result<(), Error> {
        let mut calls = self.calls.clone();
        self.done(calls.release(ReleaseRequest {})).await
    }

    pub(crate) async fn delete(&self) -> Result<(), Error> {
        let mut calls = self.calls.clone();
        self.done(calls.delete(DeleteRequest {})).await
    }

    async fn done(&self, call: impl Future<Output = Reply<Done>>) -> Result<(), Error> {
        tokio::select! {
            biased;
            reply = call => reply.map(drop).map_err(|status| from_status(&status)),
            error = self.silence(false) => Err(error),
        }
    }

    async fn events(
        &self,
        sent: bool,
        call: impl Future<Output = Reply<tonic::Streaming<Event>>>,
    ) -> Result<Option<Events>, Error> {
        let mut silence = Box::pin(self.silence(sent));
        let reply = tokio::select! {
            biased;
            reply = call => reply,
            error = &mut silence => return Err(error),
        };
        match reply {
            Ok(events) => Ok(Some(Events { events: events.into_inner(), silence })),
            Err(status) if is_answer(&status) => Err(from_status(&status)),
            Err(_broken) => Ok(None),
        }
    }

    /// Resolves once the supervisor has not answered for some time; never while it does.
    fn silence(&self, sent: bool) -> impl Future<Output = Error> + Send + use<> {
        let (mut calls, directory) = (self.calls.clone(), self.directory.clone());
        async move {
            loop {
                tokio::time::sleep(QUIET).await;
                let mut answers = false;
                for _ in 0..ATTEMPTS {
                    // Any answer will do, also that there is no such call; a broken connection ends the call itself.
                    answers = tokio::time::timeout(ANSWER, calls.hello(HelloRequest {})).await.is_ok();
                    if answers {
                        break;
                    }
                }
                if !answers {
                    return silent(directory, QUIET + ANSWER * ATTEMPTS, sent).await;
                }
            }
        }
    }
}

type Reply<T> = Result<tonic::Response<T>, Status>;

/// The error of a supervisor that does not answer. To name it takes looking at all processes.
pub(super) async fn silent(directory: TaskDirectory, waited: Duration, sent: bool) -> Error {
    let named = tokio::task::spawn_blocking(move || owner::silent(&directory, waited, sent)).await;
    named.unwrap_or_else(|error| Error::host("a thread", &error))
}

/// What an error looks like on the socket.
pub(crate) fn to_status(error: &Error) -> Status {
    let told = Told { code: error.kind().code().to_owned(), hint: error.remedy().map(str::to_owned) };
    let details = serde_json::to_vec(&told).unwrap_or_default();
    Status::with_details(Code::FailedPrecondition, error.to_string(), details.into())
}

/// An error of a call that an older supervisor does not know.
fn older(status: &tonic::Status, what: &str) -> Error {
    if status.code() != tonic::Code::Unimplemented {
        return from_status(status);
    }
    let text = format!("the task's supervisor is of an older pyro, which {what}");
    Error::new(ErrorKind::WrongState, text).hint("stop the task and start it again")
}

/// The error that the supervisor has told, or that the connection to it broke.
pub(crate) fn from_status(status: &Status) -> Error {
    match serde_json::from_slice::<Told>(status.details()) {
        Ok(told) => Error::told(&told.code, status.message().to_owned(), told.hint),
        Err(_) => {
            let text = format!("the connection to the task's supervisor broke: {}", status.message());
            Error::new(ErrorKind::OutcomeUnknown, text)
                .hint("see what became of it: pyro task status, pyro task logs")
        }
    }
}

/// Whether the supervisor has answered at all, as opposed to a connection that broke.
fn is_answer(status: &Status) -> bool {
    serde_json::from_slice::<Told>(status.details()).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_comes_through_with_its_code_its_words_and_its_hint() {
        let error = Error::new(ErrorKind::WrongState, "task x must be in 'started' state").hint("start it");
        let back = from_status(&to_status(&error));
        assert_eq!((back.kind(), back.code()), (ErrorKind::WrongState, "wrong_state"));
        assert_eq!((back.to_string(), back.remedy()), (error.to_string(), Some("start it")));
        let broken = from_status(&Status::unavailable("transport error"));
        assert_eq!(broken.kind(), ErrorKind::OutcomeUnknown);
    }
}
