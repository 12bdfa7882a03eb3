//! One machine that this process owns, from its lease to its end.

use std::io::{self, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pyro_image::Environment;
use pyro_vmm::{DiskCache, Machine, MachineEnd, MachineSpec, Qemu, Vmm};
use rustix::fs::SeekFrom as Region;

use crate::error::{Error, ErrorKind};
use crate::guest::Guest;
use crate::registry::{Lease, Registry};

/// How long a guest may take to answer after its VMM runs. A cold boot in software emulation takes one to two
/// seconds on an idle host and ten on a crowded one.
const BOOT_DEADLINE: Duration = Duration::from_secs(120);
/// How long a guest may take to write its disks and end.
const POWER_OFF_DEADLINE: Duration = Duration::from_secs(15);
/// The writable disk of a machine; sparse, so only what is written takes room.
const OVERLAY: &str = "overlay.ext4";

/// A lease and what runs under it. Dropping it ends the machine and removes every trace.
#[derive(Debug)]
pub(crate) struct Live {
    registry: Arc<Registry>,
    lease: Option<Lease>,
    running: Option<Running>,
}

/// A machine whose agent has answered.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) machine: Machine,
    pub(crate) guest: Guest,
}

/// How long the two halves of a start took.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct StartTimes {
    pub(crate) start: Duration,
    pub(crate) handshake: Duration,
}

impl Live {
    /// Takes over a lease and gives it a disk.
    pub(crate) fn new(registry: Arc<Registry>, lease: Lease, blank: &Path) -> Result<Self, Error> {
        let overlay = lease.dir.join(OVERLAY);
        let live = Self { registry, lease: Some(lease), running: None };
        copy_sparse(blank, &overlay).map_err(|error| {
            Error::host("the machine's disk could not be made", &error)
                .hint("free some space in the state directory, or set PYRO_STATE_DIR")
        })?;
        Ok(live)
    }

    /// Takes over a lease for a command on the host; returns the directory that it may use.
    pub(crate) fn on_host(
        registry: Arc<Registry>,
        lease: Lease,
    ) -> Result<(Self, std::path::PathBuf), Error> {
        let workspace = lease.dir.join("workspace");
        let live = Self { registry, lease: Some(lease), running: None };
        fs_err::create_dir(&workspace).map_err(|error| Error::host("the workspace", &error))?;
        Ok((live, workspace))
    }

    pub(crate) fn running(&self) -> Option<&Running> {
        self.running.as_ref()
    }

    /// Boots the machine and waits for its agent.
    pub(crate) async fn start(
        &mut self,
        vmm: &Qemu,
        environment: &Environment,
        vcpus: u8,
        memory_mib: u32,
    ) -> Result<StartTimes, Error> {
        let lease = self.lease.as_ref().ok_or_else(|| unavailable("the machine is gone"))?;
        let began = Instant::now();
        let spec = MachineSpec {
            dir: lease.dir.clone(),
            kernel: environment.kernel.clone(),
            initramfs: environment.initramfs.clone(),
            rootfs: environment.rootfs.clone(),
            overlay: OVERLAY.into(),
            overlay_cache: DiskCache::Unsafe,
            vcpus,
            memory_mib,
            kernel_args: Vec::new(),
        };
        let machine = vmm.launch(&spec).await.map_err(|error| {
            let failed = unavailable(&format!("phase=start: {error}"));
            error
                .hint()
                .map(|hint| unavailable(&format!("phase=start: {error}")).hint(hint))
                .unwrap_or(failed)
        })?;
        let start = began.elapsed();
        let stream = machine.take_stream().ok_or_else(|| unavailable("the machine has no channel"))?;
        let hostname = format!("pyro-{}", lease.id);
        let met = tokio::select! {
            exit = machine.wait() => {
                let console = last_lines(&exit.console_tail);
                return Err(unavailable(&format!("phase=boot: {}{console}", exit.status)));
            }
            met = tokio::time::timeout(BOOT_DEADLINE, Guest::meet(stream, &hostname)) => met,
        };
        let guest = match met {
            Ok(Ok(guest)) => guest,
            Ok(Err(error)) => {
                let console = last_lines(&machine.console_tail());
                return Err(unavailable(&format!("phase=handshake: {error}{console}")));
            }
            Err(_elapsed) => {
                let console = last_lines(&machine.console_tail());
                let seconds = BOOT_DEADLINE.as_secs();
                return Err(unavailable(&format!("phase=boot: no answer within {seconds} s{console}")));
            }
        };
        self.running = Some(Running { machine, guest });
        Ok(StartTimes { start, handshake: began.elapsed() - start })
    }

    /// Powers the guest off cleanly; its disk stays.
    pub(crate) async fn stop(&mut self) -> Option<MachineEnd> {
        let running = self.running.take()?;
        tokio::join!(running.guest.power_off(), running.machine.shutdown(POWER_OFF_DEADLINE));
        Some(running.machine.wait().await.reason)
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

/// An error in the words of the contract, section 6.
pub(crate) fn unavailable(reason: &str) -> Error {
    Error::new(
        ErrorKind::GuestUnavailable,
        format!(
            "guest boot is unavailable and host compatibility mode is disabled: {reason}. Set \
             allow_host_compat=True (CLI: --allow-host-compat) to opt into host execution."
        ),
    )
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
        // No more data: the rest is a hole.
        let Ok(data) = rustix::fs::seek(source.file(), Region::Data(position)) else { break };
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
