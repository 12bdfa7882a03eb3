//! Children of a program that ignores `SIGCHLD`, as a shell's `trap '' CHLD` or an embedding host passes it on.

#![expect(unsafe_code, reason = "the disposition of a signal")]

use std::path::Path;

use pyro_process::{Jail, Spawn, output};

fn ignore_children() {
    // SAFETY: sets a disposition; all tests of this program want the same.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}

#[test]
fn an_owner_that_ignores_sigchld_still_learns_how_its_children_end() {
    ignore_children();
    for (script, expected) in [
        ("exit 0", "exit status: 0"),
        ("exit 7", "exit status: 7"),
        ("kill -TERM $$", "signal: 15 (SIGTERM)"),
    ] {
        let mut spawn = Spawn::new("sh", Path::new("/"));
        spawn.args(["-c", script]).own_process_group();
        let mut child = spawn.spawn().expect("started");
        assert_eq!(child.wait().expect("waited for").to_string(), expected);
        assert_eq!(child.try_wait().expect("kept").expect("ended").to_string(), expected);
    }
}

#[test]
fn an_owner_that_ignores_sigchld_gets_the_output_of_a_tool_whose_own_children_matter() {
    ignore_children();
    let mut spawn = Spawn::new("sh", Path::new("/"));
    spawn.args(["-c", "(exit 3); echo $?; echo words >&2"]);
    let output = output(spawn).expect("sh runs");
    assert!(output.status.success(), "{}", output.status);
    assert_eq!((output.stdout.as_slice(), output.stderr.as_slice()), (&b"3\n"[..], &b"words\n"[..]));
}

#[test]
fn an_owner_that_ignores_sigchld_is_told_that_a_program_is_missing() {
    ignore_children();
    let error = Spawn::new("/nonexistent/program", Path::new("/")).spawn().expect_err("no such program");
    assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
    let error = Spawn::new("sh", Path::new("/nonexistent")).spawn().expect_err("no such directory");
    assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
    let error =
        Spawn::new("/nonexistent/program", Path::new("/")).spawn_detached().expect_err("no such program");
    assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
}

#[test]
fn an_owner_that_ignores_sigchld_can_start_a_process_that_outlives_it() {
    ignore_children();
    let (read, write) = std::io::pipe().expect("a pipe");
    let mut spawn = Spawn::new("sh", Path::new("/"));
    spawn.args(["-c", "echo here"]).stdout(std::process::Stdio::from(write));
    spawn.spawn_detached().expect("started");
    assert_eq!(std::io::read_to_string(read).expect("read"), "here\n");
}

#[test]
fn an_owner_that_ignores_sigchld_can_kill_its_children_in_a_jail_or_not() {
    ignore_children();
    for jailed in [false, true] {
        let mut spawn = Spawn::new("sleep", Path::new("/"));
        spawn.arg("1000");
        if jailed {
            spawn.jail(Jail::new(Path::new("/tmp")));
        }
        let mut child = spawn.spawn().expect("started");
        let program = child.program().expect("it runs");
        assert!(child.try_wait().expect("asked").is_none());
        child.kill().expect("killed");
        assert_eq!(child.wait().expect("waited for").to_string(), "signal: 9 (SIGKILL)");
        assert!(!Path::new(&format!("/proc/{program}")).exists());
    }
}
