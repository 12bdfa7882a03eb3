//! The drivers that can be had here, as an engine chooses them, or why one cannot.

use std::path::PathBuf;

use pyro_vmm::{Confine, Driver};

use crate::engine::{Engine, EngineConfig};

pub(super) fn qemu() -> Result<Driver, String> {
    driver("qemu")
}

pub(super) fn firecracker() -> Result<(&'static str, Driver), String> {
    // A helper machine's KVM works, but is emulated: on a busy host a probe of it may take longer than one lasts.
    let attempts = if std::env::var_os("PYRO_TEST_KVM").is_some() { 10 } else { 1 };
    let driver =
        (1..attempts).find_map(|_| driver("firecracker").ok()).map_or_else(|| driver("firecracker"), Ok);
    let driver = driver.map_err(|why| format!("{why}; `make test-firecracker` brings one"))?;
    let Driver::Firecracker(firecracker) = &driver else { return Err("it is another VMM".to_owned()) };
    let name = match firecracker.config().confine {
        Confine::Jailer(_) => "firecracker, jailer",
        Confine::Namespaces => "firecracker, namespaces",
    };
    Ok((name, driver))
}

fn driver(backend: &str) -> Result<Driver, String> {
    let dir = tempfile::tempdir().expect("a directory");
    let config = EngineConfig {
        state_dir: dir.path().join("state"),
        cache_dir: dir.path().join("cache"),
        apt_sources: None,
        tool_path: std::env::var_os("PATH").unwrap_or_default(),
        backend: Some(backend.to_owned()),
        firecracker: std::env::var_os("PYRO_FIRECRACKER").map(PathBuf::from),
        max_active_vms: 1,
        max_ttl_seconds: 60,
        template_limit_mib: 0,
        spare: false,
        runtime_dir: None,
        memory_overcommit: 1.0,
        disk_overcommit: 100.0,
        supervisor: None,
    };
    let engine = Engine::open(config).expect("opened");
    engine.vmm().map_err(|error| {
        let kvm = engine.host_facts().kvm;
        if kvm.usable { error.to_string() } else { format!("no usable KVM ({})", kvm.why) }
    })
}
