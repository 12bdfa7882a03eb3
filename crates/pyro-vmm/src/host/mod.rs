//! What this host can do: whether its KVM works, how fast its TSC runs, which VMMs it has.
//!
//! Finding out takes some 30 ms, so the answers are kept in a small file. It is a cache and not a record:
//! garbage in it costs those 30 ms again, and processes that write it at once lose each other's answers only.

mod cache;
mod files;
mod identity;
mod kvm;
mod preload;
mod tsc;
#[cfg(target_arch = "x86_64")]
mod vcpu;
mod version;

pub use cache::HostFacts;
pub use files::QemuFiles;
pub(crate) use identity::{cpu_identity, program_identity};
pub use kvm::{KvmProbe, probe_kvm};
pub(crate) use preload::is_needed as needs_preload;
pub use preload::preload_library;
pub use tsc::measure_tsc_khz;
pub use version::{QemuFacts, VersionError, find_qemu, firecracker_version, qemu_facts};
