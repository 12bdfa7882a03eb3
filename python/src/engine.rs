//! The engine as Python holds it.

use std::path::PathBuf;
use std::sync::Arc;

use pyo3::prelude::*;
use pyro_engine::{EngineConfig, absolute_path};
use tokio::runtime::Runtime;

use crate::exceptions;
use crate::request::Request;
use crate::running::{Running, elsewhere};
use crate::runtime::{Owned, runtime};

/// An engine of this process: machines that it makes end with it, tasks do not.
#[pyclass(frozen, module = "pyro_mcp._pyro")]
pub(crate) struct Engine {
    inner: Owned<(Arc<Runtime>, pyro_engine::Engine)>,
}

#[pymethods]
impl Engine {
    /// Opens an engine as the environment says, except for what is given.
    #[new]
    #[pyo3(signature = (*, program, backend_name=None, base_dir=None, cache_dir=None, max_active_vms=None))]
    fn new(
        py: Python<'_>,
        program: PathBuf,
        backend_name: Option<String>,
        base_dir: Option<PathBuf>,
        cache_dir: Option<PathBuf>,
        max_active_vms: Option<u32>,
    ) -> PyResult<Self> {
        let runtime = runtime()?;
        let opened = py.detach(|| {
            let config = EngineConfig::from_environment(Some(program))?;
            let absolute = |dir: Option<PathBuf>| dir.map(|dir| absolute_path(&dir)).transpose();
            pyro_engine::Engine::open(EngineConfig {
                backend: backend_name.or_else(|| config.backend.clone()),
                state_dir: absolute(base_dir)?.unwrap_or_else(|| config.state_dir.clone()),
                cache_dir: absolute(cache_dir)?.unwrap_or_else(|| config.cache_dir.clone()),
                max_active_vms: max_active_vms.unwrap_or(config.max_active_vms),
                // The next command of a program is like its last.
                spare: true,
                ..config
            })
        });
        let engine = opened.map_err(|error| exceptions::exception(py, &error))?;
        Ok(Self { inner: Owned::new((runtime, engine)) })
    }

    /// Starts a request, given as JSON.
    #[pyo3(signature = (request, *, stdin=None, output=false))]
    fn start(
        &self,
        py: Python<'_>,
        request: &str,
        stdin: Option<Vec<u8>>,
        output: bool,
    ) -> PyResult<Running> {
        let (runtime, engine) = self.inner.get().ok_or_else(|| elsewhere(py))?;
        let request: Request =
            serde_json::from_str(request).map_err(|error| exceptions::invalid(py, words(&error)))?;
        Ok(Running::start(Arc::clone(runtime), engine.clone(), request, stdin, output))
    }
}

/// What is wrong with a request, without its place in a text that its caller has not seen.
fn words(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.split(" at line ").next().unwrap_or(&text).to_owned()
}
