//! `pyro doctor`, and a machine on which no guest can be had.

use std::os::unix::fs::PermissionsExt;

use crate::support::{Pyro, parse, text};

#[test]
fn doctor_proves_what_kvm_is_worth() {
    let pyro = Pyro::new();
    let report = pyro.json(&["doctor", "--json"]);
    assert_eq!(report["runtime_ok"], true, "{report}");
    assert!(report["kvm"]["why"].as_str().is_some_and(|why| !why.is_empty()));
    let words = pyro.ok(&["doctor"]);
    for part in [
        "Platform: ",
        "Runtime: PASS",
        "KVM: exists=",
        "Isolation: ",
        "Environment cache: ",
        "Capabilities: ",
        "Networking: tun=",
        "free=",
        "Orphans: none",
        "Issues: none",
    ] {
        assert!(words.contains(part), "{part} is missing in\n{words}");
    }
}

#[test]
fn doctor_reports_also_where_nothing_works() {
    let pyro = Pyro::new();
    fs_err::write(pyro.state().join("file"), "").expect("written");
    let nowhere = pyro.state().join("file/state");
    let output = crate::support::start(
        pyro.command(&["doctor", "--json"])
            .env("PYRO_STATE_DIR", &nowhere)
            .env("PYRO_ENVIRONMENT_CACHE_DIR", &nowhere),
    )
    .wait_with_output()
    .expect("it ends");
    let report = parse(&output);
    assert_eq!((output.status.code(), &report["runtime_ok"]), (Some(1), &false.into()));
    assert!(!report["issues"].as_array().expect("a list").is_empty());
    assert!(report["kvm"]["why"].as_str().is_some_and(|why| !why.is_empty()));
}

#[test]
fn without_qemu_doctor_and_run_name_the_remedy() {
    let pyro = Pyro::without_qemu();
    let output = pyro.run(&["doctor", "--json"]);
    let report = parse(&output);
    assert_eq!((output.status.code(), &report["isolation"]), (Some(1), &"none".into()), "{output:?}");
    let issue = &report["issues"][0];
    assert_eq!(issue["remedy"], "apt-get install qemu-system-x86", "{report}");
    let output = pyro.run(&["run", "debian:12", "--", "true"]);
    assert_eq!(output.status.code(), Some(125));
    assert_eq!(
        text(&output.stderr),
        "error: guest boot is unavailable and host compatibility mode is disabled: qemu-system-x86_64 is not \
         installed. Set allow_host_compat=True (CLI: --allow-host-compat) to opt into host execution.\n\
         hint: apt-get install qemu-system-x86\n"
    );
    pyro.assert_empty();
}

#[test]
fn the_host_takes_a_guests_place_only_where_that_was_allowed() {
    let pyro = Pyro::without_qemu();
    let script = "pwd; echo $HOME; cat; exit 4";
    let output = pyro.run(&["run", "debian:12", "--allow-host-compat", "--json", "--", "sh", "-c", script]);
    let result = parse(&output);
    assert_eq!(
        (output.status.code(), &result["execution_mode"]),
        (Some(4), &"host_compat".into()),
        "{output:?}"
    );
    assert_eq!(result["isolation"], "none");
    let lines: Vec<&str> = result["stdout"].as_str().expect("text").lines().collect();
    assert_eq!(lines[0], lines[1], "the working directory is the home");
    assert!(text(&output.stderr).contains("warning: no guest could be had"), "{output:?}");
    let missing = pyro.run(&["run", "debian:12", "--allow-host-compat", "--", "no-such-program"]);
    assert_eq!(missing.status.code(), Some(127));
    let line = [
        "run",
        "debian:12",
        "--allow-host-compat",
        "--require-isolation",
        "qemu-tcg",
        "--json",
        "--",
        "true",
    ];
    let refused = pyro.json(&line);
    assert_eq!(refused["code"], "isolation_unavailable", "{refused}");
    pyro.assert_empty();
}

#[test]
fn a_task_may_be_on_the_host_too() {
    let pyro = Pyro::without_qemu();
    let refused = pyro.json(&["task", "create", "debian:12", "--json"]);
    assert_eq!(refused["code"], "guest_unavailable", "{refused}");
    let id = pyro.ok(&["task", "create", "debian:12", "--allow-host-compat", "--id-only"]);
    assert!(pyro.exec(&id, "echo kept > file").status.success());
    let output = pyro.exec(&id, "cat file");
    assert_eq!(text(&output.stdout), "kept\n", "{output:?}");
    let status = pyro.status(&id);
    assert_eq!((&status["execution_mode"], &status["isolation"]), (&"host_compat".into(), &"none".into()));
    pyro.ok(&["task", "delete", &id]);
    pyro.until("the supervisor is gone", |pyro| pyro.processes().is_empty());
    pyro.assert_empty();
}

#[test]
fn a_state_directory_is_private_and_junk_in_it_stops_nobody() {
    let pyro = Pyro::new();
    fs_err::create_dir_all(pyro.state().join("vms")).expect("made");
    fs_err::write(pyro.state().join("vms/junk"), "").expect("written");
    fs_err::set_permissions(pyro.state(), std::fs::Permissions::from_mode(0o755)).expect("opened up");
    assert!(pyro.run(&["run", "debian:12", "--", "true"]).status.success());
    let mode = fs_err::metadata(pyro.state()).expect("there").permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
    let report = pyro.json(&["doctor", "--json"]);
    let issue = report["issues"][0]["issue"].as_str().expect("an issue");
    assert!(issue.contains("vms/junk"), "{report}");
    fs_err::remove_file(pyro.state().join("vms/junk")).expect("removed");
}
