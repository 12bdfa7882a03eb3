//! A request that is being carried out: its output as it comes, then its result.

use std::sync::Arc;
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use pyro_engine::{Chunk, Engine, Observer, Stream};
use tokio::runtime::Runtime;
use tokio::sync::{Mutex, mpsc};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::exceptions;
use crate::request::{Refusal, Request, perform};
use crate::runtime::Owned;

/// Pieces of output that may wait for whoever reads them: then the command waits.
const QUEUE: usize = 8;
/// How often a waiting call looks for signals: a handler written in Python runs only when the thread asks for that.
const SIGNALS: Duration = Duration::from_millis(50);

enum Event {
    Output(Chunk),
    Done(Result<String, Refusal>),
}

type Events = Arc<Mutex<mpsc::Receiver<Event>>>;

struct Inner {
    runtime: Arc<Runtime>,
    events: Events,
    given_up: CancellationToken,
    /// An object that nobody holds any more gives its request up.
    _guard: DropGuard,
}

impl Inner {
    /// Waits until the request has ended. A further signal does not wait.
    fn wait_for_end(&self, py: Python<'_>) -> PyResult<()> {
        // The timer is made where it runs: on the runtime.
        let wait = async || tokio::time::timeout(SIGNALS, until_done(&self.events)).await;
        while py.detach(|| self.runtime.block_on(wait())).is_err() {
            py.check_signals()?;
        }
        Ok(())
    }
}

/// A request that is being carried out.
#[pyclass(frozen, module = "pyro_mcp._pyro")]
pub(crate) struct Running {
    inner: Owned<Inner>,
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
        drop(runtime.spawn(carry_out(engine, request, stdin, output, sender, given_up.clone())));
        let guard = given_up.clone().drop_guard();
        let inner = Inner { runtime, events: Arc::new(Mutex::new(events)), given_up, _guard: guard };
        Self { inner: Owned::new(inner) }
    }

    fn inner(&self, py: Python<'_>) -> PyResult<&Inner> {
        self.inner.get().ok_or_else(|| elsewhere(py))
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
                Some(event) => return present(py, event),
                None => {
                    if let Err(raised) = py.check_signals() {
                        inner.given_up.cancel();
                        inner.wait_for_end(py)?;
                        return Err(raised);
                    }
                }
            }
        }
    }

    /// Has `ready(event, exception)` called, on another thread, with the next event; one of the two is None.
    fn when_ready(&self, py: Python<'_>, ready: Py<PyAny>) -> PyResult<()> {
        let inner = self.inner(py)?;
        let events = Arc::clone(&inner.events);
        drop(inner.runtime.spawn(async move {
            let event = events.lock().await.recv().await;
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

    /// Gives the request up: its command is ended, and what it has made.
    fn cancel(&self, py: Python<'_>) -> PyResult<()> {
        self.inner(py)?.given_up.cancel();
        Ok(())
    }

    /// Gives the request up and waits until it has ended, or until a signal's handler raises.
    fn abandon(&self, py: Python<'_>) -> PyResult<()> {
        let inner = self.inner(py)?;
        inner.given_up.cancel();
        inner.wait_for_end(py)
    }

    /// Whether nothing is left to come of it.
    fn ended(&self, py: Python<'_>) -> PyResult<bool> {
        let inner = self.inner(py)?;
        Ok(inner.events.try_lock().is_ok_and(|events| events.is_closed()))
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

async fn until_done(events: &Events) {
    let mut events = events.lock().await;
    while let Some(event) = events.recv().await {
        if let Event::Done(_) = event {
            return;
        }
    }
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
        Some(Event::Done(Ok(json))) => Ok(("result", json.into_pyobject(py)?.into_any())),
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
