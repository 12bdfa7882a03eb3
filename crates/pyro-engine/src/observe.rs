//! Who wants to know what happens during a long operation.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pyro_image::Progress;
use tokio::sync::mpsc;

use crate::guest::Chunk;

/// Who wants to know what happens during a long operation.
#[derive(Clone, Default)]
pub struct Observer {
    phases: Option<Arc<dyn Fn(Phase) + Send + Sync>>,
    pub(crate) output: Option<mpsc::Sender<Chunk>>,
}

/// A step of a long operation.
#[derive(Clone, Debug)]
pub enum Phase {
    /// The environment is being made; a step of it and its detail.
    Environment(String, String),
    /// The machine is being made, from this environment.
    Create(String),
    /// The machine of this id boots.
    Start(String),
    /// The command runs in the machine of this id.
    Execute(String),
    /// Something is not as it should be, and is made up for; a sentence.
    Warning(String),
    /// The command of a task has got this sequence number.
    Sequence(u64),
}

impl Observer {
    /// Nobody.
    pub fn none() -> Self {
        Self::default()
    }

    /// Calls `phase` at each step.
    #[must_use]
    pub fn on_phase(mut self, phase: impl Fn(Phase) + Send + Sync + 'static) -> Self {
        self.phases = Some(Arc::new(phase));
        self
    }

    /// Sends output as it arrives; a full channel stops the command, a closed one ends it.
    #[must_use]
    pub fn output(mut self, output: mpsc::Sender<Chunk>) -> Self {
        self.output = Some(output);
        self
    }

    /// Has `phase` called at each step as well, before whoever was told so far.
    #[must_use]
    pub(crate) fn also(self, phase: impl Fn(&Phase) + Send + Sync + 'static) -> Self {
        let before = self.clone();
        self.on_phase(move |step| {
            phase(&step);
            before.tell(step);
        })
    }

    pub(crate) fn tell(&self, phase: Phase) {
        if let Some(phases) = &self.phases {
            phases(phase);
        }
    }
}

impl std::fmt::Debug for Observer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Observer").field("output", &self.output).finish_non_exhaustive()
    }
}

/// Passes the store's progress on, and tells it when nobody waits for the build any more.
pub(crate) struct Building {
    pub(crate) observer: Observer,
    pub(crate) cancelled: Arc<AtomicBool>,
}

impl Progress for Building {
    fn phase(&self, phase: &str, detail: &str) {
        self.observer.tell(Phase::Environment(phase.to_owned(), detail.to_owned()));
    }

    fn cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}

/// Cancels a build when the future that waits for it goes away.
pub(crate) struct CancelOnDrop(pub(crate) Arc<AtomicBool>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
