//! Why a command failed: one line of cause, one of remedy.

use std::fmt::Display;

use serde::Serialize;

/// What is printed of a failure, as words or as JSON.
#[derive(Debug, Serialize)]
pub(crate) struct Failure {
    pub(crate) ok: bool,
    pub(crate) error: String,
    pub(crate) code: String,
    pub(crate) hint: Option<String>,
}

impl Failure {
    pub(crate) fn new(code: &str, error: impl Into<String>) -> Self {
        Self { ok: false, error: error.into(), code: code.to_owned(), hint: None }
    }

    pub(crate) fn host(what: &str, error: &dyn Display) -> Self {
        Self::new("host_failed", format!("{what}: {error}"))
    }

    pub(crate) fn hint(mut self, hint: &str) -> Self {
        self.hint = Some(hint.to_owned());
        self
    }
}

impl From<pyro_engine::Error> for Failure {
    fn from(error: pyro_engine::Error) -> Self {
        Self {
            ok: false,
            error: error.to_string(),
            code: error.code().to_owned(),
            hint: error.remedy().map(str::to_owned),
        }
    }
}
