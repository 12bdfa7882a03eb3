//! The drivers that can be had here, as an engine chooses them, or why one cannot.

use std::path::PathBuf;

use pyro_vmm::Driver;

use crate::engine::{Engine, EngineConfig};

/// A driver, and the directory of what it needs beside its program.
pub(super) type Had = (Driver, tempfile::TempDir);

pub(super) fn qemu() -> Result<Had, String> {
    driver("qemu")
}

pub(super) fn firecracker() -> Result<(&'static str, Had), String> {
    // A helper machine's KVM works, but is emulated: on a busy host a probe of it may take longer than one lasts.
    let attempts = if std::env::var_os("PYRO_TEST_KVM").is_some() { 10 } else { 1 };
    let driver =
        (1..attempts).find_map(|_| driver("firecracker").ok()).map_or_else(|| driver("firecracker"), Ok);
    let had = driver.map_err(|why| format!("{why}; `make test-firecracker` brings one"))?;
    let as_root = rustix::process::geteuid().is_root();
    let name = if as_root { "firecracker, as root" } else { "firecracker, as an ordinary user" };
    Ok((name, had))
}

fn driver(backend: &str) -> Result<Had, String> {
    let dir = tempfile::tempdir().expect("a directory");
    let config = EngineConfig {
        state_dir: dir.path().join("state"),
        cache_dir: dir.path().join("cache"),
        policies_dir: None,
        outbound: pyro_net::Outbound::default(),
        apt_sources: None,
        tool_path: std::env::var_os("PATH").unwrap_or_default(),
        backend: Some(backend.to_owned()),
        firecracker: std::env::var_os("PYRO_FIRECRACKER").map(PathBuf::from),
        max_active_vms: 1,
        max_ttl_seconds: 60,
        template_limit_mib: 0,
        spare: false,
        keep_ready_seconds: 0,
        unconfined_vmm: false,
        runtime_dir: None,
        memory_overcommit: 1.0,
        disk_overcommit: 100.0,
        supervisor: None,
    };
    let engine = Engine::open(config).expect("opened");
    match engine.vmm() {
        Ok(vmm) => Ok((vmm, dir)),
        Err(error) => {
            let kvm = engine.host_facts().kvm;
            Err(if kvm.usable { error.to_string() } else { format!("no usable KVM ({})", kvm.why) })
        }
    }
}
