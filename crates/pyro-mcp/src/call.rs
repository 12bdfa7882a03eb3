//! One call of a tool: who made it, whether it was given up.

use rmcp::RoleServer;
use rmcp::model::ProgressToken;
use rmcp::service::{Peer, RequestContext};
use tokio_util::sync::CancellationToken;

use crate::failure::Failure;

/// What a tool knows of its caller.
pub(crate) struct Call {
    pub(crate) peer: Peer<RoleServer>,
    /// Under which the caller wants to hear of progress, if it does.
    pub(crate) progress: Option<ProgressToken>,
    given_up: CancellationToken,
    /// Cancelled when the client is gone, which does not mean that it has changed its mind.
    gone: CancellationToken,
}

impl Call {
    pub(crate) fn new(context: RequestContext<RoleServer>, gone: CancellationToken) -> Self {
        Self { progress: context.meta.get_progress_token(), peer: context.peer, given_up: context.ct, gone }
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
        }
    }

    /// Resolves when the call is given up.
    pub(crate) async fn given_up(&self) {
        self.given_up.cancelled().await;
    }

    /// Resolves when the client is gone and this call with it: while a client only closes its end, answers still reach it.
    pub(crate) async fn client_gone(&self) {
        self.gone.cancelled().await;
        self.given_up.cancelled().await;
    }

    /// Whether the client went away, rather than cancelling this call.
    pub(crate) fn client_is_gone(&self) -> bool {
        self.gone.is_cancelled()
    }
}
