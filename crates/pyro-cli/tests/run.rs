//! `pyro run` with real machines: each test is a sentence of the contract.
//!
//! All tests share the environments in the target directory, which the first one builds; each has a state
//! directory of its own, so that the cap of one is not another's.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use tempfile::TempDir;

/// A pyro of this test's own.
struct Pyro {
    state: TempDir,
}

impl Pyro {
    fn new() -> Self {
        Self { state: tempfile::tempdir().expect("a state directory") }
    }

    fn command(&self, line: &[&str]) -> Command {
        let mut command = Command::new(assert_cmd::cargo::cargo_bin!("pyro"));
        command
            .args(line)
            .env("PYRO_STATE_DIR", self.state.path())
            .env("PYRO_ENVIRONMENT_CACHE_DIR", environments())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn spawn(&self, line: &[&str]) -> Child {
        #[expect(clippy::disallowed_methods, reason = "the test kills it when it wants to")]
        self.command(line).spawn().expect("pyro runs")
    }

    fn run(&self, line: &[&str]) -> Output {
        self.spawn(line).wait_with_output().expect("pyro ends")
    }

    fn json(&self, line: &[&str]) -> serde_json::Value {
        let output = self.run(line);
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
    }

    /// Nothing of any machine is left.
    fn assert_empty(&self) {
        let left: Vec<_> = fs::read_dir(self.state.path().join("vms")).expect("there").collect();
        assert!(left.is_empty(), "{left:?}");
        assert_eq!(machines(&self.state.path().to_string_lossy()), Vec::<String>::new());
    }
}

/// Built once and kept beside the compiler's output.
fn environments() -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("environments")
}

/// VMM processes whose working directory is under `directory`.
fn machines(directory: &str) -> Vec<String> {
    let processes = fs::read_dir("/proc").expect("proc").flatten();
    let inside = |entry: &fs::DirEntry| {
        fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd.to_string_lossy().starts_with(directory))
    };
    processes.filter(inside).map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn git_runs_in_a_guest_and_the_words_name_the_tier() {
    let pyro = Pyro::new();
    let output = pyro.run(&["run", "debian:12", "--", "git", "--version"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stdout).starts_with("git version "), "{}", text(&output.stdout));
    assert!(text(&output.stderr).contains("execution_mode=guest_serial isolation="));
    pyro.assert_empty();
}

#[test]
fn the_exit_code_is_the_commands_own() {
    let pyro = Pyro::new();
    for (command, code) in [("exit 7", 7), ("kill -TERM $$", 143), ("no-such-program-at-all", 127)] {
        let output = pyro.run(&["run", "debian:12", "--", "sh", "-c", command]);
        assert_eq!(output.status.code(), Some(code), "{command}: {}", text(&output.stderr));
    }
    assert_eq!(pyro.run(&["run", "debian:12", "--", "no-such-program"]).status.code(), Some(127));
    pyro.assert_empty();
}

#[test]
fn a_hundred_mebibytes_arrive_byte_for_byte_from_stdin_to_stdout() {
    let pyro = Pyro::new();
    // Every byte value occurs, invalid UTF-8 included.
    let bytes: Vec<u8> = (0..100_u32 << 20).map(|i| (i ^ (i >> 8) ^ (i >> 16)).to_le_bytes()[0]).collect();
    let mut command = pyro.command(&["run", "debian:12", "--timeout-seconds", "120", "--", "cat"]);
    command.stdin(Stdio::piped());
    #[expect(clippy::disallowed_methods, reason = "its stdin is fed below")]
    let mut child = command.spawn().expect("pyro runs");
    let mut stdin = child.stdin.take().expect("piped");
    let sent = bytes.clone();
    let feeder = std::thread::spawn(move || stdin.write_all(&sent));
    let output = child.wait_with_output().expect("pyro ends");
    feeder.join().expect("no panic").expect("all was taken");
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(output.stdout == bytes, "{} of {} bytes", output.stdout.len(), bytes.len());
}

#[test]
fn a_timeout_is_124_with_what_came_before_it() {
    let pyro = Pyro::new();
    let line =
        ["run", "debian:12", "--timeout-seconds", "1", "--json", "--", "sh", "-c", "echo part; sleep 99"];
    let output = pyro.run(&line);
    assert_eq!(output.status.code(), Some(124));
    let result: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one object");
    assert_eq!((&result["stdout"], &result["fault"]), (&"part\n".into(), &"timeout".into()));
    assert!(result["stderr"].as_str().expect("text").ends_with("command timed out after 1s\n"));
    pyro.assert_empty();
}

#[test]
fn a_guest_that_fills_its_disk_ends_as_an_error_of_its_command() {
    let pyro = Pyro::new();
    let fill = "fallocate -l 7G /a; cat /dev/zero > /b";
    let line = ["run", "debian:12", "--timeout-seconds", "60", "--json", "--", "sh", "-c", fill];
    let result = pyro.json(&line);
    assert_eq!((&result["exit_code"], &result["fault"]), (&1.into(), &"disk_full".into()), "{result}");
    pyro.assert_empty();
}

#[test]
fn a_fork_bomb_ends_with_its_command_and_the_next_run_works() {
    let pyro = Pyro::new();
    let bomb = "f() { f | f & }; f; sleep 99";
    let line = ["run", "debian:12", "--timeout-seconds", "3", "--json", "--", "bash", "-c", bomb];
    let result = pyro.json(&line);
    assert_ne!(result["exit_code"], 0, "{result}");
    assert!(pyro.run(&["run", "debian:12", "--", "true"]).status.success());
    pyro.assert_empty();
}

#[test]
fn twenty_at_once_respect_the_cap_and_each_other() {
    let pyro = Pyro::new();
    let line = ["run", "debian:12", "--json", "--", "sh", "-c", "sleep 8; hostname"];
    let children: Vec<_> = (0..20).map(|_| pyro.spawn(&line)).collect();
    let mut names = Vec::new();
    for child in children {
        let output = child.wait_with_output().expect("pyro ends");
        let result: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one object");
        if output.status.code() == Some(125) {
            assert_eq!(result["error"], "max active VMs reached (4); delete old VMs first", "{result}");
        } else {
            names.push(result["stdout"].to_string());
        }
    }
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 4, "{names:?}");
    pyro.assert_empty();
}

#[test]
fn a_pyro_that_is_killed_leaves_nothing_after_the_next_command() {
    let pyro = Pyro::new();
    for millis in [50, 200, 400, 800, 1200, 1600] {
        let mut child = pyro.spawn(&["run", "debian:12", "--", "sleep", "99"]);
        std::thread::sleep(std::time::Duration::from_millis(millis));
        child.kill().expect("killed");
        child.wait().expect("reaped");
    }
    assert!(pyro.run(&["reap"]).status.success());
    pyro.assert_empty();
}

#[test]
fn a_vmm_that_is_killed_ends_the_command_as_guest_lost() {
    let pyro = Pyro::new();
    let child = pyro.spawn(&["run", "debian:12", "--json", "--", "sh", "-c", "sleep 99"]);
    let state = pyro.state.path().to_string_lossy().into_owned();
    let vmm = loop {
        if let Some(vmm) = machines(&state).first() {
            break vmm.clone();
        }
        std::thread::yield_now();
    };
    #[expect(clippy::disallowed_methods, reason = "kill(1) needs no owner")]
    let killed = Command::new("kill").args(["-KILL", &vmm]).status();
    assert!(killed.expect("kill runs").success());
    let output = child.wait_with_output().expect("pyro ends");
    assert!(matches!(output.status.code(), Some(125 | 137)), "{output:?}");
    pyro.assert_empty();
}

#[test]
fn bad_values_are_refused_before_anything_is_made() {
    let pyro = Pyro::new();
    let cases = [
        (&["--mem-mib", "1"][..], "mem_mib must be between 256 and 32768"),
        (&["--vcpu-count", "9"], "vcpu_count must be between 1 and 8"),
        (&["--ttl-seconds", "5"], "ttl_seconds must be between 60 and 3600"),
        (&["--timeout-seconds", "0"], "timeout_seconds must be positive"),
    ];
    for (flags, message) in cases {
        let line = [&["run", "debian:12", "--json"], flags, &["--", "true"]].concat();
        let output = pyro.run(&line);
        let error: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one object");
        assert_eq!((output.status.code(), &error["error"]), (Some(125), &message.into()));
    }
    let error = pyro.json(&["run", "debian:99", "--json", "--", "true"]);
    assert!(
        error["error"]
            .as_str()
            .expect("text")
            .starts_with("unknown environment 'debian:99'; expected one of: ")
    );
    pyro.assert_empty();
}

#[test]
fn a_guest_is_used_where_there_is_one_even_if_the_host_is_allowed() {
    let pyro = Pyro::new();
    let refused = pyro.run(&["run", "debian:12", "--require-isolation", "firecracker-kvm", "--", "true"]);
    assert_eq!(refused.status.code(), Some(125));
    let line = ["run", "debian:12", "--allow-host-compat", "--json", "--", "hostname"];
    assert_eq!(pyro.json(&line)["execution_mode"], "guest_serial", "a guest is there, so it is used");
    pyro.assert_empty();
}

#[test]
fn doctor_proves_what_kvm_is_worth() {
    let pyro = Pyro::new();
    let report = pyro.json(&["doctor", "--json"]);
    assert_eq!(report["runtime_ok"], true, "{report}");
    assert!(report["kvm"]["why"].as_str().is_some_and(|why| !why.is_empty()));
}
