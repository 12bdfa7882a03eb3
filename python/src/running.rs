//! A request that is being carried out: its output as it comes, then its result.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use pyro_engine::{Chunk, Engine, Observer, Stream};
use tokio::runtime::Runtime;
use tokio::sync::{Mutex, mpsc};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::exceptions;
use crate::request::{Answer, Made, Refusal, Request, perform};
use crate::runtime::Owned;

/// Pieces of output that may wait for whoever reads them: then the command waits.
const QUEUE: usize = 8;
/// How often a waiting call looks for signals: a handler written in Python runs only when the thread asks for that.
const SIGNALS: Duration = Duration::from_millis(50);

enum Event {
    Output(Chunk),
    Done(Result<Answer, Refusal>),
}

type Events = Mutex<mpsc::Receiver<Event>>;

struct Inner {
    runtime: Arc<Runtime>,
    events: Events,
    given_up: CancellationToken,
    engine: Engine,
    /// What the result that was handed over speaks of: nobody may have come to know of it.
    made: std::sync::Mutex<Option<Made>>,
    /// What undoes it.
    undoing: TaskTracker,
}

impl Inner {
    /// Notes what an event tells of, before it is handed over.
    fn hand_over(&self, event: Option<Event>) -> Option<Event> {
        event.map(|event| match event {
            Event::Done(Ok(Answer { json, made })) => {
                *self.made.lock().unwrap_or_else(PoisonError::into_inner) = made;
                if self.given_up.is_cancelled() {
                    self.give_up();
                }
                Event::Done(Ok(Answer { json, made: None }))
            }
            other => other,
        })
    }

    /// Gives the request up; where it has ended already, undoes what it has made.
    fn give_up(&self) {
        self.given_up.cancel();
        if let Some(made) = self.made.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let engine = self.engine.clone();
            drop(self.undoing.spawn_on(async move { made.undo(&engine).await }, self.runtime.handle()));
        }
    }

    /// Waits until the request that was given up has ended, and what it has made is gone. A further signal does not wait.
    fn wait_for_end(&self, py: Python<'_>) -> PyResult<()> {
        let end = async || {
            {
                let mut events = self.events.lock().await;
                while let Some(event) = events.recv().await {
                    drop(self.hand_over(Some(event)));
                }
            }
            self.undoing.close();
            self.undoing.wait().await;
        };
        // The timer is made where it runs: on the runtime.
        while py
            .detach(|| self.runtime.block_on(async { tokio::time::timeout(SIGNALS, end()).await }))
            .is_err()
        {
            py.check_signals()?;
        }
        Ok(())
    }
}

/// A request that is being carried out.
#[pyclass(frozen, module = "pyro_mcp._pyro")]
pub(crate) struct Running {
    /// An object that nobody holds any more gives its request up.
    inner: Owned<(Arc<Inner>, DropGuard)>,
}

impl Running {
    pub(crate) fn start(
        runtime: Arc<Runtime>,
        engine: Engine,
        request: Request,
        stdin: Option<Vec<u8>>,
        output: bool,
    ) -> Self {
        let (sender, events) = mpsc::channel(QUEUE);
        let given_up = CancellationToken::new();
        drop(runtime.spawn(carry_out(engine.clone(), request, stdin, output, sender, given_up.clone())));
        let guard = given_up.clone().drop_guard();
        let inner = Arc::new(Inner {
            runtime,
            events: Mutex::new(events),
            given_up,
            engine,
            made: std::sync::Mutex::default(),
            undoing: TaskTracker::new(),
        });
        Self { inner: Owned::new((inner, guard)) }
    }

    fn inner(&self, py: Python<'_>) -> PyResult<&Arc<Inner>> {
        self.inner.get().map(|(inner, _guard)| inner).ok_or_else(|| elsewhere(py))
    }
}

#[pymethods]
impl Running {
    /// Waits for the next event: `("stdout", bytes)`, `("stderr", bytes)` or, as the last, `("result", json)`. A signal
    /// whose handler raises gives the request up; what it has made is gone when this raises.
    fn next<'py>(&self, py: Python<'py>) -> PyResult<(&'static str, Bound<'py, PyAny>)> {
        let inner = self.inner(py)?;
        loop {
            let event = py.detach(|| inner.runtime.block_on(soon(&inner.events)));
            match event {
                Some(event) => return present(py, inner.hand_over(event)),
                None => {
                    if let Err(raised) = py.check_signals() {
                        inner.give_up();
                        inner.wait_for_end(py)?;
                        return Err(raised);
                    }
                }
            }
        }
    }

    /// Has `ready(event, exception)` called, on another thread, with the next event; one of the two is None.
    fn when_ready(&self, py: Python<'_>, ready: Py<PyAny>) -> PyResult<()> {
        let inner = Arc::clone(self.inner(py)?);
        drop(inner.runtime.clone().spawn(async move {
            let event = {
                let mut events = inner.events.lock().await;
                let event = events.recv().await;
                inner.hand_over(event)
            };
            // Whoever holds the GIL must not hold these threads up.
            drop(tokio::task::spawn_blocking(move || {
                // An interpreter that is on its way out hears nothing more.
                Python::try_attach(|py| {
                    let heard = match present(py, event) {
                        Ok(event) => ready.call1(py, (event, py.None())),
                        Err(error) => ready.call1(py, (py.None(), error.into_value(py))),
                    };
                    // The loop that wanted to hear it is closed.
                    drop(heard);
                });
            }));
        }));
        Ok(())
    }

    /// Gives the request up: its command is ended, and what it has made is gone, its result handed over or not.
    fn cancel(&self, py: Python<'_>) -> PyResult<()> {
        self.inner(py)?.give_up();
        Ok(())
    }

    /// Gives the request up and waits until it has ended, or until a signal's handler raises.
    fn abandon(&self, py: Python<'_>) -> PyResult<()> {
        let inner = self.inner(py)?;
        inner.give_up();
        inner.wait_for_end(py)
    }

    /// Whether nothing is left to come of it.
    fn ended(&self, py: Python<'_>) -> PyResult<bool> {
        let inner = self.inner(py)?;
        Ok(inner.undoing.is_empty() && inner.events.try_lock().is_ok_and(|events| events.is_closed()))
    }
}

/// Carries a request out and tells what comes of it.
async fn carry_out(
    engine: Engine,
    request: Request,
    stdin: Option<Vec<u8>>,
    output: bool,
    events: mpsc::Sender<Event>,
    given_up: CancellationToken,
) {
    let mut observer = Observer::none();
    let (pieces, mut chunks) = mpsc::channel::<Chunk>(QUEUE);
    if output {
        observer = observer.output(pieces);
    }
    let forward = async {
        if output {
            while let Some(chunk) = chunks.recv().await {
                if events.send(Event::Output(chunk)).await.is_err() {
                    given_up.cancel();
                }
            }
        }
    };
    let (result, ()) = tokio::join!(perform(engine, request, stdin, observer, given_up.clone()), forward);
    drop(events.send(Event::Done(result)).await);
}

/// The next event, unless a look at signals is due first.
async fn soon(events: &Events) -> Option<Option<Event>> {
    tokio::time::timeout(SIGNALS, async { events.lock().await.recv().await }).await.ok()
}

fn present<'py>(py: Python<'py>, event: Option<Event>) -> PyResult<(&'static str, Bound<'py, PyAny>)> {
    match event {
        Some(Event::Output(chunk)) => {
            let stream = match chunk.stream {
                Stream::Stdout => "stdout",
                Stream::Stderr => "stderr",
            };
            Ok((stream, PyBytes::new(py, &chunk.bytes).into_any()))
        }
        Some(Event::Done(Ok(answer))) => Ok(("result", answer.json.into_pyobject(py)?.into_any())),
        Some(Event::Done(Err(Refusal::Engine(error)))) => Err(exceptions::exception(py, &error)),
        Some(Event::Done(Err(Refusal::Invalid(message)))) => Err(exceptions::invalid(py, message)),
        Some(Event::Done(Err(Refusal::Host(message)))) => Err(exceptions::host(&message)),
        Some(Event::Done(Err(Refusal::GivenUp))) => Err(exceptions::given_up(py)),
        None => Err(exceptions::unusable(py, "the request has ended already", "make a new call")),
    }
}

pub(crate) fn elsewhere(py: Python<'_>) -> PyErr {
    exceptions::unusable(
        py,
        "this object was made before a fork, by another process",
        "make a new Pyro in the forked process",
    )
}
