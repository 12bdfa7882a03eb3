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
    /// Cancelled when the server is on its way out.
    ending: CancellationToken,
}

impl Call {
    pub(crate) fn new(
        context: RequestContext<RoleServer>,
        gone: CancellationToken,
        ending: CancellationToken,
    ) -> Self {
        let progress = context.meta.get_progress_token();
        Self { progress, peer: context.peer, given_up: context.ct, gone, ending }
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
        if self.gone.is_cancelled() || self.ending.is_cancelled() {
            std::future::pending().await
        }
    }

    /// Resolves when nobody can hear the answer any more: the server ends, or the client is gone and this call with it.
    /// While a client only closes its end, answers still reach it.
    pub(crate) async fn unheard(&self) {
        let gone = async {
            self.gone.cancelled().await;
            self.given_up.cancelled().await;
        };
        tokio::select! {
            () = gone => {}
            () = self.ending.cancelled() => {}
        }
    }
}
