//! Hosts that are not as a developer's own: signals that a caller ignores, paths that only a shell would understand, limits,
//! users that the system does not know, clocks that are set.

use fs_err as fs;
use std::process::Command;

use crate::support::{Pyro, is_root, parse, run, start, text};

fn pyro_program() -> &'static std::path::Path {
    std::path::Path::new(env!("CARGO_BIN_EXE_pyro"))
}

#[test]
fn a_caller_that_ignores_sigchld_can_create_exec_and_run() {
    let pyro = Pyro::behind(&["sh", "-c", "trap '' CHLD; exec \"$@\"", "sh"]);
    let id = pyro.create();
    assert_eq!(text(&pyro.exec(&id, "(exit 3); echo $?").stdout), "3\n");
    pyro.ok(&["task", "delete", &id]);
    assert_eq!(pyro.run(&["run", "debian:12", "--", "sh", "-c", "exit 7"]).status.code(), Some(7));
    pyro.assert_empty();
}

#[test]
fn a_state_directory_that_is_relative_or_below_a_tilde_is_the_same_for_every_process_of_pyro() {
    let pyro = Pyro::new();
    for (given, cwd) in [("rel/state", pyro.state().to_owned()), ("~/rel/state", "/".into())] {
        let odd = |line: &[&str]| {
            let mut command = pyro.command(line);
            command.env("PYRO_STATE_DIR", given).env("HOME", pyro.state()).current_dir(&cwd);
            start(&mut command).wait_with_output().expect("it ends")
        };
        let output = odd(&["task", "create", "debian:12", "--mem-mib", "512", "--id-only"]);
        let id = text(&output.stdout).trim().to_owned();
        assert!(pyro.state().join("rel/state/tasks").join(&id).is_dir(), "{output:?}");
        assert_eq!(text(&odd(&["task", "exec", &id, "--", "echo", "here"]).stdout), "here\n");
        assert!(odd(&["task", "delete", &id]).status.success());
        assert!(!std::path::Path::new("/rel").exists(), "a state tree at the root");
    }
}

#[test]
fn a_variable_that_is_empty_counts_as_one_that_is_unset() {
    let pyro = Pyro::new();
    let mut command = pyro.command(&["run", "debian:12", "--", "echo", "there"]);
    for name in
        ["APT_SOURCES", "BACKEND", "FIRECRACKER", "TEMPLATE_LIMIT_MIB", "MAX_ACTIVE_VMS", "MAX_TTL_SECONDS"]
    {
        command.env(format!("PYRO_{name}"), "");
    }
    let output = start(&mut command).wait_with_output().expect("it ends");
    assert_eq!(text(&output.stdout), "there\n", "{output:?}");
}

#[test]
fn a_limit_on_the_length_of_files_is_told_and_does_not_end_pyro_without_a_word() {
    let pyro = Pyro::behind(&["sh", "-c", "ulimit -f 1; exec \"$@\"", "sh"]);
    let output = pyro.run(&["run", "debian:12", "--json", "--", "true"]);
    let error = parse(&output);
    assert_eq!((output.status.code(), &error["code"]), (Some(125), &"host_resources".into()), "{error}");
    assert!(error["error"].as_str().is_some_and(|text| text.contains("512 bytes (ulimit -f)")), "{error}");
    assert_eq!(error["hint"], "raise the limit: ulimit -f unlimited");
}

#[test]
fn a_user_without_a_passwd_entry_and_without_a_home_is_told_both_variables() {
    const TEST: &str = "a_user_without_a_passwd_entry_and_without_a_home_is_told_both_variables";
    if !is_root() {
        return println!("skipped: {TEST}: only root can become another user");
    }
    let dir = tempfile::tempdir().expect("a directory");
    fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .expect("readable by all");
    // The user cannot reach the compiler's output.
    let program = dir.path().join("pyro");
    fs::copy(pyro_program(), &program).expect("copied");
    let mut command = Command::new("setpriv");
    command.args(["--reuid=54321", "--regid=54321", "--clear-groups", "--"]).arg(&program);
    command.args(["task", "list", "--json"]).env_clear().env("PATH", "/usr/bin:/bin").current_dir("/");
    let told = |command: &mut Command| {
        command.stdout(std::process::Stdio::piped());
        start(command).wait_with_output().expect("it ends")
    };
    let error = parse(&told(&mut command));
    assert_eq!(error["hint"], "set HOME, or both PYRO_STATE_DIR and PYRO_ENVIRONMENT_CACHE_DIR", "{error}");
    let own = dir.path().join("own");
    fs::create_dir(&own).expect("made");
    std::os::unix::fs::chown(&own, Some(54321), Some(54321)).expect("given");
    command.env("PYRO_STATE_DIR", own.join("state")).env("PYRO_ENVIRONMENT_CACHE_DIR", own.join("cache"));
    let list = parse(&told(&mut command));
    assert_eq!(list["count"], 0, "the remedy helps: {list}");
}

#[test]
fn the_clock_of_a_guest_is_set_again_when_the_clock_of_its_host_was_set() {
    const TEST: &str = "the_clock_of_a_guest_is_set_again_when_the_clock_of_its_host_was_set";
    let pyro = Pyro::new();
    let id = pyro.create();
    // As after a suspend of the host, during which the guest's clock stood still.
    assert!(pyro.exec(&id, "date -s 2001-01-01").status.success());
    assert_eq!(text(&pyro.exec(&id, "date +%Y").stdout), "2001\n");
    // The host gets the time that it has, which is as good as any other.
    let now = "import time; time.clock_settime(time.CLOCK_REALTIME, time.clock_gettime(time.CLOCK_REALTIME))";
    if !run(Command::new("python3").args(["-c", now])) {
        pyro.ok(&["task", "delete", &id]);
        return println!("skipped: {TEST}: this user cannot set the clock of this host");
    }
    pyro.until("the guest has the host's time", |pyro| text(&pyro.exec(&id, "date +%Y").stdout) != "2001\n");
    pyro.ok(&["task", "delete", &id]);
}
