//! `pyro task`: a machine that stays, commands in it, and their record.

use fs_err as fs;
use std::io::{Read, Write};
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::support::{Pyro, kill, parse, peak_kib, start, text};

#[test]
fn what_one_terminal_makes_another_uses_and_neither_is_needed() {
    let pyro = Pyro::new();
    let id = pyro.create();
    assert!(pyro.exec(&id, "echo from one > f; pwd").status.success());
    assert_eq!(text(&pyro.exec(&id, "cat f").stdout), "from one\n");
    // The terminal goes away in the middle of a command.
    let mut child =
        pyro.spawn(&["task", "exec", &id, "--", "sh", "-c", "echo begun; sleep 2; echo ended > g"]);
    let mut begun = [0; 6];
    child.stdout.take().expect("piped").read_exact(&mut begun).expect("read");
    child.kill().expect("killed");
    child.wait().expect("reaped");
    pyro.until("the command goes on", |pyro| pyro.logs(&id)[2]["status"] == "finished");
    assert_eq!(text(&pyro.exec(&id, "cat g").stdout), "ended\n");
    let status = pyro.status(&id);
    assert_eq!((&status["state"], &status["command_count"]), (&"started".into(), &4.into()));
    assert_eq!(status["last_command"]["command"], "sh -c 'cat g'");
    pyro.ok(&["task", "delete", &id]);
    let gone = pyro.json(&["task", "status", &id, "--json"]);
    assert_eq!(gone["error"], format!("task '{id}' does not exist"));
    pyro.until("the supervisor is gone", |pyro| pyro.processes().is_empty());
    pyro.assert_empty();
}

#[test]
fn a_task_says_what_it_is_in_the_words_of_the_contract() {
    let pyro = Pyro::new();
    let id = pyro.create();
    assert_eq!(pyro.ok(&["task", "logs", &id]), "No task logs found.");
    let output = pyro.exec(&id, "echo out; echo err >&2; exit 3");
    assert_eq!(output.status.code(), Some(3));
    assert_eq!((text(&output.stdout).as_str(), output.stderr.starts_with(b"err\n")), ("out\n", true));
    let line = text(&output.stderr);
    let expected =
        format!("[task-exec] task_id={id} sequence=1 cwd=/workspace execution_mode=guest_serial exit_code=3");
    assert!(line.contains(&expected), "{line}");
    let words = pyro.ok(&["task", "status", &id]);
    for part in
        [&format!("Task ID: {id}"), "State: started", "Workspace: /workspace", "Resources: 1 vCPU / 512 MiB"]
    {
        assert!(words.contains(part), "{part} is missing in\n{words}");
    }
    let logs = pyro.ok(&["task", "logs", &id]);
    assert!(logs.starts_with("#1 exit_code=3 duration_ms="), "{logs}");
    assert!(logs.ends_with("cwd=/workspace\n$ sh -c 'echo out; echo err >&2; exit 3'\nout\nerr"), "{logs}");
    let entry = fs::read_to_string(pyro.task_file(&id, "commands/000001.json")).expect("a plain file");
    assert!(
        entry.contains("\"exit_code\": 3") && entry.contains("\"stdout_file\": \"000001.stdout\""),
        "{entry}"
    );
    assert_eq!(fs::read(pyro.task_file(&id, "commands/000001.stderr")).expect("a plain file"), b"err\n");
    assert_eq!(pyro.ok(&["task", "delete", &id]), format!("Deleted task: {id}"));
}

#[test]
fn a_stopped_task_keeps_its_disk_its_journal_and_its_identity() {
    let pyro = Pyro::new();
    let id = pyro.create();
    let written = pyro.exec(&id, "echo kept > f; echo also > /root/g; cat /etc/machine-id");
    assert!(written.status.success(), "{written:?}");
    assert_eq!(pyro.json(&["task", "stop", &id, "--json"])["state"], "stopped");
    assert!(pyro.vmm(&id).is_none());
    let refused = pyro.json(&["task", "exec", &id, "--json", "--", "true"]);
    assert_eq!(refused["error"], format!("task {id} must be in 'started' state before task_exec"));
    assert_eq!(pyro.json(&["task", "stop", &id, "--json"])["state"], "stopped", "again is harmless");
    assert_eq!(pyro.json(&["task", "start", &id, "--json"])["state"], "started");
    let read = pyro.exec(&id, "cat f /root/g; cat /etc/machine-id");
    let identity = text(&written.stdout);
    assert_eq!(text(&read.stdout), format!("kept\nalso\n{identity}"));
    let twice = pyro.json(&["task", "start", &id, "--json"]);
    assert_eq!(twice["error"], format!("task {id} cannot be started from state 'started'"));
    assert_eq!(pyro.logs(&id).len(), 2);
    pyro.ok(&["task", "delete", &id]);
}

#[test]
fn logs_show_what_has_come_so_far_and_follow_the_rest() {
    let pyro = Pyro::new();
    let id = pyro.create();
    let slow = "for i in 1 2 3 4; do echo line $i; sleep 1; done";
    let sequence = pyro.ok(&["task", "exec", &id, "--detach", "--", "sh", "-c", slow]);
    assert_eq!(sequence, "1");
    pyro.until("output is there", |pyro| {
        pyro.logs(&id)[0]["stdout"].as_str().is_some_and(|text| text.starts_with("line 1\n"))
    });
    assert_eq!(pyro.logs(&id)[0]["status"], "running");
    let followed = pyro.ok(&["task", "logs", &id, "--sequence", "1", "--follow"]);
    assert!(followed.contains("line 1\nline 2\nline 3\nline 4\n#1 exit_code=0"), "{followed}");
    let attached = pyro.run(&["task", "attach", &id, "1"]);
    assert_eq!(text(&attached.stdout), "line 1\nline 2\nline 3\nline 4\n");
    for _ in 0..3 {
        assert!(pyro.exec(&id, "echo more").status.success());
    }
    let numbers = |line: &[&str]| -> Vec<u64> {
        let logs = pyro.json(line);
        let entries = logs["entries"].as_array().expect("a list");
        entries.iter().map(|entry| entry["sequence"].as_u64().expect("a number")).collect()
    };
    assert_eq!(numbers(&["task", "logs", &id, "--json", "--since", "3"]), [3, 4]);
    assert_eq!(numbers(&["task", "logs", &id, "--json", "--limit", "1"]), [4]);
    assert_eq!(numbers(&["task", "logs", &id, "--json", "--sequence", "2"]), [2]);
    // Following a task ends with it.
    let follower = pyro.spawn(&["task", "logs", &id, "--since", "5", "--follow"]);
    assert!(pyro.exec(&id, "echo fifth").status.success());
    pyro.ok(&["task", "stop", &id]);
    pyro.ok(&["task", "delete", &id]);
    let output = follower.wait_with_output().expect("it ends");
    assert!(text(&output.stdout).contains("fifth"), "{output:?}");
}

#[test]
fn a_time_limit_a_cancellation_and_a_key_press_each_say_what_they_were() {
    let pyro = Pyro::new();
    let id = pyro.create();
    let line =
        ["task", "exec", &id, "--timeout-seconds", "5", "--json", "--", "sh", "-c", "echo part; sleep 99"];
    let late = pyro.json(&line);
    assert_eq!(
        (&late["exit_code"], &late["fault"], &late["timed_out"]),
        (&124.into(), &"timeout".into(), &true.into())
    );
    assert_eq!(late["stdout"], "part\n");
    assert!(late["stderr"].as_str().expect("text").ends_with("command timed out after 5s\n"), "{late}");
    assert_eq!(pyro.logs(&id)[0]["status"], "timed_out");

    let child = pyro.spawn(&["task", "exec", &id, "--json", "--", "sh", "-c", "echo begun; sleep 99"]);
    pyro.until("it runs", |pyro| pyro.logs(&id).get(1).is_some_and(|entry| entry["stdout"] == "begun\n"));
    pyro.ok(&["task", "cancel", &id, "2"]);
    let cancelled = parse(&child.wait_with_output().expect("it ends"));
    assert_eq!((&cancelled["fault"], &cancelled["stdout"]), (&"cancelled".into(), &"begun\n".into()));
    assert_eq!(pyro.logs(&id)[1]["status"], "interrupted");

    // A key press ends the command; a terminal that goes away does not.
    for (signal, code, ends) in [("INT", 130, true), ("TERM", 143, true), ("HUP", 129, false)] {
        let child = pyro.spawn(&["task", "exec", &id, "--", "sh", "-c", "echo begun; sleep 30"]);
        let count = pyro.logs(&id).len();
        pyro.until("it runs", |pyro| pyro.logs(&id).last().is_some_and(|entry| entry["stdout"] == "begun\n"));
        kill(i32::try_from(child.id()).expect("small"), signal);
        let output = child.wait_with_output().expect("it ends");
        assert_eq!(output.status.code(), Some(code), "{signal}: {output:?}");
        let status = &pyro.logs(&id)[pyro.logs(&id).len() - 1]["status"];
        assert_eq!(status == "interrupted", ends, "{signal}, after {count}: {status}");
    }
    pyro.ok(&["task", "delete", &id]);
}

#[test]
fn deleting_a_task_ends_its_commands_and_their_callers_get_what_there_is() {
    let pyro = Pyro::new();
    let id = pyro.create();
    let child = pyro.spawn(&["task", "exec", &id, "--json", "--", "sh", "-c", "echo begun; sleep 99"]);
    pyro.until("it runs", |pyro| pyro.logs(&id).first().is_some_and(|entry| entry["stdout"] == "begun\n"));
    pyro.ok(&["task", "delete", &id]);
    let output = child.wait_with_output().expect("it ends");
    let result = parse(&output);
    assert_eq!((&result["fault"], &result["stdout"]), (&"cancelled".into(), &"begun\n".into()), "{output:?}");
    assert_eq!(result["stderr"], "command ended: the task was deleted\n");
    pyro.until("the supervisor is gone", |pyro| pyro.processes().is_empty());
    pyro.assert_empty();
}

#[test]
fn a_command_that_a_stop_of_its_task_ends_says_so_and_not_that_it_was_cancelled() {
    let pyro = Pyro::new();
    let id = pyro.create();
    let child = pyro.spawn(&["task", "exec", &id, "--json", "--", "sh", "-c", "echo begun; sleep 99"]);
    pyro.until("it runs", |pyro| pyro.logs(&id).first().is_some_and(|entry| entry["stdout"] == "begun\n"));
    pyro.ok(&["task", "stop", &id]);
    let result = parse(&child.wait_with_output().expect("it ends"));
    assert_eq!((&result["fault"], &result["stdout"]), (&"cancelled".into(), &"begun\n".into()), "{result}");
    assert_eq!(result["stderr"], "command ended: the task was stopped\n");
    let entry = fs::read_to_string(pyro.task_file(&id, "commands/000001.json")).expect("an entry");
    let entry: serde_json::Value = serde_json::from_str(&entry).expect("an object");
    assert_eq!(entry["reason"], "command ended: the task was stopped");
    // Where it ran is in its entry, and stays there when the task starts anew.
    assert_eq!((&entry["isolation"], &entry["start_mode"]), (&result["isolation"], &result["start_mode"]));
    pyro.ok(&["task", "start", &id]);
    let again = pyro.json(&["task", "exec", &id, "--json", "--", "true"]);
    assert_eq!(
        (&again["start_mode"], &again["isolation"]),
        (&"cold".into(), &result["isolation"]),
        "{again}"
    );
    let attached = pyro.json(&["task", "attach", &id, "1", "--json"]);
    assert_eq!(attached["start_mode"], result["start_mode"], "{attached}");
    pyro.ok(&["task", "delete", &id]);
}

#[test]
fn forty_commands_at_once_from_ten_processes_get_forty_entries_and_their_own_output() {
    let pyro = Pyro::new();
    let id = pyro.create();
    std::thread::scope(|scope| {
        for process in 0..10 {
            let (pyro, id) = (&pyro, &id);
            scope.spawn(move || {
                let children: Vec<_> = (0..4)
                    .map(|one| {
                        let script =
                            format!("echo {process}-{one}; sleep 1; echo {process}-{one} >&2; exit {one}");
                        (
                            one,
                            pyro.spawn(&[
                                "task",
                                "exec",
                                id,
                                "--timeout-seconds",
                                "120",
                                "--json",
                                "--",
                                "sh",
                                "-c",
                                &script,
                            ]),
                        )
                    })
                    .collect();
                for (one, child) in children {
                    let output = child.wait_with_output().expect("it ends");
                    let result = parse(&output);
                    let expected = format!("{process}-{one}\n");
                    assert_eq!(output.status.code(), Some(one), "{output:?}");
                    assert_eq!(
                        (&result["stdout"], &result["stderr"]),
                        (&expected.as_str().into(), &expected.as_str().into())
                    );
                }
            });
        }
    });
    let logs = pyro.logs(&id);
    let numbers: Vec<u64> = logs.iter().map(|entry| entry["sequence"].as_u64().expect("a number")).collect();
    assert_eq!(numbers, (1..=40).collect::<Vec<u64>>());
    for entry in &logs {
        assert!(
            entry["command"].as_str().expect("text").contains(entry["stdout"].as_str().expect("text").trim())
        );
        assert_eq!(entry["stdout"], entry["stderr"]);
    }
    pyro.ok(&["task", "delete", &id]);
}

#[test]
fn of_sixteen_tasks_at_once_a_cap_of_four_lets_four_in() {
    let pyro = Pyro::new();
    let line = ["task", "create", "debian:12", "--mem-mib", "256", "--json"];
    let children: Vec<_> = (0..16).map(|_| pyro.spawn(&line)).collect();
    let mut made = Vec::new();
    for child in children {
        let output = child.wait_with_output().expect("it ends");
        let result = parse(&output);
        if output.status.success() {
            assert_eq!(result["state"], "started");
            made.push(result["task_id"].as_str().expect("an id").to_owned());
        } else {
            assert_eq!(result["error"], "max active VMs reached (4); delete old VMs first");
        }
    }
    assert_eq!(made.len(), 4);
    let refused = pyro.json(&["run", "debian:12", "--json", "--", "true"]);
    assert_eq!(refused["code"], "cap_reached", "machines and tasks share the slots");
    // A stopped one gives its slot back, and takes it again only where there is one.
    pyro.ok(&["task", "stop", &made[0]]);
    let fifth = pyro.ok(&["task", "create", "debian:12", "--mem-mib", "256", "--id-only"]);
    assert_eq!(pyro.json(&["task", "start", &made[0], "--json"])["code"], "cap_reached");
    assert_eq!(pyro.json(&["task", "list", "--json"])["count"], 5);
    pyro.ok(&["task", "delete", &fifth]);
    assert_eq!(pyro.json(&["task", "start", &made[0], "--json"])["state"], "started");
    for id in &made {
        pyro.ok(&["task", "delete", id]);
    }
    pyro.until("the supervisors are gone", |pyro| pyro.processes().is_empty());
    pyro.assert_empty();
}

#[test]
fn a_stream_of_bytes_is_in_the_journal_as_it_was_and_takes_no_memory() {
    let pyro = Pyro::new();
    let id = pyro.create();
    let bytes: Vec<u8> = (0..40_u32 << 20).map(|i| (i ^ (i >> 8) ^ (i >> 16)).to_le_bytes()[0]).collect();
    let mut child = start(
        pyro.command(&["task", "exec", &id, "--timeout-seconds", "120", "--", "cat"]).stdin(Stdio::piped()),
    );
    let mut stdin = child.stdin.take().expect("piped");
    let sent = bytes.clone();
    let feeder = std::thread::spawn(move || stdin.write_all(&sent));
    let output = child.wait_with_output().expect("it ends");
    feeder.join().expect("no panic").expect("all was taken");
    assert!(output.stdout == bytes, "{} of {} bytes", output.stdout.len(), bytes.len());
    let kept = fs::read(pyro.task_file(&id, "commands/000001.stdout")).expect("a plain file");
    assert!(kept == bytes, "{} of {} bytes in the journal", kept.len(), bytes.len());
    let supervisor = pyro.supervisor(&id).expect("it lives");
    let peak = peak_kib(supervisor).expect("it lives");
    assert!(peak < 64 << 10, "the supervisor took {peak} KiB");
    let agent = text(&pyro.exec(&id, "grep VmHWM /proc/1/status").stdout);
    let agent: u64 = agent.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number");
    assert!(agent < 16 << 10, "the agent took {agent} KiB");
    pyro.ok(&["task", "delete", &id]);
}

#[test]
fn output_past_the_limit_of_the_journal_reaches_its_caller_and_the_entry_says_what_was_dropped() {
    let pyro = Pyro::new();
    let id = pyro.create();
    let line = ["task", "exec", &id, "--timeout-seconds", "120", "--", "head", "-c", "70000000", "/dev/zero"];
    let output = pyro.run(&line);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(0), 70_000_000));
    let entry = &pyro.logs(&id)[0];
    assert_eq!(
        (&entry["stdout_bytes"], &entry["stdout_dropped_bytes"]),
        (&70_000_000.into(), &2_891_136.into())
    );
    let kept = fs::metadata(pyro.task_file(&id, "commands/000001.stdout")).expect("there").len();
    assert_eq!(kept, 64 << 20);
    pyro.ok(&["task", "delete", &id]);
}

#[test]
fn commands_that_leave_their_input_or_output_lie_hold_no_other_up() {
    let pyro = Pyro::new();
    let id = pyro.create();
    let mut children = Vec::new();
    for _ in 0..6 {
        // More than any window holds, into a command that reads nothing.
        let line = ["task", "exec", &id, "--timeout-seconds", "120", "--", "sleep", "100"];
        let mut child = start(pyro.command(&line).stdin(Stdio::piped()));
        let mut stdin = child.stdin.take().expect("piped");
        drop(std::thread::spawn(move || drop(stdin.write_all(&vec![0; 4 << 20]))));
        children.push(child);
        // More than any pipe holds, out to a caller that reads nothing.
        let line = ["task", "exec", &id, "--timeout-seconds", "120", "--", "yes"];
        children.push(pyro.spawn(&line));
    }
    pyro.until("all run", |pyro| pyro.status(&id)["command_count"] == 12);
    assert_eq!(text(&pyro.exec(&id, "echo through").stdout), "through\n");
    // Nor a stop, nor the end of the guest, nor the end of the task.
    assert_eq!(pyro.json(&["task", "stop", &id, "--json"])["state"], "stopped");
    assert_eq!(pyro.json(&["task", "start", &id, "--json"])["state"], "started");
    children.push(pyro.spawn(&["task", "exec", &id, "--timeout-seconds", "120", "--", "yes"]));
    pyro.until("it runs", |pyro| pyro.status(&id)["command_count"] == 14);
    kill(pyro.vmm(&id).expect("it lives"), "KILL");
    pyro.until("the task is stopped", |pyro| pyro.status(&id)["state"] == "stopped");
    pyro.ok(&["task", "delete", &id]);
    for child in &mut children {
        drop(child.kill());
        child.wait().expect("reaped");
    }
}

#[test]
fn a_caller_that_does_not_read_the_end_of_its_command_holds_no_stop_up() {
    let pyro = Pyro::new();
    let id = pyro.create();
    // Somewhere here the last piece takes the last place between supervisor and caller.
    let children: Vec<_> = (0..20)
        .map(|step| {
            let size = (1_500_000 + step * 30_000).to_string();
            pyro.spawn(&[
                "task",
                "exec",
                &id,
                "--timeout-seconds",
                "300",
                "--",
                "head",
                "-c",
                &size,
                "/dev/zero",
            ])
        })
        .collect();
    pyro.until("all have begun", |pyro| pyro.status(&id)["command_count"] == 20);
    let began = Instant::now();
    assert_eq!(pyro.json(&["task", "stop", &id, "--json"])["state"], "stopped");
    assert!(began.elapsed() < Duration::from_secs(150), "{:?}", began.elapsed());
    pyro.ok(&["task", "delete", &id]);
    for mut child in children {
        drop(child.kill());
        child.wait().expect("reaped");
    }
}

#[test]
fn a_command_that_comes_while_its_task_is_deleted_does_not_hold_the_delete_up() {
    let pyro = Pyro::new();
    let id = pyro.create();
    let stubborn = pyro.spawn(&[
        "task",
        "exec",
        &id,
        "--json",
        "--",
        "sh",
        "-c",
        "trap '' TERM; echo begun; while :; do sleep 1; done",
    ]);
    pyro.until("it runs", |pyro| pyro.logs(&id).first().is_some_and(|entry| entry["stdout"] == "begun\n"));
    let began = Instant::now();
    let deleting = pyro.spawn(&["task", "delete", &id]);
    std::thread::sleep(Duration::from_millis(500));
    let late = pyro.spawn(&["task", "exec", &id, "--timeout-seconds", "300", "--json", "--", "sleep", "300"]);
    assert!(deleting.wait_with_output().expect("it ends").status.success());
    assert!(began.elapsed() < Duration::from_secs(150), "{:?}", began.elapsed());
    let result = parse(&stubborn.wait_with_output().expect("it ends"));
    assert_eq!((&result["fault"], &result["stdout"]), (&"cancelled".into(), &"begun\n".into()), "{result}");
    let output = late.wait_with_output().expect("it ends");
    assert_ne!(output.status.code(), Some(0), "{output:?}");
    pyro.until("the supervisor is gone", |pyro| pyro.processes().is_empty());
    pyro.assert_empty();
}

#[test]
fn a_task_ends_when_its_time_is_up_and_says_so_once() {
    let pyro = Pyro::new();
    let line = ["task", "create", "debian:12", "--mem-mib", "256", "--ttl-seconds", "60", "--id-only"];
    let (kept, orphan) = (pyro.ok(&line), pyro.ok(&line));
    // One with its supervisor, over a running command; one without.
    kill(pyro.supervisor(&orphan).expect("it lives"), "KILL");
    let child = pyro.spawn(&[
        "task",
        "exec",
        &kept,
        "--timeout-seconds",
        "300",
        "--json",
        "--",
        "sh",
        "-c",
        "echo begun; sleep 300",
    ]);
    let output = child.wait_with_output().expect("it ends");
    let result = parse(&output);
    assert_eq!(
        (&result["fault"], &result["stdout"]),
        (&"ttl_expired".into(), &"begun\n".into()),
        "{output:?}"
    );
    pyro.until("nobody needed to call", |pyro| !pyro.state().join("tasks").join(&kept).exists());
    pyro.until("the supervisor is gone", |pyro| pyro.processes().is_empty());
    for id in [&kept, &orphan] {
        pyro.until("its time is up", |pyro| {
            pyro.run(&["reap"]).status.success() && !pyro.state().join("tasks").join(id).exists()
        });
        // Whoever asks first is told, whatever it asks for.
        let told = if id == &kept {
            pyro.json(&["task", "exec", id, "--json", "--", "true"])
        } else {
            pyro.json(&["task", "status", id, "--json"])
        };
        assert_eq!(told["error"], format!("task '{id}' expired and was automatically deleted"));
        let again = pyro.json(&["task", "status", id, "--json"]);
        assert_eq!(again["error"], format!("task '{id}' does not exist"));
    }
    pyro.assert_empty();
}

#[test]
fn a_host_without_room_is_refused_with_both_numbers() {
    let pyro = Pyro::new();
    let refused = pyro.json(&["task", "create", "debian:12", "--mem-mib", "32768", "--json"]);
    assert_eq!(refused["code"], "host_resources", "{refused}");
    let text = refused["error"].as_str().expect("text");
    assert!(
        text.starts_with("not enough memory: 32832 MiB needed") && text.contains("MiB available"),
        "{text}"
    );
    let refused = pyro.json(&["task", "create", "debian:12", "--disk-mib", "100", "--json"]);
    assert_eq!(refused["error"], "disk_mib must be between 256 and 1048576");
    pyro.assert_empty();
    let id = pyro.ok(&["task", "create", "debian:12", "--mem-mib", "256", "--disk-mib", "300", "--id-only"]);
    let full = pyro.json(&[
        "task",
        "exec",
        &id,
        "--json",
        "--",
        "sh",
        "-c",
        "cat /dev/zero > f; df -m / | tail -1; false",
    ]);
    assert_eq!(full["fault"], "disk_full", "{full}");
    let list = pyro.json(&["task", "list", "--json"]);
    assert!(list["disk_bytes"].as_u64().expect("a number") > 100 << 20, "{list}");
    pyro.ok(&["task", "delete", &id]);
}

#[test]
fn a_path_is_no_id() {
    let pyro = Pyro::new();
    for id in ["../../etc", "..", "ABCDEF012345", "0123456789ab0", "", "0123456789a/"] {
        let error = pyro.json(&["task", "status", id, "--json"]);
        assert_eq!(error["error"], format!("task '{id}' does not exist"));
    }
}
