//! The caller's end of a supervisor's socket.

use std::io;
use std::sync::Mutex;

use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::error::{Error, ErrorKind};
use crate::task::{TaskDirectory, socket};
use supervisor_proto::supervisor_client::SupervisorClient;
use supervisor_proto::{
    CancelRequest, DeleteRequest, Event, ExecInput, FollowRequest, StartRequest, StopRequest,
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

/// A connection to a living supervisor.
pub(crate) struct Client(SupervisorClient<Channel>);

/// An error on its way between two processes.
#[derive(Serialize, Deserialize)]
struct Told {
    code: String,
    hint: Option<String>,
}

impl Client {
    /// Connects; none where there is no supervisor.
    pub(crate) async fn connect(directory: &TaskDirectory) -> Result<Option<Self>, Error> {
        let stream = match socket::connect(directory).await {
            Ok(stream) => stream,
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) =>
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
        Ok(channel.ok().map(|channel| Self(SupervisorClient::new(channel))))
    }

    pub(crate) async fn exec(
        &mut self,
        inputs: impl tokio_stream::Stream<Item = ExecInput> + Send + 'static,
    ) -> Result<tonic::Streaming<Event>, Status> {
        self.0.exec(inputs).await.map(tonic::Response::into_inner)
    }

    pub(crate) async fn follow(&mut self, request: FollowRequest) -> Result<tonic::Streaming<Event>, Status> {
        self.0.follow(request).await.map(tonic::Response::into_inner)
    }

    pub(crate) async fn cancel(&mut self, sequence: u64) -> Result<(), Error> {
        done(self.0.cancel(CancelRequest { sequence }).await)
    }

    pub(crate) async fn start(&mut self, cap: u32) -> Result<(), Error> {
        done(self.0.start(StartRequest { cap }).await)
    }

    pub(crate) async fn stop(&mut self) -> Result<(), Error> {
        done(self.0.stop(StopRequest {}).await)
    }

    pub(crate) async fn delete(&mut self) -> Result<(), Error> {
        done(self.0.delete(DeleteRequest {}).await)
    }
}

fn done<T>(reply: Result<tonic::Response<T>, Status>) -> Result<(), Error> {
    reply.map(drop).map_err(|status| from_status(&status))
}

/// What an error looks like on the socket.
pub(crate) fn to_status(error: &Error) -> Status {
    let told = Told { code: error.kind().code().to_owned(), hint: error.remedy().map(str::to_owned) };
    let details = serde_json::to_vec(&told).unwrap_or_default();
    Status::with_details(Code::FailedPrecondition, error.to_string(), details.into())
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
pub(crate) fn is_answer(status: &Status) -> bool {
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
