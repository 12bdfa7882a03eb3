//! The threads that do the work: made with the first engine of a process, and anew in a forked copy of it, to which the
//! threads of its parent did not come along.

use std::sync::{Arc, Mutex, PoisonError};

use pyo3::PyErr;
use tokio::runtime::{Builder, Runtime};

use crate::exceptions;

static RUNTIME: Mutex<Option<(u32, Arc<Runtime>)>> = Mutex::new(None);

/// The runtime of this process.
pub(crate) fn runtime() -> Result<Arc<Runtime>, PyErr> {
    let mut slot = RUNTIME.lock().unwrap_or_else(PoisonError::into_inner);
    let pid = std::process::id();
    match &*slot {
        Some((owner, runtime)) if *owner == pid => return Ok(Arc::clone(runtime)),
        // Dropping it would wait for threads that are not there.
        Some((_, inherited)) => std::mem::forget(Arc::clone(inherited)),
        None => {}
    }
    let made = Builder::new_multi_thread().worker_threads(2).thread_name("pyro").enable_all().build();
    let made = Arc::new(made.map_err(|error| exceptions::host(&format!("no threads: {error}")))?);
    *slot = Some((pid, Arc::clone(&made)));
    Ok(made)
}

/// A value of the process that made it. A forked copy of that process must not drop it: its machines are still the
/// parent's.
pub(crate) struct Owned<T> {
    pid: u32,
    value: Option<T>,
}

impl<T> Owned<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { pid: std::process::id(), value: Some(value) }
    }

    /// The value, in the process that made it.
    pub(crate) fn get(&self) -> Option<&T> {
        self.value.as_ref().filter(|_| self.pid == std::process::id())
    }
}

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        if self.pid != std::process::id() {
            std::mem::forget(self.value.take());
        }
    }
}
