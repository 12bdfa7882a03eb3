//! The Firecracker driver: configured through its API. What it makes and what it is shown has the same name in every jail,
//! so that a machine saved in one goes on in any other.

mod api;
mod short;
pub mod source;
mod vsock;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use pyro_process::{Bind, Jail, Spawn};
use rustix::fs::{CWD, FileType, Mode};
use tokio::net::UnixStream;

use self::api::{
    Api, BootSource, Drive, InstanceActionInfo, MachineConfiguration, MemoryBackend, NetworkInterface,
    SnapshotCreateParams, SnapshotLoadParams, Vm, Vsock,
};
use self::short::ShortPath;
use crate::Vmm;
use crate::confine::{self, Confine, Element, Expected, Needs};
use crate::control::{Answer, Control};
use crate::error::{ControlError, LaunchError};
use crate::host::{cpu_identity, program_identity};
use crate::kernel_args;
use crate::machine::Machine;
use crate::process::{OOM_SCORE_ADJ, Streams, VmmProcess};
use crate::spec::{
    BackendKind, Capabilities, Channel, DiskCache, Fingerprint, Isolation, MachineSpec, Snapshot, Tap, TapBy,
    VSOCK_PORT,
};

/// How long Firecracker may take to make its API's socket: 30 ms on a quiet host.
const API_DEADLINE: Duration = Duration::from_secs(20);
/// The pause before its socket is looked for again: a socket that is made and not yet listened at has no event.
const BEAT: Duration = Duration::from_millis(2);
/// How long it may take to start or restore the machine.
const START_DEADLINE: Duration = Duration::from_secs(60);
const MAX_VCPUS: u8 = 32;

/// The names of a machine's files in its root, which is also the working directory; saved machines refer to them.
const PROGRAM: &str = "firecracker";
const KERNEL: &str = "vmlinux";
const INITRAMFS: &str = "initramfs";
const ROOTFS: &str = "rootfs";
const OVERLAY: &str = "overlay";
const STATE: &str = "state";
const MEMORY: &str = "memory";
const API: &str = "run/api.sock";
const VSOCK: &str = "run/vsock.sock";
const LOG: &str = "run/log";
const RANDOM: &str = "/dev/urandom";

/// The address of the guest on its virtio socket, the first that is free.
const GUEST_CID: u32 = 3;

/// A reboot ends the machine, and its keyboard is not looked for.
const KERNEL_ARGS: &[&str] = &["reboot=k", "i8042.nokbd", "i8042.nomux", "i8042.dumbkbd"];

/// How to run Firecracker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirecrackerConfig {
    /// The program.
    pub binary: PathBuf,
    /// Its version, for records.
    pub version: String,
    /// What keeps it apart from the host.
    pub confine: Confine,
}

/// The driver.
#[derive(Debug, Clone)]
pub struct Firecracker {
    config: FirecrackerConfig,
}

/// A process whose API is not yet spoken to.
struct Started {
    process: VmmProcess,
    sockets: Sockets,
    expected: Expected,
}

/// Where the sockets of a running Firecracker are.
#[derive(Debug)]
struct Sockets {
    api: PathBuf,
    vsock: PathBuf,
    saved: Snapshot,
}

/// The control of one Firecracker.
#[derive(Debug)]
struct FirecrackerControl {
    api: Arc<Api>,
    sockets: Sockets,
}

impl Firecracker {
    /// A driver that runs Firecracker as `config` says.
    pub fn new(config: FirecrackerConfig) -> Self {
        Self { config }
    }

    /// The kind of this driver.
    pub fn kind(&self) -> BackendKind {
        BackendKind::Firecracker
    }

    /// How Firecracker is run.
    pub fn config(&self) -> &FirecrackerConfig {
        &self.config
    }

    async fn begin(&self, spec: &MachineSpec, from: Option<&Snapshot>) -> Result<Machine, LaunchError> {
        spec.validate(self.capabilities())?;
        let (config, start_spec, from_copy) = (self.config.clone(), spec.clone(), from.cloned());
        // When this future is dropped meanwhile, so is what the closure returns.
        let started = tokio::task::spawn_blocking(move || start(&config, &start_spec, from_copy.as_ref()))
            .await
            .unwrap_or_else(|error| Err(io::Error::other(error)))
            .map_err(|source| self.spawn_error(source))?;
        let Started { process, sockets, expected } = started;
        let configured = tokio::select! {
            biased;
            exit = process.wait() => return Err(LaunchError::ExitedAtOnce { exit: Box::new(exit) }),
            configured = configure(&sockets, spec, from.is_some()) => configured,
        };
        let api = match configured {
            Ok(api) => Arc::new(api),
            Err(source) => return Err(process.refused(source).await),
        };
        let confinement = match expected.observe(process.pid()) {
            Ok(confinement) => confinement,
            Err(unconfined) => {
                process.kill();
                process.wait().await;
                return Err(unconfined);
            }
        };
        Ok(Machine::new(process, confinement, Box::new(FirecrackerControl { api, sockets })))
    }

    fn spawn_error(&self, source: io::Error) -> LaunchError {
        let binary = self.config.binary.clone();
        if !binary.exists() {
            return LaunchError::BinaryMissing { binary };
        }
        LaunchError::of_spawn(&self.config.confine, binary, source)
    }
}

impl Vmm for Firecracker {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            isolation: Isolation::FirecrackerKvm,
            pause: true,
            snapshot: true,
            max_vcpus: MAX_VCPUS,
            channel: Channel::Vsock,
            tap_by: TapBy::Name,
        }
    }

    fn fingerprint(&self, spec: &MachineSpec, has_nic: bool) -> Fingerprint {
        let [binary, kernel, processor] =
            [program_identity(&self.config.binary), kernel_command_line(spec), cpu_identity()];
        // What the disk promises of its cache is written into the saved machine.
        let cache = cache_type(spec.overlay_cache);
        let nic = if has_nic { " nic" } else { "" };
        let machine =
            format!("firecracker {} {binary} {cache} {kernel} {processor}{nic}", self.config.version);
        Fingerprint { machine, tsc_khz: None }
    }

    async fn launch(&self, spec: &MachineSpec) -> Result<Machine, LaunchError> {
        self.begin(spec, None).await
    }

    async fn restore(&self, spec: &MachineSpec, from: &Snapshot) -> Result<Machine, LaunchError> {
        self.begin(spec, Some(from)).await
    }
}

/// Makes the place and starts the process in it.
fn start(config: &FirecrackerConfig, spec: &MachineSpec, from: Option<&Snapshot>) -> io::Result<Started> {
    if spec.savable && from.is_none() {
        // They are pyro's own, outside of what the VMM may turn elsewhere.
        for file in [STATE, MEMORY] {
            confine::make_empty(&spec.dir.join(file))?;
        }
    }
    let needs = needs(config, spec, from)?;
    let (mut spawn, place) = if config.confine == Confine::Nothing {
        let place = confine::unconfined(&needs)?;
        let mut spawn = Spawn::new(&config.binary, place.base());
        if let Some(network) = needs.network {
            // It is kept apart from nothing, but its tap is in this namespace.
            let mut jail = Jail::new(place.base());
            network.join(&mut jail);
            spawn.jail(jail);
        }
        (spawn, place)
    } else {
        let (jail, place) = confine::jail(&config.confine, needs)?;
        let mut spawn = Spawn::new(Path::new("/").join(PROGRAM), &spec.dir);
        spawn.jail(jail);
        (spawn, place)
    };
    spawn.args(["--id", &confine::machine_name(&spec.dir)]);
    spawn.args(["--api-sock", API, "--log-path", LOG, "--level", "Warn"]);
    if config.confine != Confine::Nothing && !config.confine.gives(Element::Seccomp) {
        spawn.arg("--no-seccomp");
    }
    let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC);
    let ((console, its_console), (stderr, its_stderr)) = (pipe()?, pipe()?);
    spawn.stdout(Stdio::from(its_console)).stderr(Stdio::from(its_stderr)).own_process_group();
    spawn.oom_score_adj(OOM_SCORE_ADJ);
    let log = make_log(&place.of(LOG))?;
    let sockets = Sockets {
        api: place.of(API),
        vsock: place.of(VSOCK),
        saved: Snapshot { state: spec.dir.join(STATE), memory: spec.dir.join(MEMORY) },
    };
    let streams = Streams { console, stderr, log: Some(log) };
    let process = VmmProcess::new(spawn.spawn()?, streams, Box::new(place))?;
    Ok(Started { process, sockets, expected: Expected::of(&config.confine) })
}

fn needs<'a>(
    config: &FirecrackerConfig,
    spec: &'a MachineSpec,
    from: Option<&Snapshot>,
) -> io::Result<Needs<'a>> {
    let mut files = Vec::new();
    let mut show = |source: &Path, name: &str, bind| files.push((source.to_owned(), name.into(), bind));
    show(&spec.rootfs, ROOTFS, Bind::Read);
    show(&spec.overlay, OVERLAY, Bind::Write);
    match from {
        Some(snapshot) => {
            show(&snapshot.state, STATE, Bind::Read);
            show(&snapshot.memory, MEMORY, Bind::Read);
        }
        None => {
            show(&spec.kernel, KERNEL, Bind::Read);
            show(&spec.initramfs, INITRAMFS, Bind::Read);
            if spec.savable {
                show(Path::new(STATE), STATE, Bind::Write);
                show(Path::new(MEMORY), MEMORY, Bind::Write);
            }
        }
    }
    let mut devices = vec!["/dev/kvm"];
    if spec.nic.is_some() {
        devices.push(confine::TUN);
    }
    Ok(Needs {
        dir: &spec.dir,
        programs: vec![(config.binary.clone(), PROGRAM.into()), (RANDOM.into(), RANDOM.into())],
        files,
        devices,
        network: confine::Network::of(spec)?,
        makes_files: true,
        memory_mib: spec.memory_mib,
        vcpus: spec.vcpus,
    })
}

/// Makes the pipe into which Firecracker writes its own words, apart from the guest's; its reading end. It is opened for
/// writing too, so that it does not end before Firecracker has begun.
fn make_log(path: &Path) -> io::Result<OwnedFd> {
    use fs_err::os::unix::fs::OpenOptionsExt;

    rustix::fs::mknodat(CWD, path, FileType::Fifo, Mode::empty(), 0)?;
    // The VMM's user is another than this one, and opens it in both directions; the directory above is closed to others.
    fs_err::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
    let mut options = fs_err::OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
    Ok(options.open(path)?.into_file().into())
}

/// Configures the machine and lets it run.
async fn configure(sockets: &Sockets, spec: &MachineSpec, restore: bool) -> Result<Api, ControlError> {
    let api = match tokio::time::timeout(API_DEADLINE, connect_api(&sockets.api)).await {
        Ok(connected) => connected?,
        Err(_elapsed) => return Err(ControlError::Timeout { after: API_DEADLINE }),
    };
    let started = async {
        if restore {
            return api.call(&load()).await;
        }
        api.call(&boot_source(spec)).await?;
        api.call(&size(spec)).await?;
        for drive in drives(spec) {
            api.call(&drive).await?;
        }
        api.call(&Vsock { guest_cid: GUEST_CID, uds_path: VSOCK }).await?;
        if let Some(nic) = &spec.nic
            && let Tap::Name { name, .. } = nic.tap
        {
            let guest_mac = nic.mac_text();
            api.call(&NetworkInterface { iface_id: "eth0", host_dev_name: name, guest_mac }).await?;
        }
        api.call(&InstanceActionInfo { action_type: "InstanceStart" }).await
    };
    match tokio::time::timeout(START_DEADLINE, started).await {
        Ok(started) => started.map(|()| api),
        Err(_elapsed) => Err(ControlError::Timeout { after: START_DEADLINE }),
    }
}

async fn connect_api(socket: &Path) -> Result<Api, ControlError> {
    loop {
        let connected = match ShortPath::of(socket) {
            Ok(path) => UnixStream::connect(path.path()).await,
            Err(error) => Err(error),
        };
        match connected {
            Ok(stream) => return Api::over(stream).await,
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) =>
            {
                tokio::time::sleep(BEAT).await;
            }
            Err(error) => return Err(ControlError::Io(error)),
        }
    }
}

fn boot_source(spec: &MachineSpec) -> BootSource {
    BootSource { kernel_image_path: KERNEL, initrd_path: INITRAMFS, boot_args: kernel_command_line(spec) }
}

fn kernel_command_line(spec: &MachineSpec) -> String {
    let channel = format!("pyro.vsock={VSOCK_PORT}");
    kernel_args::line(KERNEL_ARGS.iter().copied().chain([channel.as_str()]), &spec.kernel_args)
}

fn size(spec: &MachineSpec) -> MachineConfiguration {
    MachineConfiguration {
        vcpu_count: spec.vcpus,
        mem_size_mib: spec.memory_mib,
        smt: false,
        track_dirty_pages: false,
    }
}

fn drives(spec: &MachineSpec) -> [Drive; 2] {
    let drive = |name, is_read_only, cache_type| Drive {
        drive_id: name,
        path_on_host: name,
        is_root_device: false,
        is_read_only,
        cache_type,
        io_engine: "Sync",
    };
    [drive(ROOTFS, true, "Unsafe"), drive(OVERLAY, false, cache_type(spec.overlay_cache))]
}

fn cache_type(cache: DiskCache) -> &'static str {
    match cache {
        DiskCache::Unsafe => "Unsafe",
        DiskCache::Writeback => "Writeback",
    }
}

fn load() -> SnapshotLoadParams {
    SnapshotLoadParams {
        snapshot_path: STATE,
        mem_backend: MemoryBackend { backend_type: "File", backend_path: MEMORY },
        resume_vm: true,
    }
}

impl FirecrackerControl {
    /// Makes a call to its end, also when nobody waits for it any more: one that is cut off would close the connection.
    fn call<C: api::Call + Send + Sync + 'static>(&self, call: C) -> Answer<'static, ()> {
        let api = Arc::clone(&self.api);
        let called = tokio::spawn(async move { api.call(&call).await });
        Box::pin(async { called.await.unwrap_or(Err(ControlError::Ended)) })
    }
}

impl Control for FirecrackerControl {
    fn connect(&self) -> Answer<'_, UnixStream> {
        Box::pin(async { Ok(vsock::connect(&self.sockets.vsock, VSOCK_PORT).await) })
    }

    fn pause(&self) -> Answer<'_, ()> {
        self.call(Vm { state: "Paused" })
    }

    fn resume(&self) -> Answer<'_, ()> {
        self.call(Vm { state: "Resumed" })
    }

    /// It has no call that ends it; a machine that does not end by itself is killed.
    fn quit(&self) -> Answer<'_, ()> {
        Box::pin(std::future::ready(Err(ControlError::Protocol { what: "there is no such call" })))
    }

    fn save(&self) -> Answer<'_, Snapshot> {
        Box::pin(async {
            let save =
                SnapshotCreateParams { snapshot_type: "Full", snapshot_path: STATE, mem_file_path: MEMORY };
            self.call(save).await?;
            let saved = self.sockets.saved.clone();
            for file in [&saved.state, &saved.memory] {
                confine::take_back(file).map_err(ControlError::Io)?;
            }
            Ok(saved)
        })
    }
}
