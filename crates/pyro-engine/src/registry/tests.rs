//! The registry, as many processes use it at once.

use super::owner::tests::dead_owner;
use super::*;
use crate::budget::Overcommit;
use crate::spec::VmSpec;

/// A registry that promises without end.
pub(super) fn opened(dir: &Path) -> Registry {
    bounded(dir, None, 1e9).expect("opened")
}

fn bounded(dir: &Path, runtime_dir: Option<PathBuf>, memory: f64) -> Result<Registry, Error> {
    Registry::open(dir, Bounds { runtime_dir, overcommit: Overcommit { memory, disk: 1e9 } })
}

pub(super) fn admit(registry: &Registry, cap: u32) -> Result<(Lease, VmRecord), Error> {
    registry.admit(cap, Promise::of(1024, 8192), record)
}

fn record(id: &str) -> VmRecord {
    VmRecord::new(id, &VmSpec::new("debian:12"), "1.0.0", "qemu-tcg", now())
}

#[test]
fn sixteen_at_once_never_pass_a_cap_of_four() {
    let dir = tempfile::tempdir().expect("a directory");
    let barrier = std::sync::Barrier::new(16);
    let admitted = std::thread::scope(|scope| {
        let one = || {
            let registry = opened(dir.path());
            barrier.wait();
            admit(&registry, 4)
        };
        let threads: Vec<_> = (0..16).map(|_| scope.spawn(one)).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect::<Vec<_>>()
    });
    let (held, refused): (Vec<_>, Vec<_>) = admitted.into_iter().partition(Result::is_ok);
    assert_eq!((held.len(), refused.len()), (4, 12));
    for error in refused.into_iter().filter_map(Result::err) {
        assert_eq!(error.to_string(), "max active VMs reached (4); delete old VMs first");
    }
    let registry = opened(dir.path());
    assert_eq!(fs_err::read_dir(dir.path().join("vms")).expect("read").count(), 4);
    drop(held);
    assert_eq!(registry.sweep().vm_ids.len(), 4);
    assert_eq!(registry.live().expect("counted"), 0);
}

#[test]
fn an_expired_machine_is_told_of_once() {
    let dir = tempfile::tempdir().expect("a directory");
    let registry = opened(dir.path());
    let (lease, record) = admit(&registry, 1).expect("admitted");
    registry.expire(lease).expect("expired");
    let id = record.vm_id;
    let text = registry.get(&id).expect_err("gone").to_string();
    assert_eq!(text, format!("vm '{id}' expired and was automatically deleted"));
    assert_eq!(registry.get(&id).expect_err("gone").to_string(), format!("vm '{id}' does not exist"));
}

#[test]
fn a_machine_that_expired_after_its_owner_died_is_told_of_too() {
    let dir = tempfile::tempdir().expect("a directory");
    let registry = opened(dir.path());
    let old = |id: &str| VmRecord::new(id, &VmSpec::new("debian:12"), "1.0.0", "qemu-tcg", 0.0);
    let (lease, record) = registry.admit(1, Promise::default(), old).expect("admitted");
    drop(lease);
    assert_eq!(registry.sweep().vm_ids, std::slice::from_ref(&record.vm_id));
    assert_eq!(registry.get(&record.vm_id).expect_err("gone").kind(), ErrorKind::Expired);
}

#[test]
fn what_lies_about_without_an_owner_is_swept() {
    let dir = tempfile::tempdir().expect("a directory");
    let registry = opened(dir.path());
    let (lease, record) = admit(&registry, 4).expect("admitted");
    fs_err::create_dir_all(dir.path().join("vms/0123456789ab/deep")).expect("made");
    fs_err::create_dir_all(dir.path().join("trash/ba9876543210/deep")).expect("made");
    assert_eq!(registry.sweep().vm_ids, ["0123456789ab"]);
    assert_eq!(fs_err::read_dir(dir.path().join("trash")).expect("read").count(), 0);
    registry.get(&record.vm_id).expect("the live one stays");
    fs_err::remove_dir_all(&lease.dir).expect("removed");
    assert_eq!(registry.sweep().vm_ids, [record.vm_id]);
}

#[test]
fn what_is_not_pyros_is_told_and_stops_nobody() {
    let dir = tempfile::tempdir().expect("a directory");
    let registry = opened(dir.path());
    fs_err::write(dir.path().join("vms/junk"), "").expect("written");
    fs_err::write(dir.path().join("vms/0123456789ab"), "").expect("written");
    let swept = registry.sweep();
    assert_eq!((swept.vm_ids.len(), swept.problems.len()), (0, 2), "{swept:?}");
    drop(admit(&registry, 1).expect("admitted all the same"));
}

#[test]
fn a_lost_database_forgets_nobody_who_lives() {
    let dir = tempfile::tempdir().expect("a directory");
    let registry = opened(dir.path());
    let _held = admit(&registry, 1).expect("admitted");
    drop(registry);
    for end in ["", "-wal", "-shm"] {
        drop(fs_err::remove_file(dir.path().join(format!("registry.db{end}"))));
    }
    let registry = opened(dir.path());
    assert_eq!(registry.live().expect("counted"), 1);
    assert_eq!(admit(&registry, 1).expect_err("full").kind(), ErrorKind::CapReached);
}

#[test]
fn a_state_directory_is_private() {
    let dir = tempfile::tempdir().expect("a directory");
    let state = dir.path().join("state");
    fs_err::create_dir(&state).expect("made");
    fs_err::set_permissions(&state, std::fs::Permissions::from_mode(0o755)).expect("opened up");
    drop(opened(&state));
    assert_eq!(fs_err::metadata(&state).expect("there").permissions().mode() & 0o777, 0o700);
}

#[test]
fn a_state_directory_of_another_user_is_refused_untouched() {
    let dir = tempfile::tempdir().expect("a directory");
    let state = dir.path().join("state");
    fs_err::create_dir(&state).expect("made");
    let refused = |text: &str| {
        let error = bounded(&state, None, 1.0).expect_err("refused");
        assert_eq!(error.to_string(), format!("the state directory '{}' {text}", state.display()));
        assert!(error.remedy().is_some_and(|hint| hint.contains("PYRO_STATE_DIR")));
        assert_eq!(fs_err::read_dir(&state).expect("read").count(), 0, "nothing was made in it");
    };
    fs_err::set_permissions(&state, std::fs::Permissions::from_mode(0o777)).expect("opened up");
    refused("can be changed by other users (mode 0777)");
    fs_err::set_permissions(&state, std::fs::Permissions::from_mode(0o755)).expect("closed");
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(&state, Some(65_534), None).expect("given away");
        refused("belongs to another user (uid 65534)");
    }
    assert_eq!(fs_err::metadata(&state).expect("there").permissions().mode() & 0o777, 0o755);
}

#[test]
fn removals_and_sweeps_at_once_disturb_nobody() {
    let dir = tempfile::tempdir().expect("a directory");
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let registry = opened(dir.path());
                for _ in 0..50 {
                    let (lease, _) = admit(&registry, 8).expect("admitted");
                    fs_err::write(lease.dir.join("file"), "x").expect("still ours");
                    let id = lease.id.clone();
                    assert!(!registry.sweep().vm_ids.contains(&id), "a living owner is left alone");
                    registry.remove(lease).expect("removed");
                }
            });
        }
    });
    let registry = opened(dir.path());
    assert_eq!((registry.live().expect("counted"), registry.sweep()), (0, Swept::default()));
}

/// Has a machine belong to a process that has died, of which a forked copy holds the lock.
fn orphan(registry: &Registry, lease: &Lease) -> File {
    let sql = "UPDATE machines SET owner = ?2 WHERE id = ?1";
    let owned = registry.connection().execute(sql, params![lease.id, dead_owner().to_string()]);
    assert_eq!(owned.expect("written"), 1);
    lease.lock.try_clone().expect("a copy")
}

#[test]
fn a_forked_copy_of_a_killed_owner_keeps_no_machine_alive() {
    let dir = tempfile::tempdir().expect("a directory");
    let registry = opened(dir.path());
    let mut copies = Vec::new();
    for _ in 0..4 {
        let (lease, _) = admit(&registry, 4).expect("admitted");
        copies.push(orphan(&registry, &lease));
    }
    let (lease, record) = admit(&registry, 4).expect("those of the dead make room");
    assert_eq!(fs_err::read_dir(dir.path().join("vms")).expect("read").count(), 1);
    assert_eq!(fs_err::read_dir(dir.path().join("trash")).expect("read").count(), 0);
    assert!(registry.sweep().vm_ids.is_empty(), "the living one stays");
    // One that had moved into the trash when its remover was killed.
    copies.push(orphan(&registry, &lease));
    fs_err::rename(&lease.dir, dir.path().join("trash").join(&lease.id)).expect("moved");
    registry.sweep();
    assert_eq!(fs_err::read_dir(dir.path().join("trash")).expect("read").count(), 0);
    assert_eq!(registry.get(&record.vm_id).expect_err("gone").kind(), ErrorKind::NotFound);
}

#[test]
fn of_many_who_see_a_dead_owner_one_takes_its_machine() {
    let dir = tempfile::tempdir().expect("a directory");
    let registry = opened(dir.path());
    for _ in 0..20 {
        let (lease, record) = admit(&registry, 1).expect("admitted");
        let _copy = orphan(&registry, &lease);
        let swept = std::thread::scope(|scope| {
            let sweep = || opened(dir.path()).sweep();
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(sweep)).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect::<Vec<_>>()
        });
        // Others may find its row without a directory.
        assert!(swept.iter().any(|swept| swept.vm_ids.contains(&record.vm_id)), "{swept:?}");
        assert!(swept.iter().all(|swept| swept.problems.is_empty()), "{swept:?}");
        assert!(!lease.dir.exists());
    }
}

#[test]
fn a_task_whose_lock_is_held_by_a_living_caller_is_left_to_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let registry = opened(dir.path());
    let lease = registry.bear_task(4, Promise::of(256, 8192)).expect("admitted");
    let mut file = crate::task::test_file(&lease.id);
    file.state = VmState::Stopped;
    let directory = registry.task_path(&lease.id);
    directory.furnish().expect("made");
    file.write(&directory).expect("written");
    let id = lease.id.clone();
    // Its supervisor has died, and a caller is about to give it another.
    drop((orphan(&registry, &lease), lease));
    let Ok(TaskLock::Free(lock, _)) = registry.lock_task(&id) else { panic!("it is free") };
    assert!(matches!(registry.lock_task(&id), Ok(TaskLock::Held)), "the caller lives");
    registry.sweep();
    assert!(matches!(registry.lock_task(&id), Ok(TaskLock::Held)));
    drop(lock);
    assert!(matches!(registry.lock_task(&id), Ok(TaskLock::Free(..))));
}

#[test]
fn a_supervisor_takes_a_task_over_unless_somebody_else_has() {
    let dir = tempfile::tempdir().expect("a directory");
    let registry = opened(dir.path());
    let lease = registry.bear_task(4, Promise::of(256, 8192)).expect("admitted");
    let _copy = orphan(&registry, &lease);
    let former = registry.owner_of(&lease.id).expect("read").expect("there");
    registry.adopt(&lease.id, &former).expect("its maker has died, and nobody has seen it");
    assert!(registry.sweep().task_ids.is_empty(), "the supervisor lives");
    let _copy = orphan(&registry, &lease);
    assert_eq!(registry.sweep().task_ids, std::slice::from_ref(&lease.id), "it had no record yet");
    registry.adopt(&lease.id, &former).expect_err("too late");
}

#[test]
fn machines_of_all_state_directories_together_are_promised_no_more_than_the_host_has() {
    let root = tempfile::tempdir().expect("a directory");
    let host_mib: u64 = {
        let text = fs_err::read_to_string("/proc/meminfo").expect("read");
        let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:")).expect("told");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") >> 10
    };
    let third = Promise { mem_mib: u32::try_from(host_mib / 3).expect("small"), disk_mib: 8192 };
    // Three and a half of these, whatever limit this test runs under.
    let open =
        |name: &str| bounded(&root.path().join(name), Some(root.path().join("run")), 1.1).expect("opened");
    let (one, other) = (open("one"), open("other"));
    let Ok(first) = one.admit(4, third, record) else {
        println!("skipped: this process has less memory than the host");
        return;
    };
    let second = other.admit(4, third, record).expect("two thirds");
    let third_one = one.lease_directory(third).expect("three; one that becomes a template counts as well");
    let error = other.admit(4, third, record).expect_err("the fourth does not fit");
    assert_eq!(error.kind(), ErrorKind::HostResources);
    let sum = host_mib / 3 * 3;
    assert!(
        error.to_string().contains(&format!("3 machines were promised {sum} MiB of {host_mib} MiB")),
        "{error}"
    );
    assert_eq!(fs_err::read_dir(root.path().join("other/vms")).expect("read").count(), 1, "nothing is left");
    // Those that are stopped, gone, or have lost their owner, make room.
    let mut stopped = first.1.clone();
    stopped.state = VmState::Stopped;
    one.update(&stopped).expect("written");
    let again = other.admit(4, third, record).expect("the stopped one makes room");
    assert_eq!(one.readmit(4, &stopped.vm_id).expect_err("no room").kind(), ErrorKind::HostResources);
    one.remove(third_one).expect("removed");
    one.readmit(4, &stopped.vm_id).expect("it has room again");
    let _copies = [orphan(&other, &second.0), orphan(&other, &again.0)];
    drop(one.admit(4, third, record).expect_err("their own registry has not been asked yet"));
    other.sweep();
    let _held = [(); 2].map(|()| one.admit(4, third, record).expect("room for two"));
}

#[test]
fn why_a_machine_was_refused_is_told_also_where_its_directory_cannot_be_removed() {
    let dir = tempfile::tempdir().expect("a directory");
    let registry = opened(dir.path());
    let _held = admit(&registry, 1).expect("admitted");
    fs_err::remove_dir(dir.path().join("trash")).expect("removed");
    fs_err::write(dir.path().join("trash"), "in the way").expect("written");
    assert_eq!(admit(&registry, 1).expect_err("full").kind(), ErrorKind::CapReached);
    let asked = registry.bear_task(1, Promise::default()).expect_err("full");
    assert_eq!(asked.kind(), ErrorKind::CapReached);
}

#[test]
fn a_task_that_is_damaged_can_be_removed_with_its_disk() {
    let dir = tempfile::tempdir().expect("a directory");
    let registry = opened(dir.path());
    let lease = registry.bear_task(1, Promise::of(256, 8192)).expect("admitted");
    let directory = registry.task_path(&lease.id);
    for name in ["task.json", "overlay.ext4"] {
        fs_err::write(directory.path().join(name), "{").expect("written");
    }
    let id = lease.id.clone();
    drop(lease);
    assert_eq!(registry.lock_task(&id).expect_err("damaged").kind(), ErrorKind::Damaged);
    assert!(dir.path().join("quarantine").join(&id).join("overlay.ext4").exists());
    assert!(registry.remove_quarantined(&id).expect("removed"));
    for kind in ["tasks", "quarantine", "trash"] {
        assert_eq!(fs_err::read_dir(dir.path().join(kind)).expect("read").count(), 0, "{kind}");
    }
    assert!(!registry.remove_quarantined(&id).expect("there is none"));
    assert!(!registry.remove_quarantined("../tasks").expect("no id"));
    assert!(registry.ids("machines").expect("read").is_empty());
}
