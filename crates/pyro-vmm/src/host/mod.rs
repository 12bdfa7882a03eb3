//! What this host can do: whether its KVM works, how fast its TSC runs, which VMMs it has.
//!
//! Finding out takes some 30 ms, so the answers are kept in a small file. It is a cache and not a record:
//! garbage in it costs those 30 ms again, and processes that write it at once lose each other's answers only.

mod cache;
mod kvm;
mod qemu;
mod tsc;
#[cfg(target_arch = "x86_64")]
mod vcpu;

pub use cache::HostFacts;
pub use kvm::{KvmProbe, probe_kvm};
pub use qemu::{QemuVersion, VersionError, find_qemu, firecracker_version, qemu_version};
pub use tsc::measure_tsc_khz;
