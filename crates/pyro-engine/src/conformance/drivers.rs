//! The drivers that can be had here, or why one cannot.

use std::ffi::OsString;
use std::path::PathBuf;

use pyro_vmm::host::{HostFacts, find_qemu, firecracker_version, qemu_version};
use pyro_vmm::{Accel, Confine, Driver, Firecracker, FirecrackerConfig, Qemu, QemuConfig, source};

pub(super) fn qemu() -> Result<Driver, String> {
    let cache = tempfile::tempdir().expect("a directory");
    let cache = cache.path().join("host.json");
    let binary = find_qemu(&search_path()).ok_or("there is no QEMU")?;
    let version = qemu_version(&binary, &cache).expect("it tells its version");
    let facts = HostFacts::load(&cache);
    let accel = if facts.kvm.usable { Accel::Kvm } else { Accel::Tcg { tsc_khz: facts.tsc_khz } };
    let config = QemuConfig { binary, version: version.version, sandbox: version.sandbox, accel };
    Ok(Driver::Qemu(Qemu::new(config)))
}

pub(super) fn firecracker() -> Result<(&'static str, Driver), String> {
    let cache = tempfile::tempdir().expect("a directory");
    let cache = cache.path().join("host.json");
    let facts = HostFacts::load(&cache);
    if !facts.kvm.usable {
        return Err(format!("no usable KVM ({}); `make test-firecracker` brings one", facts.kvm.why));
    }
    let named = std::env::var_os("PYRO_FIRECRACKER").map(PathBuf::from);
    let found = source::find(named.as_deref(), "/nonexistent".as_ref(), &search_path());
    let found = found.expect("what is named is there").ok_or("there is no Firecracker")?;
    let version = firecracker_version(&found.firecracker, &cache).expect("it tells its version");
    let (name, confine) = match found.jailer {
        Some(jailer) if rustix::process::geteuid().is_root() => {
            ("firecracker, jailer", Confine::Jailer(jailer))
        }
        _ => ("firecracker, namespaces", Confine::Namespaces),
    };
    let config = FirecrackerConfig { binary: found.firecracker, version, confine, omitted: None };
    Ok((name, Driver::Firecracker(Firecracker::new(config))))
}

fn search_path() -> OsString {
    std::env::var_os("PATH").unwrap_or_default()
}
