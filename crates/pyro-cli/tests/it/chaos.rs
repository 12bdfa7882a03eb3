//! Everything at once, for as long as `PYRO_CHAOS_SECONDS` says: eight workers make, use, stop, start and delete tasks
//! through processes of their own, while supervisors, VMMs, guests and callers are killed, the clock of callers jumps
//! and the disk fills. What must hold is looked at after every step, and at the end.
//!
//! The moments are those of the machine; what is done is that of the seed (`PYRO_CHAOS_SEED`), which is printed.

use fs_err as fs;
use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Output};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{Dice, Pyro, SmallDisk, kill, processes, start, text};

const WORKERS: u64 = 8;
const CAP: usize = 4;
const DEFAULT_SECONDS: u64 = 20;
/// A call that takes longer hangs.
const HANGS_AFTER: Duration = Duration::from_secs(200);
const DISK_MIB: u64 = 400;
const FAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1";

/// What a call may answer here; anything else is a defect.
const CODES: &[&str] = &[
    "cap_reached",
    "not_found",
    "expired",
    "wrong_state",
    "guest_unavailable",
    "host_resources",
    "host_failed",
    "outcome_unknown",
    "environment_cache",
    "disk_full",
    "command_refused",
    "cancelled",
    "lock_held",
    "supervisor_unresponsive",
];

struct Chaos {
    pyro: Pyro,
    disk: Option<SmallDisk>,
    /// Tasks that a create has told of, and what was acknowledged of their commands: number, and output so far.
    tasks: Mutex<BTreeMap<String, BTreeMap<u64, Vec<u8>>>>,
    steps: Mutex<BTreeMap<&'static str, u64>>,
    /// How often calls ended in which way, by verb and code.
    outcomes: Mutex<BTreeMap<String, u64>>,
}

#[test]
fn nothing_is_lost_or_left_whatever_is_killed() {
    let number =
        |name: &str, default| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default);
    let seconds = number("PYRO_CHAOS_SECONDS", DEFAULT_SECONDS);
    let seed = number("PYRO_CHAOS_SEED", 20_261_125);
    let chaos = Chaos::new();
    let deadline = Instant::now() + Duration::from_secs(seconds);
    std::thread::scope(|scope| {
        for worker in 0..WORKERS {
            let chaos = &chaos;
            scope.spawn(move || {
                let mut dice = Dice::new(seed * 1000 + worker);
                while Instant::now() < deadline {
                    chaos.step(&mut dice);
                    chaos.check();
                }
            });
        }
    });
    chaos.finish();
    println!("chaos: seed {seed}, {seconds} s, steps {:?}", lock(&chaos.steps));
    println!("chaos: outcomes {:?}", lock(&chaos.outcomes));
}

impl Chaos {
    fn new() -> Self {
        let state = tempfile::tempdir().expect("a state directory");
        let disk = SmallDisk::mount(state.path(), DISK_MIB);
        Self {
            pyro: Pyro::at(state),
            disk,
            tasks: Mutex::default(),
            steps: Mutex::default(),
            outcomes: Mutex::default(),
        }
    }

    fn step(&self, dice: &mut Dice) {
        let (name, deed): (&'static str, fn(&Self, &mut Dice)) = match dice.below(100) {
            0..10 => ("create", Self::create),
            10..55 => ("exec", Self::exec),
            55..61 => ("exec, caller killed", Self::exec_and_vanish),
            61..64 => ("stop", |chaos, dice| chaos.change("stop", dice)),
            64..73 => ("start", |chaos, dice| chaos.change("start", dice)),
            73..77 => ("delete", Self::delete),
            77..82 => ("look", Self::look),
            82..85 => ("change a network", Self::change_network),
            85..88 => ("kill a supervisor", |chaos, dice| chaos.kill(dice, Pyro::supervisor)),
            88..91 => ("kill a VMM", |chaos, dice| chaos.kill(dice, Pyro::vmm)),
            91..93 => ("crash a guest", Self::crash_guest),
            93..95 => ("kill a create", Self::create_and_vanish),
            95..99 => ("clock jumps", Self::jump),
            _ => ("disk fills", Self::fill_disk),
        };
        *lock(&self.steps).entry(name).or_default() += 1;
        deed(self, dice);
    }

    fn create(&self, dice: &mut Dice) {
        let network: &[&str] = if dice.chance(50) { &["--allow", "up.test"] } else { &[] };
        let line = ["task", "create", "debian:12", "--mem-mib", "256", "--json"];
        let output = self.call(&[&line[..], network].concat());
        if output.status.success() {
            let id = answer(&output)["task_id"].as_str().expect("an id").to_owned();
            lock(&self.tasks).insert(id, BTreeMap::new());
        }
    }

    /// A command whose output says which it is; what its caller gets must be in the journal.
    fn exec(&self, dice: &mut Dice) {
        let Some(id) = self.some_task(dice) else { return };
        let (lines, pause) = (dice.below(200) + 1, dice.chance(20));
        let script = format!(
            "i=0; while [ $i -lt {lines} ]; do echo {id} $i; i=$((i+1)); done; {}; {}",
            if pause { "sleep 1" } else { ":" },
            if dice.chance(20) { "getent hosts up.test late.test > /dev/null; true" } else { ":" }
        );
        let output =
            self.call(&["task", "exec", &id, "--timeout-seconds", "20", "--json", "--", "sh", "-c", &script]);
        let result = answer(&output);
        let Some(sequence) = result["sequence"].as_u64() else { return };
        let acknowledged = result["stdout"].as_str().expect("text").as_bytes().to_vec();
        if result["fault"].is_null() && result["exit_code"] == 0 {
            let expected: String = (0..lines).map(|i| format!("{id} {i}\n")).collect();
            assert_eq!(text(&acknowledged), expected, "a command that ended well has all its output");
        }
        self.acknowledge(&id, sequence, acknowledged);
    }

    /// A caller that is killed in the middle has got what it has got.
    fn exec_and_vanish(&self, dice: &mut Dice) {
        let Some(id) = self.some_task(dice) else { return };
        let mut child = self.pyro.spawn(&[
            "task",
            "exec",
            &id,
            "--timeout-seconds",
            "5",
            "--",
            "sh",
            "-c",
            "while :; do echo $$; done",
        ]);
        std::thread::sleep(Duration::from_millis(dice.below(800)));
        child.kill().expect("killed");
        let mut rest = Vec::new();
        child.stdout.take().expect("piped").read_to_end(&mut rest).expect("read");
        child.wait().expect("reaped");
    }

    fn change(&self, verb: &str, dice: &mut Dice) {
        let Some(id) = self.some_task(dice) else { return };
        self.call(&["task", verb, &id, "--json"]);
    }

    /// Another policy for whatever task; one without a network says so.
    fn change_network(&self, dice: &mut Dice) {
        let Some(id) = self.some_task(dice) else { return };
        let change: &[&str] = match dice.below(4) {
            0 => &["--allow", "late.test"],
            1 => &["--deny", "late.test"],
            2 => &["--open"],
            _ => &["--closed"],
        };
        self.call(&[&["task", "network", &id, "--json"][..], change].concat());
    }

    fn delete(&self, dice: &mut Dice) {
        let Some(id) = self.some_task(dice) else { return };
        // From here on, nobody expects anything of it.
        lock(&self.tasks).remove(&id);
        let output = self.call(&["task", "delete", &id, "--json"]);
        if !output.status.success() {
            let code = answer(&output)["code"].as_str().unwrap_or_default().to_owned();
            if code != "not_found" {
                lock(&self.tasks).insert(id, BTreeMap::new());
            }
        }
    }

    fn look(&self, dice: &mut Dice) {
        let Some(id) = self.some_task(dice) else { return };
        match dice.below(4) {
            0 => self.call(&["task", "status", &id, "--json"]),
            1 => self.call(&["task", "logs", &id, "--limit", "5", "--json"]),
            2 => self.call(&["task", "list", "--json"]),
            _ => self.call(&["reap", "--json"]),
        };
    }

    fn kill(&self, dice: &mut Dice, whose: impl Fn(&Pyro, &str) -> Option<i32>) {
        let Some(id) = self.some_task(dice) else { return };
        if let Some(pid) = whose(&self.pyro, &id) {
            kill(pid, "KILL");
            // The next command of any process puts in order what is left.
            self.call(&["task", "status", &id, "--json"]);
        }
    }

    fn crash_guest(&self, dice: &mut Dice) {
        let Some(id) = self.some_task(dice) else { return };
        let script = "echo c > /proc/sysrq-trigger; sleep 5";
        self.call(&["task", "exec", &id, "--timeout-seconds", "5", "--json", "--", "sh", "-c", script]);
    }

    fn create_and_vanish(&self, dice: &mut Dice) {
        let mut child = self.pyro.spawn(&["task", "create", "debian:12", "--mem-mib", "256", "--id-only"]);
        std::thread::sleep(Duration::from_millis(dice.below(2500)));
        child.kill().expect("killed");
        let output = child.wait_with_output().expect("reaped");
        // It may have been done by then.
        let told = text(&output.stdout).trim().to_owned();
        if !told.is_empty() {
            lock(&self.tasks).insert(told, BTreeMap::new());
        }
    }

    /// A caller whose clock is days off: nothing may expire, nothing may be taken for old.
    fn jump(&self, dice: &mut Dice) {
        if !Path::new(FAKETIME).exists() {
            return;
        }
        let offset = if dice.chance(50) { "+3d" } else { "-3d" };
        let mut command = self.pyro.command(&["task", "list", "--json"]);
        command.env("LD_PRELOAD", FAKETIME).env("FAKETIME", offset).env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        let output = self.await_end(start(&mut command), "a list with another clock");
        assert!(
            output.status.success() || CODES.contains(&answer(&output)["code"].as_str().unwrap_or_default()),
            "{output:?}"
        );
    }

    fn fill_disk(&self, dice: &mut Dice) {
        if self.disk.is_none() {
            return;
        }
        let filler = self.pyro.state().join(format!("filler-{}", dice.below(1 << 30)));
        let mut file = fs::File::create(&filler).expect("created");
        let piece = vec![1; 1 << 20];
        while std::io::Write::write_all(&mut file, &piece).is_ok() {}
        for _ in 0..3 {
            self.exec(dice);
        }
        fs::remove_file(&filler).expect("removed");
    }

    fn some_task(&self, dice: &mut Dice) -> Option<String> {
        let tasks = lock(&self.tasks);
        let count = u64::try_from(tasks.len()).expect("few");
        (count > 0).then(|| {
            tasks.keys().nth(usize::try_from(dice.below(count)).expect("few")).expect("there").clone()
        })
    }

    fn acknowledge(&self, id: &str, sequence: u64, output: Vec<u8>) {
        if let Some(commands) = lock(&self.tasks).get_mut(id) {
            let before = commands.insert(sequence, output);
            assert!(before.is_none(), "task {id} gave the number {sequence} twice");
        }
    }

    fn call(&self, line: &[&str]) -> Output {
        let mut command = self.pyro.command(line);
        command.env("PYRO_MAX_ACTIVE_VMS", CAP.to_string());
        let output = self.await_end(start(&mut command), &line.join(" "));
        assert!(!text(&output.stderr).contains("panicked"), "{line:?}: {output:?}");
        let answer = answer(&output);
        let way = answer["code"].as_str().or_else(|| answer["fault"].as_str()).unwrap_or("done");
        let verb =
            line.iter().take(2).filter(|word| !word.starts_with("--")).copied().collect::<Vec<_>>().join(" ");
        *lock(&self.outcomes).entry(format!("{verb}: {way}")).or_default() += 1;
        if answer["ok"] == false {
            let code = answer["code"].as_str().unwrap_or_default();
            assert!(CODES.contains(&code), "{line:?}: {answer}");
        }
        output
    }

    fn await_end(&self, child: Child, what: &str) -> Output {
        let pid = i32::try_from(child.id()).expect("small");
        let (done, ended) = std::sync::mpsc::channel();
        let what = what.to_owned();
        let watchdog = std::thread::spawn(move || {
            if ended.recv_timeout(HANGS_AFTER) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                kill(pid, "ABRT");
                return Some(what);
            }
            None
        });
        let output = child.wait_with_output().expect("it ends");
        // Where the watchdog has barked, nobody hears this.
        _ = done.send(());
        let hung = watchdog.join().expect("no panic");
        assert_eq!(hung, None, "hangs");
        output
    }

    /// What holds at every moment.
    fn check(&self) {
        let supervisors = processes(|_, words| words.get(1).is_some_and(|verb| verb == "supervise"));
        let state = self.pyro.state().to_string_lossy().into_owned();
        let owned = processes(|name, _| name.starts_with("qemu-system")).into_iter().filter(|vmm| {
            let cwd = fs::read_link(format!("/proc/{vmm}/cwd")).unwrap_or_default();
            cwd.starts_with(&state) && parent(*vmm).is_some_and(|parent| supervisors.contains(&parent))
        });
        let live = owned.count();
        assert!(live <= CAP, "{live} machines at the same time, where {CAP} may be");
        let tasks = lock(&self.tasks).clone();
        for (id, commands) in tasks {
            let journal = self.pyro.state().join("tasks").join(&id).join("commands");
            for (sequence, acknowledged) in commands {
                let Ok(kept) = fs::read(journal.join(format!("{sequence:06}.stdout"))) else {
                    // Deleted since this look began.
                    let forgotten = !lock(&self.tasks).contains_key(&id);
                    assert!(forgotten, "task {id} has lost its command {sequence}");
                    break;
                };
                assert!(kept.starts_with(&acknowledged), "task {id} has lost output of command {sequence}");
            }
        }
    }

    /// What holds when nothing happens any more.
    fn finish(&self) {
        let ids: Vec<String> = lock(&self.tasks).keys().cloned().collect();
        for id in &ids {
            let logs = answer(&self.call(&["task", "logs", id, "--json"]));
            let entries = logs["entries"].as_array().unwrap_or_else(|| panic!("{logs}"));
            let numbers: Vec<u64> =
                entries.iter().map(|entry| entry["sequence"].as_u64().expect("a number")).collect();
            let expected: Vec<u64> = (1..=u64::try_from(numbers.len()).expect("few")).collect();
            assert_eq!(numbers, expected, "task {id}");
        }
        self.check();
        let list = answer(&self.call(&["task", "list", "--json"]));
        assert_eq!(list["problems"], serde_json::json!([]), "{list}");
        // Also those of creates that were killed after they were done.
        for task in list["tasks"].as_array().expect("a list") {
            self.call(&["task", "delete", task["task_id"].as_str().expect("an id"), "--json"]);
        }
        self.pyro.until("all processes are gone", |pyro| pyro.processes().is_empty());
        self.call(&["reap", "--json"]);
        self.pyro.assert_empty();
        let doctor = answer(&self.call(&["doctor", "--json"]));
        assert_eq!(
            (&doctor["state"]["live_vms"], &doctor["state"]["tasks"]),
            (&0.into(), &0.into()),
            "{doctor}"
        );
        let known = ["vms", "tasks", "trash", "quarantine", "host.json", "repair.lock", "told-emulation"];
        for entry in fs::read_dir(self.pyro.state()).expect("there").flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            // The library for older QEMUs is made once, as the file of what is known of the host is.
            let starts = ["registry.db", "qemu-open-"];
            let is_known =
                known.contains(&name.as_str()) || starts.iter().any(|start| name.starts_with(start));
            assert!(is_known, "{name} has no owner");
        }
    }
}

impl Drop for Chaos {
    fn drop(&mut self) {
        if self.disk.is_some() {
            for pid in self.pyro.processes() {
                kill(pid, "KILL");
            }
        }
    }
}

fn parent(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.split(' ').nth(1)?.parse().ok()
}

fn answer(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or(Value::Null)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
