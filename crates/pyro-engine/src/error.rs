//! One error type for all fronts: a kind, a sentence, and where one exists a remedy.

use std::fmt;
use std::io;
use std::path::Path;
use std::time::Duration;

use pyro_process::Holder;

/// What went wrong, as a closed list that the fronts map exhaustively.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// A value is outside its limits.
    InvalidValue,
    /// No such environment.
    UnknownEnvironment,
    /// No such machine.
    NotFound,
    /// It was there, and its time was up.
    Expired,
    /// As many machines as allowed are live.
    CapReached,
    /// The machine is not in a state for this.
    WrongState,
    /// This host cannot isolate as strongly as was required.
    IsolationUnavailable,
    /// No guest can be had, and running on the host was not allowed.
    GuestUnavailable,
    /// This host cannot give a guest a network.
    NetworkUnavailable,
    /// The environment could not be made or is damaged.
    Environment,
    /// The command was sent and the connection broke: it may or may not have run.
    OutcomeUnknown,
    /// The guest refused the command before it ran.
    CommandRefused,
    /// The host lacks memory or disk for another machine.
    HostResources,
    /// A record on disk cannot be read.
    Damaged,
    /// The caller gave up.
    Cancelled,
    /// The host's file system or kernel refused something.
    Host,
}

impl ErrorKind {
    /// All of them.
    pub const ALL: [Self; 16] = [
        Self::InvalidValue,
        Self::UnknownEnvironment,
        Self::NotFound,
        Self::Expired,
        Self::CapReached,
        Self::WrongState,
        Self::IsolationUnavailable,
        Self::GuestUnavailable,
        Self::NetworkUnavailable,
        Self::Environment,
        Self::OutcomeUnknown,
        Self::CommandRefused,
        Self::HostResources,
        Self::Damaged,
        Self::Cancelled,
        Self::Host,
    ];

    /// The stable name that every surface shows.
    pub fn code(self) -> &'static str {
        match self {
            Self::InvalidValue => "invalid_value",
            Self::UnknownEnvironment => "unknown_environment",
            Self::NotFound => "not_found",
            Self::Expired => "expired",
            Self::CapReached => "cap_reached",
            Self::WrongState => "wrong_state",
            Self::IsolationUnavailable => "isolation_unavailable",
            Self::GuestUnavailable => "guest_unavailable",
            Self::NetworkUnavailable => "network_unavailable",
            Self::Environment => "environment_failed",
            Self::OutcomeUnknown => "outcome_unknown",
            Self::CommandRefused => "command_refused",
            Self::HostResources => "host_resources",
            Self::Damaged => "damaged",
            Self::Cancelled => "cancelled",
            Self::Host => "host_failed",
        }
    }
}

/// The code of an error about a lock that another process holds.
pub(crate) const LOCK_HELD: &str = "lock_held";

/// Why an operation failed.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    code: &'static str,
    message: String,
    hint: Option<String>,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, code: kind.code(), message: message.into(), hint: None }
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub(crate) fn host(what: &str, error: &dyn fmt::Display) -> Self {
        Self::new(ErrorKind::Host, format!("{what}: {error}"))
    }

    /// Something in the state directory could not be read or written.
    pub(crate) fn state(path: &Path, error: &io::Error) -> Self {
        let words = error.to_string();
        let place = path.display().to_string();
        let text = if words.contains(&place) { words } else { format!("'{place}': {words}") };
        if let Some(limited) = Self::file_limit(error.kind(), &format!("the state directory: {text}")) {
            return limited;
        }
        let hint = match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "free some disk space",
            _ => "check its owner and mode, or set PYRO_STATE_DIR to another directory",
        };
        Self::new(ErrorKind::Host, format!("the state directory: {text}")).hint(hint)
    }

    /// What failed because this process may not make a file that long. None where there is no such limit, or the error is
    /// another one.
    pub(crate) fn file_limit(kind: io::ErrorKind, what: &str) -> Option<Self> {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Fsize).current?;
        (kind == io::ErrorKind::FileTooLarge).then(|| {
            let text =
                format!("{what}: this process may not make a file longer than {limit} bytes (ulimit -f)");
            Self::new(ErrorKind::HostResources, text).hint("raise the limit: ulimit -f unlimited")
        })
    }

    /// Another process has not done its part in time.
    pub(crate) fn unresponsive(code: &'static str, message: impl Into<String>) -> Self {
        Self { code, ..Self::new(ErrorKind::Host, message) }
    }

    /// A lock that another process held for longer than it was waited for.
    pub(crate) fn lock_held(what: &str, holder: Option<&Holder>, waited: Duration) -> Self {
        let named = holder.map_or_else(|| "another process".to_owned(), ToString::to_string);
        let text = format!("{what} was held for {} s by {named}", waited.as_secs());
        let error = Self::unresponsive(LOCK_HELD, text);
        match holder {
            Some(holder) => error.hint(holder.remedy()),
            None => error.hint("find a pyro process that is stopped, as by Ctrl-Z, and let it go on"),
        }
    }

    /// An error that another process has told.
    pub(crate) fn told(code: &str, message: String, hint: Option<String>) -> Self {
        let kind = ErrorKind::ALL.into_iter().find(|kind| kind.code() == code).unwrap_or(ErrorKind::Host);
        Self { kind, code: kind.code(), message, hint }
    }

    /// What went wrong.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The stable name of the error, finer than its kind where a part of pyro has one.
    pub fn code(&self) -> &'static str {
        self.code
    }

    /// The action that mends it, where there is one.
    pub fn remedy(&self) -> Option<&str> {
        self.hint.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl From<pyro_image::ImageError> for Error {
    fn from(error: pyro_image::ImageError) -> Self {
        if let Some(kind) = error.io_kind()
            && let Some(limited) = Self::file_limit(kind, &chain(&error))
        {
            return limited;
        }
        let kind = match error.code() {
            "unknown_environment" => ErrorKind::UnknownEnvironment,
            "cancelled" => ErrorKind::Cancelled,
            _ => ErrorKind::Environment,
        };
        Self { kind, code: error.code(), hint: error.hint(), message: chain(&error) }
    }
}

impl From<rusqlite::Error> for Error {
    fn from(error: rusqlite::Error) -> Self {
        if error.sqlite_error_code() == Some(rusqlite::ErrorCode::DatabaseBusy) {
            return Self::lock_held(
                "the registry",
                crate::lock::registry_holder().as_ref(),
                crate::lock::BUSY,
            );
        }
        let text = format!("the registry: {error}");
        // SQLite tells a write that the kernel has refused, and keeps the reason to itself.
        let refused = matches!(
            error.sqlite_error_code(),
            Some(rusqlite::ErrorCode::SystemIoFailure | rusqlite::ErrorCode::DiskFull)
        );
        if refused && let Some(limited) = Self::file_limit(io::ErrorKind::FileTooLarge, &text) {
            return limited;
        }
        Self::new(ErrorKind::Host, text)
            .hint("free some disk space, check the state directory's owner and mode, or set PYRO_STATE_DIR")
    }
}

/// An error and its causes in one line, causes that are already named left out.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let words = cause.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        next = cause.source();
    }
    text
}
