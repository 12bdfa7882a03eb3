//! How an earlier system of this kind lost and leaked, one test for each that is not told by another: the numbers are
//! those of the list that was made of it.

use fs_err as fs;
use std::process::Stdio;

use crate::support::{Pyro, kill, parse, start, text};

/// 1 and 2: `of_sixteen_tasks_at_once_a_cap_of_four_lets_four_in`. 5: the tests of `kill`. 10:
/// `a_task_ends_when_its_time_is_up_and_says_so_once`. 11: `forty_commands_at_once_…`. 13: `deleting_a_task_…`. 15:
/// `the_host_takes_a_guests_place_…`. 16: `output_past_the_limit_…`, `logs_show_…`. 17: `a_time_limit_…`. 21:
/// `a_stopped_task_…`. 27: the tests of the image store. 28 and 29: the tests of `doctor`.
#[test]
fn failure_3_a_record_is_never_read_half_written() {
    let pyro = Pyro::new();
    let id = pyro.create();
    std::thread::scope(|scope| {
        let (pyro, id) = (&pyro, &id);
        for _ in 0..4 {
            scope.spawn(move || {
                for _ in 0..10 {
                    assert!(pyro.exec(id, "true").status.success());
                }
            });
        }
        scope.spawn(move || {
            for _ in 0..100 {
                assert_eq!(pyro.status(id)["state"], "started");
                drop(pyro.logs(id));
            }
        });
    });
    assert_eq!(pyro.status(&id)["command_count"], 40);
    pyro.ok(&["task", "delete", &id]);
}

#[test]
fn failure_4_a_corrupt_record_stops_nobody_else() {
    let pyro = Pyro::new();
    let (bad, good) = (pyro.create(), pyro.create());
    kill(pyro.supervisor(&bad).expect("it lives"), "KILL");
    pyro.until("its VMM is gone", |pyro| pyro.vmm(&bad).is_none());
    fs::write(pyro.task_file(&bad, "task.json"), "{\"layout_version\": 1, \"tas").expect("written");
    assert!(pyro.exec(&good, "true").status.success());
    let error = pyro.json(&["task", "status", &bad, "--json"]);
    assert_eq!(
        (&error["code"], &error["error"]),
        (&"damaged".into(), &format!("task '{bad}' is damaged: its record cannot be read").into())
    );
    assert!(error["hint"].as_str().expect("a hint").contains("quarantine"), "{error}");
    let another = pyro.create();
    for id in [&good, &another] {
        pyro.ok(&["task", "delete", id]);
    }
    assert!(
        pyro.state().join("quarantine").join(&bad).join("overlay.ext4").exists(),
        "kept for a person to see"
    );
    pyro.ok(&["task", "delete", &bad]);
    assert_eq!(pyro.json(&["task", "delete", &bad, "--json"])["code"], "not_found");
    pyro.until("the supervisors are gone", |pyro| pyro.processes().is_empty());
    pyro.assert_empty();
}

#[test]
fn failure_6_a_command_is_sent_once_whatever_breaks() {
    let pyro = Pyro::new();
    let id = pyro.create();
    let child = pyro.spawn(&[
        "task",
        "exec",
        &id,
        "--json",
        "--",
        "sh",
        "-c",
        "echo once >> /root/runs; sync; : > /run/written; sleep 99",
    ]);
    // Until it has synced, a killed guest may lose it.
    pyro.until("it runs", |pyro| pyro.exec(&id, "test -e /run/written").status.success());
    kill(pyro.supervisor(&id).expect("it lives"), "KILL");
    let result = parse(&child.wait_with_output().expect("it ends"));
    assert_eq!(result["fault"], "guest_lost", "what became of it is in the journal: {result}");
    pyro.ok(&["task", "start", &id]);
    assert_eq!(text(&pyro.exec(&id, "cat /root/runs").stdout), "once\n");
    pyro.ok(&["task", "delete", &id]);
}

#[test]
fn failure_7_a_time_limit_is_told_by_the_guest_and_not_by_the_connection() {
    let pyro = Pyro::new();
    let id = pyro.create();
    for _ in 0..3 {
        let line = ["task", "exec", &id, "--timeout-seconds", "0.5", "--json", "--", "sleep", "9"];
        let result = pyro.json(&line);
        assert_eq!((&result["exit_code"], &result["fault"]), (&124.into(), &"timeout".into()));
    }
    assert_eq!(pyro.logs(&id).iter().filter(|entry| entry["status"] == "timed_out").count(), 3);
    pyro.ok(&["task", "delete", &id]);
}

#[test]
fn failure_8_output_that_is_no_text_harms_nobody() {
    let pyro = Pyro::new();
    let id = pyro.create();
    let output = pyro.exec(&id, "head -c 100000 /dev/urandom; printf '\\377'");
    assert_eq!((output.status.code(), output.stdout.len()), (Some(0), 100_001));
    assert_eq!(fs::read(pyro.task_file(&id, "commands/000001.stdout")).expect("there"), output.stdout);
    assert!(pyro.exec(&id, "true").status.success());
    assert_eq!(pyro.logs(&id).len(), 2);
    pyro.ok(&["task", "delete", &id]);
}

#[test]
fn failure_9_a_number_of_a_process_is_never_taken_for_life() {
    let pyro = Pyro::new();
    let id = pyro.create();
    let supervisor = pyro.supervisor(&id).expect("it lives");
    kill(supervisor, "KILL");
    // Whatever has its number now, its lock is free once it is dead.
    pyro.until("the lock is free", |pyro| pyro.status(&id)["state"] == "stopped");
    // Stopped by a signal it is alive, and says nothing until it goes on.
    pyro.ok(&["task", "start", &id]);
    let supervisor = pyro.supervisor(&id).expect("it lives");
    kill(supervisor, "STOP");
    assert_eq!(pyro.status(&id)["state"], "started");
    kill(supervisor, "CONT");
    assert!(pyro.exec(&id, "true").status.success());
    pyro.ok(&["task", "delete", &id]);
}

#[test]
fn failure_12_a_deleted_task_does_not_come_back() {
    let pyro = Pyro::new();
    for _ in 0..3 {
        let id = pyro.create();
        let children: Vec<_> =
            (0..4).map(|_| pyro.spawn(&["task", "exec", &id, "--json", "--", "sleep", "20"])).collect();
        pyro.until("they run", |pyro| pyro.status(&id)["command_count"] == 4);
        pyro.ok(&["task", "delete", &id]);
        for child in children {
            child.wait_with_output().expect("it ends");
        }
        pyro.until("the supervisor is gone", |pyro| pyro.processes().is_empty());
        pyro.assert_empty();
    }
}

#[test]
fn failure_14_and_15_a_commands_input_is_not_its_callers() {
    let pyro = Pyro::new();
    let id = pyro.create();
    let mut child = start(
        pyro.command(&["task", "exec", &id, "--detach", "--", "sh", "-c", "cat; echo end"])
            .stdin(Stdio::piped()),
    );
    drop(child.stdin.take());
    assert!(child.wait().expect("it ends").success());
    assert_eq!(text(&pyro.run(&["task", "attach", &id, "1"]).stdout), "end\n");
    pyro.ok(&["task", "delete", &id]);
}

#[test]
fn failure_18_a_slow_call_delays_no_other() {
    let pyro = Pyro::new();
    let id = pyro.create();
    let slow = pyro.spawn(&["task", "create", "debian:12", "--mem-mib", "256", "--id-only"]);
    let mut sleeping = pyro.spawn(&["task", "exec", &id, "--timeout-seconds", "300", "--", "sleep", "300"]);
    pyro.until("it sleeps", |pyro| pyro.status(&id)["command_count"] == 1);
    assert_eq!(pyro.status(&id)["state"], "started");
    assert_eq!(text(&pyro.exec(&id, "echo quick").stdout), "quick\n");
    assert!(sleeping.try_wait().expect("asked").is_none(), "the quick one waited for the slow one");
    pyro.ok(&["task", "cancel", &id, "1"]);
    let other = text(&slow.wait_with_output().expect("it ends").stdout).trim().to_owned();
    assert_eq!(sleeping.wait().expect("it ends").code(), Some(143));
    for id in [&id, &other] {
        pyro.ok(&["task", "delete", id]);
    }
}

#[test]
fn failure_19_a_task_that_is_started_answers() {
    let pyro = Pyro::new();
    for _ in 0..3 {
        let id = pyro.create();
        let line = ["task", "exec", &id, "--timeout-seconds", "5", "--json", "--", "true"];
        assert_eq!(pyro.json(&line)["exit_code"], 0);
        pyro.ok(&["task", "delete", &id]);
    }
}

#[test]
fn failure_20_a_task_costs_the_disk_what_it_writes() {
    let pyro = Pyro::new();
    let id = pyro.create();
    let bytes = pyro.status(&id)["disk_bytes"].as_u64().expect("a number");
    assert!(bytes < 4 << 20, "{bytes} bytes for an 8 GiB disk");
    pyro.ok(&["task", "delete", &id]);
}

#[test]
fn failure_23_what_went_wrong_is_in_the_record() {
    let pyro = Pyro::new();
    let id = pyro.create();
    pyro.exec(&id, "no-such-command-at-all");
    let line = ["task", "exec", &id, "--json", "--", "no-such-program"];
    let refused = pyro.json(&line);
    assert_eq!(refused["exit_code"], 127, "{refused}");
    let logs = pyro.logs(&id);
    assert_eq!((logs.len(), &logs[0]["exit_code"], &logs[1]["exit_code"]), (2, &127.into(), &127.into()));
    assert!(logs[1]["stderr"].as_str().expect("text").contains("no-such-program"), "{}", logs[1]);
    pyro.ok(&["task", "delete", &id]);
}

#[test]
fn failure_24_a_command_is_run_as_it_was_given() {
    let pyro = Pyro::new();
    let id = pyro.create();
    for (script, expected) in [
        ("# a comment\necho a", "a\n"),
        ("echo a || echo b; echo c", "a\nc\n"),
        ("false && echo x; pwd", "/workspace\n"),
    ] {
        let output = pyro.run(&["task", "exec", &id, "--", script]);
        assert_eq!(text(&output.stdout), expected, "{script}");
    }
    let words = pyro.run(&["task", "exec", &id, "--", "printf", "%s|", "a b", "", "$HOME", "--", ";"]);
    assert_eq!(text(&words.stdout), "a b||$HOME|--|;|");
    assert_eq!(pyro.run(&["task", "exec", &id, "--", "if then fi ("]).status.code(), Some(2));
    pyro.ok(&["task", "delete", &id]);
}

#[test]
fn failure_30_and_31_stopped_tasks_hold_no_slot_and_a_newer_layout_is_left_alone() {
    let pyro = Pyro::new();
    let id = pyro.create();
    pyro.ok(&["task", "stop", &id]);
    kill(pyro.supervisor(&id).expect("it lives on while the task does"), "KILL");
    pyro.until("it is gone", |pyro| pyro.supervisor(&id).is_none());
    let record = fs::read_to_string(pyro.task_file(&id, "task.json")).expect("there");
    fs::write(
        pyro.task_file(&id, "task.json"),
        record.replace("\"layout_version\": 1", "\"layout_version\": 2"),
    )
    .expect("written");
    let error = pyro.json(&["task", "status", &id, "--json"]);
    assert!(error["error"].as_str().expect("text").contains("has layout 2; this pyro knows 1"), "{error}");
    fs::write(pyro.task_file(&id, "task.json"), &record).expect("written");
    assert_eq!(pyro.status(&id)["state"], "stopped");
    pyro.ok(&["task", "delete", &id]);
}

#[test]
fn a_lost_registry_is_made_again_from_what_is_on_disk() {
    let pyro = Pyro::new();
    let (started, stopped) = (pyro.create(), pyro.create());
    pyro.ok(&["task", "stop", &stopped]);
    for end in ["", "-wal", "-shm"] {
        drop(fs::remove_file(pyro.state().join(format!("registry.db{end}"))));
    }
    let list = pyro.json(&["task", "list", "--json"]);
    assert_eq!(list["count"], 2, "{list}");
    assert!(pyro.exec(&started, "true").status.success());
    let full = start(pyro.command(&["task", "start", &stopped, "--json"]).env("PYRO_MAX_ACTIVE_VMS", "1"));
    let full = parse(&full.wait_with_output().expect("it ends"));
    assert_eq!(full["code"], "cap_reached", "the one that runs still counts: {full}");
    assert_eq!(pyro.json(&["task", "start", &stopped, "--json"])["state"], "started");
    for id in [&started, &stopped] {
        pyro.ok(&["task", "delete", id]);
    }
}
