//! Killing everything at moments that nobody chose: nothing may be left after the next command, and nothing lost.

use std::time::{Duration, Instant};

use crate::support::{Dice, Pyro, kill, text};

const TIMES: u64 = 50;
/// Longer than a machine takes to boot and to run a short command, on a machine that has other things to do.
const LONGEST_MILLIS: u64 = 3500;
/// Machines at the same time.
const AT_ONCE: u64 = 2;

#[test]
fn a_pyro_that_is_killed_leaves_nothing_after_the_next_command() {
    let pyro = Pyro::new();
    let mut dice = Dice::new(1);
    for _ in 0..TIMES / AT_ONCE {
        let children: Vec<_> = (0..AT_ONCE)
            .map(|_| (pyro.spawn(&["run", "debian:12", "--", "true"]), dice.below(LONGEST_MILLIS)))
            .collect();
        std::thread::scope(|scope| {
            for (mut child, millis) in children {
                scope.spawn(move || {
                    std::thread::sleep(Duration::from_millis(millis));
                    child.kill().expect("killed");
                    child.wait().expect("reaped");
                });
            }
        });
        assert!(pyro.run(&["reap"]).status.success());
        pyro.until("the VMM has died with its owner", |pyro| pyro.processes().is_empty());
        pyro.assert_empty();
    }
}

#[test]
fn a_vmm_that_is_killed_ends_its_command_as_an_error_and_leaves_nothing() {
    let pyro = Pyro::new();
    let mut dice = Dice::new(2);
    for _ in 0..TIMES {
        let mut child = pyro.spawn(&["run", "debian:12", "--json", "--", "sleep", "99"]);
        let own = i32::try_from(child.id()).expect("small");
        pyro.until("there is a VMM", |pyro| pyro.processes().iter().any(|pid| *pid != own));
        std::thread::sleep(Duration::from_millis(dice.below(2500)));
        // One that was about to be restored is followed by one that boots, which dies too.
        pyro.until("pyro has ended", |pyro| {
            for pid in pyro.processes().into_iter().filter(|pid| *pid != own) {
                kill(pid, "KILL");
            }
            child.try_wait().expect("its state").is_some()
        });
        let output = child.wait_with_output().expect("pyro ends");
        let result: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one object");
        match output.status.code() {
            // Before the command was sent, or when nobody can know what became of it.
            Some(125) => {
                let code = result["code"].as_str().unwrap_or_default();
                assert!(matches!(code, "guest_unavailable" | "outcome_unknown"), "{result}");
            }
            Some(137) => assert_eq!(result["fault"], "guest_lost", "{result}"),
            other => panic!("{other:?}: {output:?}"),
        }
        pyro.assert_empty();
    }
}

#[test]
fn root_in_the_guest_can_end_its_guest_and_nothing_else() {
    let pyro = Pyro::new();
    // The first process of a system cannot be killed from inside.
    let output = pyro.run(&["run", "debian:12", "--", "sh", "-c", "kill -9 1; kill -SEGV 1; echo alive"]);
    assert_eq!(text(&output.stdout), "alive\n", "{output:?}");
    for deed in [
        "echo c > /proc/sysrq-trigger",
        "echo b > /proc/sysrq-trigger",
        "echo o > /proc/sysrq-trigger",
        "rm -f /dev/null; kill -STOP -1; echo b > /proc/sysrq-trigger",
    ] {
        let line = ["run", "debian:12", "--timeout-seconds", "10", "--json", "--", "sh", "-c", deed];
        let output = pyro.run(&line);
        let result: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one object");
        assert!(matches!(output.status.code(), Some(137 | 124)), "{deed}: {output:?}");
        assert!(matches!(result["fault"].as_str(), Some("guest_lost" | "timeout")), "{deed}: {result}");
        pyro.assert_empty();
    }
    assert!(pyro.run(&["run", "debian:12", "--", "true"]).status.success());
}

#[test]
fn a_signal_ends_the_command_its_machine_and_everything() {
    let pyro = Pyro::new();
    for (signal, code) in [("INT", 130), ("TERM", 143), ("HUP", 129)] {
        for millis in [0, 300, 1500] {
            let child = pyro.spawn(&["run", "debian:12", "--", "sleep", "99"]);
            let own = i32::try_from(child.id()).expect("small");
            // Before it listens, a signal ends any program in the ordinary way.
            pyro.until("it works", |pyro| !pyro.processes().is_empty());
            std::thread::sleep(Duration::from_millis(100 + millis));
            kill(own, signal);
            let output = child.wait_with_output().expect("pyro ends");
            assert_eq!(output.status.code(), Some(code), "{signal} after {millis} ms: {output:?}");
            pyro.until("the VMM is gone", |pyro| pyro.processes().is_empty());
            pyro.assert_empty();
        }
    }
}

#[test]
fn the_three_ways_in_which_a_task_loses_its_guest_have_three_names() {
    let pyro = Pyro::new();
    let id = pyro.create();
    assert!(pyro.exec(&id, "echo kept > f; sync").status.success());
    let ends: [(&str, &dyn Fn()); 4] = [
        ("supervisor_lost", &|| kill(pyro.supervisor(&id).expect("it lives"), "KILL")),
        ("vmm_lost", &|| kill(pyro.vmm(&id).expect("it lives"), "KILL")),
        ("guest_crashed", &|| drop(pyro.exec(&id, "echo c > /proc/sysrq-trigger; sleep 9"))),
        ("guest_powered_off", &|| drop(pyro.exec(&id, "echo b > /proc/sysrq-trigger; sleep 9"))),
    ];
    for (name, end) in ends {
        let running = pyro.spawn(&["task", "exec", &id, "--json", "--", "sh", "-c", "echo begun; sleep 99"]);
        pyro.until("it runs", |pyro| pyro.logs(&id).last().is_some_and(|entry| entry["stdout"] == "begun\n"));
        let sequence = pyro.logs(&id).len();
        end();
        let output = running.wait_with_output().expect("it ends");
        let result: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one object");
        assert_eq!(
            (&result["fault"], &result["stdout"]),
            (&"guest_lost".into(), &"begun\n".into()),
            "{name}: {output:?}"
        );
        pyro.until("the task is stopped", |pyro| pyro.status(&id)["state"] == "stopped");
        let status = pyro.status(&id);
        let said = status["last_error"].as_str().unwrap_or_default();
        assert!(said.starts_with(&format!("{name}: ")), "{name}: {said}");
        assert_eq!(pyro.logs(&id)[sequence - 1]["status"], "interrupted", "{name}");
        pyro.until("the VMM is gone", |pyro| pyro.vmm(&id).is_none());
        let started = pyro.json(&["task", "start", &id, "--json"]);
        assert_eq!(started["state"], "started", "{name}: {started}");
        assert_eq!(text(&pyro.exec(&id, "cat f").stdout), "kept\n", "{name}");
    }
    pyro.ok(&["task", "delete", &id]);
    pyro.until("the supervisor is gone", |pyro| pyro.processes().is_empty());
    pyro.assert_empty();
}

#[test]
fn a_guest_that_does_not_answer_holds_neither_a_cancellation_nor_a_delete_up() {
    let pyro = Pyro::new();
    let id = pyro.create();
    kill(pyro.vmm(&id).expect("it lives"), "STOP");
    let line = ["task", "exec", &id, "--timeout-seconds", "300", "--json", "--", "true"];
    let (first, second) = (pyro.spawn(&line), pyro.spawn(&line));
    pyro.until("both have begun", |pyro| pyro.status(&id)["command_count"] == 2);
    let began = Instant::now();
    pyro.ok(&["task", "cancel", &id, "1"]);
    pyro.ok(&["task", "delete", &id]);
    assert!(began.elapsed() < Duration::from_secs(150), "{:?}", began.elapsed());
    for child in [first, second] {
        let output = child.wait_with_output().expect("it ends");
        let result: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one object");
        assert_eq!(result["fault"], "cancelled", "{result}");
    }
    pyro.until("the supervisor is gone", |pyro| pyro.processes().is_empty());
    pyro.assert_empty();
}

#[test]
fn a_create_that_is_killed_or_interrupted_leaves_no_task() {
    let pyro = Pyro::new();
    let mut dice = Dice::new(3);
    for round in 0..12 {
        let mut child = pyro.spawn(&["task", "create", "debian:12", "--mem-mib", "256"]);
        std::thread::sleep(Duration::from_millis(dice.below(1500)));
        let signal = if round % 2 == 0 { "KILL" } else { "INT" };
        kill(i32::try_from(child.id()).expect("small"), signal);
        let ended = child.wait().expect("reaped");
        // It may have been done by then.
        if ended.code() == Some(0) {
            let list = pyro.json(&["task", "list", "--json"]);
            pyro.ok(&["task", "delete", list["tasks"][0]["task_id"].as_str().expect("an id")]);
        }
        // One that was killed between its supervisor's report and its own end has made a whole task, which it told nobody.
        // A supervisor that gives up does so at once, so what is still there then is such a task.
        let gives_up_until = Instant::now() + Duration::from_secs(20);
        pyro.until("a supervisor whose caller is gone gives up", |pyro| {
            if signal == "KILL" && Instant::now() >= gives_up_until {
                let list = pyro.json(&["task", "list", "--json"]);
                let id = list["tasks"][0]["task_id"].as_str().expect("an id").to_owned();
                assert!(pyro.exec(&id, "true").status.success(), "a task that is left is whole");
                pyro.ok(&["task", "delete", &id]);
            }
            pyro.processes().is_empty()
        });
        assert!(pyro.run(&["reap"]).status.success());
        pyro.assert_empty();
    }
}
