//! One of the drivers, chosen at run time.

use std::path::Path;

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

    /// Finds out whether the VMM can be kept apart from this host, by making a jail with nothing in it below `dir`, a
    /// directory of the caller's.
    ///
    /// # Errors
    /// When the host refuses what a jail is made of, or the VMM cannot be shown in one.
    pub fn probe_confinement(&self, dir: &Path) -> Result<(), LaunchError> {
        let confine = match self {
            Self::Firecracker(driver) => &driver.config().confine,
            Self::Qemu(driver) => {
                driver.config().check_confinable()?;
                &driver.config().confine
            }
        };
        crate::confine::probe(confine, dir)
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

    fn fingerprint(&self, spec: &MachineSpec, has_nic: bool) -> Fingerprint {
        match self {
            Self::Firecracker(driver) => driver.fingerprint(spec, has_nic),
            Self::Qemu(driver) => driver.fingerprint(spec, has_nic),
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
