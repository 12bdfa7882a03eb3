//! One microVM, launched and controlled through a VMM process.
//!
//! This crate moves bytes and does not know what they mean: a [`Machine`] gives the byte stream to the guest,
//! the end of the VMM process, and the means to end it. What runs in the guest is its caller's business.
//!
//! - [`Vmm`] is one way to get a machine; [`Qemu`] is the driver that exists.
//! - [`host`] tells what this host can do: whether its KVM works, the rate of its TSC, which QEMU it has.
//!
//! No machine outlives the process that launched it, none outlives its [`Machine`], and neither the guest nor
//! the VMM can make this process hold more than a fixed number of their bytes.

mod error;
pub mod host;
mod machine;
mod process;
mod qemu;
mod spec;
mod tail;
mod watch;

pub use error::{ControlError, LaunchError};
pub use machine::{Machine, MachineEnd, MachineExit};
pub use qemu::qmp;
pub use qemu::{Accel, Qemu, QemuConfig};
pub use spec::{BackendKind, Capabilities, DiskCache, Isolation, MachineSpec};

/// One way to run a microVM: a VMM program with its settings.
pub trait Vmm: Send + Sync {
    /// What machines of this VMM can do and how strongly they isolate.
    fn capabilities(&self) -> Capabilities;

    /// Starts a machine; it resolves when the VMM has accepted the whole configuration and the guest runs.
    ///
    /// Dropping the future ends whatever it had started. It must be awaited on a tokio runtime that has its
    /// I/O and time drivers enabled.
    ///
    /// # Errors
    /// See [`LaunchError`].
    fn launch(&self, spec: &MachineSpec) -> impl Future<Output = Result<Machine, LaunchError>> + Send;
}
