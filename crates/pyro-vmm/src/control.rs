//! What a driver does for a running machine.

use std::fmt::Debug;
use std::pin::Pin;

use tokio::net::UnixStream;

use crate::error::ControlError;
use crate::spec::Snapshot;

/// An answer that is waited for.
pub(crate) type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, ControlError>> + Send + 'a>>;

/// The control of one machine. The machine sets the time limits.
pub(crate) trait Control: Debug + Send + Sync {
    /// A stream to the guest.
    fn connect(&self) -> Answer<'_, UnixStream>;
    fn pause(&self) -> Answer<'_, ()>;
    fn resume(&self) -> Answer<'_, ()>;
    /// Makes the VMM end by itself.
    fn quit(&self) -> Answer<'_, ()>;
    /// Saves the machine, which is paused.
    fn save(&self) -> Answer<'_, Snapshot>;
}
