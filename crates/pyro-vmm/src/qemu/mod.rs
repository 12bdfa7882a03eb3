//! The QEMU driver: `qemu-system-x86_64` with the `microvm` machine, in software or on KVM.
//!
//! Under KVM the same command line with another accelerator and CPU is used. It was written from QEMU's
//! documentation and has not been run on a host with a usable KVM.

mod command_line;
mod control;
pub mod qmp;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use pyro_process::{Bind, Spawn};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use tokio::net::UnixStream;

use self::command_line::Paths;
use self::control::QemuControl;
use crate::Vmm;
use crate::confine::{self, Confine, Element, Expected, Needs, Place};
use crate::error::{ControlError, LaunchError};
use crate::host::{
    QemuFacts, QemuFiles, VersionError, cpu_identity, needs_preload, preload_library, program_identity,
    qemu_facts,
};
use crate::machine::Machine;
use crate::process::{OOM_SCORE_ADJ, Streams, VmmProcess};
use crate::qmp::Qmp;
use crate::spec::{
    BackendKind, Capabilities, Channel, Fingerprint, Isolation, MachineSpec, Nic, Snapshot, Tap, TapBy,
};

/// How long QEMU may take to accept its command line: 40 ms on a quiet host, seconds on a swamped one.
const ACCEPT_DEADLINE: Duration = Duration::from_secs(30);
const MAX_VCPUS: u8 = 32;
/// The files of a savable machine, in its directory: the guest's memory, and what it is saved to.
const MEMORY: &str = "memory";
const STATE: &str = "state";
/// Where random numbers come from that QEMU's libraries draw.
const RANDOM: &str = "/dev/urandom";
/// What it tries out locks on before it locks its disks.
const NULL: &str = "/dev/null";
/// Where the jail shows the library that an older QEMU needs.
const PRELOAD: &str = "/open.so";

/// What executes the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// The processor itself, through `/dev/kvm`.
    Kvm,
    /// QEMU's translator.
    Tcg {
        /// The rate of the host's TSC, which the guest then need not calibrate: on a busy host a calibration
        /// fails now and then, and the guest hangs. See [`crate::host::measure_tsc_khz`].
        tsc_khz: Option<u32>,
    },
}

/// How to run QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QemuConfig {
    /// The program.
    pub binary: PathBuf,
    /// Its version, for records; see [`crate::host::qemu_facts`].
    pub version: String,
    /// Whether it can confine itself with seccomp; see [`crate::host::qemu_facts`].
    pub sandbox: bool,
    /// The files that it needs, or why they are not known; see [`crate::host::qemu_facts`].
    pub files: Result<QemuFiles, String>,
    /// The library that lets an older one restore in a jail; see [`crate::host::preload_library`].
    pub preload: Option<PathBuf>,
    /// What executes the guest's instructions.
    pub accel: Accel,
    /// What keeps it apart from the host.
    pub confine: Confine,
}

impl QemuConfig {
    /// Asks a QEMU what it is, or `cache_file` if it was asked before; beside that file lies what an older one is
    /// loaded with.
    ///
    /// # Errors
    /// As [`crate::host::qemu_facts`].
    pub fn ask(
        binary: PathBuf,
        cache_file: &Path,
        accel: Accel,
        confine: Confine,
    ) -> Result<Self, VersionError> {
        let QemuFacts { version, sandbox, mut files } = qemu_facts(&binary, cache_file)?;
        let mut preload = None;
        if confine != Confine::Nothing && needs_preload(&version) {
            let dir = cache_file.parent().unwrap_or_else(|| Path::new("/"));
            match preload_library(dir) {
                Ok(library) => preload = Some(library),
                Err(error) => files = Err(error.to_string()),
            }
        }
        Ok(Self { binary, version, sandbox, files, preload, accel, confine })
    }

    /// Refuses one that cannot be kept apart from the host as it should be.
    pub(crate) fn check_confinable(&self) -> Result<(), LaunchError> {
        if self.confine == Confine::Nothing {
            return Ok(());
        }
        if !self.sandbox {
            return Err(LaunchError::Unconfined { missing: Element::Seccomp.as_str().to_owned() });
        }
        match &self.files {
            Ok(_) => Ok(()),
            Err(why) => Err(LaunchError::Unjailable { why: why.clone() }),
        }
    }

    /// Whether it is told to confine itself.
    fn sandboxes(&self) -> bool {
        self.sandbox && (self.confine == Confine::Nothing || self.confine.gives(Element::Seccomp))
    }

    /// Whether it can map a file privately that it may only read.
    fn reads_memory(&self) -> bool {
        !needs_preload(&self.version)
    }
}

/// The driver.
#[derive(Debug, Clone)]
pub struct Qemu {
    config: QemuConfig,
}

/// A QEMU that has not yet accepted its command line.
struct Started {
    process: VmmProcess,
    channel: UnixStream,
    control: UnixStream,
    expected: Expected,
}

impl Qemu {
    /// A driver that runs QEMU as `config` says.
    pub fn new(config: QemuConfig) -> Self {
        Self { config }
    }

    /// The kind of this driver.
    pub fn kind(&self) -> BackendKind {
        BackendKind::Qemu
    }

    /// How QEMU is run.
    pub fn config(&self) -> &QemuConfig {
        &self.config
    }
}

impl Vmm for Qemu {
    fn capabilities(&self) -> Capabilities {
        let isolation = match self.config.accel {
            Accel::Kvm => Isolation::QemuKvm,
            Accel::Tcg { .. } => Isolation::QemuTcg,
        };
        let channel = Channel::Serial;
        let (max_vcpus, tap_by) = (MAX_VCPUS, TapBy::Descriptor);
        Capabilities { isolation, pause: true, snapshot: true, max_vcpus, channel, tap_by }
    }

    fn fingerprint(&self, spec: &MachineSpec, has_nic: bool) -> Fingerprint {
        let binary = program_identity(&self.config.binary);
        let machine = command_line::fingerprint(&self.config, spec, has_nic);
        let (processor, tsc_khz) = match self.config.accel {
            Accel::Kvm => (cpu_identity(), None),
            Accel::Tcg { tsc_khz } => (String::new(), tsc_khz),
        };
        let machine = format!("qemu {} {binary} {machine} {processor}", self.config.version);
        Fingerprint { machine, tsc_khz }
    }

    async fn launch(&self, spec: &MachineSpec) -> Result<Machine, LaunchError> {
        self.begin(spec, None).await
    }

    async fn restore(&self, spec: &MachineSpec, from: &Snapshot) -> Result<Machine, LaunchError> {
        self.begin(spec, Some(from)).await
    }
}

impl Qemu {
    async fn begin(&self, spec: &MachineSpec, from: Option<&Snapshot>) -> Result<Machine, LaunchError> {
        spec.validate(self.capabilities())?;
        self.config.check_confinable()?;
        let (config, from_copy) = (self.config.clone(), from.cloned());
        let start_spec = spec.clone();
        // Forking takes milliseconds. When this future is dropped meanwhile, so is what the closure returns.
        let started = tokio::task::spawn_blocking(move || start(&config, &start_spec, from_copy.as_ref()))
            .await
            .unwrap_or_else(|error| Err(io::Error::other(error)))
            .map_err(|source| self.spawn_error(source))?;
        let Started { process, channel, control, expected } = started;
        let accepted = tokio::time::timeout(ACCEPT_DEADLINE, async {
            let mut qmp = Qmp::connect(control).await?;
            if let Some(snapshot) = from {
                control::restore(&mut qmp, &snapshot.state).await?;
            }
            Ok(qmp)
        });
        let source = match accepted.await {
            Ok(Ok(qmp)) => {
                return match expected.observe(process.pid()) {
                    Ok(confinement) => {
                        let dir = (spec.savable && from.is_none()).then(|| spec.dir.clone());
                        let control = QemuControl::new(qmp, channel, dir);
                        Ok(Machine::new(process, confinement, Box::new(control)))
                    }
                    Err(unconfined) => {
                        process.kill();
                        process.wait().await;
                        Err(unconfined)
                    }
                };
            }
            Ok(Err(source)) => source,
            Err(_elapsed) => ControlError::Timeout { after: ACCEPT_DEADLINE },
        };
        Err(process.refused(source).await)
    }

    fn spawn_error(&self, source: io::Error) -> LaunchError {
        let binary = self.config.binary.clone();
        // The working directory may be what is missing, so look at the program itself.
        if source.kind() == io::ErrorKind::NotFound && !binary.exists() {
            return LaunchError::BinaryMissing { binary };
        }
        LaunchError::of_spawn(&self.config.confine, binary, source)
    }
}

/// Starts the process and connects its channels, all by descriptor: no socket has a name that could be taken,
/// guessed or left behind.
fn start(config: &QemuConfig, spec: &MachineSpec, from: Option<&Snapshot>) -> io::Result<Started> {
    let (channel, qemu_channel) = StdUnixStream::pair()?;
    let (control, qemu_control) = StdUnixStream::pair()?;
    let (console, qemu_console) = StdUnixStream::pair()?;
    let (stderr, qemu_stderr) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;

    if spec.savable && from.is_none() {
        confine::make_empty(&spec.dir.join(MEMORY))?;
        reserve_memory(&spec.dir.join(MEMORY), u64::from(spec.memory_mib) << 20)?;
    }
    let (mut spawn, place) = match &config.files {
        Ok(files) if config.confine != Confine::Nothing => jailed(config, files, spec, from)?,
        _ => {
            let mut spawn = Spawn::new(&config.binary, &spec.dir);
            spawn.args(command_line::arguments(config, spec, &Paths::of_host(spec, from)));
            (spawn, None)
        }
    };
    spawn
        .stdout(Stdio::null())
        .stderr(Stdio::from(qemu_stderr))
        .own_process_group()
        .oom_score_adj(OOM_SCORE_ADJ)
        .fd(qemu_channel.into(), command_line::CHANNEL_FD)
        .fd(qemu_control.into(), command_line::CONTROL_FD)
        .fd(qemu_console.into(), command_line::CONSOLE_FD);
    if let Some(Nic { tap: Tap::Descriptor(tap), .. }) = &spec.nic {
        spawn.fd(tap.try_clone()?, command_line::TAP_FD);
    }
    let child = spawn.spawn()?;

    let streams = Streams { console: OwnedFd::from(console), stderr, log: None };
    let process = VmmProcess::new(child, streams, Box::new(place))?;
    channel.set_nonblocking(true)?;
    control.set_nonblocking(true)?;
    let (channel, control) = (UnixStream::from_std(channel)?, UnixStream::from_std(control)?);
    Ok(Started { process, channel, control, expected: Expected::of(&config.confine) })
}

/// A QEMU in a jail that holds the program with its libraries, and the files of its machine.
fn jailed(
    config: &QemuConfig,
    files: &QemuFiles,
    spec: &MachineSpec,
    from: Option<&Snapshot>,
) -> io::Result<(Spawn, Option<Place>)> {
    let inside = Paths::of_jail(spec, from);
    let mut programs: Vec<_> = files.programs.iter().map(|file| (file.clone(), file.clone())).collect();
    programs.push((files.firmware.clone(), inside.firmware.clone()));
    programs.push((RANDOM.into(), RANDOM.into()));
    let mut shown = Vec::new();
    let mut show = |source: &Path, target: &Path, bind| {
        shown.push((source.to_owned(), target.to_owned(), bind));
    };
    show(&spec.rootfs, &inside.rootfs, Bind::Read);
    show(&spec.overlay, &inside.overlay, Bind::Write);
    match from {
        Some(snapshot) => show(&snapshot.memory, Path::new(command_line::TEMPLATE_MEMORY), Bind::Read),
        None => {
            show(&spec.kernel, &inside.kernel, Bind::Read);
            show(&spec.initramfs, &inside.initramfs, Bind::Read);
            if spec.savable {
                show(Path::new(MEMORY), Path::new(command_line::JAILED_MEMORY), Bind::Write);
            }
        }
    }
    let preload = config.preload.as_ref().filter(|_| from.is_some() && !config.reads_memory());
    if let Some(library) = preload {
        show(library, Path::new(PRELOAD), Bind::Read);
    }
    let needs = Needs {
        dir: &spec.dir,
        programs,
        files: shown,
        devices: if config.accel == Accel::Kvm { vec![NULL, "/dev/kvm"] } else { vec![NULL] },
        network: None,
        makes_files: false,
        memory_mib: spec.memory_mib,
        vcpus: spec.vcpus,
    };
    let (jail, place) = confine::jail(&config.confine, needs)?;
    // The program itself is shown under the path that links led to.
    let program = fs_err::canonicalize(&config.binary)?;
    let mut spawn = Spawn::new(program, &spec.dir);
    spawn.args(command_line::arguments(config, spec, &inside)).jail(jail);
    if let Some(modules) = &files.modules {
        spawn.env("QEMU_MODULE_DIR", modules);
    }
    if preload.is_some() {
        spawn.env("LD_PRELOAD", PRELOAD);
    }
    Ok((spawn, Some(place)))
}

/// Makes the file that a savable guest has for its memory, with all of its room on the disk: a guest that touched a page
/// for which the disk has none would end its VMM by SIGBUS.
fn reserve_memory(path: &Path, bytes: u64) -> io::Result<()> {
    let file = fs_err::File::create(path)?.into_file();
    let reserved = rustix::fs::ftruncate(&file, bytes)
        .and_then(|()| rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes));
    match reserved {
        // Not every file system can do that; then it is as sparse as it would be.
        Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
        Err(error) => {
            drop(file);
            fs_err::remove_file(path).ok();
            let text = format!("{} MiB for the guest's memory in '{}': {error}", bytes >> 20, path.display());
            Err(io::Error::new(io::Error::from(error).kind(), text))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn the_memory_of_a_savable_guest_has_its_room_before_the_guest_runs() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join(MEMORY);
        reserve_memory(&path, 8 << 20).expect("made");
        let found = fs_err::metadata(&path).expect("there");
        assert_eq!((found.len(), found.blocks() * 512 >= 8 << 20), (8 << 20, true));
        let error = reserve_memory(&path, 1 << 50).expect_err("no disk is that large");
        assert!(error.to_string().contains("MiB for the guest's memory in"), "{error}");
        assert!(!path.exists());
    }
}
