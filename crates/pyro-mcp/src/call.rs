//! One call of a tool: who made it, whether it was given up.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::http::request::Parts;
use rmcp::RoleServer;
use rmcp::model::{ProgressToken, ProtocolVersion, RequestId};
use rmcp::service::{Peer, RequestContext};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::failure::Failure;

/// How long after a call was given up its client may be heard to have cancelled it: the one comes right after the other.
const MARK: Duration = Duration::from_secs(1);
/// How long after a stream was closed the server may be heard to end: that closes them all.
const END: Duration = Duration::from_millis(50);

/// The calls that one client has cancelled by name.
#[derive(Debug, Default)]
pub(crate) struct Cancelled {
    calls: Mutex<HashSet<RequestId>>,
    told: Notify,
}

impl Cancelled {
    pub(crate) fn tell(&self, call: RequestId) {
        // What a client cancels that was never called, or has ended, must not add up.
        const MOST: usize = 1024;
        let mut calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        if calls.len() >= MOST {
            calls.clear();
        }
        calls.insert(call);
        drop(calls);
        self.told.notify_waiters();
    }

    /// Resolves when this call was cancelled.
    async fn hear(&self, call: &RequestId) {
        loop {
            let told = self.told.notified();
            if self.heard(call) {
                return;
            }
            told.await;
        }
    }

    fn heard(&self, call: &RequestId) -> bool {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner).contains(call)
    }
}

/// Whether a request is of a version of the protocol that has no sessions over HTTP. Versions are dates.
fn closing_cancels(request: &Parts) -> bool {
    let version = request.headers.get("mcp-protocol-version").and_then(|version| version.to_str().ok());
    version.is_some_and(|version| version >= ProtocolVersion::NO_INITIALIZE.as_str())
}

/// What a tool knows of its caller.
pub(crate) struct Call {
    pub(crate) peer: Peer<RoleServer>,
    /// Under which the caller wants to hear of progress, if it does.
    pub(crate) progress: Option<ProgressToken>,
    id: RequestId,
    /// Cancelled when the client has cancelled the call, and when it is gone, which does not mean that it has changed its
    /// mind.
    given_up: CancellationToken,
    /// Over HTTP without sessions a client cancels by closing the stream of its answer, and says nothing more.
    closing_cancels: bool,
    cancelled: Arc<Cancelled>,
    /// Cancelled when the server is on its way out.
    ending: CancellationToken,
}

impl Call {
    pub(crate) fn new(
        context: RequestContext<RoleServer>,
        cancelled: Arc<Cancelled>,
        ending: CancellationToken,
    ) -> Self {
        let progress = context.meta.get_progress_token();
        let closing_cancels = context.extensions.get::<Parts>().is_some_and(closing_cancels);
        let (peer, id, given_up) = (context.peer, context.id, context.ct);
        Self { peer, progress, id, given_up, closing_cancels, cancelled, ending }
    }

    /// Does the work, and drops it when the call is given up: what it had made ends with it.
    pub(crate) async fn unless_given_up<T, E>(
        &self,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, Failure>
    where
        Failure: From<E>,
    {
        tokio::select! {
            done = work => Ok(done?),
            () = self.given_up.cancelled() => Err(Failure::cancelled()),
            () = self.ending.cancelled() => Err(Failure::ending()),
        }
    }

    /// Resolves when the client changes its mind about this call, and not when it goes away.
    pub(crate) async fn cancelled(&self) {
        self.given_up.cancelled().await;
        let has_changed_its_mind = if self.closing_cancels {
            tokio::time::timeout(END, self.ending.cancelled()).await.is_err()
        } else {
            tokio::time::timeout(MARK, self.cancelled.hear(&self.id)).await.is_ok()
        };
        if !has_changed_its_mind {
            std::future::pending().await
        }
    }

    /// Resolves when nobody can hear the answer any more: the server ends, or the client is gone and has not cancelled
    /// the call before.
    pub(crate) async fn unheard(&self) {
        let gone = async {
            self.given_up.cancelled().await;
            tokio::time::sleep(MARK).await;
            if self.closing_cancels || self.cancelled.heard(&self.id) {
                std::future::pending().await
            }
        };
        tokio::select! {
            () = gone => {}
            () = self.ending.cancelled() => {}
        }
    }
}
