//! Machines whose VMM is a shell script that misbehaves.
//!
//! The script has the guest channel as descriptor 3, its control channel as 4 and the console as 5.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pyro_vmm::{
    Accel, Confine, ControlError, DiskCache, LaunchError, Machine, MachineEnd, MachineSpec, Qemu, QemuConfig,
    Vmm,
};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Greets and enters command mode, as QEMU does.
const ACCEPT: &str = r#"
echo $$ > pid
printf '{"QMP":{}}\n' >&4
read -r line <&4
printf '{"return":{},"id":1}\n' >&4
"#;

struct Fake {
    dir: TempDir,
    qemu: Qemu,
}

impl Fake {
    fn new(script: &str) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let binary = dir.path().join("vmm");
        fs_err::write(&binary, format!("#!/bin/sh\n{script}\n")).expect("written");
        fs_err::set_permissions(&binary, std::fs::Permissions::from_mode(0o755)).expect("executable");
        for file in ["kernel", "initramfs", "rootfs", "overlay"] {
            fs_err::write(dir.path().join(file), "").expect("written");
        }
        Self { qemu: qemu(binary), dir }
    }

    fn accepting(script: &str) -> Self {
        Self::new(&format!("{ACCEPT}{script}"))
    }

    fn spec(&self) -> MachineSpec {
        MachineSpec {
            dir: self.dir.path().to_owned(),
            kernel: "kernel".into(),
            initramfs: "initramfs".into(),
            rootfs: "rootfs".into(),
            overlay: "overlay".into(),
            overlay_cache: DiskCache::Unsafe,
            vcpus: 1,
            memory_mib: 128,
            kernel_args: Vec::new(),
            savable: false,
            nic: None,
        }
    }

    async fn launch(&self) -> Result<Machine, LaunchError> {
        tokio::time::timeout(Duration::from_secs(20), self.qemu.launch(&self.spec())).await.expect("no hang")
    }

    async fn machine(&self) -> Machine {
        self.launch().await.expect("launched")
    }

    async fn pid_from_file(&self) -> u32 {
        let path = self.dir.path().join("pid");
        for _ in 0..500 {
            if let Some(pid) = fs_err::read_to_string(&path).ok().and_then(|text| text.trim().parse().ok()) {
                return pid;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the script did not start");
    }
}

fn qemu(binary: PathBuf) -> Qemu {
    let accel = Accel::Tcg { tsc_khz: None };
    Qemu::new(QemuConfig {
        binary,
        version: "0".to_owned(),
        sandbox: false,
        files: Err("a script".to_owned()),
        preload: None,
        accel,
        confine: Confine::Nothing,
    })
}

/// Neither running nor a zombie.
fn is_gone(pid: u32) -> bool {
    !Path::new(&format!("/proc/{pid}")).exists()
}

async fn until_gone(pid: u32) {
    let start = Instant::now();
    while !is_gone(pid) {
        assert!(start.elapsed() < Duration::from_secs(60), "process {pid} stays");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_vmm_that_ends_at_once_is_an_error_with_its_last_words() {
    let fake = Fake::new("echo 'first' >&2; echo 'qemu: -foo: invalid \x1b[31moption' >&2; exit 3");
    let error = fake.launch().await.expect_err("it has ended");
    assert_eq!(error.code(), "vmm_exited");
    assert_eq!(
        error.to_string(),
        "the VMM ended at once (the VMM ended with exit status: 3): first; qemu: -foo: invalid option"
    );
    let LaunchError::ExitedAtOnce { exit } = error else { panic!("{error:?}") };
    assert_eq!(exit.reason, MachineEnd::Crashed);
    assert_eq!(exit.stderr_tail, "first\nqemu: -foo: invalid option");
}

#[tokio::test]
async fn a_vmm_that_is_missing_is_an_error_with_a_remedy() {
    let fake = Fake::new("");
    let error = qemu("/nonexistent/qemu".into()).launch(&fake.spec()).await.expect_err("no such program");
    assert_eq!(error.code(), "vmm_missing");
    assert!(error.hint().expect("a hint").contains("apt-get install qemu-system-x86"));

    let not_executable = fake.dir.path().join("kernel");
    let error = qemu(not_executable).launch(&fake.spec()).await.expect_err("no program");
    assert_eq!(error.code(), "vmm_spawn_failed");

    let spec = MachineSpec { vcpus: 0, ..fake.spec() };
    assert_eq!(fake.qemu.launch(&spec).await.expect_err("no vCPU").code(), "bad_machine_spec");
}

#[tokio::test]
async fn a_vmm_that_speaks_garbage_is_an_error_and_is_ended() {
    let fake = Fake::new("echo $$ > pid; echo hello >&4; exec sleep 1000");
    let error = fake.launch().await.expect_err("garbage");
    assert_eq!(error.code(), "vmm_unresponsive");
    assert!(is_gone(fake.pid_from_file().await));
}

#[tokio::test]
async fn a_launch_that_nobody_waits_for_leaves_nothing() {
    let fake = Fake::new("echo $$ > pid; trap '' TERM INT HUP; exec sleep 1000");
    let spec = fake.spec();
    let launch = fake.qemu.launch(&spec);
    assert!(tokio::time::timeout(Duration::from_millis(300), launch).await.is_err());
    until_gone(fake.pid_from_file().await).await;
}

#[tokio::test]
async fn a_machine_ends_in_the_way_that_its_vmm_ends() {
    let ends = [
        ("exit 0", MachineEnd::PoweredOff, "the guest powered off"),
        (
            "echo '[ 1.0] Kernel panic - not syncing: oops' >&5; exit 0",
            MachineEnd::Panicked,
            "the guest kernel panicked: oops",
        ),
        ("exit 7", MachineEnd::Crashed, "the VMM ended with exit status: 7"),
        ("kill -SEGV $$", MachineEnd::Crashed, "the VMM ended with signal: 11"),
        // Nobody here killed it: that was the host, for want of memory perhaps.
        ("kill -KILL $$", MachineEnd::Crashed, "the VMM ended with signal: 9 (SIGKILL)"),
    ];
    for (script, reason, status) in ends {
        let machine = Fake::accepting(script).machine().await;
        let exit = machine.wait().await;
        assert_eq!(exit.reason, reason, "{script}: {exit:?}");
        assert!(exit.status.starts_with(status), "{script}: {exit:?}");
        assert_eq!(machine.wait().await, exit, "again");
        assert!(is_gone(machine.pid()));
        assert_eq!(machine.memory_usage(), None);
        machine.kill().await;
        assert!(matches!(machine.pause().await, Err(ControlError::Ended)));
    }
}

#[tokio::test]
async fn the_last_words_are_complete_when_the_end_is_told() {
    let script =
        "i=0; while [ $i -lt 300 ]; do echo line $i >&5; echo error $i >&2; i=$((i+1)); done; exit 1";
    for _ in 0..10 {
        let exit = Fake::accepting(script).machine().await.wait().await;
        assert!(exit.console_tail.ends_with("line 298\nline 299"), "{exit:?}");
        assert!(exit.stderr_tail.ends_with("error 299"), "{exit:?}");
        assert_eq!(exit.console_tail.lines().count(), 40);
    }
}

#[tokio::test]
async fn a_machine_that_ignores_everything_is_killed() {
    let fake = Fake::accepting("trap '' TERM INT HUP; exec sleep 1000");
    let machine = fake.machine().await;
    assert_eq!(machine.pid(), fake.pid_from_file().await);
    assert!(machine.start_time() > 0);
    assert!(machine.memory_usage().expect("it runs") > 0);
    machine.kill().await;
    assert!(is_gone(machine.pid()), "gone when kill returns");
    assert_eq!(machine.wait().await.reason, MachineEnd::Killed);
    machine.kill().await;

    let machine = fake.machine().await;
    let start = Instant::now();
    machine.shutdown(Duration::from_millis(200)).await;
    assert!(is_gone(machine.pid()), "gone when shutdown returns");
    // The VMM itself sleeps for 1000 s.
    assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
    assert_eq!(machine.wait().await.reason, MachineEnd::Killed);
}

#[tokio::test]
async fn a_shutdown_waits_for_the_guest_and_then_asks_the_vmm() {
    let machine = Fake::accepting("sleep 0.3; exit 0").machine().await;
    machine.shutdown(Duration::from_secs(10)).await;
    assert_eq!(machine.wait().await.reason, MachineEnd::PoweredOff);

    let machine = Fake::accepting("read -r line <&4; echo \"$line\" >&5; exit 0").machine().await;
    machine.shutdown(Duration::ZERO).await;
    let exit = machine.wait().await;
    assert_eq!((exit.reason, exit.status.as_str()), (MachineEnd::Killed, "the VMM was told to quit"));
    assert!(exit.console_tail.contains(r#""execute":"quit""#), "{exit:?}");
}

#[tokio::test]
async fn dropped_machines_leave_neither_processes_nor_zombies() {
    let fake = Fake::accepting("trap '' TERM; exec sleep 1000");
    let mut pids = Vec::new();
    for _ in 0..10 {
        pids.push(fake.machine().await.pid());
    }
    for pid in pids {
        until_gone(pid).await;
    }
}

#[test]
fn a_machine_outlives_the_runtime_that_launched_it() {
    let fake = Fake::accepting("read -r line <&3; exit 0");
    let first = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let machine = first.block_on(fake.machine());
    drop(first);
    let second = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    second.block_on(async {
        assert!(tokio::time::timeout(Duration::from_millis(100), machine.wait()).await.is_err());
        machine.kill().await;
        assert_eq!(machine.wait().await.reason, MachineEnd::Killed);
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_number_of_tasks_may_wait() {
    let machine = Arc::new(Fake::accepting("read -r line <&3; exit 5").machine().await);
    let waiters: Vec<_> = (0..20)
        .map(|_| {
            let machine = Arc::clone(&machine);
            tokio::spawn(async move { machine.wait().await })
        })
        .collect();
    let mut stream = machine.connect().await.expect("the stream");
    assert!(matches!(machine.connect().await, Err(ControlError::Taken)), "once");
    stream.write_all(b"go\n").await.expect("sent");
    for waiter in waiters {
        assert!(waiter.await.expect("no panic").status.contains("exit status: 5"));
    }
}

#[tokio::test]
async fn the_stream_carries_bytes_both_ways_and_ends_with_the_vmm() {
    let machine = Fake::accepting("cat <&3 >&3; exit 0").machine().await;
    let stream = machine.connect().await.expect("the stream");
    let (mut read, mut write) = stream.into_split();
    let sent: Vec<u8> = (0..1_000_000_u32).map(|i| i.to_le_bytes()[0] ^ i.to_le_bytes()[1]).collect();
    let expected = sent.clone();
    let writer = tokio::spawn(async move {
        write.write_all(&sent).await.expect("sent");
        write.shutdown().await.expect("ended");
    });
    let mut received = Vec::new();
    read.read_to_end(&mut received).await.expect("received");
    writer.await.expect("no panic");
    assert!(received == expected);
    assert_eq!(machine.wait().await.reason, MachineEnd::PoweredOff);
}

#[tokio::test]
async fn a_flood_neither_fills_memory_nor_stops_the_vmm() {
    let fake = Fake::accepting("yes console >&5 & yes error >&2 & sleep 1; exit 0");
    let machine = fake.machine().await;
    let before = own_memory();
    let exit = tokio::time::timeout(Duration::from_secs(10), machine.wait()).await.expect("no hang");
    assert_eq!(exit.reason, MachineEnd::PoweredOff, "{exit:?}");
    assert_eq!(exit.console_tail.lines().count(), 40);
    assert!(exit.console_tail.lines().skip(1).all(|line| line == "console"));
    let grown = own_memory().saturating_sub(before);
    assert!(grown < 16 << 20, "{grown} bytes more");
}

#[tokio::test]
async fn a_control_channel_that_dies_is_no_hang() {
    let machine = Fake::accepting("exec 4>&-; exec sleep 1000").machine().await;
    assert!(machine.pause().await.is_err());
    assert!(machine.resume().await.is_err());
    machine.shutdown(Duration::ZERO).await;
    assert!(is_gone(machine.pid()));
}

fn own_memory() -> usize {
    let statm = fs_err::read_to_string("/proc/self/statm").expect("read");
    statm.split(' ').nth(1).expect("a field").parse::<usize>().expect("a number") * 4096
}
