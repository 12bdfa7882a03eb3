//! Instant start: machines that go on from a template, and what must not be the same in two of them.

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fs_err as fs;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::support::{Dice, Pyro, is_root, kill, run, text};

/// What is wrong with a template, and how it comes to be.
type Damage = (&'static str, fn(&Path));

const SIZE: [&str; 2] = ["--mem-mib", "512"];

fn run_json(pyro: &Pyro, flags: &[&str], command: &[&str]) -> Value {
    pyro.json(&[&["run", "debian:12", "--json"], &SIZE[..], flags, &["--"], command].concat())
}

/// The directories of all templates of a cache.
fn templates(cache: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(cache.join("templates")).expect("there");
    entries.map(|entry| entry.expect("readable").path()).collect()
}

fn with_cache() -> (tempfile::TempDir, PathBuf, Pyro) {
    // Beside the environments, so that their files can be linked.
    let root = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let cache = root.path().join("cache");
    let pyro = Pyro::with_cache(&cache);
    (root, cache, pyro)
}

#[test]
fn machines_are_restored_unless_they_shall_boot() {
    let pyro = Pyro::new();
    let restored = run_json(&pyro, &[], &["git", "--version"]);
    assert_eq!(
        (&restored["start_mode"], &restored["exit_code"]),
        (&"restored".into(), &0.into()),
        "{restored}"
    );
    let cold = run_json(&pyro, &["--cold"], &["true"]);
    assert_eq!(cold["start_mode"], "cold", "{cold}");
    let id = pyro.create();
    assert_eq!(pyro.status(&id)["start_mode"], "restored");
    let result = pyro.json(&["task", "exec", &id, "--json", "--", "true"]);
    assert_eq!(result["start_mode"], "restored");
    // A disk that has been used cannot go on from a template.
    pyro.exec(&id, "echo kept > file; sync");
    pyro.ok(&["task", "stop", &id]);
    let again = pyro.json(&["task", "start", &id, "--json"]);
    assert_eq!(again["start_mode"], "cold", "{again}");
    assert_eq!(text(&pyro.exec(&id, "cat file").stdout), "kept\n");
    let booted = pyro.json(&["task", "create", "debian:12", "--mem-mib", "512", "--cold", "--json"]);
    assert_eq!(booted["start_mode"], "cold", "{booted}");
    for id in [id.as_str(), booted["task_id"].as_str().expect("an id")] {
        pyro.ok(&["task", "delete", id]);
    }
}

/// What the guests of 16 tasks that were made at once tell of themselves.
#[test]
fn sixteen_clones_share_nothing_that_must_be_ones_own() {
    const CLONES: usize = 16;
    const QUESTIONS: [&str; 7] = [
        "head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n'",
        "cat /etc/machine-id",
        "cat /proc/sys/kernel/random/boot_id",
        "cat /proc/sys/kernel/hostname",
        "cat /proc/sys/kernel/random/uuid",
        "mktemp -u",
        "sed -n 's/^127.0.1.1 //p' /etc/hosts",
    ];
    let pyro = Pyro::new();
    // The template is made before they come.
    run_json(&pyro, &[], &["true"]);
    let ids: Vec<String> = std::thread::scope(|scope| {
        let create = || {
            let mut command = pyro.command(&["task", "create", "debian:12", "--mem-mib", "512", "--json"]);
            command.env("PYRO_MAX_ACTIVE_VMS", CLONES.to_string()).env("PYRO_MEMORY_OVERCOMMIT", "9");
            let child = crate::support::start(&mut command);
            let output = child.wait_with_output().expect("it ends");
            let record = crate::support::parse(&output);
            assert_eq!(record["start_mode"], "restored", "{record}");
            record["task_id"].as_str().expect("an id").to_owned()
        };
        let threads: Vec<_> = (0..CLONES).map(|_| scope.spawn(create)).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    let mut answers: Vec<BTreeSet<String>> = vec![BTreeSet::new(); QUESTIONS.len()];
    for id in &ids {
        let told =
            text(&pyro.exec(id, &QUESTIONS.map(|question| format!("{question}; echo")).join("; ")).stdout);
        let told: Vec<&str> = told.lines().filter(|line| !line.is_empty()).collect();
        assert_eq!(told.len(), QUESTIONS.len(), "{told:?}");
        assert!(
            told[3] == format!("pyro-{id}") && told[6] == told[3],
            "it knows its own name alone: {told:?}"
        );
        for (answer, told) in answers.iter_mut().zip(told) {
            answer.insert(told.to_owned());
        }
        let skew = clock_skew(&pyro, id);
        assert!(skew < 0.050, "the clock of {id} is {skew} s off");
        // Nothing of a user's runs in a template.
        let processes = text(&pyro.exec(id, "cat /proc/[0-9]*/comm | sort | uniq -c | sort -rn").stdout);
        for left in ["git", "python3", "bash", "sleep"] {
            assert!(!processes.contains(left), "{processes}");
        }
    }
    for (question, answer) in QUESTIONS.iter().zip(&answers) {
        assert_eq!(answer.len(), CLONES, "{question}: {answer:?}");
    }
    for id in &ids {
        pyro.ok(&["task", "delete", id]);
    }
    pyro.assert_empty();
}

/// How far a guest's clock is from the host's, at least: what the time of the question and answer does not explain.
fn clock_skew(pyro: &Pyro, id: &str) -> f64 {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs_f64();
    let skews = (0..3).map(|_| {
        let before = now();
        let told = text(&pyro.exec(id, "date +%s.%N").stdout);
        let after = now();
        let guest: f64 = told.trim().parse().unwrap_or_else(|_| panic!("no time: {told}"));
        (before - guest).max(guest - after).max(0.0)
    });
    skews.fold(0.0, f64::max)
}

#[test]
fn whatever_is_wrong_with_a_template_the_run_works_and_the_template_is_replaced() {
    let (_root, cache, pyro) = with_cache();
    let check = |what: &str, mode: &str| {
        let result = run_json(&pyro, &[], &["echo", "well"]);
        assert_eq!(
            (&result["stdout"], &result["start_mode"]),
            (&"well\n".into(), &mode.into()),
            "{what}: {result}"
        );
    };
    check("none yet", "restored");
    let first = templates(&cache);
    assert_eq!(first.len(), 1);
    let damages: [Damage; 6] = [
        ("a memory cut short", |dir| file(dir, "memory").set_len(1 << 20).expect("cut")),
        ("flipped bits in the memory", |dir| flip(dir, "memory")),
        ("flipped bits in the state", |dir| flip(dir, "state")),
        ("a manifest of another version", |dir| {
            fs::write(dir.join("manifest.json"), "{\"format_version\": 7}").expect("written");
        }),
        ("files that are gone", |dir| fs::remove_file(dir.join("overlay.ext4")).expect("removed")),
        ("a template that is gone", |dir| fs::remove_dir_all(dir).expect("removed")),
    ];
    for (what, damage) in damages {
        damage(&templates(&cache)[0]);
        check(what, "restored");
        let inspection = pyro.json(&["env", "inspect", "debian:12"]);
        assert_eq!(inspection["templates"][0]["verified"], true, "{what}: {inspection}");
    }
    // Damage that only the VMM can see: the record fits the bytes.
    let directory = templates(&cache)[0].clone();
    fs::write(directory.join("state"), "no state of any machine").expect("written");
    let manifest = fs::read_to_string(directory.join("manifest.json")).expect("readable");
    let mut manifest: Value = serde_json::from_str(&manifest).expect("an object");
    let digest: String =
        Sha256::digest(b"no state of any machine").iter().map(|byte| format!("{byte:02x}")).collect();
    manifest["files"]["state"]["sha256"] = digest.into();
    fs::write(directory.join("manifest.json"), manifest.to_string()).expect("written");
    let output = pyro.run(&[&["run", "debian:12"], &SIZE[..], &["--", "echo", "well"]].concat());
    let words = text(&output.stderr);
    assert_eq!(text(&output.stdout), "well\n", "{words}");
    assert!(
        words.contains("warning: the template could not be restored") && words.contains("start_mode=cold"),
        "{words}"
    );
    check("after it was taken out of use", "restored");
    pyro.assert_empty();
}

fn file(dir: &Path, name: &str) -> std::fs::File {
    std::fs::File::options().read(true).write(true).open(dir.join(name)).expect("there")
}

fn flip(dir: &Path, name: &str) {
    let file = file(dir, name);
    let mut bytes = [0; 4096];
    file.read_exact_at(&mut bytes, 8192).expect("read");
    file.write_all_at(&bytes.map(|byte| !byte), 8192).expect("written");
}

#[test]
fn a_template_that_goes_while_it_is_in_use_takes_nobody_with_it() {
    let (_root, cache, pyro) = with_cache();
    let id = pyro.create();
    assert_eq!(pyro.status(&id)["start_mode"], "restored");
    for directory in templates(&cache) {
        fs::remove_dir_all(directory).expect("removed");
    }
    assert!(text(&pyro.exec(&id, "git --version && ls /usr/bin | wc -l").stdout).starts_with("git version"));
    let other = pyro.create();
    assert_eq!(pyro.status(&other)["start_mode"], "restored");
    pyro.ok(&["env", "prune"]);
    assert_eq!(templates(&cache).len(), 1, "its environment is in use");
    for id in [&id, &other] {
        pyro.ok(&["task", "delete", id]);
    }
}

#[test]
fn makers_that_are_killed_leave_nothing_and_stop_nobody() {
    let (_root, cache, pyro) = with_cache();
    let mut dice = Dice::new(11);
    for _ in 0..8 {
        for directory in templates(&cache) {
            fs::remove_dir_all(directory).expect("removed");
        }
        let mut child = pyro.spawn(&["env", "pull", "debian:12", "--prepare", "--mem-mib", "512"]);
        std::thread::sleep(Duration::from_millis(300 + dice.below(4000)));
        kill(i32::try_from(child.id()).expect("small"), "KILL");
        child.wait().expect("reaped");
        let result = run_json(&pyro, &[], &["echo", "well"]);
        assert_eq!(result["stdout"], "well\n", "{result}");
        pyro.until("the VMM of the dead is gone", |pyro| pyro.processes().is_empty());
        pyro.ok(&["reap"]);
        pyro.assert_empty();
        assert_eq!(fs::read_dir(cache.join("staging")).expect("there").count(), 0);
    }
}

#[test]
fn a_disk_that_is_full_costs_the_template_and_not_the_run() {
    const TEST: &str = "a_disk_that_is_full_costs_the_template_and_not_the_run";
    let (_root, cache, pyro) = with_cache();
    let place = cache.join("staging");
    let mounted = is_root()
        && run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=8m,mode=0700", "tmpfs"]).arg(&place));
    if !mounted {
        println!("skipped: {TEST}: a file system can be mounted by root only");
        return;
    }
    let output = pyro.run(&[&["run", "debian:12"], &SIZE[..], &["--", "echo", "well"]].concat());
    let left = fs::read_dir(&place).expect("there").count();
    assert!(run(Command::new("umount").arg("-l").arg(&place)));
    let words = text(&output.stderr);
    assert_eq!(text(&output.stdout), "well\n", "{words}");
    assert!(
        words.contains("warning: no template could be made") && words.contains("start_mode=cold"),
        "{words}"
    );
    assert_eq!((left, templates(&cache).len()), (0, 0), "{words}");
    pyro.assert_empty();
}

#[test]
fn a_template_can_be_made_beforehand_is_shown_and_can_be_switched_off() {
    let (_root, cache, pyro) = with_cache();
    let pulled = pyro.json(&["env", "pull", "debian:12", "--prepare", "--mem-mib", "512", "--json"]);
    assert_eq!(pulled["templates"][0]["made"], true, "{pulled}");
    let again = pyro.json(&["env", "pull", "debian:12", "--prepare", "--mem-mib", "512", "--json"]);
    assert_eq!(again["templates"][0]["made"], false, "{again}");
    let inspection = pyro.json(&["env", "inspect", "debian:12"]);
    assert_eq!(inspection["templates"][0]["id"], pulled["templates"][0]["id"], "{inspection}");
    assert_eq!(inspection["templates"][0]["mem_mib"], 512);
    let mut off = pyro.command(&["run", "debian:12", "--mem-mib", "512", "--json", "--", "true"]);
    let output =
        crate::support::start(off.env("PYRO_TEMPLATE_LIMIT_MIB", "0")).wait_with_output().expect("ends");
    assert_eq!(crate::support::parse(&output)["start_mode"], "cold");
    let mut bad = pyro.command(&["run", "debian:12", "--", "true"]);
    let output =
        crate::support::start(bad.env("PYRO_TEMPLATE_LIMIT_MIB", "much")).wait_with_output().expect("ends");
    assert!(text(&output.stderr).contains("PYRO_TEMPLATE_LIMIT_MIB must be a whole number, not 'much'"));
    pyro.ok(&["env", "prune"]);
    assert_eq!(templates(&cache).len(), 0);
}
