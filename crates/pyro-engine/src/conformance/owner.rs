//! What becomes of a machine whose owner is killed: the owner is another process, this same program.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use pyro_process::Spawn;
use pyro_vmm::MachineSpec;
use rustix::process::{Pid, Signal, kill_process};

use super::bench::{Bench, DEADLINE};
use super::drivers;

/// The directory of the machine that this process owns, where it is the owner.
const OWNER: &str = "PYRO_TEST_OWNER";
const DRIVER: &str = "PYRO_TEST_DRIVER";
/// How often somebody is killed, unless the variable says otherwise.
const CYCLES: &str = "PYRO_TEST_CYCLES";
const CYCLES_DEFAULT: u32 = 2;

/// Makes a machine, runs a command in it, and kills its owner or its VMM, in turn; nothing may be left.
pub(super) async fn killed(bench: &Bench) {
    let cycles = std::env::var(CYCLES).ok().and_then(|text| text.parse().ok()).unwrap_or(CYCLES_DEFAULT);
    for cycle in 0..cycles {
        let spec = bench.spec();
        let mut owner = start_owner(bench, &spec);
        let mut words = BufReader::new(owner.take_stdout().expect("piped")).lines();
        let told = words.by_ref().map(|line| line.expect("read"));
        let vmm = told.filter_map(|line| line.split_once("vmm ")?.1.parse::<u32>().ok()).next();
        let vmm = vmm.unwrap_or_else(|| panic!("cycle {cycle}: the owner has no machine"));
        let between = ancestors(vmm, owner.id());
        if cycle % 2 == 0 {
            owner.kill().expect("killed");
        } else {
            kill(vmm);
        }
        owner.wait().expect("reaped");
        let deadline = Instant::now() + DEADLINE;
        let left = || between.iter().find(|pid| runs(**pid)).map(|pid| format!("process {pid}"));
        let unforgotten = || pyro_vmm::forget(&spec.dir).err().map(|error| error.to_string());
        while let Some(left) = left().or_else(unforgotten) {
            assert!(Instant::now() < deadline, "cycle {cycle}: left behind: {left}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        fs_err::remove_dir_all(&spec.dir).expect("removed");
    }
}

fn start_owner(bench: &Bench, spec: &MachineSpec) -> pyro_process::Child {
    let program = std::env::current_exe().expect("this program");
    let mut spawn = Spawn::new(program, Path::new("/"));
    spawn.args(["conformance::owner::owner", "--exact", "--nocapture"]).stdout(Stdio::piped());
    for name in ["PATH", "PYRO_TEST_GUEST", "PYRO_FIRECRACKER"] {
        if let Some(value) = std::env::var_os(name) {
            spawn.env(name, value);
        }
    }
    let driver = bench.driver.kind().as_str();
    spawn.env(OWNER, &spec.dir).env(DRIVER, driver).own_process_group();
    spawn.spawn().expect("started")
}

/// Not a case: the process that owns a machine for [`killed`].
#[tokio::test]
async fn owner() {
    let Some(dir) = std::env::var_os(OWNER).map(PathBuf::from) else { return };
    let driver = match std::env::var(DRIVER).as_deref() {
        Ok("firecracker") => drivers::firecracker().expect("a driver").1,
        _ => drivers::qemu().expect("a driver"),
    };
    let files = PathBuf::from(std::env::var_os("PYRO_TEST_GUEST").expect("set"));
    let (driver, _kept) = driver;
    let guest = Bench::new(driver, files).boot_from_dir(dir).await;
    assert_eq!(guest.text("echo alive").await, "alive");
    println!("vmm {}", guest.running.machine.pid());
    guest.running.machine.wait().await;
}

/// The VMM, and every process between it and its owner.
fn ancestors(vmm: u32, owner: u32) -> Vec<u32> {
    let parent = |pid: u32| {
        let status = fs_err::read_to_string(format!("/proc/{pid}/status")).ok()?;
        status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse::<u32>().ok()
    };
    let chain: Vec<u32> =
        std::iter::successors(Some(vmm), |pid| parent(*pid)).take_while(|pid| *pid != owner).collect();
    assert!(chain.len() <= 3, "{chain:?} between the VMM and {owner}");
    chain
}

fn runs(pid: u32) -> bool {
    let stat = fs_err::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // A dead process that nobody has reaped yet holds nothing.
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

fn kill(pid: u32) {
    let pid = Pid::from_raw(i32::try_from(pid).expect("a number")).expect("a process");
    kill_process(pid, Signal::KILL).expect("killed");
}
