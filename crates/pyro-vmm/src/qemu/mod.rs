//! The QEMU driver: `qemu-system-x86_64` with the `microvm` machine, in software or on KVM.
//!
//! Under KVM the same command line with another accelerator and CPU is used. It was written from QEMU's
//! documentation and has not been run on a host with a usable KVM.

mod command_line;
pub mod qmp;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use pyro_process::Spawn;
use tokio::net::UnixStream;

use crate::Vmm;
use crate::error::{ControlError, LaunchError};
use crate::machine::Machine;
use crate::process::{Streams, VmmProcess};
use crate::qmp::Qmp;
use crate::spec::{BackendKind, Capabilities, Isolation, MachineSpec};

/// How long QEMU may take to accept its command line: 40 ms on a quiet host, seconds on a swamped one.
const ACCEPT_DEADLINE: Duration = Duration::from_secs(30);
/// How long the end of a QEMU is waited for that has closed its control channel.
const EXIT_GRACE: Duration = Duration::from_secs(2);
const MAX_VCPUS: u8 = 32;

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
    /// Its version, for records; see [`crate::host::qemu_version`].
    pub version: String,
    /// Whether it can confine itself with seccomp; see [`crate::host::qemu_version`].
    pub sandbox: bool,
    /// What executes the guest's instructions.
    pub accel: Accel,
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
        Capabilities { isolation, pause: true, snapshot: false, max_vcpus: MAX_VCPUS }
    }

    async fn launch(&self, spec: &MachineSpec) -> Result<Machine, LaunchError> {
        spec.validate(self.capabilities())?;
        let (config, spec) = (self.config.clone(), spec.clone());
        // Forking takes milliseconds. When this future is dropped meanwhile, so is what the closure returns.
        let started = tokio::task::spawn_blocking(move || start(&config, &spec))
            .await
            .unwrap_or_else(|error| Err(io::Error::other(error)))
            .map_err(|source| self.spawn_error(source))?;
        accept(started).await
    }
}

impl Qemu {
    fn spawn_error(&self, source: io::Error) -> LaunchError {
        let binary = self.config.binary.clone();
        // The working directory may be what is missing, so look at the program itself.
        if source.kind() == io::ErrorKind::NotFound && !binary.exists() {
            return LaunchError::BinaryMissing { binary };
        }
        LaunchError::Spawn { binary, source }
    }
}

/// Starts the process and connects its channels, all by descriptor: no socket has a name that could be taken,
/// guessed or left behind.
fn start(config: &QemuConfig, spec: &MachineSpec) -> io::Result<Started> {
    let (channel, qemu_channel) = StdUnixStream::pair()?;
    let (control, qemu_control) = StdUnixStream::pair()?;
    let (console, qemu_console) = StdUnixStream::pair()?;
    let (stderr, qemu_stderr) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;

    let mut spawn = Spawn::new(&config.binary, &spec.dir);
    spawn
        .args(command_line::arguments(config, spec))
        .stdout(Stdio::null())
        .stderr(Stdio::from(qemu_stderr))
        .own_process_group()
        .fd(qemu_channel.into(), command_line::CHANNEL_FD)
        .fd(qemu_control.into(), command_line::CONTROL_FD)
        .fd(qemu_console.into(), command_line::CONSOLE_FD);
    let child = spawn.spawn()?;

    let process = VmmProcess::new(child, Streams { console: OwnedFd::from(console), stderr })?;
    channel.set_nonblocking(true)?;
    control.set_nonblocking(true)?;
    let (channel, control) = (UnixStream::from_std(channel)?, UnixStream::from_std(control)?);
    Ok(Started { process, channel, control })
}

/// Waits until QEMU has accepted its command line, or ended over it. The guest boots meanwhile.
async fn accept(started: Started) -> Result<Machine, LaunchError> {
    let Started { process, channel, control } = started;
    let source = match tokio::time::timeout(ACCEPT_DEADLINE, Qmp::connect(control)).await {
        Ok(Ok(control)) => return Ok(Machine::new(process, channel, control)),
        Ok(Err(source)) => source,
        Err(_elapsed) => ControlError::Timeout { after: ACCEPT_DEADLINE },
    };
    if matches!(source, ControlError::Ended)
        && let Ok(exit) = tokio::time::timeout(EXIT_GRACE, process.wait()).await
    {
        return Err(LaunchError::ExitedAtOnce { exit: Box::new(exit) });
    }
    process.kill();
    process.wait().await;
    Err(LaunchError::Control { source })
}
