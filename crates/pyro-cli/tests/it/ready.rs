//! A machine that `pyro run --keep-ready` leaves for the next such command.

use fs_err as fs;
use serde_json::Value;

use crate::support::{Pyro, kill, start, text};

const RUN: [&str; 6] = ["run", "debian:12", "--mem-mib", "512", "--keep-ready", "100"];

/// The machine that is or will be ready.
fn noted(pyro: &Pyro) -> Option<String> {
    let note = fs::read_to_string(pyro.state().join("ready.json")).ok()?;
    let note: Value = serde_json::from_str(&note).expect("an object");
    note["task_id"].as_str().map(str::to_owned)
}

/// The machine that is ready, once it is.
pub(crate) fn ready(pyro: &Pyro) -> String {
    let mut found = None;
    pyro.until("a machine is ready", |pyro| {
        found = noted(pyro).filter(|id| {
            let record = fs::read_to_string(pyro.task_file(id, "task.json")).unwrap_or_default();
            record.contains("\"kept\": \"ready\"")
        });
        found.is_some()
    });
    found.expect("one is ready")
}

fn run(pyro: &Pyro, flags: &[&str], words: &[&str]) -> Value {
    pyro.json(&[&RUN[..], flags, &["--json", "--"], words].concat())
}

/// The result of a command that is served by the machine that is ready.
fn served(pyro: &Pyro, flags: &[&str], words: &[&str]) -> Value {
    let ready = ready(pyro);
    let result = run(pyro, flags, words);
    assert_eq!(result["vm_id"], ready.as_str(), "{result}");
    result
}

/// Ends the machine that is ready, as its own time would.
pub(crate) fn end(pyro: &Pyro) {
    // Also one that has been begun and is not there yet.
    pyro.until("none is ready", |pyro| {
        if let Some(pid) = noted(pyro).and_then(|id| pyro.supervisor(&id)) {
            kill(pid, "TERM");
        }
        pyro.ok(&["reap"]);
        pyro.processes().is_empty() && fs::read_dir(pyro.state().join("tasks")).expect("there").count() == 0
    });
    pyro.assert_empty();
}

#[test]
fn a_machine_that_is_ready_serves_once_and_is_nobodys_task() {
    let pyro = Pyro::new();
    let first = run(&pyro, &[], &["sh", "-c", "echo out; echo err >&2; touch /left; exit 3"]);
    let again = served(&pyro, &["-e", "A=b"], &["sh", "-c", "echo out; echo err >&2; ls /left 2>&-; exit 3"]);
    for key in ["stdout", "stderr", "exit_code", "execution_mode", "isolation", "environment", "fault"] {
        assert_eq!(first[key], again[key], "{key}: {again}");
    }
    let keys = |result: &Value| result.as_object().expect("an object").keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(&first), keys(&again));
    assert_eq!((&again["cleanup"]["deleted"], &again["cleanup"]["vm_id"]), (&true.into(), &again["vm_id"]));
    // Each has an identity of its own.
    let names: Vec<Value> =
        (0..2).map(|_| served(&pyro, &[], &["cat", "/etc/hostname"])["stdout"].clone()).collect();
    assert_ne!(names[0], names[1]);
    // It is in no list, and no task.
    assert_eq!(pyro.ok(&["task", "list"]), "No tasks found.");
    let ready = ready(&pyro);
    let refused = pyro.json(&["task", "status", &ready, "--json"]);
    assert_eq!(refused["code"], "not_found", "{refused}");
    // A command without the flag leaves it alone; one of another kind takes its place.
    let plain = pyro.json(&["run", "debian:12", "--mem-mib", "512", "--json", "--", "true"]);
    assert_ne!(plain["vm_id"], ready.as_str());
    run(&pyro, &["--disk-mib", "4096"], &["true"]);
    pyro.until("the other is gone", |pyro| !pyro.state().join("tasks").join(&ready).exists());
    end(&pyro);
}

#[test]
fn a_machine_that_is_ready_ends_by_itself_and_with_whoever_has_it() {
    let pyro = Pyro::new();
    let short = ["run", "debian:12", "--mem-mib", "512", "--keep-ready", "5", "--", "true"];
    pyro.ok(&short);
    pyro.until("it is begun", |pyro| noted(pyro).is_some());
    pyro.until("its time is over", |pyro| pyro.processes().is_empty());
    pyro.assert_empty();
    // Its life is that of its caller.
    pyro.ok(&[&RUN[..], &["--", "true"]].concat());
    let claimed = ready(&pyro);
    let mut caller =
        pyro.spawn(&[&RUN[..], &["--timeout-seconds", "100", "--json", "--", "sleep", "99"]].concat());
    pyro.until("it is claimed", |pyro| pyro.task_file(&claimed, "commands/000001.json").exists());
    kill(i32::try_from(caller.id()).expect("small"), "KILL");
    caller.wait().expect("it is gone");
    pyro.until("it is gone with its caller", |pyro| !pyro.state().join("tasks").join(&claimed).exists());
    end(&pyro);
}

#[test]
fn a_machine_that_is_ready_gives_way_and_takes_the_last_slot_from_nobody() {
    let pyro = Pyro::new();
    let with_cap = |cap: &str, line: &[&str]| {
        let output =
            start(pyro.command(line).env("PYRO_MAX_ACTIVE_VMS", cap)).wait_with_output().expect("it ends");
        assert!(output.status.success(), "{line:?}: {output:?}");
        text(&output.stdout).trim().to_owned()
    };
    let run = [&RUN[..], &["--", "true"]].concat();
    with_cap("1", &run);
    assert_eq!(noted(&pyro), None, "it would hold the only slot");
    with_cap("2", &run);
    let ready = noted(&pyro).expect("there is room for one");
    pyro.until("it is there", |pyro| pyro.task_file(&ready, "task.json").exists());
    let create = ["task", "create", "debian:12", "--mem-mib", "512", "--id-only"];
    let ids = [with_cap("2", &create), with_cap("2", &create)];
    pyro.until("it is gone", |pyro| !pyro.state().join("tasks").join(&ready).exists());
    for id in &ids {
        pyro.ok(&["task", "delete", id]);
    }
    // Its supervisor killed, nothing of it stays, and the next command finds none.
    with_cap("2", &run);
    let ready = noted(&pyro).expect("there is room for one");
    pyro.until("it is there", |pyro| pyro.task_file(&ready, "task.json").exists());
    kill(pyro.supervisor(&ready).expect("it lives"), "KILL");
    pyro.until("it is gone with its supervisor", |pyro| {
        pyro.ok(&["reap"]);
        !pyro.state().join("tasks").join(&ready).exists()
    });
    assert!(pyro.run(&run).status.success());
    end(&pyro);
}
