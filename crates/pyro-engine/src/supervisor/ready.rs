//! The supervisor's side of a machine that is kept ready: it is claimed once, or released.

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::Supervisor;
use super::machine::terms;
use crate::ending::{Ending, Noun};
use crate::error::{Error, ErrorKind};
use crate::execute::{Cancel, Limit, Sink, carry_out};
use crate::guest::Chunk;
use crate::registry::now;
use crate::spec::{Command, ExecSpec};
use crate::task::boottime;
use crate::task::ready::{Kept, Shape, Wish};
use crate::task::supervisor_proto::Claimed;

/// How long the first command of a machine may take.
const WARM_SECONDS: f64 = 30.0;

/// Output that nobody wants.
struct Nobody;

impl Sink for Nobody {
    async fn take(&mut self, _chunk: Chunk) -> Result<(), Error> {
        Ok(())
    }
}

impl Supervisor {
    /// Has the machine run a command, so that what its processor has to learn for one it knows; then it can be claimed.
    pub(super) async fn make_ready(self: &Arc<Self>) {
        let place = self.place.borrow().clone();
        let limit = Limit { asked: WARM_SECONDS, left: WARM_SECONDS };
        let warm = ExecSpec::new(Command::argv(["true"]));
        let warmed = carry_out(&place, warm, limit, &mut Nobody, Cancel::default(), false).await;
        let is_warm = warmed.is_ok_and(|(outcome, _)| outcome.exit_code == 0);
        if !is_warm || self.write(|file| file.kept = Some(Kept::Ready)).is_err() {
            drop(self.owner.remove(Ending::Deleted(Noun::Vm)).await);
        }
    }

    /// Hands the machine to a caller who asks for one like it. It is the caller's for as long as the answer is listened to.
    pub(super) fn claim(
        self: &Arc<Self>,
        wish: &Wish,
    ) -> Result<ReceiverStream<Result<Claimed, Status>>, Error> {
        let refused = |text: &str| Err(Error::new(ErrorKind::WrongState, text));
        let Some(environment) = &self.environment else { return refused("it has no guest") };
        let place = self.place.borrow().clone();
        {
            let mut file = self.file();
            let shape = Shape::of(&file, environment, &self.engine.inner.config);
            if file.kept != Some(Kept::Ready) || shape != wish.shape {
                return refused("this machine cannot be claimed");
            }
            let asked =
                crate::task::TaskFile { require_isolation: wish.require_isolation.clone(), ..file.clone() };
            terms(&asked)?.check(&place)?;
            // On disk it stays a machine that ends with its supervisor, which is all that others need to know of it.
            file.kept = Some(Kept::Claimed);
            file.ttl_seconds = wish.ttl_seconds;
            file.created_at = now();
            file.expires_at = file.created_at + f64::from(wish.ttl_seconds);
            file.expires_at_boottime = boottime() + f64::from(wish.ttl_seconds);
        }
        self.claimed.send_replace(true);
        let (sender, answer) = mpsc::channel(1);
        drop(sender.try_send(Ok(Claimed {})));
        let supervisor = Arc::clone(self);
        drop(tokio::spawn(async move {
            sender.closed().await;
            // Its owner is gone, or needs it no more; what cannot be removed the next sweep finds.
            drop(supervisor.owner.remove(Ending::Deleted(Noun::Vm)).await);
        }));
        Ok(ReceiverStream::new(answer))
    }

    /// Ends the machine, unless somebody has it.
    pub(super) async fn release(&self) -> Result<(), Error> {
        {
            let mut file = self.file();
            if !matches!(file.kept, Some(Kept::Starting | Kept::Ready)) {
                return Err(Error::new(ErrorKind::WrongState, "this machine is in use"));
            }
            file.kept = Some(Kept::Claimed);
        }
        self.owner.remove(Ending::Deleted(Noun::Vm)).await
    }
}
