//! Boots one machine, waits for the first byte on its channel, and powers it off:
//! `boot KERNEL INITRAMFS ROOTFS OVERLAY [COUNT]`

#![expect(clippy::print_stdout, reason = "an example that is run by hand")]

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pyro_vmm::host::{HostFacts, find_qemu};
use pyro_vmm::{Accel, Confine, DiskCache, MachineSpec, Qemu, QemuConfig, Vmm};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [kernel, initramfs, rootfs, overlay, rest @ ..] = args.as_slice() else {
        return Err("usage: boot KERNEL INITRAMFS ROOTFS OVERLAY [COUNT]".into());
    };
    let count: u32 = rest.first().map_or(Ok(1), |count| count.to_string_lossy().parse())?;

    let cache = std::env::temp_dir().join("pyro-vmm-example.json");
    let facts = HostFacts::load(&cache);
    println!("kvm: {:?}, tsc: {:?} kHz", facts.kvm, facts.tsc_khz);
    let binary = find_qemu(&std::env::var_os("PATH").unwrap_or_default()).ok_or("no QEMU")?;
    let accel = if facts.kvm.usable { Accel::Kvm } else { Accel::Tcg { tsc_khz: facts.tsc_khz } };
    let qemu = Qemu::new(QemuConfig::ask(binary, &cache, accel, Confine::JAIL)?);
    let absolute = |path: &Path| fs_err::canonicalize(path);
    let spec = MachineSpec {
        dir: std::env::current_dir()?,
        kernel: absolute(kernel)?,
        initramfs: absolute(initramfs)?,
        rootfs: absolute(rootfs)?,
        overlay: absolute(overlay)?,
        overlay_cache: DiskCache::Unsafe,
        vcpus: 1,
        memory_mib: 512,
        kernel_args: Vec::new(),
        savable: false,
        nic: None,
    };
    for _ in 0..count {
        boot(&qemu, &spec).await?;
    }
    Ok(())
}

async fn boot(qemu: &Qemu, spec: &MachineSpec) -> Result<(), Box<dyn Error>> {
    let start = Instant::now();
    let machine = qemu.launch(spec).await?;
    let launched = start.elapsed();
    let mut stream = machine.connect().await?;
    tokio::time::timeout(Duration::from_secs(60), stream.read_u8()).await??;
    let ready = start.elapsed();
    let memory = machine.memory_usage().unwrap_or_default() >> 20;
    stream.write_all(b"Q").await?;
    machine.shutdown(Duration::from_secs(10)).await;
    let exit = machine.wait().await;
    println!(
        "launched {launched:?}, first byte {ready:?}, ended {:?}, {memory} MiB, {:?}: {}",
        start.elapsed(),
        exit.reason,
        exit.status
    );
    Ok(())
}
