//! Which VMM is used, where Firecracker comes from, and what is said where it cannot be used.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{Pyro, parse, start, text};

/// What a pyro says whose cache of environments is a directory of the test's.
fn with_cache(pyro: &Pyro, cache: &Path, line: &[&str], variables: &[(&str, &Path)]) -> Value {
    let mut command = pyro.command(line);
    command.env("PYRO_ENVIRONMENT_CACHE_DIR", cache.join("cache")).env_remove("PYRO_FIRECRACKER");
    command.envs(variables.iter().copied());
    parse(&start(&mut command).wait_with_output().expect("it ends"))
}

fn program(path: &Path, says: &str) {
    fs_err::write(path, format!("#!/bin/sh\necho '{says}'\n")).expect("written");
    fs_err::set_permissions(path, std::fs::Permissions::from_mode(0o755)).expect("executable");
}

/// The archive with the tested version.
fn archive() -> PathBuf {
    std::env::var_os("PYRO_TEST_FIRECRACKER").expect("the script sets it").into()
}

#[test]
fn firecracker_without_kvm_is_refused_at_once_with_the_cause_and_the_remedy() {
    let pyro = Pyro::new();
    let report = pyro.json(&["doctor", "--json"]);
    if report["kvm"]["usable"] == true {
        return println!("skipped: firecracker_without_kvm_is_refused: this host has a KVM that works");
    }
    for line in [
        ["run", "debian:12", "--backend", "firecracker", "--", "true"].as_slice(),
        &["task", "create", "debian:12", "--backend", "firecracker"],
    ] {
        let began = Instant::now();
        let output = pyro.run(line);
        // A boot that is tried in vain takes 30 s.
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
        let words = text(&output.stderr);
        assert!(words.contains("backend 'firecracker' needs a KVM that works: "), "{words}");
        assert!(
            words.contains(report["kvm"]["why"].as_str().expect("words").split(':').next().unwrap_or(""))
        );
        assert!(words.contains("hint: run `pyro doctor`"), "{words}");
        assert_eq!(output.status.code(), Some(if line[0] == "run" { 125 } else { 1 }));
    }
    pyro.assert_empty();
}

#[test]
fn a_backend_that_is_none_is_refused_by_flag_and_by_variable() {
    let pyro = Pyro::new();
    let words = "invalid backend; expected one of: firecracker, qemu";
    let output = pyro.run(&["run", "debian:12", "--backend", "xen", "--", "true"]);
    assert!(text(&output.stderr).contains(words), "{output:?}");
    let output = start(pyro.command(&["doctor", "--json"]).env("PYRO_BACKEND", "xen")).wait_with_output();
    let report = parse(&output.expect("it ends"));
    assert_eq!((&report["runtime_ok"], &report["issues"][0]["issue"]), (&false.into(), &words.into()));
}

#[test]
fn the_tested_firecracker_is_installed_from_an_archive_and_doctor_names_it() {
    let (pyro, dir) = (Pyro::new(), tempfile::tempdir().expect("a directory"));
    let archive = archive();
    let install = ["env", "firecracker", "--json", "--from", archive.to_str().expect("text")];
    let installed = with_cache(&pyro, dir.path(), &install, &[]);
    assert_eq!(installed["version"], "1.12.1", "{installed}");
    let report = with_cache(&pyro, dir.path(), &["doctor", "--json"], &[]);
    let found = &report["firecracker"];
    assert_eq!((&found["version"], &found["origin"]), (&"1.12.1".into(), &"store".into()), "{report}");
    assert_eq!(found["binary"], installed["firecracker"]);
    // An archive that is named is what it was installed from.
    let named = [("PYRO_FIRECRACKER", archive.as_path())];
    let report = with_cache(&pyro, dir.path(), &["doctor", "--json"], &named);
    assert_eq!(report["firecracker"]["origin"], "store", "{report}");
}

#[test]
fn other_bytes_are_refused_and_so_is_no_source() {
    let (pyro, dir) = (Pyro::new(), tempfile::tempdir().expect("a directory"));
    let forged = dir.path().join("forged.tgz");
    fs_err::create_dir(dir.path().join("release")).expect("made");
    program(&dir.path().join("release/firecracker-v1.12.1-x86_64"), "Firecracker v1.12.1");
    let mut pack = std::process::Command::new("tar");
    pack.arg("-C").arg(dir.path()).arg("-czf").arg(&forged).arg("release");
    assert!(start(&mut pack).wait().expect("it ends").success());
    let install = ["env", "firecracker", "--json", "--from", forged.to_str().expect("text")];
    let refused = with_cache(&pyro, dir.path(), &install, &[]);
    let words = refused["error"].as_str().expect("words");
    assert!(words.contains("firecracker-v1.12.1-x86_64 has sha256 "), "{refused}");
    assert!(refused["hint"].as_str().is_some_and(|hint| hint.contains("anew")), "{refused}");
    let refused = with_cache(&pyro, dir.path(), &["env", "firecracker", "--json"], &[]);
    assert_eq!(refused["code"], "invalid_value", "{refused}");
    let report = with_cache(&pyro, dir.path(), &["doctor", "--json"], &[]);
    assert_eq!(report["firecracker"], Value::Null);
}

#[test]
fn a_firecracker_of_ones_own_must_be_there_and_new_enough() {
    let (pyro, dir) = (Pyro::new(), tempfile::tempdir().expect("a directory"));
    let own = dir.path().join("firecracker");
    let doctor =
        |path: &Path| with_cache(&pyro, dir.path(), &["doctor", "--json"], &[("PYRO_FIRECRACKER", path)]);
    let report = doctor(&own);
    let words = format!("there is no firecracker at {}", own.display());
    assert!(report["issues"].to_string().contains(&words), "{report}");
    program(&own, "Firecracker v1.11.0");
    let report = doctor(&own);
    assert!(report["issues"].to_string().contains("is version 1.11.0; at least 1.12 is needed"), "{report}");
    program(&own, "Firecracker v1.15.1 ");
    let report = doctor(&own);
    assert_eq!(report["firecracker"]["version"], "1.15.1", "{report}");
    assert_eq!(report["firecracker"]["origin"], "named");
}

/// The probe of KVM is made to lie: what it says is kept in a file.
#[test]
fn a_kvm_that_boots_no_guest_is_left_for_software() {
    const TEST: &str = "a_kvm_that_boots_no_guest_is_left_for_software";
    let pyro = Pyro::new();
    let report = pyro.json(&["doctor", "--json"]);
    if report["kvm"]["usable"] == true || report["kvm"]["writable"] == false {
        return println!("skipped: {TEST}: this host has no KVM that is there and does not work");
    }
    let facts = pyro.state().join("host.json");
    let mut lie: Value = serde_json::from_slice(&fs_err::read(&facts).expect("kept")).expect("JSON");
    lie["host"]["facts"]["kvm"]["usable"] = true.into();
    fs_err::write(&facts, lie.to_string()).expect("written");
    let tier = pyro.json(&["doctor", "--json"])["isolation"].clone();
    assert!(
        ["firecracker-kvm", "qemu-kvm"].contains(&tier.as_str().expect("a tier")),
        "the lie is believed: {tier}"
    );
    let line = ["run", "debian:12", "--mem-mib", "512", "--json", "--", "echo", "booted"];
    let result = pyro.json(&line);
    assert_eq!(
        (&result["stdout"], &result["isolation"]),
        (&"booted\n".into(), &"qemu-tcg".into()),
        "{result}"
    );
    let report = pyro.json(&["doctor", "--json"]);
    assert_eq!(report["isolation"], "qemu-tcg");
    assert!(report["kvm"]["why"].as_str().is_some_and(|why| why.starts_with("a guest did not boot on it")));
    pyro.assert_empty();
}
