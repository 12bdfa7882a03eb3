//! What machines are promised, counted; and what happens when they all want it.

use fs_err as fs;
use std::process::Output;

use crate::support::{Pyro, SmallDisk, kill, parse, start, text};

/// The host's memory in MiB.
fn memory_mib() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").expect("read");
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:")).expect("told");
    line.trim().trim_end_matches("kB").trim().parse::<u64>().expect("a number") >> 10
}

#[test]
fn guests_that_no_longer_fit_the_host_together_are_refused_also_in_another_state_directory() {
    let (one, other) = (Pyro::new(), Pyro::new());
    // Two fit. The third would take all of the memory and what its VMM needs.
    let mib = (memory_mib() / 3).clamp(256, 32_768);
    if memory_mib() > 3 * 32_768 {
        println!("skipped: three of the largest guests fit this host");
        return;
    }
    let create = |pyro: &Pyro, factor: &str| -> Output {
        let mut command =
            pyro.command(&["task", "create", "debian:12", "--cold", "--mem-mib", &mib.to_string(), "--json"]);
        command.env("PYRO_RUNTIME_DIR", one.runtime()).env("PYRO_MEMORY_OVERCOMMIT", factor);
        start(&mut command).wait_with_output().expect("it ends")
    };
    let first = parse(&create(&one, "1"));
    let id = first["task_id"].as_str().unwrap_or_else(|| panic!("{first}")).to_owned();
    let second = parse(&create(&other, "1"));
    assert_eq!(second["state"], "started", "{second}");
    let refused = parse(&create(&other, "1"));
    assert_eq!(refused["code"], "host_resources", "{refused}");
    let (needed, has) = (mib + 64, memory_mib());
    assert_eq!(
        refused["error"],
        format!(
            "not enough memory: this machine needs {needed} MiB; 2 machines were promised {} MiB of {has} MiB \
             (overcommit 1)",
            2 * needed
        )
    );
    assert!(refused["hint"].as_str().expect("a hint").contains("PYRO_MEMORY_OVERCOMMIT"), "{refused}");
    let bad = parse(&create(&other, "none"));
    assert_eq!(bad["error"], "PYRO_MEMORY_OVERCOMMIT must be a number above 0, not 'none'");
    // A supervisor that is killed makes room, though nobody has looked at its state directory since.
    kill(one.supervisor(&id).expect("it lives"), "KILL");
    one.until("its VMM is gone", |pyro| pyro.vmm(&id).is_none());
    let third = parse(&create(&other, "1"));
    assert_eq!(third["state"], "started", "{third}");
    for task in [&second, &third] {
        other.ok(&["task", "delete", task["task_id"].as_str().expect("an id")]);
    }
    one.ok(&["task", "delete", &id]);
}

#[test]
fn guests_that_fill_the_hosts_disk_together_lose_their_commands_and_nothing_else() {
    const GUESTS: usize = 4;
    let state = tempfile::tempdir().expect("a directory");
    let Some(disk) = SmallDisk::mount(state.path(), 700) else {
        println!("skipped: no small disk can be mounted here");
        return;
    };
    let pyro = Pyro::at(state);
    // 8 GiB each.
    let ids: Vec<String> = (0..GUESTS).map(|_| pyro.create()).collect();
    let fill = "echo before; dd if=/dev/zero of=/root/fill bs=1M; echo after";
    let exec = |id: &str| {
        ["task", "exec", id, "--timeout-seconds", "100", "--json", "--", "sh", "-c", fill].map(str::to_owned)
    };
    let children: Vec<_> =
        ids.iter().map(|id| pyro.spawn(&exec(id).each_ref().map(String::as_str))).collect();
    for child in children {
        let result = parse(&child.wait_with_output().expect("it ends"));
        assert_eq!((&result["fault"], &result["exit_code"]), (&"disk_full".into(), &137.into()), "{result}");
        assert_eq!(result["stdout"], "before\n", "{result}");
        let stderr = result["stderr"].as_str().expect("text");
        assert!(stderr.ends_with("command ended: the disk of the host is full\n"), "{result}");
    }
    for id in &ids {
        let logs = pyro.logs(id);
        assert_eq!(logs.len(), 1, "no entry is lost: {logs:?}");
        assert_eq!((&logs[0]["status"], &logs[0]["fault"]), (&"interrupted".into(), &"disk_full".into()));
        assert!(logs[0]["reason"].as_str().expect("words").contains("the disk of the host"), "{logs:?}");
        assert_eq!(pyro.status(id)["state"], "started", "no VMM has died of it");
    }
    let late = pyro.exec(&ids[0], "true");
    assert_eq!(late.status.code(), Some(137), "while there is no room, nothing is begun: {late:?}");
    pyro.ok(&["task", "delete", &ids[0]]);
    for id in &ids[1..] {
        pyro.until("with room again, the guest goes on", |pyro| pyro.exec(id, "true").status.success());
        let output =
            pyro.exec(id, "rm /root/fill && echo more > /root/more && sync && dmesg | grep -c 'I/O error'");
        assert_eq!(text(&output.stdout), "0\n", "its disk has refused nothing: {output:?}");
        pyro.ok(&["task", "delete", id]);
    }
    pyro.assert_empty();
    drop(pyro);
    drop(disk);
}

#[test]
fn a_single_command_that_fills_the_hosts_disk_is_ended_with_its_machine() {
    let state = tempfile::tempdir().expect("a directory");
    let Some(disk) = SmallDisk::mount(state.path(), 400) else {
        println!("skipped: no small disk can be mounted here");
        return;
    };
    let pyro = Pyro::at(state);
    let line = ["run", "debian:12", "--mem-mib", "512", "--timeout-seconds", "100", "--json", "--"];
    let fill = ["dd", "if=/dev/zero", "of=/root/fill", "bs=1M"];
    let result = pyro.json(&[&line[..], &fill[..]].concat());
    assert_eq!((&result["fault"], &result["exit_code"]), (&"disk_full".into(), &137.into()), "{result}");
    assert_eq!(result["cleanup"]["deleted"], true, "{result}");
    pyro.assert_empty();
    drop(pyro);
    drop(disk);
}
