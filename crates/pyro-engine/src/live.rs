//! A machine that runs, and the lease under which one of this process's own runs.

use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pyro_image::Environment;
use pyro_vmm::{Channel, DiskCache, Driver, Isolation, Machine, MachineExit, MachineSpec, Vmm};
use rustix::fs::SeekFrom as Region;

use crate::engine::Engine;
use crate::error::{Error, ErrorKind, chain};
use crate::guest::{Guest, Identity};
use crate::registry::{Lease, Registry};
use crate::spec::VmSpec;

/// How long a guest may take to answer after its VMM runs. A cold boot in software emulation takes one to two
/// seconds on an idle host and ten on a crowded one.
const BOOT_DEADLINE: Duration = Duration::from_secs(120);
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

/// What is needed to boot a machine from its directory.
#[derive(Debug)]
pub(crate) struct Boot<'a> {
    pub(crate) dir: PathBuf,
    pub(crate) environment: &'a Environment,
    pub(crate) vcpus: u8,
    pub(crate) memory_mib: u32,
    pub(crate) disk: DiskCache,
    pub(crate) identity: Identity,
}

/// A machine whose agent has answered. Dropping it kills the machine.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) machine: Machine,
    pub(crate) guest: Guest,
    /// How its commands are run, as records name it.
    pub(crate) execution_mode: &'static str,
    pub(crate) isolation: Isolation,
}

/// How long the two halves of a start took.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct StartTimes {
    pub(crate) start: Duration,
    pub(crate) handshake: Duration,
}

impl Running {
    /// Boots a machine and waits for its agent. Dropping the future ends whatever it had started.
    pub(crate) async fn boot(vmm: &Driver, boot: &Boot<'_>) -> Result<(Self, StartTimes), Error> {
        let began = Instant::now();
        let deadline = if vmm.emulates() { BOOT_DEADLINE } else { KVM_BOOT_DEADLINE };
        let spec = MachineSpec {
            dir: boot.dir.clone(),
            kernel: boot.environment.kernel.clone(),
            initramfs: boot.environment.initramfs.clone(),
            rootfs: boot.environment.rootfs.clone(),
            overlay: OVERLAY.into(),
            overlay_cache: boot.disk,
            vcpus: boot.vcpus,
            memory_mib: boot.memory_mib,
            kernel_args: Vec::new(),
            savable: false,
        };
        let machine = vmm.launch(&spec).await.map_err(|error| {
            let failed = unavailable(&format!("phase=start: {}", chain(&error)));
            match error.hint() {
                Some(hint) => failed.hint(hint),
                None => failed,
            }
        })?;
        let start = began.elapsed();
        let met = tokio::select! {
            exit = machine.wait() => return Err(boot_failed(&exit)),
            met = tokio::time::timeout(deadline, meet(&machine, &boot.identity)) => met,
        };
        match met {
            Ok(Ok(guest)) => {
                let times = StartTimes { start, handshake: began.elapsed() - start };
                let isolation = vmm.capabilities().isolation;
                Ok((Self { machine, guest, execution_mode: execution_mode(vmm), isolation }, times))
            }
            Ok(Err(error)) => {
                // The end of the VMM closes its channel a moment before it is known; it tells more.
                match tokio::time::timeout(EXIT_GRACE, machine.wait()).await {
                    Ok(exit) => Err(boot_failed(&exit)),
                    Err(_elapsed) => {
                        let console = last_lines(&machine.console_tail());
                        Err(unavailable(&format!("phase=handshake: {error}{console}")))
                    }
                }
            }
            Err(_elapsed) => {
                let console = last_lines(&machine.console_tail());
                let seconds = deadline.as_secs();
                Err(unavailable(&format!("phase=boot: no answer within {seconds} s{console}")))
            }
        }
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
    running: Option<Running>,
}

impl Live {
    /// Takes over a lease and gives it a disk.
    pub(crate) fn new(registry: Arc<Registry>, lease: Lease, blank: &Path) -> Result<Self, Error> {
        let overlay = lease.dir.join(OVERLAY);
        let live = Self { registry, lease: Some(lease), running: None };
        make_disk(blank, &overlay)?;
        Ok(live)
    }

    /// Takes over a lease for commands on the host.
    pub(crate) fn on_host(registry: Arc<Registry>, lease: Lease) -> Result<Self, Error> {
        let live = Self { registry, lease: Some(lease), running: None };
        live.move_to_host()?;
        Ok(live)
    }

    /// Makes the directory that commands on the host may use.
    pub(crate) fn move_to_host(&self) -> Result<(), Error> {
        match fs_err::create_dir(self.workspace()) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(Error::host("the workspace", &error))
            }
            _ => Ok(()),
        }
    }

    /// The working directory of commands on the host.
    pub(crate) fn workspace(&self) -> PathBuf {
        self.lease.as_ref().map(|lease| lease.dir.join("workspace")).unwrap_or_default()
    }

    pub(crate) fn running(&self) -> Option<&Running> {
        self.running.as_ref()
    }

    /// Boots the machine and waits for its agent.
    pub(crate) async fn start(
        &mut self,
        engine: &Engine,
        environment: &Environment,
        spec: &VmSpec,
    ) -> Result<StartTimes, Error> {
        let lease = self.lease.as_ref().ok_or_else(|| unavailable("the machine is gone"))?;
        let boot = Boot {
            dir: lease.dir.clone(),
            environment,
            vcpus: spec.vcpu_count,
            memory_mib: spec.mem_mib,
            disk: DiskCache::Unsafe,
            identity: Identity::fresh(&lease.id)?,
        };
        let (running, times) = engine.boot(&boot, spec.require_isolation).await?;
        self.running = Some(running);
        Ok(times)
    }

    /// Powers the guest off cleanly; its disk stays.
    pub(crate) async fn stop(&mut self) {
        if let Some(running) = self.running.take() {
            running.power_off().await;
        }
    }

    /// Ends the machine at once and removes every trace.
    pub(crate) async fn remove(mut self) -> Result<(), Error> {
        self.kill().await;
        self.lease.take().map_or(Ok(()), |lease| self.registry.remove(lease))
    }

    /// As [`Live::remove`], because its time is up.
    pub(crate) async fn expire(mut self) -> Result<(), Error> {
        self.kill().await;
        self.lease.take().map_or(Ok(()), |lease| self.registry.expire(lease))
    }

    async fn kill(&mut self) {
        if let Some(running) = self.running.take() {
            running.machine.kill().await;
        }
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        // Dropping the machine kills the VMM; its files may then go although it has not been reaped yet.
        self.running = None;
        if let Some(lease) = self.lease.take() {
            // What cannot be removed now is found by the next sweep, once the lock is free.
            drop(self.registry.remove(lease));
        }
    }
}

impl Identity {
    /// That of a machine which has never been: its id and a new machine-id.
    pub(crate) fn fresh(id: &str) -> Result<Self, Error> {
        let machine_id =
            crate::files::random_hex(16).map_err(|error| Error::host("random numbers", &error))?;
        Ok(Self { hostname: format!("pyro-{id}"), machine_id })
    }
}

/// Gives a machine its disk: a copy of the blank one.
pub(crate) fn make_disk(blank: &Path, overlay: &Path) -> Result<(), Error> {
    copy_sparse(blank, overlay).map_err(|error| {
        Error::host("the machine's disk could not be made", &error)
            .hint("free some space in the state directory, or set PYRO_STATE_DIR")
    })
}

/// An error in the words of the contract, section 6.
pub(crate) fn unavailable(reason: &str) -> Error {
    Error::new(ErrorKind::GuestUnavailable, host_refused("guest boot", reason))
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

/// Copies a sparse file without its holes.
fn copy_sparse(from: &Path, to: &Path) -> io::Result<()> {
    let mut source = fs_err::File::open(from)?;
    let mut target = fs_err::File::create_new(to)?;
    let length = source.metadata()?.len();
    let mut position = 0;
    while position < length {
        let data = match rustix::fs::seek(source.file(), Region::Data(position)) {
            Ok(data) => data,
            // No more data: the rest is a hole.
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let hole = rustix::fs::seek(source.file(), Region::Hole(data))?;
        source.seek(SeekFrom::Start(data))?;
        target.seek(SeekFrom::Start(data))?;
        io::copy(&mut io::Read::take(&mut source, hole - data), &mut target)?;
        position = hole;
    }
    target.flush()?;
    target.file().set_len(length)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_copy_of_a_sparse_file_is_sparse() {
        let dir = tempfile::tempdir().expect("a directory");
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let mut file = fs_err::File::create(&from).expect("created");
        file.file().set_len(1 << 30).expect("sized");
        file.seek(SeekFrom::Start(500 << 20)).expect("sought");
        file.write_all(b"island").expect("written");
        copy_sparse(&from, &to).expect("copied");
        let meta = fs_err::metadata(&to).expect("there");
        assert_eq!(meta.len(), 1 << 30);
        assert!(meta.blocks() * 512 < 1 << 20, "{} blocks", meta.blocks());
        let mut read = [0; 6];
        let file = fs_err::File::open(&to).expect("opened");
        std::os::unix::fs::FileExt::read_exact_at(file.file(), &mut read, 500 << 20).expect("read");
        assert_eq!(&read, b"island");
    }
}
