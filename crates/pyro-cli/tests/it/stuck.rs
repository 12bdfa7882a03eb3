//! Stopped processes: a command that waits for one names it and can end it.

use fs_err as fs;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{Pyro, environments, is_root, kill, run, start, text};

/// Within this, a command says for whom it waits.
const SAYS_SO: Duration = Duration::from_secs(10);
/// What a crowded machine may take longer.
const CROWDED: Duration = Duration::from_secs(5);
/// Within this, a signal ends pyro; and what a crowded machine may take longer.
const SIGNAL_ENDS: Duration = Duration::from_secs(2 + 1);

fn pid(child: &Child) -> i32 {
    i32::try_from(child.id()).expect("small")
}

fn ended_within(child: Child, deadline: Duration, what: &str) -> Output {
    let began = Instant::now();
    let output = child.wait_with_output().expect("it ends");
    assert!(began.elapsed() < deadline, "{what} took {:?}: {output:?}", began.elapsed());
    output
}

/// A program that holds a lock on a file, and is stopped; killed when dropped.
struct Holder(Child);

impl Holder {
    fn of(path: &Path) -> Self {
        Self::run(Command::new("flock").arg("-F").arg(path).args(["sh", "-c", "echo held; exec sleep 999"]))
    }

    /// One in the middle of a write to the registry.
    fn of_registry(state: &Path) -> Self {
        let script = "import sqlite3, sys, time\n\
                      registry = sqlite3.connect(sys.argv[1], isolation_level=None)\n\
                      registry.execute('BEGIN IMMEDIATE')\n\
                      print('held', flush=True)\n\
                      time.sleep(999)";
        Self::run(Command::new("python3").args(["-c", script]).arg(state.join("registry.db")))
    }

    fn run(command: &mut Command) -> Self {
        let mut child = start(command.stdin(Stdio::null()).stdout(Stdio::piped()));
        let mut held = [0; 5];
        let stdout = child.stdout.as_mut().expect("piped");
        std::io::Read::read_exact(stdout, &mut held).expect("it holds the lock");
        kill(pid(&child), "STOP");
        Self(child)
    }

    fn is_named_in(&self, answer: &Value) {
        assert_eq!(answer["code"], "lock_held", "{answer}");
        let error = answer["error"].as_str().expect("text");
        let named = format!("process {}", pid(&self.0));
        assert!(error.contains(&named) && error.contains("which is stopped"), "{error}");
        assert_eq!(answer["hint"], format!("let it go on: kill -CONT {}", pid(&self.0)), "{answer}");
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.0.kill().expect("killed");
        self.0.wait().expect("reaped");
    }
}

fn answer(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

#[test]
fn a_stopped_supervisor_is_named_by_every_command_that_waits_for_it_and_is_ended_by_force() {
    let pyro = Pyro::new();
    let id = pyro.create();
    pyro.ok(&["task", "exec", &id, "--detach", "--", "sleep", "999"]);
    let attached = pyro.spawn(&["task", "attach", &id, "1", "--json"]);
    pyro.until("the command is followed", |pyro| pyro.status(&id)["command_count"] == 1);
    let supervisor = pyro.supervisor(&id).expect("it lives");
    kill(supervisor, "STOP");
    let lines: [&[&str]; 6] = [
        &["task", "exec", &id, "--json", "--", "true"],
        &["task", "exec", &id, "--json", "--detach", "--", "true"],
        &["task", "stop", &id, "--json"],
        &["task", "start", &id, "--json"],
        &["task", "cancel", &id, "1", "--json"],
        &["task", "delete", &id, "--json"],
    ];
    let waiting: Vec<_> = lines.iter().map(|line| (*line, pyro.spawn(line))).collect();
    let following = pyro.spawn(&["task", "logs", &id, "--follow"]);
    let named = format!("the supervisor of task '{id}', process {supervisor} (");
    for (line, child) in waiting.into_iter().chain([(&["attach"][..], attached)]) {
        let output = ended_within(child, SAYS_SO + CROWDED, &line.join(" "));
        let answer = answer(&output);
        let error = answer["error"].as_str().unwrap_or_else(|| panic!("{line:?}: {answer}"));
        assert!(error.starts_with(&named) && error.contains("which is stopped"), "{line:?}: {error}");
        let hint = answer["hint"].as_str().expect("a hint");
        assert!(hint.contains("kill -CONT") && hint.contains("--force"), "{hint}");
        let code = if line.contains(&"exec") { "outcome_unknown" } else { "supervisor_unresponsive" };
        assert_eq!(answer["code"], code, "{line:?}");
    }
    let output = ended_within(following, SAYS_SO + CROWDED, "logs --follow");
    assert!(text(&output.stderr).contains(&named), "{output:?}");
    // What needs no supervisor is answered all the same.
    assert_eq!(pyro.status(&id)["state"], "started");
    for (signal, code) in [("TERM", 143), ("INT", 130)] {
        let child = pyro.spawn(&["task", "exec", &id, "--", "true"]);
        std::thread::sleep(Duration::from_millis(500));
        kill(pid(&child), signal);
        let output = ended_within(child, SIGNAL_ENDS, signal);
        assert_eq!(output.status.code(), Some(code), "{output:?}");
    }
    let deleted = pyro.spawn(&["task", "delete", &id, "--force", "--json"]);
    let output = ended_within(deleted, SAYS_SO + CROWDED, "delete --force");
    assert_eq!(answer(&output)["deleted"], true, "{output:?}");
    pyro.assert_empty();
}

#[test]
fn force_deletes_a_task_that_obeys_and_one_without_a_supervisor() {
    let pyro = Pyro::new();
    let obeys = pyro.create();
    let running = pyro.spawn(&["task", "exec", &obeys, "--json", "--", "sleep", "999"]);
    pyro.until("it runs", |pyro| pyro.status(&obeys)["command_count"] == 1);
    pyro.ok(&["task", "delete", &obeys, "--force"]);
    let result = answer(&running.wait_with_output().expect("it ends"));
    assert_eq!(result["fault"], "cancelled", "its caller was told: {result}");
    let alone = pyro.create();
    kill(pyro.supervisor(&alone).expect("it lives"), "KILL");
    pyro.ok(&["task", "delete", &alone, "--force"]);
    let missing = answer(&pyro.run(&["task", "delete", &alone, "--force", "--json"]));
    assert_eq!(missing["code"], "not_found", "{missing}");
    pyro.assert_empty();
}

#[test]
fn a_task_past_its_time_whose_supervisor_is_stopped_is_ended_by_whoever_looks() {
    let pyro = Pyro::new();
    for line in [&["task", "status"][..], &["task", "exec"], &["task", "list"]] {
        let id = pyro.create();
        kill(pyro.supervisor(&id).expect("it lives"), "STOP");
        // As if its time had been up for some seconds.
        let record = pyro.task_file(&id, "task.json");
        let mut file: Value = serde_json::from_slice(&fs::read(&record).expect("read")).expect("JSON");
        let expires = file["expires_at_boottime"].as_f64().expect("seconds");
        file["expires_at_boottime"] = (expires - 600.0 - 6.0).into();
        fs::write(&record, file.to_string()).expect("written");
        let mut line = line.to_vec();
        match line[1] {
            "status" => line.extend([&id, "--json"]),
            "exec" => line.extend([&id, "--json", "--", "true"]),
            _ => line.push("--json"),
        }
        let answer = answer(&ended_within(pyro.spawn(&line), SAYS_SO + CROWDED, "a look"));
        if line[1] == "list" {
            assert_eq!(answer["count"], 0, "{answer}");
        } else {
            assert_eq!(answer["code"], "expired", "{answer}");
        }
        pyro.until("its VMM has died with it", |pyro| pyro.processes().is_empty());
        pyro.assert_empty();
    }
}

#[test]
fn a_lock_that_a_stopped_process_holds_is_told_within_ten_seconds_with_its_name() {
    let pyro = Pyro::new();
    let id = pyro.create();
    for lock in ["repair.lock", "registry.db.init"] {
        let holder = Holder::of(&pyro.state().join(lock));
        let line = ["task", "status", &id, "--json"];
        let output = ended_within(pyro.spawn(&line), SAYS_SO + CROWDED, lock);
        holder.is_named_in(&answer(&output));
        let waiting = pyro.spawn(&line);
        std::thread::sleep(Duration::from_millis(500));
        kill(pid(&waiting), "TERM");
        let output = ended_within(waiting, SIGNAL_ENDS, lock);
        assert_eq!(output.status.code(), Some(143), "{output:?}");
    }
    let holder = Holder::of_registry(pyro.state());
    let output = ended_within(pyro.spawn(&["task", "list", "--json"]), SAYS_SO + CROWDED, "the registry");
    holder.is_named_in(&answer(&output));
    drop(holder);
    pyro.ok(&["task", "delete", &id]);
}

#[test]
fn a_pull_that_waits_for_a_stopped_process_says_so_and_gives_up() {
    let cache = tempfile::tempdir_in(environments().parent().expect("a directory")).expect("made");
    let pyro = Pyro::with_cache(&cache.path().join("environments"));
    let lock = cache.path().join("environments/locks/debian_12");
    let holder = Holder::of(&lock);
    let words = pyro.spawn(&["env", "pull", "debian:12"]);
    let object = pyro.spawn(&["env", "pull", "debian:12", "--json"]);
    let waiting = pyro.spawn(&["env", "pull", "debian:12"]);
    let output = ended_within(object, SAYS_SO + CROWDED, "pull");
    holder.is_named_in(&answer(&output));
    let output = ended_within(words, SAYS_SO + CROWDED, "pull");
    let told = format!("waiting for process {}", pid(&holder.0));
    assert!(text(&output.stderr).contains(&told), "{output:?}");
    drop(waiting.wait_with_output());
    let waiting = pyro.spawn(&["env", "pull", "debian:12"]);
    std::thread::sleep(Duration::from_millis(500));
    kill(pid(&waiting), "TERM");
    let output = ended_within(waiting, SIGNAL_ENDS, "pull");
    assert_eq!(output.status.code(), Some(143), "{output:?}");
}

#[test]
fn a_signal_ends_pyro_within_two_seconds_whatever_it_does() {
    let cache = tempfile::tempdir_in(environments().parent().expect("a directory")).expect("made");
    let making_a_template = Pyro::with_cache(&cache.path().join("environments"));
    let pyro = Pyro::new();
    let id = pyro.create();
    let stubborn = "trap '' TERM; echo begun; while :; do sleep 1; done";
    let states: [(&Pyro, &[&str], u64); 9] = [
        (&making_a_template, &["run", "debian:12", "--", "true"], 700),
        (&making_a_template, &["task", "create", "debian:12"], 700),
        (&pyro, &["run", "debian:12", "--cold", "--", "true"], 500),
        (&pyro, &["run", "debian:12", "--", "sh", "-c", stubborn], 2000),
        // Nobody reads its output.
        (&pyro, &["run", "debian:12", "--", "yes"], 3000),
        (&pyro, &["task", "exec", &id, "--", "sh", "-c", stubborn], 1000),
        (&pyro, &["task", "exec", &id, "--", "yes"], 2000),
        (&pyro, &["task", "logs", &id, "--follow"], 1000),
        (&pyro, &["mcp", "serve"], 1000),
    ];
    for (pyro, line, millis) in states {
        let mut command = pyro.command(line);
        // Somebody has the other end and says nothing, as an MCP host does.
        let (stdin, _kept) = std::io::pipe().expect("a pipe");
        let mut child = start(command.stdin(OwnedFd::from(stdin)));
        std::thread::sleep(Duration::from_millis(millis));
        assert_eq!(child.try_wait().expect("its state"), None, "{line:?}");
        let began = Instant::now();
        kill(pid(&child), "TERM");
        let code = child.wait().expect("it ends").code();
        assert!(began.elapsed() < SIGNAL_ENDS, "{line:?} took {:?}", began.elapsed());
        assert_eq!(code, Some(143), "{line:?}");
    }
    let began = Instant::now();
    let supervisor = pyro.supervisor(&id).expect("it lives");
    drop(pyro.spawn(&["task", "exec", &id, "--detach", "--", "sh", "-c", stubborn]).wait_with_output());
    assert!(pyro.exec(&id, "echo kept > /workspace/f").status.success());
    let told = Instant::now();
    kill(supervisor, "TERM");
    pyro.until("the supervisor has ended", |pyro| pyro.supervisor(&id).is_none());
    assert!(told.elapsed() < SIGNAL_ENDS, "{:?} of {:?}", told.elapsed(), began.elapsed());
    let status = pyro.status(&id);
    assert_eq!(status["state"], "stopped", "{status}");
    pyro.ok(&["task", "start", &id]);
    assert_eq!(text(&pyro.exec(&id, "cat /workspace/f").stdout), "kept\n", "what was written is on the disk");
    pyro.ok(&["task", "delete", &id]);
    for pyro in [&pyro, &making_a_template] {
        pyro.until("nothing has outlived its owner", |pyro| pyro.processes().is_empty());
        pyro.ok(&["reap"]);
        pyro.assert_empty();
    }
}

#[test]
fn a_slow_reader_does_not_end_a_command_and_misses_nothing() {
    let pyro = Pyro::new();
    let id = pyro.create();
    let script = "seq 1 1000000";
    let child = pyro.spawn(&["task", "exec", &id, "--timeout-seconds", "20", "--", "sh", "-c", script]);
    let ended = |pyro: &Pyro| pyro.status(&id)["last_command"]["exit_code"] == 0;
    pyro.until("the command has ended before anybody reads", ended);
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let expected: String = (1..=1_000_000).map(|number| format!("{number}\n")).collect();
    assert!(text(&output.stdout) == expected, "{} bytes of {}", output.stdout.len(), expected.len());
    pyro.ok(&["task", "delete", &id]);
}

#[test]
fn what_ends_a_command_is_told_and_only_what_runs_is_cancelled() {
    let pyro = Pyro::new();
    let id = pyro.create();
    let begin = |pyro: &Pyro| {
        let count = pyro.status(&id)["command_count"].as_u64().expect("a number");
        let child = pyro.spawn(&["task", "exec", &id, "--json", "--", "sh", "-c", "echo begun; sleep 999"]);
        pyro.until("it runs", |pyro| {
            pyro.logs(&id).get(usize::try_from(count).expect("few")).is_some_and(|e| e["stdout"] == "begun\n")
        });
        child
    };
    let running = begin(&pyro);
    let cancel = |number: &str| pyro.json(&["task", "cancel", &id, number, "--json"]);
    assert_eq!(cancel("1")["ended"], true);
    drop(running.wait_with_output());
    assert_eq!(cancel("1"), serde_json::json!({ "task_id": id, "sequence": 1, "ended": false }));
    assert_eq!(cancel("99")["code"], "not_found");
    assert_eq!(pyro.logs(&id)[0]["reason"], "command ended: it was cancelled");
    let running = begin(&pyro);
    pyro.ok(&["task", "stop", &id]);
    let result = answer(&running.wait_with_output().expect("it ends"));
    assert_eq!((&result["fault"], &result["stdout"]), (&"cancelled".into(), &"begun\n".into()), "{result}");
    assert_eq!(result["stderr"], "command ended: the task was stopped\n");
    assert_eq!(pyro.logs(&id)[1]["reason"], "command ended: the task was stopped");
    pyro.ok(&["task", "start", &id]);
    let running = begin(&pyro);
    pyro.ok(&["task", "delete", &id]);
    let result = answer(&running.wait_with_output().expect("it ends"));
    assert_eq!((&result["fault"], &result["stdout"]), (&"cancelled".into(), &"begun\n".into()), "{result}");
    assert_eq!(result["stderr"], "command ended: the task was deleted\n");
    pyro.assert_empty();
}

/// A small disk for the state of a pyro, which only root can mount; it is unmounted when dropped.
struct SmallDisk(Option<Pyro>);

impl SmallDisk {
    fn new() -> Self {
        let state = tempfile::tempdir().expect("a state directory");
        let line = ["-t", "tmpfs", "-o", "size=400m,mode=700", "tmpfs"];
        assert!(run(Command::new("mount").args(line).arg(state.path())), "mounted");
        Self(Some(Pyro::at(state)))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let Some(pyro) = &self.0 else { return };
        for pid in pyro.processes() {
            kill(pid, "KILL");
        }
        run(Command::new("umount").arg("-l").arg(pyro.state()));
    }
}

#[test]
fn a_caller_hears_of_the_end_of_its_command_while_the_disk_of_the_host_is_full() {
    if !is_root() {
        println!("skipped: only root can mount a small disk");
        return;
    }
    let disk = SmallDisk::new();
    let pyro = disk.0.as_ref().expect("there");
    let id = pyro.create();
    let script = "echo begun; sleep 2; seq 1 20000";
    let line = ["task", "exec", &id, "--timeout-seconds", "20", "--json", "--", "sh", "-c", script];
    let child = pyro.spawn(&line);
    let silent = pyro.spawn(&["task", "exec", &id, "--timeout-seconds", "20", "--json", "--", "sleep", "2"]);
    pyro.until("both run", |pyro| {
        pyro.logs(&id).len() == 2 && pyro.logs(&id).iter().any(|entry| entry["stdout"] == "begun\n")
    });
    let filler = pyro.state().join("filler");
    let mut file = fs::File::create(&filler).expect("made");
    while std::io::Write::write_all(&mut file, &[0x5a; 4096]).is_ok() {}
    let result = answer(&ended_within(child, SAYS_SO + CROWDED, "the command"));
    assert_eq!(result["fault"], "disk_full", "{result}");
    assert!(
        result["stdout"].as_str().expect("text").starts_with("begun\n"),
        "what came is passed on: {result}"
    );
    let result = answer(&ended_within(silent, SAYS_SO + CROWDED, "the silent command"));
    if result["stderr"].as_str().expect("text").contains("not on record yet") {
        // It has ended by itself, or was ended because the disk was nearly full.
        assert_eq!(result["fault"], "disk_full", "{result}");
        assert!([0, 137].contains(&result["exit_code"].as_i64().expect("a number")), "{result}");
    }
    drop(file);
    fs::remove_file(&filler).expect("removed");
    pyro.until("the ends are on record once there is room", |pyro| {
        pyro.logs(&id).iter().all(|entry| entry["status"] != "running")
    });
    pyro.ok(&["task", "delete", &id]);
}
