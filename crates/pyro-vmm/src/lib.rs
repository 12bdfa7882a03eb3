//! One microVM, launched and controlled through a VMM process.
//!
//! This crate moves bytes and does not know what they mean: a [`Machine`] gives the byte stream to the guest,
//! the end of the VMM process, and the means to end it. What runs in the guest is its caller's business.
//!
//! - [`Vmm`] is one way to get a machine; [`Firecracker`] and [`Qemu`] are the drivers, [`Driver`] is one of them.
//! - [`host`] tells what this host can do: whether its KVM works, the rate of its TSC, which QEMU it has.
//!
//! No machine outlives the process that launched it, none outlives its [`Machine`], and neither the guest nor
//! the VMM can make this process hold more than a fixed number of their bytes.

mod confine;
mod control;
mod driver;
mod error;
mod firecracker;
pub mod host;
mod kernel_args;
mod machine;
mod process;
mod qemu;
mod spec;
mod tail;
mod watch;

pub use confine::{Confine, Confinement, Element, control_group_of, forget, remove_control_group};
pub use driver::Driver;
pub use error::{ControlError, LaunchError};
pub use firecracker::{Firecracker, FirecrackerConfig, source};
pub use machine::{Machine, MachineEnd, MachineExit};
pub use qemu::qmp;
pub use qemu::{Accel, Qemu, QemuConfig};
pub use spec::{
    BackendKind, Capabilities, Channel, DiskCache, Fingerprint, Isolation, MachineSpec, Nic, Snapshot, Tap,
    TapBy, VSOCK_PORT,
};

/// One way to run a microVM: a VMM program with its settings.
pub trait Vmm: Send + Sync {
    /// What machines of this VMM can do and how strongly they isolate.
    fn capabilities(&self) -> Capabilities;

    /// What a saved machine and the one that goes on from it must have in common, besides the sizes of the spec and the
    /// contents of its files. `has_nic` tells whether it has a network device, which the spec need not hold yet.
    fn fingerprint(&self, spec: &MachineSpec, has_nic: bool) -> Fingerprint;

    /// Starts a machine; it resolves when the VMM has accepted the whole configuration and the guest runs.
    ///
    /// Dropping the future ends whatever it had started. It must be awaited on a tokio runtime that has its
    /// I/O and time drivers enabled.
    ///
    /// # Errors
    /// See [`LaunchError`].
    fn launch(&self, spec: &MachineSpec) -> impl Future<Output = Result<Machine, LaunchError>> + Send;

    /// Starts a machine that goes on where a snapshot was taken; it resolves when the guest runs.
    ///
    /// The spec is that of the saved machine, with a directory and a copy of the overlay disk of its own; kernel and
    /// initramfs are not used. What was an open stream in the saved machine is broken; the guest has to be given a new
    /// identity before it does anything.
    ///
    /// # Errors
    /// See [`LaunchError`].
    fn restore(
        &self,
        spec: &MachineSpec,
        from: &Snapshot,
    ) -> impl Future<Output = Result<Machine, LaunchError>> + Send;
}
