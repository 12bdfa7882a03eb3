//! Machines for the cases: each in a directory of its own, with a disk of its own.

use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use pyro_vmm::{DiskCache, Driver, MachineSpec, Snapshot, Vmm};

use crate::error::Error;
use crate::execute::{Cancel, Limit, Outcome, Sink, carry_out};
use crate::guest::{Chunk, Identity, Stream};
use crate::live::{OVERLAY, Running, lay_disk, meet};
use crate::place::Place;
use crate::spec::{Command, ExecSpec};

/// A machine may be emulated twice over, on a busy host.
pub(super) const DEADLINE: Duration = Duration::from_secs(120);

pub(super) struct Bench {
    pub(super) driver: Driver,
    files: PathBuf,
    root: tempfile::TempDir,
    next: AtomicU32,
    blank: OnceLock<PathBuf>,
}

/// A machine and its directory.
pub(super) struct Guest {
    pub(super) running: Arc<Running>,
    pub(super) dir: PathBuf,
}

/// What a command has written, and how it ended.
pub(super) struct Done {
    pub(super) stdout: Vec<u8>,
    pub(super) stderr: Vec<u8>,
    pub(super) outcome: Outcome,
}

impl Bench {
    pub(super) fn new(driver: Driver, files: PathBuf) -> Self {
        let root = tempfile::tempdir().expect("a directory");
        Self { driver, files, root, next: AtomicU32::new(0), blank: OnceLock::new() }
    }

    /// The spec of a new machine, with a new disk.
    pub(super) fn spec(&self) -> MachineSpec {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        // As long as an id is.
        let dir = self.root.path().join(format!("{number:012x}"));
        fs_err::create_dir(&dir).expect("made");
        let blank = self.blank.get_or_init(|| {
            let blank = self.root.path().join("blank");
            copy_without_zeros(&self.files.join("overlay"), &blank);
            blank
        });
        lay_disk(blank, &dir.join(OVERLAY)).expect("a disk");
        self.spec_in(dir)
    }

    /// Boots a machine whose directory another process has made.
    pub(super) async fn boot_from_dir(&self, dir: PathBuf) -> Guest {
        self.boot_from(self.spec_in(dir)).await
    }

    fn spec_in(&self, dir: PathBuf) -> MachineSpec {
        MachineSpec {
            dir,
            kernel: self.files.join("vmlinux"),
            initramfs: self.files.join("initramfs"),
            rootfs: self.files.join("rootfs"),
            overlay: OVERLAY.into(),
            overlay_cache: DiskCache::Unsafe,
            vcpus: 1,
            memory_mib: 160,
            kernel_args: Vec::new(),
            savable: false,
            nic: None,
        }
    }

    pub(super) async fn boot(&self) -> Guest {
        self.boot_from(self.spec()).await
    }

    pub(super) async fn boot_from(&self, spec: MachineSpec) -> Guest {
        let machine = self.driver.launch(&spec).await.expect("launched");
        self.meet(machine, spec.dir).await
    }

    pub(super) async fn restore(&self, spec: MachineSpec, from: &Snapshot) -> Guest {
        let machine = self.driver.restore(&spec, from).await.expect("restored");
        self.meet(machine, spec.dir).await
    }

    async fn meet(&self, machine: pyro_vmm::Machine, dir: PathBuf) -> Guest {
        let identity = identity(&dir);
        let met = tokio::select! {
            met = tokio::time::timeout(DEADLINE, meet(&machine, &identity)) => met,
            exit = machine.wait() => panic!("it has ended: {exit:?}"),
        };
        let met = met.unwrap_or_else(|_| panic!("no answer: {}", machine.console_tail()));
        let guest = met.unwrap_or_else(|error| panic!("{error}: {}", machine.console_tail()));
        let isolation = self.driver.capabilities().isolation;
        let (restored, cold_reason) = (false, None);
        let running = Running {
            ports: crate::ports::Ports::new(guest.clone()),
            machine,
            guest,
            execution_mode: "guest",
            isolation,
            restored,
            cold_reason,
            network: None,
        };
        Guest { running: Arc::new(running), dir }
    }
}

/// A sparse copy of a disk, also where the file system of the original knows no holes.
fn copy_without_zeros(from: &Path, to: &Path) {
    let mut source = fs_err::File::open(from).expect("a disk");
    let target = fs_err::File::create_new(to).expect("created");
    let length = source.metadata().expect("its length").len();
    target.set_len(length).expect("sized");
    let (mut buffer, mut position) = (vec![0; 64 << 10], 0);
    while position < length {
        let read = source.read(&mut buffer).expect("read");
        assert_ne!(read, 0, "{} is shorter than it was", from.display());
        if buffer[..read].iter().any(|byte| *byte != 0) {
            target.file().write_all_at(&buffer[..read], position).expect("written");
        }
        position += read as u64;
    }
}

fn identity(dir: &Path) -> Identity {
    Identity::fresh(&dir.file_name().unwrap_or_default().to_string_lossy()).expect("random numbers")
}

impl Guest {
    pub(super) async fn sh(&self, script: &str) -> Done {
        let mut spec = ExecSpec::new(Command::Shell(script.to_owned()));
        spec.timeout_seconds = DEADLINE.as_secs_f64();
        self.run(spec).await
    }

    /// What a script prints, that ends well.
    pub(super) async fn text(&self, script: &str) -> String {
        let done = self.sh(script).await;
        assert_eq!(done.outcome.exit_code, 0, "{script}: {}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8(done.stdout).expect("text").trim_end().to_owned()
    }

    pub(super) async fn run(&self, spec: ExecSpec) -> Done {
        let limit = Limit { asked: spec.timeout_seconds, left: 3600.0 };
        let mut done = Collected::default();
        let place = Place::Guest(Arc::clone(&self.running));
        let outcome = carry_out(&place, spec, limit, &mut done, Cancel::default(), false).await;
        let (outcome, _) =
            outcome.unwrap_or_else(|error| panic!("{error}: {}", self.running.machine.console_tail()));
        Done { stdout: done.stdout, stderr: done.stderr, outcome }
    }
}

#[derive(Default)]
struct Collected {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl Sink for Collected {
    async fn take(&mut self, chunk: Chunk) -> Result<(), Error> {
        match chunk.stream {
            Stream::Stdout => self.stdout.extend(chunk.bytes),
            Stream::Stderr => self.stderr.extend(chunk.bytes),
        }
        Ok(())
    }
}
