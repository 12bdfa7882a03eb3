//! Why something other than a command itself ends it.

use std::fmt;

use crate::record::Fault;

/// What a command runs in, as its caller names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Noun {
    Vm,
    Task,
}

/// Why a command ends before it has ended by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// Its caller cancelled it.
    Cancelled,
    /// The VM or task that it runs in was stopped.
    Stopped(Noun),
    /// The VM or task that it runs in was deleted.
    Deleted(Noun),
    /// The VM's or task's time to live is over.
    TtlExpired,
    /// The guest ended.
    GuestLost,
    /// Its output could not be written on the host.
    HostDiskFull,
    /// Its input broke off: its sender died, or could not read it.
    StdinBroken,
}

impl Ending {
    pub(crate) fn fault(self) -> Fault {
        match self {
            Self::Cancelled | Self::Stopped(_) | Self::Deleted(_) | Self::StdinBroken => Fault::Cancelled,
            Self::TtlExpired => Fault::TtlExpired,
            Self::GuestLost => Fault::GuestLost,
            Self::HostDiskFull => Fault::DiskFull,
        }
    }
}

/// The reason that results, records and errors give.
impl fmt::Display for Ending {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cancelled => formatter.write_str("it was cancelled"),
            Self::Stopped(noun) => write!(formatter, "the {noun} was stopped"),
            Self::Deleted(noun) => write!(formatter, "the {noun} was deleted"),
            Self::TtlExpired => formatter.write_str("the machine's time is up"),
            Self::GuestLost => formatter.write_str("the guest is gone"),
            Self::HostDiskFull => formatter.write_str("the disk of the host is full"),
            Self::StdinBroken => {
                formatter.write_str("stdin_broken: its caller was gone before the end of its input")
            }
        }
    }
}

impl fmt::Display for Noun {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Vm => "VM",
            Self::Task => "task",
        })
    }
}
