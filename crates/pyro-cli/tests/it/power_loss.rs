//! A loss of power: everything is killed, and what was not on the disk is gone.
//!
//! The state directory is on a file system of its own, in an image behind a loop device. What that image holds at the
//! moment of the loss, without what the kernel had still to write, is what a disk would hold.

use fs_err as fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::support::{Pyro, is_root, kill, run, text};

const IMAGE_MIB: u64 = 700;

#[test]
fn after_a_loss_of_power_each_task_is_whole_or_gone_and_each_entry_readable() {
    const TEST: &str = "after_a_loss_of_power_each_task_is_whole_or_gone_and_each_entry_readable";
    let place = tempfile::tempdir().expect("a directory");
    let (image, before, after) = (place.path().join("image"), tempfile::tempdir(), tempfile::tempdir());
    let (before, after) = (before.expect("a directory"), after.expect("a directory"));
    fs::File::create(&image).and_then(|file| file.set_len(IMAGE_MIB << 20)).expect("an image");
    let ready = is_root()
        && run(Command::new("mke2fs").args(["-q", "-F", "-t", "ext4"]).arg(&image))
        && run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(before.path()));
    if !ready {
        println!("skipped: {TEST}: a loop device can be mounted by root only");
        return;
    }
    let _mounted = Mounted(before.path().to_owned());
    let pyro = Pyro::at(before);
    let (kept, stopped) = (pyro.create(), pyro.create());
    for id in [&kept, &stopped] {
        for number in 1..=5 {
            assert!(pyro.exec(id, &format!("echo {number} | tee -a f; sync")).status.success());
        }
    }
    pyro.ok(&["task", "stop", &stopped]);
    let mut busy = pyro.spawn(&["task", "exec", &kept, "--", "sh", "-c", "while :; do echo on and on; done"]);
    let mut born = pyro.spawn(&["task", "create", "debian:12", "--mem-mib", "256"]);
    pyro.until("it writes", |pyro| {
        fs::metadata(pyro.task_file(&kept, "commands/000006.stdout")).is_ok_and(|found| found.len() > 0)
    });
    for pid in pyro.processes() {
        kill(pid, "KILL");
    }
    for child in [&mut busy, &mut born] {
        drop(child.kill());
        child.wait().expect("reaped");
    }
    let disk = place.path().join("disk");
    assert!(run(Command::new("cp").arg("--sparse=always").arg(&image).arg(&disk)));

    assert!(
        run(Command::new("mount").args(["-o", "loop"]).arg(&disk).arg(after.path())),
        "the copy is a file system"
    );
    let _mounted_too = Mounted(after.path().to_owned());
    let pyro = Pyro::at(after);
    let list = pyro.json(&["task", "list", "--json"]);
    assert_eq!(list["problems"], serde_json::json!([]), "{list}");
    let ids: Vec<&str> = list["tasks"]
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|task| task["task_id"].as_str())
        .collect();
    assert!(ids.contains(&kept.as_str()) && ids.contains(&stopped.as_str()), "{list}");
    for id in &ids {
        for entry in pyro.logs(id) {
            assert!(
                entry["reason"].as_str().is_none_or(|reason| !reason.contains("cannot be read")),
                "{entry}"
            );
            assert!(matches!(entry["status"].as_str(), Some("finished" | "interrupted")), "{entry}");
            let file =
                pyro.task_file(id, &format!("commands/{}", entry["stdout_file"].as_str().expect("a name")));
            let length = fs::metadata(file).expect("there").len();
            assert!(length >= entry["stdout_bytes"].as_u64().expect("a number"), "{entry}");
        }
    }
    let sent = pyro.logs(&kept).len();
    assert_eq!(sent, 6, "a command that was sent is on record");
    for id in [&kept, &stopped] {
        // What a caller was told of was on the disk, but for the ends of the last moment.
        let finished = |entry: &&Value| entry["status"] == "finished";
        assert!(pyro.logs(id).iter().filter(finished).count() >= 4, "{:?}", pyro.logs(id));
        assert_eq!(pyro.status(id)["state"], "stopped");
        assert_eq!(pyro.json(&["task", "start", id, "--json"])["state"], "started");
        let kept = text(&pyro.exec(id, "cat f").stdout);
        assert!(
            "1\n2\n3\n4\n5\n".starts_with(&kept) && kept.len() >= 8,
            "what the guest had synced: {kept:?}"
        );
    }
    for id in &ids {
        pyro.ok(&["task", "delete", id]);
    }
    pyro.until("the supervisors are gone", |pyro| pyro.processes().is_empty());
    pyro.assert_empty();
}

struct Mounted(std::path::PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        run(Command::new("umount").arg("-l").arg(Path::new(&self.0)));
        // Whoever owns it could not remove it while something was mounted there.
        fs::remove_dir(&self.0).ok();
    }
}
