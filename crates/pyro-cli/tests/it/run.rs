//! `pyro run`.

use std::io::{Read, Write};
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::support::{Pyro, parse, peak_kib, start, text};

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
fn a_hundred_mebibytes_arrive_byte_for_byte_with_flat_memory() {
    let pyro = Pyro::new();
    // Every byte value occurs, invalid UTF-8 included.
    let bytes: Vec<u8> = (0..100_u32 << 20).map(|i| (i ^ (i >> 8) ^ (i >> 16)).to_le_bytes()[0]).collect();
    let mut command = pyro.command(&["run", "debian:12", "--timeout-seconds", "120", "--", "cat"]);
    command.stdin(Stdio::piped());
    let mut child = start(&mut command);
    let pid = i32::try_from(child.id()).expect("small");
    let mut stdin = child.stdin.take().expect("piped");
    let mut stdout = child.stdout.take().expect("piped");
    let sent = bytes.clone();
    let feeder = std::thread::spawn(move || stdin.write_all(&sent));
    let mut arrived = Vec::new();
    let mut peak = 0;
    let mut piece = vec![0; 1 << 20];
    while let Ok(length @ 1..) = stdout.read(&mut piece) {
        arrived.extend_from_slice(&piece[..length]);
        peak = peak.max(peak_kib(pid).unwrap_or(0));
    }
    feeder.join().expect("no panic").expect("all was taken");
    let output = child.wait_with_output().expect("pyro ends");
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(arrived == bytes, "{} of {} bytes", arrived.len(), bytes.len());
    assert!((1..64 << 10).contains(&peak), "pyro took {peak} KiB for a stream of 102400 KiB");
}

#[test]
fn a_timeout_is_124_with_what_came_before_it() {
    let pyro = Pyro::new();
    let line =
        ["run", "debian:12", "--timeout-seconds", "5", "--json", "--", "sh", "-c", "echo part; sleep 99"];
    let output = pyro.run(&line);
    assert_eq!(output.status.code(), Some(124));
    let result: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one object");
    assert_eq!((&result["stdout"], &result["fault"]), (&"part\n".into(), &"timeout".into()));
    assert!(result["stderr"].as_str().expect("text").ends_with("command timed out after 5s\n"));
    pyro.assert_empty();
}

#[test]
fn a_guest_that_fills_its_disk_ends_as_an_error_of_its_command() {
    let pyro = Pyro::new();
    let line = ["run", "debian:12", "--timeout-seconds", "60", "--disk-mib", "256", "--json", "--"];
    let result = pyro.json(&[&line[..], &["sh", "-c", "cat /dev/zero > /b"]].concat());
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
fn a_guest_that_takes_all_memory_ends_as_an_error_of_its_command() {
    let pyro = Pyro::new();
    let line = ["run", "debian:12", "--mem-mib", "256", "--json", "--", "tail", "/dev/zero"];
    let result = pyro.json(&line);
    assert_eq!((&result["exit_code"], &result["fault"]), (&137.into(), &"out_of_memory".into()), "{result}");
    assert!(pyro.run(&["run", "debian:12", "--", "true"]).status.success());
    pyro.assert_empty();
}

#[test]
fn a_flood_of_output_ends_with_its_time_and_takes_no_memory() {
    let pyro = Pyro::new();
    let line = ["run", "debian:12", "--timeout-seconds", "3", "--json", "--", "sh", "-c", "yes; echo never"];
    let child = pyro.spawn(&line);
    let pid = i32::try_from(child.id()).expect("small");
    let watcher = std::thread::spawn(move || {
        let mut peak = 0;
        while let Some(now) = peak_kib(pid) {
            peak = now;
            std::thread::sleep(Duration::from_millis(50));
        }
        peak
    });
    let output = child.wait_with_output().expect("pyro ends");
    let result = parse(&output);
    assert_eq!((output.status.code(), &result["fault"]), (Some(124), &"timeout".into()));
    assert_eq!(result["stdout_truncated"], true);
    assert!(result["stdout"].as_str().expect("text").len() < 1_100_000);
    assert!(result["stdout_bytes"].as_u64().expect("a number") > 2 << 20, "{}", result["stdout_bytes"]);
    let peak = watcher.join().expect("no panic");
    assert!((1..96 << 10).contains(&peak), "pyro took {peak} KiB");
    pyro.assert_empty();
}

#[test]
fn what_a_command_leaves_in_the_background_does_not_hold_its_end_up() {
    let pyro = Pyro::new();
    for script in ["yes & exit 3", "sleep 999 & exit 3", "setsid sleep 999 >/dev/null 2>&1 & exit 3"] {
        let began = Instant::now();
        let output = pyro.run(&["run", "debian:12", "--timeout-seconds", "300", "--", "sh", "-c", script]);
        assert_eq!(output.status.code(), Some(3), "{script}: {}", text(&output.stderr));
        assert!(began.elapsed() < Duration::from_secs(200), "{script}: {:?}", began.elapsed());
    }
    pyro.assert_empty();
}

#[test]
fn a_timeout_ends_also_what_ignores_signals_and_moves_to_another_group() {
    let pyro = Pyro::new();
    let script = "trap '' TERM; mkdir /sys/fs/cgroup/away; echo $$ > /sys/fs/cgroup/away/cgroup.procs; \
                  echo moved; while :; do sleep 1; done";
    let line = ["run", "debian:12", "--timeout-seconds", "2", "--json", "--", "sh", "-c", script];
    let result = pyro.json(&line);
    assert_eq!((&result["exit_code"], &result["fault"]), (&124.into(), &"timeout".into()), "{result}");
    assert_eq!(result["stdout"], "moved\n");
    pyro.assert_empty();
}

#[test]
fn bytes_that_are_no_text_survive_and_are_replaced_in_json_only() {
    let pyro = Pyro::new();
    let script = r"printf 'a\377\000b\303'";
    let output = pyro.run(&["run", "debian:12", "--", "sh", "-c", script]);
    assert_eq!(output.stdout, b"a\xff\0b\xc3", "{}", text(&output.stderr));
    let result = pyro.json(&["run", "debian:12", "--json", "--", "sh", "-c", script]);
    assert_eq!((&result["stdout"], &result["stdout_bytes"]), (&"a\u{fffd}\0b\u{fffd}".into(), &5.into()));
}

#[test]
fn output_that_cannot_be_written_is_a_failure_and_output_that_nobody_reads_is_an_end() {
    let pyro = Pyro::new();
    let full = fs_err::OpenOptions::new().write(true).open("/dev/full").expect("there");
    let output =
        start(pyro.command(&["run", "debian:12", "--", "echo", "important"]).stdout(full.into_file()))
            .wait_with_output()
            .expect("pyro ends");
    assert_eq!(output.status.code(), Some(125), "{output:?}");
    assert!(text(&output.stderr).contains("error: the output could not be written"), "{output:?}");
    let mut child = pyro.spawn(&["run", "debian:12", "--", "yes"]);
    let mut stdout = child.stdout.take().expect("piped");
    stdout.read_exact(&mut [0; 4096]).expect("read");
    drop(stdout);
    assert_eq!(child.wait().expect("pyro ends").code(), Some(141));
    pyro.assert_empty();
}

#[test]
fn a_slow_reader_of_the_output_gets_all_of_it_and_the_true_exit_code() {
    let pyro = Pyro::new();
    let script = "head -c 900000 /dev/zero; exit 5";
    let mut child = pyro.spawn(&["run", "debian:12", "--timeout-seconds", "3", "--", "sh", "-c", script]);
    let mut stdout = child.stdout.take().expect("piped");
    let mut first = [0; 1];
    stdout.read_exact(&mut first).expect("read");
    // Longer than the command's own time, and than what the host waits beyond it.
    std::thread::sleep(Duration::from_secs(15));
    let mut rest = Vec::new();
    stdout.read_to_end(&mut rest).expect("read");
    assert_eq!(rest.len(), 899_999);
    assert_eq!(child.wait().expect("pyro ends").code(), Some(5));
    pyro.assert_empty();
}

#[test]
fn a_command_that_no_linux_could_start_is_refused_before_anything_is_made() {
    let pyro = Pyro::new();
    let long = "x".repeat(130_000);
    let mut line = vec!["run", "debian:12", "--json", "--", "true"];
    line.extend(std::iter::repeat_n(long.as_str(), 9));
    let error = pyro.json(&line);
    assert_eq!(error["code"], "invalid_value", "{error}");
    pyro.assert_empty();
}

#[test]
fn flags_of_any_number_are_refused_in_the_words_of_the_contract() {
    let pyro = Pyro::new();
    for (flag, value, message) in [
        ("--timeout-seconds", "-1", "timeout_seconds must be positive"),
        ("--vcpu-count", "300", "vcpu_count must be between 1 and 8"),
        ("--mem-mib", "-5", "mem_mib must be between 256 and 32768"),
        ("--ttl-seconds", "99999999999", "ttl_seconds must be between 60 and 3600"),
    ] {
        let error = pyro.json(&["run", "debian:12", flag, value, "--json", "--", "true"]);
        assert_eq!(error["error"], message, "{flag} {value}");
    }
}

#[test]
fn guests_know_who_they_are_and_nothing_of_the_host() {
    let pyro = Pyro::new();
    let script = "hostname; cat /etc/hostname; getent hosts $(hostname); cat /etc/machine-id; env | sort; \
                  ls -A /workspace; id -u; test -e /etc/resolv.conf && cat /etc/resolv.conf; pwd";
    let result = pyro.json(&["run", "debian:12", "--json", "--", "sh", "-c", script]);
    let id = result["vm_id"].as_str().expect("an id");
    let out = result["stdout"].as_str().expect("text");
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!((lines[0], lines[1]), (format!("pyro-{id}").as_str(), format!("pyro-{id}").as_str()), "{out}");
    assert!(lines[2].starts_with("127.0.1.1") && lines[3].len() == 32, "{out}");
    assert!(!out.contains("CARGO") && !out.contains("PYRO"), "{out}");
    assert!(out.ends_with("0\n/workspace\n"), "{out}");
}
