//! What runs beside a connection: nothing of it outlives the connection.

use std::sync::{Arc, Mutex, PoisonError};

use hyper::rt::Executor;
use tokio::task::JoinSet;

/// Tasks that end with the one who holds their [`Keeper`].
#[derive(Clone, Debug)]
pub(super) struct Tasks(Arc<Mutex<Option<JoinSet<()>>>>);

/// Ends all tasks when it is dropped; later ones do not begin.
#[derive(Debug)]
pub(super) struct Keeper(pub(super) Tasks);

impl Keeper {
    pub(super) fn new() -> Self {
        Self(Tasks(Arc::new(Mutex::new(Some(JoinSet::new())))))
    }

    /// Waits until all tasks have ended by themselves.
    pub(super) async fn finish(&self) {
        loop {
            // Taken out, so that a task which begins another one does not wait for this.
            let Some(mut tasks) = self.0.lock(|tasks| tasks.as_mut().map(std::mem::take)) else { return };
            if tasks.is_empty() {
                return;
            }
            while tasks.join_next().await.is_some() {}
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        drop(self.0.lock(Option::take));
    }
}

impl Tasks {
    fn lock<T>(&self, work: impl FnOnce(&mut Option<JoinSet<()>>) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.lock(|tasks| {
            if let Some(tasks) = tasks {
                // Those that have ended are let go of.
                while tasks.try_join_next().is_some() {}
                tasks.spawn(task);
            }
        });
    }
}

/// Streams of HTTP/2 are such tasks too.
impl<F> Executor<F> for Tasks
where
    F: Future + Send + 'static,
    F::Output: Send,
{
    fn execute(&self, task: F) {
        self.spawn(async move { drop(task.await) });
    }
}
