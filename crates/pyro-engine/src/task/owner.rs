//! The supervisor of a task as a process: named in errors, and killed where it does not do its part.
//!
//! It is found by what it is: `pyro supervise ID` with the task's locked directory open as descriptor 3. The credentials of
//! its socket do not name it, since the process that made the task has opened the socket.

use std::time::Duration;

use pyro_process::{Holder, Other, lock_holder};

use super::{LOCK_FD, TaskDirectory};
use crate::error::{Error, ErrorKind};
use crate::lock;

/// How long the end of a killed supervisor is waited for.
const KILLED: Duration = Duration::from_secs(3);

fn find(directory: &TaskDirectory) -> Result<Option<Other>, Error> {
    let arguments = ["supervise", id(directory)];
    Other::find(&lock::locked(directory.path()), LOCK_FD, &arguments)
        .map_err(|error| Error::host("/proc", &error))
}

fn id(directory: &TaskDirectory) -> &str {
    directory.path().file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

/// Kills the supervisor of a task, which has ended when this returns; false where there is none. Its VMM dies with it.
pub(crate) fn kill(directory: &TaskDirectory) -> Result<bool, Error> {
    let Some(supervisor) = find(directory)? else { return Ok(false) };
    let pid = supervisor.pid();
    let failed = |error: &dyn std::fmt::Display| {
        Error::host(
            &format!("the supervisor of task '{}', process {pid}, cannot be killed", id(directory)),
            error,
        )
    };
    match supervisor.kill(KILLED) {
        Ok(true) => Ok(true),
        Ok(false) => {
            let text = format!("the kernel has not ended it within {} s", KILLED.as_secs());
            Err(failed(&text).hint("a disk that does not answer may hold it; try again when it does"))
        }
        Err(error) => Err(failed(&error)),
    }
}

/// The error of a supervisor that has not answered for so long. With `sent`, a command was sent to it.
pub(crate) fn silent(directory: &TaskDirectory, waited: Duration, sent: bool) -> Error {
    let id = id(directory);
    let supervisor = find(directory).ok().flatten().and_then(|supervisor| Holder::of(supervisor.pid()));
    // Without one, the task is being made by another process, or lies in another container's processes.
    let holder = supervisor.or_else(|| lock_holder(&lock::locked(directory.path())));
    let named = holder.as_ref().map_or_else(String::new, |holder| format!(", {holder},"));
    let after = if sent { "; the command that was sent to it may run when it goes on" } else { "" };
    let text =
        format!("the supervisor of task '{id}'{named} has not answered for {} s{after}", waited.as_secs());
    let remedy = holder
        .filter(|holder| holder.is_stopped)
        .map_or_else(String::new, |holder| format!("{}; or ", holder.remedy()));
    let error = if sent {
        Error::new(ErrorKind::OutcomeUnknown, text)
    } else {
        Error::unresponsive("supervisor_unresponsive", text)
    };
    error.hint(format!("{remedy}end the task: pyro task delete {id} --force"))
}
