//! The native half of the Python package `pyro_mcp`: requests in, events out, and exceptions. The typed half, in Python,
//! is what users see.
//!
//! A request and a result are JSON; output is bytes. Each call releases the GIL while it waits.

// What `#[pymodule]` and `#[pyclass]` write is not ours.
#![allow(
    missing_docs,
    unreachable_pub,
    missing_debug_implementations,
    reason = "items that Python sees, not Rust"
)]

mod engine;
mod exceptions;
mod request;
mod running;
mod runtime;

use pyo3::prelude::*;

#[pymodule]
mod _pyro {
    use super::*;

    #[pymodule_export]
    use super::engine::Engine;
    #[pymodule_export]
    use super::running::Running;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", pyro_engine::VERSION)?;
        exceptions::add_to(module)
    }
}
