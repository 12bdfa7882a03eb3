//! What a machine is to be, and what a VMM can give.

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::LaunchError;

/// The least memory that the guest kernel, its initramfs and the first process fit into.
const MEMORY_MIB_MIN: u32 = 96;
/// The kernel's COMMAND_LINE_SIZE on x86-64, less its NUL and what a driver adds itself.
const KERNEL_ARGS_MAX: usize = 1200;

/// The VMM programs that have a driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BackendKind {
    /// `firecracker`.
    Firecracker,
    /// `qemu-system-x86_64` with the `microvm` machine.
    Qemu,
}

impl BackendKind {
    /// All of them, the strongest first.
    pub const ALL: [Self; 2] = [Self::Firecracker, Self::Qemu];

    /// The name that users and records see.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Firecracker => "firecracker",
            Self::Qemu => "qemu",
        }
    }

    /// The kind with this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == name)
    }
}

/// What carries the bytes between host and guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channel {
    /// One virtio-serial port, which the guest finds by its name, `agent`.
    Serial,
    /// A virtio socket: the guest listens at [`VSOCK_PORT`].
    Vsock,
}

/// Where a guest on [`Channel::Vsock`] listens.
pub const VSOCK_PORT: u32 = 5005;

/// How strongly a machine is kept apart from the host; a stronger tier is greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isolation {
    /// QEMU emulates the processor in software. QEMU's own policy does not call this a security boundary.
    QemuTcg,
    /// QEMU on the processor's own virtualisation.
    QemuKvm,
    /// Firecracker on the processor's own virtualisation.
    FirecrackerKvm,
}

impl Isolation {
    /// The name that users and records see.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::QemuTcg => "qemu-tcg",
            Self::QemuKvm => "qemu-kvm",
            Self::FirecrackerKvm => "firecracker-kvm",
        }
    }
}

impl Isolation {
    /// The tier with this name.
    pub fn named(name: &str) -> Option<Self> {
        [Self::QemuTcg, Self::QemuKvm, Self::FirecrackerKvm].into_iter().find(|tier| tier.as_str() == name)
    }
}

impl fmt::Display for Isolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What the machines of a VMM can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// The tier that a machine runs in.
    pub isolation: Isolation,
    /// Whether a machine can be paused and resumed.
    pub pause: bool,
    /// Whether a machine can be saved and restored.
    pub snapshot: bool,
    /// The most virtual processors that a machine may have.
    pub max_vcpus: u8,
    /// How host and guest talk.
    pub channel: Channel,
    /// How the VMM takes the tap of a guest's network.
    pub tap_by: TapBy,
}

/// How a VMM takes a tap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TapBy {
    /// As an open descriptor.
    Descriptor,
    /// By its name, in the network namespace that it is in.
    Name,
}

/// A network device of the guest.
#[derive(Debug, Clone)]
pub struct Nic {
    /// The address of the guest's end. A restored guest has the one that it was saved with.
    pub mac: [u8; 6],
    /// The host's end.
    pub tap: Tap,
}

/// The host's end of a guest's network device.
#[derive(Debug, Clone)]
pub enum Tap {
    /// An open tap, for a VMM that takes it by [`TapBy::Descriptor`].
    Descriptor(Arc<OwnedFd>),
    /// A persistent tap that nobody has open, for a VMM that takes it by [`TapBy::Name`].
    Name {
        /// Its name.
        name: &'static str,
        /// The network namespace that it is in.
        net: Arc<OwnedFd>,
        /// The user namespace that owns the network namespace, where that is not the host's.
        user: Option<Arc<OwnedFd>>,
    },
}

impl Nic {
    /// The MAC address as text.
    pub(crate) fn mac_text(&self) -> String {
        self.mac.map(|byte| format!("{byte:02x}")).join(":")
    }
}

/// A saved machine: two files that belong together. A copy of its overlay disk as of that moment belongs to them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The state of processors and devices.
    pub state: PathBuf,
    /// The guest's memory; sparse.
    pub memory: PathBuf,
}

/// What a saved machine can be restored by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprint {
    /// The VMM, its settings and, where the processor runs the guest, that processor; any difference forbids it.
    pub machine: String,
    /// The rate at which the guest believes its clock to run, in kHz; another host's differs by more than the error of
    /// its measurement.
    pub tsc_khz: Option<u32>,
}

/// How the host caches writes to the overlay disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DiskCache {
    /// Flushes of the guest are not passed on: fastest, and a crash of the *host* may lose the disk. Right for
    /// a disk that is deleted with its machine.
    #[default]
    Unsafe,
    /// Flushes of the guest reach the host's disk: what the guest has synced survives a crash of the host.
    Writeback,
}

/// A machine that is about to be launched.
///
/// Relative paths are relative to `dir`.
#[derive(Debug, Clone)]
pub struct MachineSpec {
    /// The machine's own private directory: the working directory of the VMM.
    pub dir: PathBuf,
    /// The guest kernel: an uncompressed `vmlinux` with a PVH entry point.
    pub kernel: PathBuf,
    /// The initramfs, whose `/init` is the guest's first process.
    pub initramfs: PathBuf,
    /// The raw image of the root file system, shared and never written: the guest's first disk, `vda`.
    pub rootfs: PathBuf,
    /// The raw image of the machine's own writable disk: the guest's second disk, `vdb`.
    pub overlay: PathBuf,
    /// How the host caches writes to `overlay`.
    pub overlay_cache: DiskCache,
    /// Virtual processors.
    pub vcpus: u8,
    /// Guest memory.
    pub memory_mib: u32,
    /// Kernel command-line arguments, one each, after those of the driver. A restored machine has had its own.
    pub kernel_args: Vec<String>,
    /// Whether it is going to be saved: what that takes may have to be there from the start.
    pub savable: bool,
    /// The network device; none: the guest has no network.
    pub nic: Option<Nic>,
}

impl MachineSpec {
    /// Checks what can be checked without starting anything.
    pub(crate) fn validate(&self, capabilities: Capabilities) -> Result<(), LaunchError> {
        let bad = |what: String| Err(LaunchError::BadSpec { what });
        if self.vcpus == 0 || self.vcpus > capabilities.max_vcpus {
            return bad(format!("{} vCPUs: this VMM gives 1 to {}", self.vcpus, capabilities.max_vcpus));
        }
        if self.memory_mib < MEMORY_MIB_MIN {
            return bad(format!("{} MiB of memory: at least {MEMORY_MIB_MIN} are needed", self.memory_mib));
        }
        if !self.dir.is_dir() {
            return bad(format!("{} is no directory", self.dir.display()));
        }
        for path in [&self.kernel, &self.initramfs, &self.rootfs, &self.overlay] {
            self.validate_file(path)?;
        }
        let tap_by = self.nic.as_ref().map(|nic| match nic.tap {
            Tap::Descriptor(_) => TapBy::Descriptor,
            Tap::Name { .. } => TapBy::Name,
        });
        if tap_by.is_some_and(|tap_by| tap_by != capabilities.tap_by) {
            return bad(format!("this VMM takes a tap by {:?}", capabilities.tap_by));
        }
        for arg in &self.kernel_args {
            // The kernel splits at white space and knows quotes; an argument must stay one argument.
            if arg.is_empty() || arg.contains(|c: char| !c.is_ascii_graphic() || c == '"') {
                return bad(format!(
                    "kernel argument {arg:?}: printable ASCII without spaces or quotes only"
                ));
            }
        }
        if self.kernel_args.iter().map(|arg| arg.len() + 1).sum::<usize>() > KERNEL_ARGS_MAX {
            return bad(format!("kernel arguments are longer than {KERNEL_ARGS_MAX} bytes"));
        }
        Ok(())
    }

    fn validate_file(&self, path: &Path) -> Result<(), LaunchError> {
        if !self.dir.join(path).is_file() {
            return Err(LaunchError::BadSpec { what: format!("{} is no file", path.display()) });
        }
        if path.to_str().is_none() {
            return Err(LaunchError::BadSpec { what: format!("{} is not UTF-8", path.display()) });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stronger_isolation_is_greater() {
        assert!(Isolation::FirecrackerKvm > Isolation::QemuKvm);
        assert!(Isolation::QemuKvm > Isolation::QemuTcg);
        assert_eq!(Isolation::QemuTcg.to_string(), "qemu-tcg");
    }

    #[test]
    fn a_spec_that_cannot_work_is_refused_with_what_is_wrong() {
        let dir = tempfile::tempdir().expect("a directory");
        for file in ["k", "i", "r", "o"] {
            fs_err::write(dir.path().join(file), b"x").expect("written");
        }
        let good = MachineSpec {
            dir: dir.path().to_owned(),
            kernel: "k".into(),
            initramfs: "i".into(),
            rootfs: dir.path().join("r"),
            overlay: "o".into(),
            overlay_cache: DiskCache::Unsafe,
            vcpus: 1,
            memory_mib: 512,
            kernel_args: vec!["quiet".to_owned()],
            savable: false,
            nic: None,
        };
        let capabilities = Capabilities {
            isolation: Isolation::QemuTcg,
            pause: true,
            snapshot: false,
            max_vcpus: 4,
            channel: Channel::Serial,
            tap_by: TapBy::Descriptor,
        };
        good.validate(capabilities).expect("a good spec");
        let bad = [
            (MachineSpec { vcpus: 0, ..good.clone() }, "0 vCPUs"),
            (MachineSpec { vcpus: 5, ..good.clone() }, "1 to 4"),
            (MachineSpec { memory_mib: 5, ..good.clone() }, "at least"),
            (MachineSpec { kernel: "missing".into(), ..good.clone() }, "missing is no file"),
            (MachineSpec { dir: "/nonexistent".into(), ..good.clone() }, "no directory"),
            (MachineSpec { kernel_args: vec!["a b".to_owned()], ..good.clone() }, "kernel argument"),
            (MachineSpec { kernel_args: vec!["x".repeat(5000)], ..good.clone() }, "longer than"),
        ];
        for (spec, text) in bad {
            let error = spec.validate(capabilities).expect_err("a bad spec").to_string();
            assert!(error.contains(text), "{error:?} does not say {text:?}");
        }
    }
}
