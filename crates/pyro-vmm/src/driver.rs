//! One of the drivers, chosen at run time.

use crate::error::LaunchError;
use crate::firecracker::Firecracker;
use crate::machine::Machine;
use crate::qemu::Qemu;
use crate::spec::{BackendKind, Capabilities, Fingerprint, MachineSpec, Snapshot};
use crate::{Accel, Vmm};

/// A driver with its settings.
#[derive(Debug, Clone)]
pub enum Driver {
    /// Firecracker on KVM.
    Firecracker(Firecracker),
    /// QEMU, on KVM or in software.
    Qemu(Qemu),
}

impl Driver {
    /// The kind of the driver.
    pub fn kind(&self) -> BackendKind {
        match self {
            Self::Firecracker(_) => BackendKind::Firecracker,
            Self::Qemu(_) => BackendKind::Qemu,
        }
    }

    /// The version of the VMM, for records.
    pub fn version(&self) -> &str {
        match self {
            Self::Firecracker(driver) => &driver.config().version,
            Self::Qemu(driver) => &driver.config().version,
        }
    }

    /// Whether guests are emulated in software.
    pub fn emulates(&self) -> bool {
        matches!(self, Self::Qemu(driver) if driver.config().accel != Accel::Kvm)
    }
}

impl Vmm for Driver {
    fn capabilities(&self) -> Capabilities {
        match self {
            Self::Firecracker(driver) => driver.capabilities(),
            Self::Qemu(driver) => driver.capabilities(),
        }
    }

    fn fingerprint(&self, spec: &MachineSpec) -> Fingerprint {
        match self {
            Self::Firecracker(driver) => driver.fingerprint(spec),
            Self::Qemu(driver) => driver.fingerprint(spec),
        }
    }

    async fn launch(&self, spec: &MachineSpec) -> Result<Machine, LaunchError> {
        match self {
            Self::Firecracker(driver) => driver.launch(spec).await,
            Self::Qemu(driver) => driver.launch(spec).await,
        }
    }

    async fn restore(&self, spec: &MachineSpec, from: &Snapshot) -> Result<Machine, LaunchError> {
        match self {
            Self::Firecracker(driver) => driver.restore(spec, from).await,
            Self::Qemu(driver) => driver.restore(spec, from).await,
        }
    }
}
