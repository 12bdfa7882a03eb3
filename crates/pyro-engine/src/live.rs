//! A machine that runs, and the lease under which one of this process's own runs.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pyro_image::{Environment, copy_sparse};
use pyro_net::{Network, Settings};
use pyro_vmm::{
    Channel, DiskCache, Driver, Isolation, LaunchError, Machine, MachineExit, MachineSpec, Snapshot, Vmm,
};

use crate::error::{Error, ErrorKind, chain};
use crate::files;
use crate::guest::{Guest, Identity};
use crate::network::GuestLink;
use crate::place::Place;
use crate::ports::Ports;
use crate::registry::{Lease, Registry};
use crate::template::NO_TEMPLATE;

/// How long a guest may take to answer after its VMM runs. A cold boot in software emulation takes one to two
/// seconds on an idle host, and thirty where seven processes want each processor.
const BOOT_DEADLINE: Duration = Duration::from_secs(100);
/// After how long the first boot is given up and another begun, in software emulation. On such a host one boot of some 150 hangs
/// in the kernel, after its first second, for ever; the next one does not.
const BEGIN_AGAIN: Duration = Duration::from_secs(45);
/// The same, where the processor runs the guest: a second, and ten where that processor is itself emulated.
const KVM_BOOT_DEADLINE: Duration = Duration::from_secs(30);
/// How often a guest is met anew that breaks the connection before it has its identity.
const MEETINGS: u32 = 5;
/// How long a guest may take to write its disks and end.
const POWER_OFF_DEADLINE: Duration = Duration::from_secs(15);
/// How long the end of a VMM is waited for whose guest has stopped answering.
const EXIT_GRACE: Duration = Duration::from_secs(2);
/// The writable disk of a machine; sparse, so only what is written takes room.
pub(crate) const OVERLAY: &str = "overlay.ext4";

/// What is needed to start a machine in its directory.
#[derive(Debug)]
pub(crate) struct Boot<'a> {
    pub(crate) dir: PathBuf,
    pub(crate) environment: &'a Environment,
    pub(crate) vcpus: u8,
    pub(crate) memory_mib: u32,
    pub(crate) disk: DiskCache,
    /// None: it has its disk already, from an earlier start.
    pub(crate) fresh: Option<Fresh<'a>>,
    pub(crate) identity: Identity,
    /// What it may reach, and where that is written down.
    pub(crate) network: Settings,
}

/// A machine that has never been.
#[derive(Debug)]
pub(crate) struct Fresh<'a> {
    /// What its disk is a copy of, where it boots.
    pub(crate) blank: &'a Path,
    pub(crate) disk_mib: u32,
    /// Boot, also where there is a template.
    pub(crate) cold: bool,
}

/// A machine whose agent has answered. Dropping it kills the machine.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) machine: Machine,
    pub(crate) guest: Guest,
    /// The owner of its network; none: it has no network device.
    pub(crate) network: Option<Network>,
    /// The ports of this host that lead to it.
    pub(crate) ports: Ports,
    /// How its commands are run, as records name it.
    pub(crate) execution_mode: &'static str,
    pub(crate) isolation: Isolation,
    pub(crate) restored: bool,
    /// Why it has booted although it might have been restored.
    pub(crate) cold_reason: Option<String>,
}

/// Why a guest was not met.
enum NotBegun {
    /// It has not answered in time.
    Silent(Error),
    Failed(Error),
}

impl From<Error> for NotBegun {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl From<NotBegun> for Error {
    fn from(not_begun: NotBegun) -> Self {
        match not_begun {
            NotBegun::Silent(error) | NotBegun::Failed(error) => error,
        }
    }
}

/// How long the two halves of a start took.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct StartTimes {
    pub(crate) start: Duration,
    pub(crate) handshake: Duration,
}

/// A machine with the files of an environment and a disk in its directory.
pub(crate) fn machine_spec(
    dir: PathBuf,
    environment: &Environment,
    vcpus: u8,
    memory_mib: u32,
    overlay_cache: DiskCache,
) -> MachineSpec {
    MachineSpec {
        dir,
        kernel: environment.kernel.clone(),
        initramfs: environment.initramfs.clone(),
        rootfs: environment.rootfs.clone(),
        overlay: OVERLAY.into(),
        overlay_cache,
        vcpus,
        memory_mib,
        kernel_args: Vec::new(),
        savable: false,
        nic: None,
    }
}

impl Boot<'_> {
    /// The machine that is to be started.
    pub(crate) fn spec(&self) -> MachineSpec {
        machine_spec(self.dir.clone(), self.environment, self.vcpus, self.memory_mib, self.disk)
    }
}

/// How long a guest of this VMM may take to boot and answer.
pub(crate) fn boot_deadline(vmm: &Driver) -> Duration {
    if vmm.emulates() { BOOT_DEADLINE } else { KVM_BOOT_DEADLINE }
}

impl Running {
    /// Boots a machine and waits for its agent. Dropping the future ends whatever it had started.
    pub(crate) async fn boot(vmm: &Driver, boot: &Boot<'_>) -> Result<(Self, StartTimes), Error> {
        if vmm.emulates() {
            match Self::boot_within(vmm, boot, BEGIN_AGAIN).await {
                Err(NotBegun::Silent(_)) => {}
                Err(NotBegun::Failed(error)) => return Err(error),
                Ok(booted) => return Ok(booted),
            }
        }
        Ok(Self::boot_within(vmm, boot, boot_deadline(vmm)).await?)
    }

    async fn boot_within(
        vmm: &Driver,
        boot: &Boot<'_>,
        deadline: Duration,
    ) -> Result<(Self, StartTimes), NotBegun> {
        let (spec, network) = Self::connected(vmm, boot).await?;
        Self::begin(vmm, boot, network, vmm.launch(&spec), deadline).await
    }

    /// As [`Running::boot`], going on where another machine was saved.
    pub(crate) async fn restore(
        vmm: &Driver,
        boot: &Boot<'_>,
        from: &Snapshot,
        deadline: Duration,
    ) -> Result<(Self, StartTimes), Error> {
        let (spec, network) = Self::connected(vmm, boot).await?;
        let (running, times) = Self::begin(vmm, boot, network, vmm.restore(&spec, from), deadline).await?;
        Ok((Self { restored: true, ..running }, times))
    }

    /// The machine with the network that it is to have, which is served from now on.
    async fn connected(vmm: &Driver, boot: &Boot<'_>) -> Result<(MachineSpec, Option<Network>), Error> {
        let spec = boot.spec();
        if !boot.network.policy.has_nic() {
            return Ok((spec, None));
        }
        let link = GuestLink::make(vmm).await?;
        let nic = Some(link.nic.clone());
        Ok((MachineSpec { nic, ..spec }, Some(link.serve(boot.network.clone())?)))
    }

    async fn begin(
        vmm: &Driver,
        boot: &Boot<'_>,
        network: Option<Network>,
        machine: impl Future<Output = Result<Machine, LaunchError>>,
        deadline: Duration,
    ) -> Result<(Self, StartTimes), NotBegun> {
        let began = Instant::now();
        let machine = machine.await.map_err(|error| not_launched(&error))?;
        let start = began.elapsed();
        let identity = boot.identity.for_network(network.as_ref(), &boot.network);
        let met = tokio::select! {
            exit = machine.wait() => return Err(boot_failed(&exit).into()),
            met = tokio::time::timeout(deadline, meet(&machine, &identity)) => met,
        };
        match met {
            Ok(Ok(guest)) => {
                let times = StartTimes { start, handshake: began.elapsed() - start };
                let isolation = vmm.capabilities().isolation;
                let execution_mode = execution_mode(vmm);
                let (restored, cold_reason) = (false, None);
                let ports = Ports::new(guest.clone());
                let running =
                    Self { machine, guest, network, ports, execution_mode, isolation, restored, cold_reason };
                Ok((running, times))
            }
            Ok(Err(error)) => {
                // The end of the VMM closes its channel a moment before it is known; it tells more.
                match tokio::time::timeout(EXIT_GRACE, machine.wait()).await {
                    Ok(exit) => Err(boot_failed(&exit).into()),
                    Err(_elapsed) => {
                        let console = last_lines(&machine.console_tail());
                        Err(unavailable(&format!("phase=handshake: {error}{console}")).into())
                    }
                }
            }
            Err(_elapsed) => {
                let console = last_lines(&machine.console_tail());
                let seconds = deadline.as_secs();
                // Its disk is free for another when this returns.
                machine.kill().await;
                let text = format!("phase=boot: no answer within {seconds} s{console}");
                Err(NotBegun::Silent(unavailable(&text)))
            }
        }
    }

    /// How it has started, as records name it.
    pub(crate) fn start_mode(&self) -> &'static str {
        if self.restored { "restored" } else { "cold" }
    }

    /// What somebody should know of its start: that there was no template is the ordinary reason to boot.
    pub(crate) fn warning(&self) -> Option<&str> {
        self.cold_reason.as_deref().filter(|reason| *reason != NO_TEMPLATE)
    }

    /// Powers the guest off cleanly; its disk is whole when this returns.
    pub(crate) async fn power_off(&self) -> MachineExit {
        tokio::join!(self.guest.power_off(), self.machine.shutdown(POWER_OFF_DEADLINE));
        self.machine.wait().await
    }
}

/// Finds the agent of a machine that runs, however long it takes to come up.
///
/// A virtio socket is reset once after its machine was restored, and takes the connection of that moment with it. No
/// command has been sent then, so the meeting begins anew.
pub(crate) async fn meet(machine: &Machine, identity: &Identity) -> io::Result<Guest> {
    let mut stream = machine.connect().await.map_err(io::Error::other)?;
    let mut attempts = 1;
    loop {
        match Guest::meet(stream, identity).await {
            Err(error) if attempts < MEETINGS => {
                // Where there is only one stream, this was it.
                stream = machine.connect().await.map_err(|_taken| error)?;
                attempts += 1;
            }
            met => return met,
        }
    }
}

fn execution_mode(vmm: &Driver) -> &'static str {
    match vmm.capabilities().channel {
        Channel::Serial => "guest_serial",
        Channel::Vsock => "guest_vsock",
    }
}

/// A lease and what runs under it. Dropping it ends the machine and removes every trace.
#[derive(Debug)]
pub(crate) struct Live {
    registry: Arc<Registry>,
    lease: Option<Lease>,
    pub(crate) place: Place,
}

impl Live {
    /// Takes over a lease.
    pub(crate) fn new(registry: Arc<Registry>, lease: Lease) -> Self {
        Self { registry, lease: Some(lease), place: Place::None }
    }

    /// The machine's directory.
    pub(crate) fn dir(&self) -> PathBuf {
        self.lease.as_ref().map(|lease| lease.dir.clone()).unwrap_or_default()
    }

    /// Whether its guest runs.
    pub(crate) fn lives(&self) -> bool {
        matches!(&self.place, Place::Guest(running) if running.machine.memory_usage().is_some())
    }

    /// Ends the machine at once and removes every trace.
    pub(crate) async fn remove(mut self) -> Result<(), Error> {
        self.place.kill().await;
        self.lease.take().map_or(Ok(()), |lease| self.registry.remove(lease))
    }

    /// As [`Live::remove`], because its time is up.
    pub(crate) async fn expire(mut self) -> Result<(), Error> {
        self.place.kill().await;
        self.lease.take().map_or(Ok(()), |lease| self.registry.expire(lease))
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        // A command may still hold the guest, so dropping the place would not end it. The files may go although the VMM
        // has not been reaped yet.
        if let Place::Guest(running) = std::mem::take(&mut self.place) {
            running.machine.kill_at_once();
        }
        if let Some(lease) = self.lease.take() {
            // What cannot be removed now is found by the next sweep, once the lock is free.
            drop(self.registry.remove(lease));
        }
    }
}

impl Identity {
    /// One with nothing but its names.
    pub(crate) fn new(hostname: String, machine_id: String) -> Self {
        Self { hostname, machine_id, authority: None, environment: Vec::new() }
    }

    /// With what the programs of the guest need to use its network.
    fn for_network(&self, network: Option<&Network>, settings: &Settings) -> Self {
        let secrets = settings.secrets.iter();
        Self {
            authority: network.and_then(Network::authority).map(str::to_owned),
            environment: secrets.map(|held| (held.name.clone(), held.secret.placeholder.clone())).collect(),
            ..self.clone()
        }
    }

    /// That of a machine which has never been: its id and a new machine-id.
    pub(crate) fn fresh(id: &str) -> Result<Self, Error> {
        let machine_id =
            crate::files::random_hex(16).map_err(|error| Error::host("random numbers", &error))?;
        Ok(Self::new(format!("pyro-{id}"), machine_id))
    }
}

/// Gives a machine its disk, a copy of another, in place of any that it has. What is there is whole at any moment.
pub(crate) fn lay_disk(from: &Path, overlay: &Path) -> Result<(), Error> {
    let beside = overlay.with_extension("new");
    let laid = files::remove_if_there(&beside)
        .and_then(|()| copy_sparse(from, &beside))
        .and_then(|()| fs_err::rename(&beside, overlay));
    laid.map_err(|error| {
        drop(files::remove_if_there(&beside));
        let what = "the machine's disk could not be made";
        Error::file_limit(error.kind(), &format!("{what}: {error}")).unwrap_or_else(|| {
            Error::host(what, &error).hint("free some space in the state directory, or set PYRO_STATE_DIR")
        })
    })
}

/// An error in the words of the contract, section 6.
pub(crate) fn unavailable(reason: &str) -> Error {
    Error::new(ErrorKind::GuestUnavailable, host_refused("guest boot", reason))
}

/// A VMM that did not start, in the same words.
pub(crate) fn not_launched(error: &LaunchError) -> Error {
    let failed = unavailable(&format!("phase=start: {}", chain(error)));
    match error.hint() {
        Some(hint) => failed.hint(hint),
        None => failed,
    }
}

/// The same, where the guest is there and cannot be spoken to.
pub(crate) fn command_unavailable(reason: &str) -> Error {
    Error::new(ErrorKind::GuestUnavailable, host_refused("guest command execution", reason))
}

fn host_refused(what: &str, reason: &str) -> String {
    format!(
        "{what} is unavailable and host compatibility mode is disabled: {reason}. Set \
         allow_host_compat=True (CLI: --allow-host-compat) to opt into host execution."
    )
}

fn boot_failed(exit: &MachineExit) -> Error {
    let words = last_words(&exit.stderr_tail);
    let error = unavailable(&format!("phase=boot: {}{words}{}", exit.status, last_lines(&exit.console_tail)));
    if exit.stderr_tail.contains("Cannot allocate memory") {
        return error.hint("free memory on this host, or ask for a smaller machine");
    }
    error
}

fn last_words(stderr: &str) -> String {
    if stderr.trim().is_empty() { String::new() } else { format!("; the VMM said: {}", stderr.trim_end()) }
}

fn last_lines(console: &str) -> String {
    if console.trim().is_empty() { String::new() } else { format!("; console:\n{}", console.trim_end()) }
}
