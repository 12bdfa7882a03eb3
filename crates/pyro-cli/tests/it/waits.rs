//! What takes a minute of waiting, and nothing else: side by side in one test.

use fs_err as fs;
use std::os::unix::fs::PermissionsExt;

use crate::support::{Pyro, parse, start, text};

#[test]
fn what_lasts_too_long_ends() {
    std::thread::scope(|scope| {
        scope.spawn(a_machine_that_was_ready_ends_with_its_commands_time_to_live);
        scope.spawn(a_guest_that_hangs_while_it_boots_is_booted_again);
    });
}

fn a_machine_that_was_ready_ends_with_its_commands_time_to_live() {
    let pyro = Pyro::new();
    let run = ["run", "debian:12", "--mem-mib", "512", "--keep-ready", "100"];
    pyro.ok(&[&run[..], &["--", "true"]].concat());
    let ready = crate::ready::ready(&pyro);
    let flags = ["--ttl-seconds", "60", "--timeout-seconds", "100", "--json", "--", "sleep", "99"];
    let result = pyro.json(&[&run[..], &flags].concat());
    assert_eq!(
        (&result["fault"], &result["vm_id"]),
        (&"ttl_expired".into(), &ready.as_str().into()),
        "{result}"
    );
    crate::ready::end(&pyro);
}

/// Under emulation a kernel may hang in its first second. The first QEMU here starts and runs nothing.
fn a_guest_that_hangs_while_it_boots_is_booted_again() {
    let pyro = Pyro::new();
    let tools = tempfile::tempdir().expect("a directory");
    let wrapper = tools.path().join("qemu-system-x86_64");
    let begun = tools.path().join("begun");
    let script = format!(
        "#!/bin/sh\n[ -e {0} ] || {{ touch {0}; exec /usr/bin/qemu-system-x86_64 \"$@\" -S; }}\n\
         exec /usr/bin/qemu-system-x86_64 \"$@\"\n",
        begun.display()
    );
    fs::write(&wrapper, script).expect("written");
    fs::set_permissions(&wrapper, PermissionsExt::from_mode(0o755)).expect("set");
    let path = format!("{}:{}", tools.path().display(), std::env::var("PATH").unwrap_or_default());
    let line = ["run", "debian:12", "--mem-mib", "512", "--cold", "--unconfined-vmm", "--json", "--", "true"];
    let output = start(pyro.command(&line).env("PATH", path)).wait_with_output().expect("it ends");
    let result = parse(&output);
    assert_eq!(result["exit_code"], 0, "{}", text(&output.stderr));
    let handshake = result["timings"]["handshake"].as_f64().expect("a number");
    assert!(begun.exists() && handshake < 45_000.0, "of the second boot alone: {result}");
    pyro.assert_empty();
}
