//! Real machines. The guest is made by `tests/guest/build.sh`; `PYRO_TEST_KERNEL` names the `vmlinux`, and
//! `PYRO_TEST_VMM_INITRAMFS` what the script built. Without them the tests say that they are skipped.

#![expect(clippy::print_stdout, reason = "a skipped test says so")]

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pyro_vmm::host::{find_qemu, measure_tsc_khz};
use pyro_vmm::{
    Accel, Confine, DiskCache, LaunchError, Machine, MachineEnd, MachineSpec, Qemu, QemuConfig, Vmm,
};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// A boot takes a second on a quiet host.
const BOOT_DEADLINE: Duration = Duration::from_secs(60);
const ANSWER_DEADLINE: Duration = Duration::from_secs(20);

struct Bench {
    dir: TempDir,
    qemu: Qemu,
    spec: MachineSpec,
}

/// A machine that has said that it is there.
struct Guest {
    machine: Machine,
    stream: UnixStream,
}

impl Bench {
    fn new(test: &str) -> Option<Self> {
        let kernel = file_from_env(test, "PYRO_TEST_KERNEL")?;
        let initramfs = file_from_env(test, "PYRO_TEST_VMM_INITRAMFS")?;
        let path = std::env::var_os("PATH").unwrap_or_default();
        let Some(binary) = find_qemu(&path) else {
            println!("skipped: {test}: no QEMU");
            return None;
        };
        let dir = tempfile::tempdir().expect("a directory");
        let accel = Accel::Tcg { tsc_khz: measure_tsc_khz() };
        let cache = dir.path().join("cache.json");
        let config = QemuConfig::ask(binary, &cache, accel, Confine::JAIL).expect("a version");
        // Names that an option string would split.
        let (rootfs, overlay) = (dir.path().join("root,fs:1.erofs"), dir.path().join("over lay.ext4"));
        sparse_file(&rootfs, b"ROOT", 1 << 20);
        sparse_file(&overlay, b"", 16 << 20);
        let spec = MachineSpec {
            dir: dir.path().to_owned(),
            kernel,
            initramfs,
            rootfs,
            overlay,
            overlay_cache: DiskCache::Unsafe,
            vcpus: 1,
            memory_mib: 256,
            kernel_args: Vec::new(),
            savable: false,
            nic: None,
        };
        Some(Self { dir, qemu: Qemu::new(config), spec })
    }

    async fn boot(&self) -> Guest {
        let machine = self.qemu.launch(&self.spec).await.expect("launched");
        let mut stream = machine.connect().await.expect("the stream");
        let first = tokio::time::timeout(BOOT_DEADLINE, stream.read_u8()).await;
        let first = first.unwrap_or_else(|_| panic!("no boot: {}", machine.console_tail()));
        assert_eq!(first.expect("a byte"), b'R', "{}", machine.console_tail());
        Guest { machine, stream }
    }
}

impl Guest {
    async fn send(&mut self, request: &[u8]) {
        self.stream.write_all(request).await.expect("sent");
    }

    async fn ask(&mut self, request: &[u8]) -> String {
        self.send(request).await;
        let mut answer = [0; 4096];
        let count = tokio::time::timeout(ANSWER_DEADLINE, self.stream.read(&mut answer)).await;
        let count = count.unwrap_or_else(|_| panic!("no answer: {}", self.machine.console_tail()));
        String::from_utf8_lossy(&answer[..count.expect("received")]).into_owned()
    }
}

fn file_from_env(test: &str, name: &str) -> Option<PathBuf> {
    let path = std::env::var_os(name).map(PathBuf::from);
    if path.is_none() {
        println!("skipped: {test}: {name} is not set");
    }
    path
}

fn sparse_file(path: &std::path::Path, start: &[u8], length: u64) {
    fs_err::write(path, start).expect("written");
    fs_err::OpenOptions::new().write(true).open(path).expect("opened").set_len(length).expect("grown");
}

#[tokio::test]
async fn a_guest_talks_uses_its_disks_and_powers_off() {
    let Some(bench) = Bench::new("a_guest_talks_uses_its_disks_and_powers_off") else { return };
    let mut guest = bench.boot().await;
    assert_eq!(guest.ask(b"hello").await, "hello");
    assert_eq!(guest.ask(b"D").await, "ROOT 5 0 1", "read, written, synced, and vda is read-only");
    assert_eq!(guest.ask(b"N").await, "1");
    assert!(guest.machine.memory_usage().expect("it runs") > 50 << 20);
    guest.send(b"Q").await;
    guest.machine.shutdown(Duration::from_secs(20)).await;
    let exit = guest.machine.wait().await;
    assert_eq!(exit.reason, MachineEnd::PoweredOff, "{exit:?}");
    assert_eq!(exit.stderr_tail, "");
    assert!(fs_err::read(&bench.spec.overlay).expect("read").starts_with(b"hello"));
    assert!(fs_err::read(&bench.spec.rootfs).expect("read").starts_with(b"ROOT"));
    let names = fs_err::read_dir(bench.dir.path()).expect("listed").count();
    assert_eq!(names, 4, "the cache, the library and the disks: the machine has made no file");
}

#[tokio::test]
async fn a_reboot_ends_the_machine() {
    let Some(bench) = Bench::new("a_reboot_ends_the_machine") else { return };
    let mut guest = bench.boot().await;
    guest.send(b"B").await;
    let exit = tokio::time::timeout(ANSWER_DEADLINE, guest.machine.wait()).await.expect("ended");
    assert_eq!(exit.reason, MachineEnd::PoweredOff, "{exit:?}");
}

#[tokio::test]
async fn a_panic_of_the_guest_is_told_with_its_words() {
    let Some(bench) = Bench::new("a_panic_of_the_guest_is_told_with_its_words") else { return };
    let mut guest = bench.boot().await;
    guest.send(b"P").await;
    let exit = tokio::time::timeout(ANSWER_DEADLINE, guest.machine.wait()).await.expect("ended");
    assert_eq!(exit.reason, MachineEnd::Panicked, "{exit:?}");
    assert_eq!(exit.status, "the guest kernel panicked: sysrq triggered crash");
    // The trace may be longer than what is kept for show; its end is always there.
    assert!(exit.console_tail.contains("Kernel Offset"), "{exit:?}");
}

#[tokio::test]
async fn a_paused_guest_does_nothing_until_it_is_resumed() {
    let Some(bench) = Bench::new("a_paused_guest_does_nothing_until_it_is_resumed") else { return };
    let mut guest = bench.boot().await;
    guest.machine.pause().await.expect("paused");
    guest.machine.pause().await.expect("paused already");
    guest.send(b"hello").await;
    let mut byte = [0];
    let read = tokio::time::timeout(Duration::from_millis(500), guest.stream.read(&mut byte)).await;
    assert!(read.is_err(), "a paused guest has answered");
    guest.machine.resume().await.expect("resumed");
    tokio::time::timeout(ANSWER_DEADLINE, guest.stream.read(&mut byte))
        .await
        .expect("answered")
        .expect("read");
    guest.machine.pause().await.expect("paused");
    guest.machine.kill().await;
    assert_eq!(guest.machine.wait().await.reason, MachineEnd::Killed);
}

#[tokio::test]
async fn a_guest_that_floods_its_console_is_answered_and_bounded() {
    let Some(bench) = Bench::new("a_guest_that_floods_its_console_is_answered_and_bounded") else { return };
    let mut guest = bench.boot().await;
    assert_eq!(guest.ask(b"F").await, "F");
    let tail = guest.machine.console_tail();
    assert!(tail.lines().count() <= 40 && tail.ends_with("xxx"), "{tail}");
    guest.machine.shutdown(Duration::ZERO).await;
    assert_eq!(guest.machine.wait().await.status, "the VMM was told to quit");
}

#[tokio::test]
async fn an_overlay_belongs_to_one_machine() {
    let Some(bench) = Bench::new("an_overlay_belongs_to_one_machine") else { return };
    let mut guest = bench.boot().await;
    let error = bench.qemu.launch(&bench.spec).await.expect_err("the overlay is in use");
    assert!(matches!(error, LaunchError::ExitedAtOnce { .. }), "{error:?}");
    assert!(error.to_string().contains("lock"), "{error}");
    assert!(error.hint().expect("a hint").contains("another machine"));
    assert_eq!(guest.ask(b"hello").await, "hello", "the first one is unharmed");
}

#[tokio::test]
async fn a_machine_may_have_several_processors() {
    let Some(mut bench) = Bench::new("a_machine_may_have_several_processors") else { return };
    bench.spec.vcpus = 2;
    bench.spec.overlay_cache = DiskCache::Writeback;
    let mut guest = bench.boot().await;
    assert_eq!(guest.ask(b"N").await, "2");
}

#[tokio::test]
async fn a_kernel_that_is_none_is_refused_or_dies() {
    let Some(mut bench) = Bench::new("a_kernel_that_is_none_is_refused_or_dies") else { return };
    bench.spec.kernel = bench.spec.rootfs.clone();
    let error = bench.qemu.launch(&bench.spec).await.expect_err("no kernel");
    assert_eq!(error.code(), "vmm_exited", "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn boots_under_load_do_not_hang() {
    let Some(bench) = Bench::new("boots_under_load_do_not_hang") else { return };
    static STOP: AtomicBool = AtomicBool::new(false);
    let count: u32 = std::env::var("PYRO_TEST_BOOTS").ok().and_then(|count| count.parse().ok()).unwrap_or(3);
    let load: Vec<_> = (0..2)
        .map(|_| {
            std::thread::spawn(|| {
                while !STOP.load(Ordering::Relaxed) {
                    std::hint::spin_loop()
                }
            })
        })
        .collect();
    for boot in 0..count {
        let start = std::time::Instant::now();
        let mut guest = bench.boot().await;
        println!("boot {boot} under load: {:?}", start.elapsed());
        guest.send(b"Q").await;
        guest.machine.shutdown(ANSWER_DEADLINE).await;
    }
    STOP.store(true, Ordering::Relaxed);
    load.into_iter().for_each(|thread| thread.join().expect("no panic"));
}
