//! Cases about the life of a machine: its ends, its pause, its disk, its restored copies.

use std::path::Path;
use std::time::Duration;

use pyro_vmm::{Driver, MachineEnd, MachineSpec, Vmm};
use rustix::process::{Pid, Signal, kill_process};

use super::bench::{Bench, DEADLINE, Guest};
use crate::live::{OVERLAY, lay_disk};
use crate::record::Fault;
use crate::template::save_machine;

pub(super) async fn pause(guest: &Guest) {
    let machine = &guest.running.machine;
    machine.pause().await.expect("paused");
    machine.pause().await.expect("paused already");
    let mut answer = Box::pin(guest.text("echo alive"));
    let early = tokio::time::timeout(Duration::from_millis(700), &mut answer).await;
    assert!(early.is_err(), "a paused guest has answered");
    machine.resume().await.expect("resumed");
    machine.resume().await.expect("resumed already");
    assert_eq!(answer.await, "alive");
}

pub(super) async fn power_off(bench: &Bench, guest: Guest) {
    let exit = guest.running.power_off().await;
    assert_eq!(exit.reason, MachineEnd::PoweredOff, "{exit:?}");
    assert_left(&guest.dir, &[OVERLAY]);
    assert!(matches!(bench.driver, Driver::Qemu(_)) || no_cgroup(&guest.dir));
}

pub(super) async fn disk_stays(bench: &Bench) {
    let spec = bench.spec();
    let guest = bench.boot_from(spec.clone()).await;
    guest.text("echo kept > /workspace/file && sync").await;
    guest.running.machine.kill().await;
    let guest = bench.boot_from(spec).await;
    assert_eq!(guest.text("cat /workspace/file").await, "kept");
    guest.running.machine.kill().await;
}

pub(super) async fn killed(bench: &Bench) {
    let guest = bench.boot().await;
    let pid = guest.running.machine.pid();
    let (done, ()) = tokio::join!(guest.sh("echo begun; sleep 1000"), async {
        // The command has begun when the guest answers another.
        guest.text("echo alive").await;
        kill_process(process(pid), Signal::KILL).expect("killed");
    });
    assert_eq!(done.outcome.fault, Some(Fault::GuestLost));
    let exit = guest.running.machine.wait().await;
    assert_eq!(exit.reason, MachineEnd::Crashed, "{exit:?}");
    assert_left(&guest.dir, &[OVERLAY]);
}

pub(super) async fn dropped(bench: &Bench) {
    is_gone(bench.boot().await).await;
}

/// Drops a machine and waits until nothing of it is left.
pub(super) async fn is_gone(guest: Guest) {
    let (pid, dir) = (guest.running.machine.pid(), guest.dir.clone());
    drop(guest);
    let deadline = std::time::Instant::now() + DEADLINE;
    while Path::new(&format!("/proc/{pid}")).exists() || dir.join("jail").exists() {
        assert!(std::time::Instant::now() < deadline, "the VMM or its jail is still there");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub(super) async fn panics(bench: &Bench) {
    let guest = bench.boot().await;
    let done = guest.sh("echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger").await;
    assert_eq!(done.outcome.fault, Some(Fault::GuestLost));
    let exit = guest.running.machine.wait().await;
    assert_eq!(exit.reason, MachineEnd::Panicked, "{exit:?}");
    assert!(exit.status.contains("sysrq triggered crash"), "{exit:?}");
}

/// Two copies of one saved machine: both remember, neither is the other.
pub(super) async fn restores(bench: &Bench) {
    let spec = MachineSpec { savable: true, ..bench.spec() };
    let guest = bench.boot_from(spec.clone()).await;
    guest.text("echo remembered > /dev/shm/note; (sleep 1000 >/dev/null 2>&1 &); sync").await;
    let saved = guest.running.machine.save().await.expect("saved");
    let kept = bench.spec();
    for (from, to) in [(&saved.state, "state"), (&saved.memory, "memory")] {
        fs_err::rename(from, kept.dir.join(to)).expect("moved");
    }
    lay_disk(&spec.dir.join(OVERLAY), &kept.dir.join(OVERLAY)).expect("copied");
    guest.running.machine.kill().await;
    let saved = pyro_vmm::Snapshot { state: kept.dir.join("state"), memory: kept.dir.join("memory") };

    let mut random = Vec::new();
    for _ in 0..2 {
        let spec = bench.spec();
        lay_disk(&kept.dir.join(OVERLAY), &spec.dir.join(OVERLAY)).expect("copied");
        let copy = bench.restore(spec.clone(), &saved).await;
        super::confinement::is_there(&copy);
        super::confinement::holds(&copy, &spec).await;
        assert_eq!(copy.text("cat /dev/shm/note").await, "remembered");
        let sleeping = copy.text("cat /proc/[0-9]*/comm | grep -c '^sleep$'").await;
        assert_eq!(sleeping, "1", "its processes go on");
        let hostname = copy.text("cat /proc/sys/kernel/hostname").await;
        let expected = format!("pyro-{}", copy.dir.file_name().unwrap_or_default().to_string_lossy());
        assert_eq!(hostname, expected);
        let bytes = copy.text("head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n'").await;
        random.push((bytes, copy.text("cat /etc/machine-id").await));
        copy.text("echo private > /dev/shm/note").await;
        let skew = copy.text("date +%s.%N").await.parse::<f64>().expect("a time") - crate::registry::now();
        assert!(skew.abs() < 30.0, "the clock is {skew} s off");
        super::confinement::mounts_nothing(&copy).await;
        copy.running.machine.kill().await;
    }
    assert_ne!(random[0].0, random[1].0);
    assert_ne!(random[0].1, random[1].1);
}

/// What instant start does: a machine at rest is saved, and many go on from it, two of them at once.
pub(super) async fn template(bench: &Bench) {
    let spec = bench.spec();
    let dir = spec.dir.clone();
    let saved = save_machine(&bench.driver, spec, |_step| {}).await.expect("saved");
    assert!(!dir.join("jail").exists(), "it has ended");
    let copy = async || {
        let spec = bench.spec();
        lay_disk(&dir.join(OVERLAY), &spec.dir.join(OVERLAY)).expect("copied");
        let copy = bench.restore(spec, &saved).await;
        let told = "head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n'; cat /etc/machine-id /etc/hosts \
                    /proc/sys/kernel/random/boot_id";
        let told = copy.text(told).await;
        copy.running.machine.kill().await;
        told
    };
    let (one, other) = tokio::join!(copy(), copy());
    let mut all = std::collections::BTreeSet::from([one, other]);
    for _ in 2..24 {
        all.insert(copy().await);
    }
    assert_eq!(all.len(), 24, "no two are alike");
    assert!(
        all.iter().all(|told| told.matches("pyro-").count() == 1),
        "each knows its own name alone: {all:?}"
    );
}

pub(super) async fn no_kernel(bench: &Bench) {
    let mut spec = bench.spec();
    fs_err::write(spec.dir.join("text"), "no kernel").expect("written");
    spec.kernel = "text".into();
    let error = bench.driver.launch(&spec).await.expect_err("no kernel");
    assert!(["vmm_exited", "vmm_unresponsive"].contains(&error.code()), "{error}");
    assert!(!spec.dir.join("jail").exists(), "nothing stays of a refused machine");
}

fn assert_left(dir: &Path, expected: &[&str]) {
    let names: Vec<_> =
        fs_err::read_dir(dir).expect("listed").map(|entry| entry.expect("read").file_name()).collect();
    assert_eq!(names, expected);
}

fn no_cgroup(dir: &Path) -> bool {
    !Path::new("/sys/fs/cgroup/pyro").join(dir.file_name().unwrap_or_default()).exists()
}

fn process(pid: u32) -> Pid {
    Pid::from_raw(i32::try_from(pid).expect("a number")).expect("a process")
}
