//! The exceptions of the package: one class for each kind of error of the engine, all of them a `PyroError`, with the
//! error's code and hint.

use pyo3::exceptions::{PyException, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple, PyType};
use pyro_engine::{Error, ErrorKind};

struct Classes {
    base: Py<PyType>,
    kinds: Vec<Py<PyType>>,
}

static CLASSES: PyOnceLock<Classes> = PyOnceLock::new();

/// The name of a kind's class, and whether it is one of bad values and missing things, which Python calls a
/// `ValueError`.
fn class(kind: ErrorKind) -> (&'static str, bool, &'static str) {
    match kind {
        ErrorKind::InvalidValue => ("InvalidValueError", true, "A value is outside its limits."),
        ErrorKind::UnknownEnvironment => ("UnknownEnvironmentError", true, "There is no such environment."),
        ErrorKind::NotFound => ("NotFoundError", true, "There is no such machine or task."),
        ErrorKind::Expired => ("ExpiredError", true, "It was there, and its time was up."),
        ErrorKind::CapReached => ("CapReachedError", false, "As many machines as allowed are live."),
        ErrorKind::WrongState => {
            ("WrongStateError", false, "The machine or task is not in a state for this.")
        }
        ErrorKind::IsolationUnavailable => {
            ("IsolationUnavailableError", false, "This host cannot isolate as strongly as was required.")
        }
        ErrorKind::GuestUnavailable => {
            ("GuestUnavailableError", false, "No guest can be had, and running on the host was not allowed.")
        }
        ErrorKind::NetworkUnavailable => {
            ("NetworkUnavailableError", false, "This host cannot give a guest a network.")
        }
        ErrorKind::Environment => {
            ("EnvironmentFailedError", false, "The environment could not be made or is damaged.")
        }
        ErrorKind::OutcomeUnknown => (
            "OutcomeUnknownError",
            false,
            "The connection broke after the command was sent: it may have run.",
        ),
        ErrorKind::CommandRefused => {
            ("CommandRefusedError", false, "The guest refused the command before it ran.")
        }
        ErrorKind::HostResources => {
            ("HostResourcesError", false, "The host lacks memory or disk for another machine.")
        }
        ErrorKind::Damaged => ("DamagedError", false, "A record on disk cannot be read."),
        ErrorKind::Cancelled => ("OperationCancelledError", false, "The operation was given up."),
        ErrorKind::Host => ("HostError", false, "The host's file system or kernel refused something."),
    }
}

/// Makes the classes and adds them to the module.
pub(crate) fn add_to(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    let classes = CLASSES.get_or_try_init(py, || make(py))?;
    module.add("PyroError", classes.base.bind(py))?;
    for class in &classes.kinds {
        module.add(class.bind(py).name()?, class.bind(py))?;
    }
    Ok(())
}

fn make(py: Python<'_>) -> PyResult<Classes> {
    let about = "Any error of pyro; `code` is its stable name, `hint` what mends it, or None.";
    let exception = py.get_type::<PyException>();
    let base = new_class(py, "PyroError", &[&exception], about, ErrorKind::Host.code())?;
    let kinds = ErrorKind::ALL.into_iter().map(|kind| {
        let (name, of_value, about) = class(kind);
        let python = if of_value { py.get_type::<PyValueError>() } else { py.get_type::<PyRuntimeError>() };
        Ok(new_class(py, name, &[&base, &python], about, kind.code())?.unbind())
    });
    let kinds = kinds.collect::<PyResult<Vec<_>>>()?;
    Ok(Classes { base: base.unbind(), kinds })
}

/// A class with several bases, which `create_exception!` does not make.
fn new_class<'py>(
    py: Python<'py>,
    name: &str,
    bases: &[&Bound<'py, PyType>],
    about: &str,
    code: &str,
) -> PyResult<Bound<'py, PyType>> {
    let attributes = PyDict::new(py);
    attributes.set_item("__module__", "pyro_mcp")?;
    attributes.set_item("__doc__", about)?;
    attributes.set_item("code", code)?;
    attributes.set_item("hint", py.None())?;
    let made = py.get_type::<PyType>().call1((name, PyTuple::new(py, bases)?, attributes))?;
    Ok(made.cast_into::<PyType>()?)
}

/// The exception for an error of the engine.
pub(crate) fn exception(py: Python<'_>, error: &Error) -> PyErr {
    raise(py, error.kind(), error.code(), error.to_string(), error.remedy())
}

/// Something of the host's that is no error of the engine.
pub(crate) fn host(message: &str) -> PyErr {
    Python::attach(|py| raise(py, ErrorKind::Host, ErrorKind::Host.code(), message.to_owned(), None))
}

/// A request that is none.
pub(crate) fn invalid(py: Python<'_>, message: String) -> PyErr {
    raise(py, ErrorKind::InvalidValue, ErrorKind::InvalidValue.code(), message, None)
}

/// The caller gave a request up.
pub(crate) fn given_up(py: Python<'_>) -> PyErr {
    raise(
        py,
        ErrorKind::Cancelled,
        ErrorKind::Cancelled.code(),
        "the operation was given up".to_owned(),
        None,
    )
}

/// The object cannot be used any more, or not here.
pub(crate) fn unusable(py: Python<'_>, message: &str, hint: &str) -> PyErr {
    raise(py, ErrorKind::WrongState, ErrorKind::WrongState.code(), message.to_owned(), Some(hint))
}

fn raise(py: Python<'_>, kind: ErrorKind, code: &str, message: String, hint: Option<&str>) -> PyErr {
    let made = || -> PyResult<PyErr> {
        let classes = CLASSES.get_or_try_init(py, || make(py))?;
        let place = ErrorKind::ALL.into_iter().position(|known| known == kind).unwrap_or(0);
        let value = classes.kinds[place].bind(py).call1((message.as_str(),))?;
        value.setattr("code", code)?;
        value.setattr("hint", hint)?;
        Ok(PyErr::from_value(value))
    };
    made().unwrap_or_else(|error| error)
}
