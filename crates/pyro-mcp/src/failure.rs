//! Why a tool failed, in the three parts that every surface of pyro tells: the text, its stable code, the remedy.

use pyro_engine::{Error, ErrorKind};
use schemars::JsonSchema;
use serde::Serialize;

/// A failure as a tool's result tells it.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Failure {
    /// What went wrong.
    pub error: String,
    /// Its stable name, in snake_case.
    pub code: String,
    /// What to do about it, where there is something.
    pub hint: Option<String>,
}

impl Failure {
    pub(crate) fn new(code: &str, error: impl Into<String>) -> Self {
        Self { error: error.into(), code: code.to_owned(), hint: None }
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub(crate) fn cancelled() -> Self {
        Self::new(ErrorKind::Cancelled.code(), "the call was cancelled by the client")
    }

    pub(crate) fn ending() -> Self {
        Self::new(ErrorKind::Cancelled.code(), "the server is ending")
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let hint = error.remedy().map(in_tools_words).or_else(|| next_step(error.kind()).map(str::to_owned));
        Self { error: error.to_string(), code: error.code().to_owned(), hint }
    }
}

/// The engine's remedies name commands; an agent has tools for some of them.
fn in_tools_words(hint: &str) -> String {
    hint.replace("pyro task start", "call task_start with task_id")
        .replace("pyro task create", "call task_create")
        .replace("pyro task delete", "call task_delete with task_id")
        .replace(" --force", " and force")
}

/// What an agent does about an error for which the engine names no remedy.
fn next_step(kind: ErrorKind) -> Option<&'static str> {
    match kind {
        ErrorKind::InvalidValue => Some("correct the argument and call again"),
        ErrorKind::UnknownEnvironment => Some("call vm_list_environments for the names"),
        ErrorKind::NotFound => Some("call task_list for the tasks that there are"),
        ErrorKind::Expired => Some("create a new one; ttl_seconds sets how long it lives"),
        ErrorKind::CapReached => Some("delete what is no longer needed: task_list, task_delete, vm_delete"),
        ErrorKind::WrongState => Some("look at its state first: task_status or vm_status"),
        ErrorKind::OutcomeUnknown => {
            Some("look at what it has done before running it again: task_logs, or the files themselves")
        }
        ErrorKind::CommandRefused => {
            Some("check that the program and the working directory exist in the guest")
        }
        ErrorKind::IsolationUnavailable
        | ErrorKind::GuestUnavailable
        | ErrorKind::NetworkUnavailable
        | ErrorKind::Environment
        | ErrorKind::HostResources
        | ErrorKind::Damaged
        | ErrorKind::Host => Some("the user can run `pyro doctor` to see what to mend"),
        ErrorKind::Cancelled => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_but_a_cancelled_call_tells_what_to_do_next() {
        for kind in ErrorKind::ALL {
            assert_eq!(next_step(kind).is_none(), kind == ErrorKind::Cancelled, "{kind:?}");
        }
    }
}
