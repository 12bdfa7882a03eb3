//! Cold start: from nothing to the end of the first command, against a bare guest on the same VMM.
//!
//! The two take turns in one run. The bare guest is the same kernel with an init that loads the modules of
//! the channel and writes one byte. `scripts/bench.sh` sets the variables that name kernel and images.

#![expect(clippy::print_stdout, reason = "a bench prints its figures")]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pyro_engine::{Command, Engine, EngineConfig, ExecSpec, Observer, VmSpec};
use pyro_vmm::host::{HostFacts, find_qemu, qemu_version};
use pyro_vmm::{Accel, DiskCache, MachineSpec, Qemu, QemuConfig, Vmm};
use tokio::io::AsyncReadExt;

const ROUNDS: usize = 15;

fn variable(name: &str) -> PathBuf {
    std::env::var_os(name).map(PathBuf::from).unwrap_or_else(|| panic!("{name} is not set; use `make bench`"))
}

#[tokio::main]
async fn main() {
    let state = tempfile::tempdir().expect("a directory");
    let tool_path = std::env::var_os("PATH").unwrap_or_default();
    let engine = Engine::open(EngineConfig {
        state_dir: state.path().to_owned(),
        cache_dir: variable("PYRO_TEST_ENVIRONMENTS"),
        apt_sources: None,
        tool_path: tool_path.clone(),
        backend: None,
        max_active_vms: 4,
        max_ttl_seconds: 3600,
    })
    .expect("the engine opens");
    let cache = state.path().join("host.json");
    let binary = find_qemu(&tool_path).expect("QEMU is installed");
    let version = qemu_version(&binary, &cache).expect("it tells its version");
    let facts = HostFacts::load(&cache);
    let accel = if facts.kvm.usable { Accel::Kvm } else { Accel::Tcg { tsc_khz: facts.tsc_khz } };
    let qemu = Qemu::new(QemuConfig { binary, version: version.version, sandbox: version.sandbox, accel });

    let (mut bare, mut whole, mut guest) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        bare.push(boot_bare(&qemu, state.path()).await);
        let began = Instant::now();
        let exec = ExecSpec::new(Command::argv(["true"]));
        let result = engine.run(VmSpec::new("debian:12"), exec, Observer::none()).await.expect("it runs");
        whole.push(began.elapsed());
        guest.push(Duration::from_secs_f64((result.timings.start + result.timings.handshake) / 1e3));
    }
    let (bare, whole, guest) = (median(bare), median(whole), median(guest));
    let ratio = |time: Duration| time.as_secs_f64() / bare.as_secs_f64();
    println!("bare guest, first byte          {:6.0} ms", bare.as_secs_f64() * 1e3);
    println!(
        "pyro, guest ready for a command {:6.0} ms  {:.2} x bare",
        guest.as_secs_f64() * 1e3,
        ratio(guest)
    );
    println!(
        "pyro, `true` ended, cleaned up  {:6.0} ms  {:.2} x bare",
        whole.as_secs_f64() * 1e3,
        ratio(whole)
    );
}

async fn boot_bare(qemu: &Qemu, dir: &Path) -> Duration {
    let [rootfs, overlay] = ["bare-rootfs", "bare-overlay"].map(|name| {
        let disk = dir.join(name);
        std::fs::File::create(&disk).and_then(|file| file.set_len(1 << 20)).expect("a disk");
        disk
    });
    let spec = MachineSpec {
        dir: dir.to_owned(),
        kernel: variable("PYRO_TEST_KERNEL"),
        initramfs: variable("PYRO_TEST_VMM_INITRAMFS"),
        rootfs,
        overlay,
        overlay_cache: DiskCache::Unsafe,
        vcpus: 1,
        memory_mib: 1024,
        kernel_args: Vec::new(),
    };
    let began = Instant::now();
    let machine = qemu.launch(&spec).await.expect("launched");
    let mut stream = machine.take_stream().expect("a channel");
    stream.read_exact(&mut [0]).await.expect("a byte");
    let time = began.elapsed();
    machine.kill().await;
    time
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}
