//! The command line of QEMU. Each option is here because it was measured or because a boot failed without it.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{Accel, MEMORY, QemuConfig};
use crate::kernel_args;
use crate::spec::{DiskCache, MachineSpec, Snapshot};

/// The numbers under which QEMU gets its ends of the socket pairs.
pub(super) const CHANNEL_FD: RawFd = 3;
pub(super) const CONTROL_FD: RawFd = 4;
pub(super) const CONSOLE_FD: RawFd = 5;
/// The number under which it gets the tap.
pub(super) const TAP_FD: RawFd = 6;

/// Where the jail shows the guest's memory: its own, and a template's (`preload/open.rs` has the same name).
pub(super) const JAILED_MEMORY: &str = "/memory";
pub(super) const TEMPLATE_MEMORY: &str = "/template-memory";

/// The name of the port of the guest channel, in the guest under `/sys/class/virtio-ports`.
const PORT_NAME: &str = "agent";

/// ACPI stays on: Debian's kernel finds its devices by it. The clock chip stays on: the kernel waits a second
/// for one that is missing. The interrupt controller stays on: without it boots took longer.
const MACHINE: &str = "microvm,x-option-roms=off,pit=off,isa-serial=on";

/// The firmware that starts a kernel without option ROMs. QEMU's own choice for this machine is SeaBIOS, which does not;
/// only Debian 12 has the other one under that name.
const FIRMWARE: &str = "qboot.rom";

/// The default code buffer is 1 GiB for each machine; a shell, git and Python together fill 33 MiB.
const TCG: &str = "tcg,tb-size=128";
/// All that the translator can do, so that programs built for x86-64-v2 and v3 run. The fast string moves and
/// five-level paging cost more than they give when they are emulated.
const TCG_CPU: &str = "max,erms=off,fsrm=off,la57=off";

/// A restored guest need not announce itself to a switch: its peer is always the same. The announcement is work for the guest.
const NIC: &str = "virtio-net-device,guest_announce=off";

const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// A reboot ends the machine (with `-no-reboot`). The serial console costs 1 to 3 % of a boot and is the only witness of a
/// panic.
const KERNEL_ARGS: &[&str] = &["reboot=t", "8250.skip_txen_test=1", "i8042.nokbd"];

/// In software, defences against the leaks of a processor that is not there only cost time; and so do the kernel's
/// checks of itself and its accounts of stalls, a tenth of every fork and exec together.
///
/// `norandmaps` loads each program at the same address every time. QEMU finds translated code by its virtual address, so
/// with random addresses it translates each dynamic program anew at each start. The price: an attacker inside the guest
/// knows where programs lie. A guest can switch the randomisation on (`sysctl kernel.randomize_va_space=2`).
const KERNEL_ARGS_TCG: &[&str] = &[
    "noreplace-smp",
    "mitigations=off",
    "nokaslr",
    "norandmaps",
    "init_on_alloc=0",
    "hardened_usercopy=off",
    "randomize_kstack_offset=off",
    "kfence.sample_interval=0",
    "psi=0",
    "nowatchdog",
    "apparmor=0",
    "selinux=0",
    "lsm=",
];

/// Where QEMU finds its files.
#[derive(Debug)]
pub(super) struct Paths {
    pub(super) firmware: PathBuf,
    pub(super) kernel: PathBuf,
    pub(super) initramfs: PathBuf,
    pub(super) rootfs: PathBuf,
    pub(super) overlay: PathBuf,
    memory: Option<Memory>,
}

/// The file that the guest's memory is in.
#[derive(Debug)]
enum Memory {
    /// Its own, which is saved with it.
    Saved(PathBuf),
    /// A template's: what the guest writes stays private.
    Template(PathBuf),
}

impl Paths {
    /// Files where the host has them.
    pub(super) fn of_host(spec: &MachineSpec, from: Option<&Snapshot>) -> Self {
        Self {
            // QEMU looks for it in its own directories.
            firmware: FIRMWARE.into(),
            kernel: spec.kernel.clone(),
            initramfs: spec.initramfs.clone(),
            rootfs: spec.rootfs.clone(),
            overlay: spec.overlay.clone(),
            memory: Memory::of(spec, from, MEMORY, |snapshot| snapshot.memory.clone()),
        }
    }

    /// Files where the jail shows them.
    pub(super) fn of_jail(spec: &MachineSpec, from: Option<&Snapshot>) -> Self {
        Self {
            firmware: "/firmware.rom".into(),
            kernel: "/vmlinux".into(),
            initramfs: "/initramfs".into(),
            rootfs: "/rootfs".into(),
            overlay: "/overlay".into(),
            memory: Memory::of(spec, from, JAILED_MEMORY, |_| TEMPLATE_MEMORY.into()),
        }
    }
}

impl Memory {
    fn of(
        spec: &MachineSpec,
        from: Option<&Snapshot>,
        saved: &str,
        template: impl FnOnce(&Snapshot) -> PathBuf,
    ) -> Option<Self> {
        match from {
            Some(snapshot) => Some(Self::Template(template(snapshot))),
            None => spec.savable.then(|| Self::Saved(saved.into())),
        }
    }
}

/// All arguments after the program's name. A machine that goes on from a template takes no kernel.
pub(super) fn arguments(config: &QemuConfig, spec: &MachineSpec, paths: &Paths) -> Vec<OsString> {
    let mut args = Arguments(Vec::new());
    args.flag("-nodefaults").flag("-no-user-config").flag("-no-reboot");
    args.option("-display", "none").option("-name", name(&spec.dir));
    if config.sandboxes() {
        args.option("-sandbox", SANDBOX);
    }
    // Memory in a file need not be saved: a restored machine maps the file, and keeps its changes private.
    if let Some(memory) = &paths.memory {
        args.option("-object", memory_file(memory, spec.memory_mib, config.reads_memory()).to_string());
    }
    let backend = if paths.memory.is_some() { ",memory-backend=memory" } else { "" };
    args.option("-M", format!("{MACHINE}{backend}")).option("-bios", &paths.firmware);
    args.option("-accel", accelerator(config.accel, spec.vcpus));
    args.option("-cpu", cpu(config.accel));
    args.option("-m", spec.memory_mib.to_string()).option("-smp", spec.vcpus.to_string());
    if let Some(Memory::Template(_)) = paths.memory {
        args.option("-incoming", "defer");
    } else {
        args.option("-kernel", &paths.kernel).option("-initrd", &paths.initramfs);
        args.option("-append", kernel_command_line(config.accel, spec));
    }

    args.option("-chardev", format!("socket,id=control,fd={CONTROL_FD}"));
    args.option("-mon", "chardev=control,mode=control");
    args.option("-chardev", format!("socket,id=console,fd={CONSOLE_FD}"));
    args.option("-serial", "chardev:console");
    args.option("-chardev", format!("socket,id=channel,fd={CHANNEL_FD}"));
    args.option("-device", "virtio-serial-device");
    args.option("-device", format!("virtserialport,chardev=channel,name={PORT_NAME}"));

    args.disk("rootfs", &root_disk(&paths.rootfs));
    args.disk("overlay", &overlay_disk(&paths.overlay, spec.overlay_cache));
    if let Some(nic) = &spec.nic {
        args.option("-netdev", format!("tap,id=net,fd={TAP_FD}"));
        args.option("-device", format!("{NIC},netdev=net,mac={}", nic.mac_text()));
    }
    args.0
}

struct Arguments(Vec<OsString>);

impl Arguments {
    fn flag(&mut self, flag: &str) -> &mut Self {
        self.0.push(flag.into());
        self
    }

    fn option(&mut self, option: &str, value: impl Into<OsString>) -> &mut Self {
        self.0.push(option.into());
        self.0.push(value.into());
        self
    }

    /// A full or failing disk of the host is an error that the guest sees; by default QEMU would pause the
    /// machine for ever.
    fn disk(&mut self, id: &str, node: &Value) -> &mut Self {
        self.option("-blockdev", node.to_string());
        self.option("-device", format!("virtio-blk-device,drive={id},werror=report,rerror=report"))
    }
}

/// Disks are described in JSON, in which a path may hold commas and colons. Locks keep two machines off one
/// overlay; a root disk that nobody writes may be opened by all.
fn root_disk(path: &Path) -> Value {
    json!({
        "driver": "raw",
        "node-name": "rootfs",
        "read-only": true,
        "file": { "driver": "file", "filename": path.to_string_lossy(), "locking": "on" },
    })
}

fn overlay_disk(path: &Path, cache: DiskCache) -> Value {
    json!({
        "driver": "raw",
        "node-name": "overlay",
        "discard": "unmap",
        "cache": { "no-flush": cache == DiskCache::Unsafe },
        "file": { "driver": "file", "filename": path.to_string_lossy(), "locking": "on" },
    })
}

/// `reads`: whether this QEMU can map a file privately that it has opened to be read.
fn memory_file(memory: &Memory, mib: u32, reads: bool) -> Value {
    let (path, share) = match memory {
        Memory::Saved(path) => (path, true),
        Memory::Template(path) => (path, false),
    };
    let mut object = json!({
        "qom-type": "memory-backend-file",
        "id": "memory",
        "size": u64::from(mib) << 20,
        "mem-path": path.to_string_lossy(),
        "share": share,
    });
    if reads && !share {
        object["readonly"] = true.into();
        object["rom"] = "off".into();
    }
    object
}

fn accelerator(accel: Accel, vcpus: u8) -> String {
    match accel {
        Accel::Kvm => "kvm".to_owned(),
        Accel::Tcg { .. } if vcpus > 1 => format!("{TCG},thread=multi"),
        Accel::Tcg { .. } => TCG.to_owned(),
    }
}

fn kernel_command_line(accel: Accel, spec: &MachineSpec) -> String {
    let mut args = KERNEL_ARGS.to_vec();
    let rate;
    if let Accel::Tcg { tsc_khz } = accel {
        args.extend(KERNEL_ARGS_TCG);
        // Without it the kernel measures the TSC against a timer, fails now and then on a busy host, and then
        // hangs. The guest's TSC is the host's.
        if let Some(khz) = tsc_khz {
            rate = format!("tsc_early_khz={khz} tsc=reliable");
            args.push(&rate);
        }
    }
    kernel_args::line(args, &spec.kernel_args)
}

/// All that two machines must have in common for one to go on where the other was saved, but for the rate of the TSC.
pub(super) fn fingerprint(config: &QemuConfig, spec: &MachineSpec, has_nic: bool) -> String {
    let accel = match config.accel {
        Accel::Kvm => Accel::Kvm,
        Accel::Tcg { .. } => Accel::Tcg { tsc_khz: None },
    };
    let kernel = kernel_command_line(accel, spec);
    let nic = if has_nic { NIC } else { "" };
    format!("{MACHINE} {FIRMWARE} {} {} {kernel} {nic}", accelerator(accel, spec.vcpus), cpu(accel))
}

fn cpu(accel: Accel) -> &'static str {
    if accel == Accel::Kvm { "host" } else { TCG_CPU }
}

/// What process listings show: which machine this QEMU is.
fn name(dir: &Path) -> String {
    let dir = dir.file_name().unwrap_or_default().to_string_lossy();
    let safe: String =
        dir.chars().filter(|c| c.is_ascii_alphanumeric() || "-_.".contains(*c)).take(64).collect();
    format!("pyro-{safe}")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::Confine;
    use crate::spec::{Nic, Tap};

    fn spec() -> MachineSpec {
        MachineSpec {
            dir: "/state/tasks/k3v9,x y".into(),
            kernel: "/images/vmlinux".into(),
            initramfs: "/images/initramfs.cpio".into(),
            rootfs: "/images/a,b:c \"d\".erofs".into(),
            overlay: "overlay.ext4".into(),
            overlay_cache: DiskCache::Unsafe,
            vcpus: 1,
            memory_mib: 512,
            kernel_args: vec!["pyro.task=k3v9".to_owned()],
            savable: false,
            nic: None,
        }
    }

    fn config(accel: Accel) -> QemuConfig {
        QemuConfig {
            binary: "qemu".into(),
            version: "7.2.22".to_owned(),
            sandbox: true,
            files: Err("unknown".to_owned()),
            preload: None,
            accel,
            confine: Confine::Nothing,
        }
    }

    fn line(config: &QemuConfig, spec: &MachineSpec) -> String {
        let args = arguments(config, spec, &Paths::of_host(spec, None));
        let args: Vec<String> = args.into_iter().map(|arg| arg.into_string().expect("UTF-8")).collect();
        args.join("\n").replace("\n-", "\x00-").replace('\n', " ").replace('\x00', "\n")
    }

    #[test]
    fn a_machine_in_software() {
        let expected = r#"-nodefaults
-no-user-config
-no-reboot
-display none
-name pyro-k3v9xy
-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
-M microvm,x-option-roms=off,pit=off,isa-serial=on
-bios qboot.rom
-accel tcg,tb-size=128
-cpu max,erms=off,fsrm=off,la57=off
-m 512
-smp 1
-kernel /images/vmlinux
-initrd /images/initramfs.cpio
-append console=ttyS0 8250.nr_uarts=1 quiet panic=-1 random.trust_cpu=on rcupdate.rcu_expedited=1 cryptomgr.notests audit=0 i8042.noaux pci=off raid=noautodetect debugfs=off reboot=t 8250.skip_txen_test=1 i8042.nokbd noreplace-smp mitigations=off nokaslr norandmaps init_on_alloc=0 hardened_usercopy=off randomize_kstack_offset=off kfence.sample_interval=0 psi=0 nowatchdog apparmor=0 selinux=0 lsm= tsc_early_khz=2596120 tsc=reliable pyro.task=k3v9
-chardev socket,id=control,fd=4
-mon chardev=control,mode=control
-chardev socket,id=console,fd=5
-serial chardev:console
-chardev socket,id=channel,fd=3
-device virtio-serial-device
-device virtserialport,chardev=channel,name=agent
-blockdev {"driver":"raw","file":{"driver":"file","filename":"/images/a,b:c \"d\".erofs","locking":"on"},"node-name":"rootfs","read-only":true}
-device virtio-blk-device,drive=rootfs,werror=report,rerror=report
-blockdev {"cache":{"no-flush":true},"discard":"unmap","driver":"raw","file":{"driver":"file","filename":"overlay.ext4","locking":"on"},"node-name":"overlay"}
-device virtio-blk-device,drive=overlay,werror=report,rerror=report"#;
        assert_eq!(line(&config(Accel::Tcg { tsc_khz: Some(2_596_120) }), &spec()), expected);
    }

    #[test]
    fn the_guest_of_a_real_processor_keeps_its_defences() {
        let line = line(&config(Accel::Kvm), &spec());
        assert!(line.contains("-accel kvm\n-cpu host\n"), "{line}");
        for absent in ["tsc", "mitigations=off", "nokaslr", "norandmaps", "init_on_alloc", "tb-size"] {
            assert!(!line.contains(absent), "{absent} in {line}");
        }
    }

    #[test]
    fn what_a_spec_changes() {
        let spec = MachineSpec { vcpus: 2, overlay_cache: DiskCache::Writeback, ..spec() };
        let config = QemuConfig { sandbox: false, ..config(Accel::Tcg { tsc_khz: None }) };
        let line = line(&config, &spec);
        assert!(line.contains("tb-size=128,thread=multi") && line.contains("-smp 2"), "{line}");
        assert!(line.contains(r#""no-flush":false"#), "{line}");
        assert!(!line.contains("-sandbox") && !line.contains("tsc_early_khz"), "{line}");
    }

    #[test]
    fn a_guest_with_a_network_has_a_device_on_a_tap_that_is_handed_over() {
        let tap = std::fs::File::open("/dev/null").expect("opened").into();
        let nic = Nic { mac: [2, 0x70, 0x79, 0x72, 0x6f, 2], tap: Tap::Descriptor(Arc::new(tap)) };
        let (config, without) = (config(Accel::Kvm), spec());
        let with = MachineSpec { nic: Some(nic), ..without.clone() };
        let line = line(&config, &with);
        let end = "-netdev tap,id=net,fd=6\n-device virtio-net-device,guest_announce=off,netdev=net,mac=02:70:79:72:6f:02";
        assert!(line.ends_with(end), "{line}");
        assert_ne!(fingerprint(&config, &without, true), fingerprint(&config, &without, false));
    }

    #[test]
    fn the_kernel_takes_the_longest_command_line() {
        let spec = MachineSpec { kernel_args: vec!["x".repeat(1199)], ..spec() };
        assert!(kernel_command_line(Accel::Tcg { tsc_khz: Some(u32::MAX) }, &spec).len() < 2048);
    }
}
