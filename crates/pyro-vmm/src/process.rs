//! The VMM process as its owner sees it: who it is, how to signal it, how it ended.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use pyro_process::Child;
use rustix::process::Signal;

use crate::machine::{MachineEnd, MachineExit};
use crate::watch::{self, ExitReceiver, Watched};

pub(crate) use crate::watch::Streams;

/// A running VMM. Dropping it kills the process at once and leaves the reaping to its thread.
#[derive(Debug)]
pub(crate) struct VmmProcess {
    pid: u32,
    start_time: u64,
    /// Signals go through this, so that they can hit no other process.
    pidfd: OwnedFd,
    watched: Arc<Watched>,
    exit: ExitReceiver,
}

impl VmmProcess {
    /// Takes over a child that was just started. On failure the child is ended and reaped.
    pub(crate) fn new(child: Child, streams: Streams) -> io::Result<Self> {
        let pid = child.id();
        let pidfd = child.pidfd().try_clone_to_owned();
        let start_time = process_start_time(pid).unwrap_or_default();
        let (watched, exit) = watch::start(child, streams)?;
        let pidfd = match pidfd {
            Ok(pidfd) => pidfd,
            Err(error) => {
                watched.end_without_pidfd();
                return Err(error);
            }
        };
        Ok(Self { pid, start_time, pidfd, watched, exit })
    }
}
