//! What both benches need: the engine of the tests' environments, a bare QEMU, medians, processes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use pyro_engine::EngineConfig;
use pyro_process::Spawn;
use pyro_vmm::host::{HostFacts, find_qemu};
use pyro_vmm::{Accel, Confine, DiskCache, MachineSpec, Qemu, QemuConfig};

/// Machines that the program may have at the same time.
pub(crate) const CAP: u32 = 16;

pub(crate) fn variable(name: &str) -> PathBuf {
    std::env::var_os(name).map(PathBuf::from).unwrap_or_else(|| panic!("{name} is not set; use `make bench`"))
}

/// An engine on a state directory of its own.
pub(crate) fn config(state: &Path, max_active_vms: u32) -> EngineConfig {
    EngineConfig {
        state_dir: state.to_owned(),
        cache_dir: variable("PYRO_TEST_ENVIRONMENTS"),
        policies_dir: None,
        outbound: pyro_engine::network::Outbound::default(),
        apt_sources: None,
        tool_path: std::env::var_os("PATH").unwrap_or_default(),
        backend: None,
        firecracker: None,
        template_limit_mib: 4096,
        spare: false,
        keep_ready_seconds: 0,
        unconfined_vmm: false,
        max_active_vms,
        max_ttl_seconds: 3600,
        runtime_dir: None,
        memory_overcommit: 1.0,
        disk_overcommit: 100.0,
        supervisor: Some(variable("PYRO_TEST_PROGRAM")),
    }
}

/// The QEMU that the engine would use, with nothing around it.
pub(crate) fn bare_qemu(config: &EngineConfig) -> Qemu {
    let cache = config.state_dir.join("host.json");
    let binary = find_qemu(&config.tool_path).expect("QEMU is installed");
    let facts = HostFacts::load(&cache);
    let accel = if facts.kvm.usable { Accel::Kvm } else { Accel::Tcg { tsc_khz: facts.tsc_khz } };
    Qemu::new(QemuConfig::ask(binary, &cache, accel, Confine::Nothing).expect("it tells its version"))
}

/// Processes whose command line holds a text.
pub(crate) fn processes(text: &str) -> Vec<u32> {
    let all = fs_err::read_dir("/proc").expect("proc").flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let named = |pid: &u32| {
        let line = fs_err::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(text)
    };
    pids.filter(named).collect()
}

/// What is resident, the share of it that is the process's own where pages are shared, and what is private, in MB.
pub(crate) fn memory(pid: u32) -> [f64; 3] {
    let text = fs_err::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("it lives");
    ["Rss:", "Pss:", "Private_Dirty:"].map(|name| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).expect("told");
        line.trim().trim_end_matches("kB").trim().parse::<f64>().expect("a number") / 1e3
    })
}

pub(crate) fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

pub(crate) fn median<T: PartialOrd + Copy>(mut values: Vec<T>) -> T {
    values.sort_by(|one, other| one.partial_cmp(other).unwrap_or(std::cmp::Ordering::Equal));
    values[values.len() / 2]
}

/// A machine of the usual size with these files, in a directory.
pub(crate) fn machine(dir: &Path, boot: [PathBuf; 2], disks: [PathBuf; 2]) -> MachineSpec {
    let ([kernel, initramfs], [rootfs, overlay]) = (boot, disks);
    MachineSpec {
        dir: dir.to_owned(),
        kernel,
        initramfs,
        rootfs,
        overlay,
        overlay_cache: DiskCache::Unsafe,
        vcpus: 1,
        memory_mib: 1024,
        kernel_args: Vec::new(),
        savable: false,
        nic: None,
    }
}

/// What a command of the program prints; it must succeed.
pub(crate) fn pyro(config: &EngineConfig, words: &[&str]) -> String {
    let program: PathBuf = variable("PYRO_TEST_PROGRAM");
    let mut spawn = Spawn::new(program, Path::new("/"));
    spawn.args(words).env("HOME", "/").env("PATH", &config.tool_path);
    spawn.env("PYRO_STATE_DIR", &config.state_dir).env("PYRO_ENVIRONMENT_CACHE_DIR", &config.cache_dir);
    spawn.env("PYRO_MAX_ACTIVE_VMS", CAP.to_string());
    let output = pyro_process::output(spawn).expect("it runs");
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{words:?}: {stderr}");
    String::from_utf8(output.stdout).expect("text")
}
