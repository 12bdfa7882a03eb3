//! Commands and those who run them: output, input, and who they are run as.

use std::io::{Read, Write};
use std::process::{Child, Output, Stdio};
use std::time::Duration;

use fs_err as fs;
use serde_json::{Value, json};

use crate::support::{Pyro, kill, start, text};

/// Two processes that never rest, so that everything in the guest takes its time.
fn keep_busy(pyro: &Pyro, id: &str) {
    for _ in 0..2 {
        pyro.ok(&["task", "exec", id, "--detach", "--timeout-seconds", "500", "--", "while :; do :; done"]);
    }
}

fn with_stdin(pyro: &Pyro, line: &[&str]) -> Child {
    start(pyro.command(line).stdin(Stdio::piped()))
}

/// The end of a command that is given this input.
fn fed(pyro: &Pyro, line: &[&str], input: &[u8]) -> Output {
    let mut child = with_stdin(pyro, line);
    // Where it reads nothing, it may be gone.
    drop(child.stdin.take().expect("a pipe").write_all(input));
    child.wait_with_output().expect("it ends")
}

fn process(child: &Child) -> i32 {
    i32::try_from(child.id()).expect("small")
}

#[test]
fn a_slow_reader_neither_slows_a_command_nor_ends_it() {
    const LIMIT: u64 = 12;
    let pyro = Pyro::new();
    let id = pyro.create();
    let seconds = LIMIT.to_string();
    let script = "seq 1 2000000";
    let lines: [&[&str]; 2] = [
        &["task", "exec", &id, "--timeout-seconds", &seconds, "--", script],
        &["run", "debian:12", "--mem-mib", "512", "--timeout-seconds", &seconds, "--", script],
    ];
    let children: Vec<_> = lines.iter().map(|line| pyro.spawn(line)).collect();
    // Longer than each may take, and far more than pipes hold.
    std::thread::sleep(Duration::from_secs(LIMIT + 2));
    let state = &pyro.logs(&id)[0];
    assert_eq!((&state["status"], &state["exit_code"]), (&"finished".into(), &0.into()), "{state}");
    for (child, line) in children.into_iter().zip(lines) {
        let output = child.wait_with_output().expect("it ends");
        let whole = text(&output.stdout);
        assert!(output.status.success(), "{line:?}: {}", text(&output.stderr));
        assert_eq!(
            (whole.lines().count(), whole.lines().next_back()),
            (2_000_000, Some("2000000")),
            "{line:?}"
        );
    }
    pyro.ok(&["task", "delete", &id]);
    pyro.assert_empty();
}

#[test]
fn a_caller_that_dies_is_no_end_of_the_input() {
    let pyro = Pyro::new();
    let id = pyro.create();
    let mut child = with_stdin(&pyro, &["task", "exec", &id, "--", "sh", "-c", "cat > in; echo committed"]);
    child.stdin.as_mut().expect("a pipe").write_all(b"first half").expect("written");
    pyro.until("it is the first", |pyro| pyro.status(&id)["command_count"] == 1);
    pyro.until("it has come", |pyro| text(&pyro.exec(&id, "cat in").stdout) == "first half");
    kill(process(&child), "KILL");
    child.wait().expect("it is gone");
    pyro.until("the command has ended", |pyro| pyro.logs(&id)[0]["status"] != "running");
    let entry = &pyro.logs(&id)[0];
    assert_eq!((&entry["status"], &entry["fault"]), (&"interrupted".into(), &"cancelled".into()), "{entry}");
    assert!(entry["reason"].as_str().is_some_and(|reason| reason.contains("stdin_broken")), "{entry}");
    assert_eq!(entry["stdout"], "", "{entry}");
    // An end is one.
    let whole =
        fed(&pyro, &["task", "exec", &id, "--", "sh", "-c", "cat > in; echo committed"], b"all of it");
    assert_eq!(text(&whole.stdout), "committed\n");
    pyro.ok(&["task", "delete", &id]);
    pyro.assert_empty();
}

#[test]
fn what_the_last_children_of_a_command_write_is_its_output() {
    let pyro = Pyro::new();
    let id = pyro.create();
    keep_busy(&pyro, &id);
    let exec = |words: &[&str]| {
        pyro.json(&[&["task", "exec", &id, "--json", "--timeout-seconds", "60", "--"], words].concat())
    };
    let times: usize = std::env::var("PYRO_TEST_TIMES").map_or(20, |times| times.parse().expect("a number"));
    for at in 0..times {
        let result = exec(&["bash", "-c", "exec > >(cat); echo x"]);
        assert_eq!(
            (&result["stdout"], &result["output_open"]),
            (&"x\n".into(), &false.into()),
            "{at}: {result}"
        );
    }
    // F_SETPIPE_SZ: a pipe may hold more than one is made with.
    let enlarged = "fcntl(STDOUT, 1031, 1 << 20) or die $!; print 'x' x (1 << 20)";
    let result = exec(&["perl", "-e", enlarged]);
    assert_eq!(result["stdout_bytes"], 1 << 20, "{}", result["stderr"]);
    pyro.ok(&["task", "delete", &id]);
    pyro.assert_empty();
}

#[test]
fn what_is_written_after_a_command_goes_on_into_its_journal() {
    let pyro = Pyro::new();
    let id = pyro.create();
    let script = "(sleep 4; echo later; echo worse >&2) & echo now";
    let result = pyro.json(&["task", "exec", &id, "--json", "--", "sh", "-c", script]);
    assert_eq!(
        (&result["stdout"], &result["exit_code"], &result["output_open"]),
        (&"now\n".into(), &0.into(), &true.into()),
        "{result}"
    );
    pyro.until("more has come", |pyro| {
        let entry = &pyro.logs(&id)[0];
        entry["stdout"] == "now\nlater\n" && entry["stderr"] == "worse\n"
    });
    let entry = &pyro.logs(&id)[0];
    assert_eq!((&entry["status"], &entry["output_open"]), (&"finished".into(), &true.into()), "{entry}");
    // One that has written nothing shares its file with others.
    for name in ["commands/000001.stderr", "commands/000002.stderr"] {
        assert!(pyro.exec(&id, "true").status.success());
        assert_eq!(
            fs::read_to_string(pyro.task_file(&id, name)).expect("there").is_empty(),
            name.contains('2')
        );
    }
    // One that is redirected is waited for by nobody.
    let result = pyro.json(&["task", "exec", &id, "--json", "--", "sleep 99 > /dev/null 2>&1 & echo now"]);
    assert_eq!(result["output_open"], false, "{result}");
    // A process that writes for ever holds neither the command nor the machine up.
    let result = pyro.json(&["task", "exec", &id, "--json", "--", "yes & echo now"]);
    assert_eq!((&result["exit_code"], &result["output_open"]), (&0.into(), &true.into()));
    assert_eq!(text(&pyro.exec(&id, "echo alive").stdout), "alive\n");
    pyro.ok(&["task", "delete", &id]);
    pyro.assert_empty();
}

#[test]
fn a_command_that_nobody_waits_for_gets_its_input_whole_and_one_that_wants_none_has_none() {
    let pyro = Pyro::new();
    let id = pyro.create();
    let input: Vec<u8> = (0..500_000_u32).flat_map(u32::to_le_bytes).collect();
    let line = ["task", "exec", &id, "--detach", "--", "sh", "-c", "sleep 1; md5sum; echo end"];
    let detached = fed(&pyro, &line, &input);
    assert_eq!(text(&detached.stdout), "1\n", "{detached:?}");
    let attached = text(&pyro.run(&["task", "attach", &id, "1"]).stdout);
    let expected = fed_here("md5sum", &input);
    assert_eq!(attached, format!("{expected}end\n"));
    // Half of it begins nothing.
    let mut child = with_stdin(&pyro, &line);
    child.stdin.as_mut().expect("a pipe").write_all(&input).expect("written");
    kill(process(&child), "KILL");
    child.wait().expect("it is gone");
    // A loop that reads lines keeps them.
    for flag in ["-n", "--no-stdin"] {
        let output = fed(&pyro, &["task", "exec", &id, flag, "--", "sh", "-c", "cat; echo end"], b"line\n");
        assert_eq!(text(&output.stdout), "end\n");
        let output = fed(&pyro, &["run", "debian:12", "--mem-mib", "512", flag, "--", "cat"], b"line\n");
        assert_eq!(text(&output.stdout), "");
    }
    assert_eq!(pyro.logs(&id).len(), 3, "the command whose input broke off was not begun");
    // What is longer than may be kept is refused before it is begun.
    let mut child = with_stdin(&pyro, &["task", "exec", &id, "--detach", "--", "cat"]);
    let mut stdin = child.stdin.take().expect("a pipe");
    let mib = vec![b'x'; 1 << 20];
    while stdin.write_all(&mib).is_ok() {}
    let refused = child.wait_with_output().expect("it ends");
    assert!(text(&refused.stderr).contains("is longer than 64 MiB"), "{refused:?}");
    pyro.ok(&["task", "delete", &id]);
    pyro.assert_empty();
}

/// What a program of this host says to this input.
fn fed_here(program: &str, input: &[u8]) -> String {
    let mut child = start(std::process::Command::new(program).stdin(Stdio::piped()).stdout(Stdio::piped()));
    child.stdin.take().expect("a pipe").write_all(input).expect("written");
    let mut said = String::new();
    child.stdout.take().expect("a pipe").read_to_string(&mut said).expect("read");
    child.wait().expect("it ends");
    said
}

#[test]
fn a_follower_of_a_task_sees_all_commands_as_they_run() {
    let pyro = Pyro::new();
    let id = pyro.create();
    let mut follower = pyro.spawn(&["task", "logs", &id, "--follow"]);
    let wait = "echo first; until [ -e go ]; do sleep 0.1; done; echo last";
    pyro.ok(&["task", "exec", &id, "--detach", "--timeout-seconds", "100", "--", "sh", "-c", wait]);
    // What a reader of the journal sees, a follower has been told of or is being told.
    pyro.until("the first has begun", |pyro| pyro.logs(&id)[0]["stdout"] == "first\n");
    assert!(pyro.exec(&id, "echo second").status.success());
    assert!(pyro.exec(&id, "touch go").status.success());
    pyro.ok(&["task", "attach", &id, "1"]);
    pyro.ok(&["task", "stop", &id]);
    assert!(follower.wait().expect("it ends").success());
    let mut shown = String::new();
    follower.stdout.take().expect("a pipe").read_to_string(&mut shown).expect("read");
    let at = |what: &str| shown.find(what).unwrap_or_else(|| panic!("no '{what}' in:\n{shown}"));
    let order = [
        at("#1 running cwd=/workspace\n$ sh -c 'echo first;"),
        at("\nfirst\n"),
        at("#2 running"),
        at("\nsecond\n"),
        at("#2 exit_code=0"),
        at("#1 goes on\nlast\n"),
        at("#1 exit_code=0"),
    ];
    assert!(order.is_sorted(), "{order:?} in:\n{shown}");
    pyro.ok(&["task", "delete", &id]);
    pyro.assert_empty();
}

#[test]
fn a_command_has_variables_a_user_and_a_directory_of_its_own() {
    let pyro = Pyro::new();
    let id = pyro.create();
    let exec =
        |flags: &[&str], words: &[&str]| pyro.run(&[&["task", "exec", &id], flags, &["--"], words].concat());
    let said = |flags: &[&str], script: &str| text(&exec(flags, &["sh", "-c", script]).stdout);
    assert_eq!(said(&["-e", "A=b", "--env", "C=d =e", "-e", "LANG=x"], "echo \"$A|$C|$LANG\""), "b|d =e|x\n");
    assert_eq!(said(&["--cwd", "/tmp"], "pwd"), "/tmp\n");
    assert_eq!(said(&[], "id -u; echo $HOME"), "0\n/root\n");
    // What a pipe's name leads to belongs to the user as well.
    let script =
        "id -u; id -g; echo $HOME $USER; echo x > /dev/stdout; echo y > /dev/stderr; ! touch /root/x 2>&-";
    let nobody = exec(&["--user", "nobody"], &["sh", "-c", script]);
    assert_eq!(text(&nobody.stdout), "65534\n65534\n/nonexistent nobody\nx\n", "{nobody:?}");
    assert!(nobody.status.success(), "{nobody:?}");
    assert_eq!(said(&["--user", "1234:games"], "id -u; id -gn; id -G; grep Eff /proc/self/status"), {
        "1234\ngames\n60\nCapEff:\t0000000000000000\n"
    });
    let fails = |flags: &[&str]| {
        let output = exec(flags, &["true"]);
        (output.status.code(), text(&output.stderr).lines().next().unwrap_or_default().to_owned())
    };
    assert_eq!(fails(&["--user", "nosuch"]), (Some(126), "no such user: nosuch".to_owned()));
    assert_eq!(fails(&["--user", "nobody:nosuch"]), (Some(126), "no such group: nosuch".to_owned()));
    assert_eq!(fails(&["-e", "A"]), (Some(125), "error: env: 'A' is no variable".to_owned()));
    assert_eq!(fails(&["-e", "=A"]), (Some(125), "error: env: '' is no name of a variable".to_owned()));
    assert_eq!(fails(&["--cwd", "tmp"]), (Some(125), "error: cwd must be an absolute path".to_owned()));

    let line = ["task", "exec", &id, "--user", "nobody", "--json", "--", "printf", "%s|", "a b", ""];
    let result: Value = pyro.json(&line);
    assert_eq!(result["argv"], json!(["printf", "%s|", "a b", ""]));
    assert_eq!(result["command"], "printf '%s|' 'a b' ''");
    let entry = pyro.logs(&id).pop().expect("an entry");
    for (key, value) in
        [("argv", &result["argv"]), ("command", &result["command"]), ("user", &"nobody".into())]
    {
        assert_eq!(&entry[key], value, "{entry}");
    }
    // The same in a machine that is gone afterwards.
    let line =
        ["run", "debian:12", "--mem-mib", "512", "-e", "A=b", "--user", "games", "--cwd", "/usr", "--json"];
    let result = pyro.json(&[&line[..], &["--", "echo $A; id -un; pwd"]].concat());
    assert_eq!((&result["stdout"], &result["argv"]), (&"b\ngames\n/usr\n".into(), &Value::Null), "{result}");
    pyro.ok(&["task", "delete", &id]);
    pyro.assert_empty();
}
