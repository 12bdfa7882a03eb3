//! What a caller hears while a tool works: the phase, the output so far, and that it is still at it.

use std::time::{Duration, Instant};

use pyro_engine::{Chunk, Observer, Phase, Stream};
use rmcp::model::ProgressNotificationParam;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::call::Call;

/// Between two notifications at the least.
const BEAT: Duration = Duration::from_millis(200);
/// A caller that waits hears something this often, so that its own time limit can tell slow from dead.
const SIGN_OF_LIFE: Duration = Duration::from_secs(5);
const QUEUE: usize = 8;

#[derive(Clone, Debug, Default)]
struct State {
    phase: String,
    stdout: u64,
    stderr: u64,
}

/// Tells progress until it is dropped.
pub(crate) struct Reporting {
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Reporting {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Reporting {
    /// Stops; no notification follows.
    pub(crate) async fn stop(mut self) {
        for task in std::mem::take(&mut self.tasks) {
            task.abort();
            drop(task.await);
        }
    }
}

/// An observer for the engine that tells the caller of each phase and of output, if the caller asked for it.
pub(crate) fn report(call: &Call) -> (Observer, Reporting) {
    let Some(token) = call.progress.clone() else {
        return (Observer::none(), Reporting { tasks: Vec::new() });
    };
    let state = watch::Sender::new(State::default());
    let (output, mut chunks) = mpsc::channel::<Chunk>(QUEUE);
    let observer = Observer::none().output(output).on_phase({
        let state = state.clone();
        move |phase| {
            if let Some(words) = words(phase) {
                state.send_modify(|state| state.phase = words);
            }
        }
    });
    let peer = call.peer.clone();
    let mut seen = state.subscribe();
    let counting = tokio::spawn(async move {
        while let Some(chunk) = chunks.recv().await {
            state.send_modify(|state| match chunk.stream {
                Stream::Stdout => state.stdout += chunk.bytes.len() as u64,
                Stream::Stderr => state.stderr += chunk.bytes.len() as u64,
            });
        }
        // The observer's end is not the call's.
        std::future::pending::<()>().await;
    });
    let telling = tokio::spawn(async move {
        let began = Instant::now();
        let mut progress = 0.0;
        loop {
            tokio::select! {
                changed = seen.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(SIGN_OF_LIFE) => {}
            }
            progress += 1.0;
            let message = seen.borrow_and_update().message(began.elapsed());
            let told = ProgressNotificationParam::new(token.clone(), progress).with_message(message);
            if peer.notify_progress(told).await.is_err() {
                return;
            }
            tokio::time::sleep(BEAT).await;
        }
    });
    (observer, Reporting { tasks: vec![counting, telling] })
}

impl State {
    fn message(&self, elapsed: Duration) -> String {
        let mut text = format!("{} ({:.1} s)", self.phase, elapsed.as_secs_f64());
        if self.stdout + self.stderr > 0 {
            text.push_str(&format!("; stdout {} bytes, stderr {} bytes", self.stdout, self.stderr));
        }
        text
    }
}

fn words(phase: Phase) -> Option<String> {
    match phase {
        Phase::Environment(step, detail) if detail.is_empty() => Some(format!("environment: {step}")),
        Phase::Environment(step, detail) => Some(format!("environment: {step} {detail}")),
        Phase::Create(environment) => Some(format!("creating a machine from {environment}")),
        Phase::Start(id) => Some(format!("starting {id}")),
        Phase::Execute(id) => Some(format!("running the command in {id}")),
        Phase::Warning(warning) => Some(format!("warning: {warning}")),
        Phase::Sequence(sequence) => Some(format!("running command {sequence}")),
    }
}
