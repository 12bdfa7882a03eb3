//! What a task does when the host's disk is nearly full: its guest stops, its commands end, and both go on when there is
//! room again.

use std::convert::Infallible;
use std::sync::Arc;

use super::Supervisor;
use super::body::Body;
use crate::live::Running;
use crate::record::Fault;
use crate::room;

impl Supervisor {
    /// Watches the host's disk while a guest runs; never done by itself.
    pub(super) async fn watch_disk(self: &Arc<Self>, running: &Arc<Running>) -> Infallible {
        let dir = self.directory.path();
        loop {
            room::until_low(dir, || !self.commands.is_idle()).await;
            super::serve::complain(
                "the disk of the host is nearly full: commands are ended, and the guest waits",
            );
            // First of all the guest stops writing: a command that is ended leaves it with much that is not on its disk
            // yet. One that is gone meanwhile ends this too.
            running.machine.pause().await.ok();
            self.commands.end_all(Fault::DiskFull).await;
            room::until_back(dir).await;
            let _gate = self.gate.lock().await;
            let is_ours = matches!(&*self.body(), Body::Guest(ours) if Arc::ptr_eq(ours, running));
            if is_ours {
                running.machine.resume().await.ok();
                self.commands.reopen();
            }
        }
    }
}
