//! The life of the store, with a stand-in for `mmdebstrap` that takes no time.

mod support;
mod templates;

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pyro_image::{ImageError, Progress, Silent, Store};
use support::{Fixture, PULL_HELPER, Recorder};

const NAME: &str = "debian:12-base";

#[test]
fn an_environment_is_built_once_and_then_used() {
    let fixture = Fixture::new();
    let store = fixture.store();
    assert!(!store.installed(NAME).expect("readable"));
    assert_eq!(store.list().expect("readable").len(), 3);
    let environment = store.ensure(NAME, &Silent).expect("built");
    for file in [&environment.kernel, &environment.initramfs, &environment.rootfs] {
        assert!(file.is_file(), "{}", file.display());
    }
    assert!(fs_err::read(&environment.kernel).expect("readable").starts_with(b"\x7fELF"));
    drop(store.ensure(NAME, &Silent).expect("there"));
    assert_eq!(fixture.runs(), 1);
    assert_eq!(fixture.staging(), 0);
    let inspection = store.inspect(NAME).expect("readable");
    assert!(inspection.verified && inspection.entry.installed, "{inspection:?}");
    assert_eq!(inspection.rootfs_digest.as_deref(), Some(environment.digest.as_str()));
    assert_eq!(inspection.packages[0].name, "bash");
    let pulled = store.pull(NAME, &Silent).expect("there");
    assert_eq!(pulled.source, "cache");
    let mode = fs_err::metadata(&fixture.cache).expect("there").mode();
    assert_eq!(mode & 0o777, 0o700);
}

#[test]
fn the_kernel_is_fetched_once_for_all_environments() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let first = store.ensure(NAME, &Silent).expect("built");
    let second = store.ensure("debian:12", &Silent).expect("built");
    assert_eq!(first.kernel, second.kernel);
    assert_eq!((fixture.runs(), fixture.kernel_fetches()), (2, 1));
}

#[test]
fn the_same_build_gives_the_same_bytes_and_a_new_agent_a_new_initramfs() {
    let (one, two) = (Fixture::new(), Fixture::new());
    let first = one.store().ensure(NAME, &Silent).expect("built");
    let second = two.store_with_agent(b"another agent").ensure(NAME, &Silent).expect("built");
    assert_eq!((&first.digest, &first.kernel_digest), (&second.digest, &second.kernel_digest));
    assert_ne!(first.initramfs.file_name(), second.initramfs.file_name());
    let archive = fs_err::read(&second.initramfs).expect("readable");
    let holds = |text: &[u8]| archive.windows(text.len()).any(|window| window == text);
    assert!(holds(b"another agent") && holds(b"modules/01-virtio_mmio.ko"));
    assert!(
        holds(b"modules/order\0") && holds(b"modules/order.vsock\0") && holds(b"modules/order.network\0")
    );
}

#[test]
fn unknown_environments_are_named_with_what_there_is() {
    let fixture = Fixture::new();
    let error = fixture.store().check_name("alpine").expect_err("unknown");
    assert_eq!(
        error.to_string(),
        "unknown environment 'alpine'; expected one of: debian:12, debian:12-base, debian:12-build"
    );
    assert_eq!(error.code(), "unknown_environment");
}

#[test]
fn two_pulls_at_once_build_once() {
    let fixture = Fixture::new();
    fixture.set("delay", "1");
    let recorders: Vec<Recorder> = std::thread::scope(|scope| {
        let pulls: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let recorder = Recorder::default();
                    fixture.store().pull(NAME, &recorder).expect("pulled");
                    recorder
                })
            })
            .collect();
        pulls.into_iter().map(|pull| pull.join().expect("no panic")).collect()
    });
    assert_eq!(fixture.runs(), 1);
    assert_eq!(recorders.iter().filter(|recorder| recorder.heard("waiting")).count(), 3);
}

#[test]
fn damage_is_found_and_mended() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let environment = store.ensure(NAME, &Silent).expect("built");
    let good = fs_err::read(&environment.rootfs).expect("readable");

    // Touched but whole: hashed again, not built again.
    fs_err::write(&environment.rootfs, &good).expect("written");
    assert!(!store.installed(NAME).expect("readable"));
    drop(store.ensure(NAME, &Silent).expect("whole"));
    assert!(store.installed(NAME).expect("readable"));
    assert_eq!(fixture.runs(), 1);

    // Other bytes: never used, even while somebody leases it.
    let mut bad = good.clone();
    bad[5000] ^= 1;
    fs_err::write(&environment.rootfs, &bad).expect("written");
    let inspection = store.inspect(NAME).expect("readable");
    assert!(!inspection.verified && inspection.problems[0].contains("rootfs.erofs"), "{inspection:?}");
    let mended = store.ensure(NAME, &Silent).expect("rebuilt");
    assert_eq!(fixture.runs(), 2);
    assert!(fs_err::read(&mended.rootfs).expect("readable") == good);

    // Other bytes under the old time: what a full check is for.
    let file = std::fs::File::options().write(true).open(&mended.rootfs).expect("there");
    let time = file.metadata().expect("there").modified().expect("known");
    std::os::unix::fs::FileExt::write_all_at(&file, &bad, 0).expect("written");
    file.set_modified(time).expect("set");
    assert!(store.installed(NAME).expect("readable"));
    assert!(!store.inspect(NAME).expect("readable").verified);
    assert_eq!(store.pull(NAME, &Silent).expect("rebuilt").source, "debian-packages");
    assert_eq!(fixture.runs(), 3);

    // A kernel module that is gone, and a manifest cut short.
    let module = mended.kernel.with_file_name("modules").join("01-virtio_mmio.ko");
    fs_err::remove_file(&module).expect("removed");
    drop(store.ensure(NAME, &Silent).expect("rebuilt"));
    assert!(module.exists());
    fs_err::write(mended.rootfs.with_file_name("manifest.json"), "{\"format_version\": 1,").expect("written");
    drop(store.ensure(NAME, &Silent).expect("rebuilt"));
    assert_eq!((fixture.runs(), fixture.kernel_fetches()), (5, 2));
    assert!(store.inspect(NAME).expect("readable").verified);
}

#[test]
fn a_damaged_initramfs_is_made_again() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let environment = store.ensure(NAME, &Silent).expect("built");
    let good = fs_err::read(&environment.initramfs).expect("readable");
    fs_err::write(&environment.initramfs, "cut short").expect("written");
    let again = store.ensure(NAME, &Silent).expect("mended");
    assert!(fs_err::read(&again.initramfs).expect("readable") == good);
    assert_eq!(fixture.runs(), 1);
}

#[test]
fn what_a_newer_version_wrote_is_left_alone() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let environment = store.ensure(NAME, &Silent).expect("built");
    let manifest = environment.rootfs.with_file_name("manifest.json");
    fs_err::write(&manifest, "{\"format_version\": 2}").expect("written");
    let error = store.ensure(NAME, &Silent).expect_err("refused");
    assert_eq!(error.code(), "environment_manifest");
    assert_eq!(fixture.runs(), 1);
}

#[test]
fn prune_keeps_what_is_leased() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let environment = store.ensure(NAME, &Silent).expect("built");
    drop(store.ensure("debian:12", &Silent).expect("built"));
    let template = store.overlay_template(64).expect("made");
    let pruned = fixture.store().prune().expect("pruned");
    assert_eq!((pruned.count, pruned.in_use.as_slice()), (1, [NAME.to_owned()].as_slice()));
    assert!(pruned.deleted_environment_dirs[0].to_string_lossy().contains("/debian_12/"));
    assert!(environment.rootfs.exists() && environment.kernel.exists() && environment.initramfs.exists());
    assert!(template.exists());

    drop(environment);
    let pruned = store.prune().expect("pruned");
    assert_eq!((pruned.count, pruned.in_use.len()), (1, 0));
    assert!(!template.exists());
    for directory in ["envs", "kernels", "staging"] {
        assert_eq!(fs_err::read_dir(fixture.cache.join(directory)).expect("there").count(), 0, "{directory}");
    }
    assert!(!store.installed(NAME).expect("readable"));
    assert_eq!(store.prune().expect("pruned").count, 0);
}

#[test]
fn prune_removes_the_initramfs_of_old_agents() {
    let fixture = Fixture::new();
    let old = fixture.store().ensure(NAME, &Silent).expect("built");
    let store = fixture.store_with_agent(b"new agent");
    let new = store.ensure(NAME, &Silent).expect("there");
    assert!(old.initramfs.exists() && new.initramfs.exists());
    assert_eq!(store.prune().expect("pruned").in_use, [NAME]);
    assert!(old.initramfs.exists() && new.initramfs.exists());
    let path = old.initramfs.clone();
    drop(old);
    assert_eq!(store.prune().expect("pruned").in_use, [NAME]);
    assert!(!path.exists() && !path.with_extension("json").exists());
    assert!(new.initramfs.exists() && new.kernel.exists());
}

#[test]
fn overlays_are_blank_sparse_and_reproducible() {
    let (one, two) = (Fixture::new(), Fixture::new());
    let first = one.store().overlay_template(4096).expect("made");
    let second = two.store().overlay_template(4096).expect("made");
    let metadata = fs_err::metadata(&first).expect("there");
    assert_eq!(metadata.len(), 4096 << 20);
    assert!(metadata.blocks() * 512 < 512 << 10, "{} bytes on disk", metadata.blocks() * 512);
    let head = |path: &std::path::Path| {
        use std::io::Read;
        let mut head = vec![0; 8 << 20];
        fs_err::File::open(path).expect("there").read_exact(&mut head).expect("readable");
        head
    };
    assert!(head(&first) == head(&second));
    for size in [0, 63, u32::MAX] {
        assert!(matches!(one.store().overlay_template(size), Err(ImageError::OverlaySize)));
    }
}

#[test]
fn failures_say_what_the_tool_said() {
    let fixture = Fixture::new();
    fixture.set("fail", "E: the mirror\u{1b}[31m is gone");
    let error = fixture.store().ensure(NAME, &Silent).expect_err("failed");
    assert_eq!(error.code(), "tool_failed");
    let text = error.to_string();
    assert!(text.contains("the mirror") && !text.contains('\u{1b}'), "{text}");
    assert!(error.hint().is_some());
    assert_eq!(fixture.staging(), 0);

    fixture.set("fail", "tar: write error: No space left on device");
    assert_eq!(fixture.store().ensure(NAME, &Silent).expect_err("failed").code(), "disk_full");
}

#[test]
fn sources_that_do_not_serve_are_refused() {
    let fixture = Fixture::new();
    fs_err::write(fixture.sources(), "deb http://archive.example/ubuntu noble main\n").expect("written");
    let error = fixture.store().ensure(NAME, &Silent).expect_err("refused");
    assert_eq!(error.code(), "no_debian_sources");
    assert!(error.hint().is_some());
    let checks = fixture.store().doctor();
    let sources = checks.iter().find(|check| check.name == "package sources").expect("checked");
    assert!(!sources.ok && sources.remedy.is_some());
}

/// Cancels as soon as the build has begun.
struct Impatient<'a>(&'a Fixture, AtomicBool);

impl Progress for Impatient<'_> {
    fn phase(&self, _phase: &str, _detail: &str) {}

    fn cancelled(&self) -> bool {
        let started = self.0.has("started");
        self.1.fetch_or(started, Ordering::Relaxed);
        started
    }
}

#[test]
fn cancelling_ends_all_processes_and_leaves_nothing() {
    let fixture = Fixture::new();
    fixture.set("delay", "300");
    let begun = Instant::now();
    let impatient = Impatient(&fixture, AtomicBool::new(false));
    let error = fixture.store().ensure(NAME, &impatient).expect_err("cancelled");
    assert!(matches!(error, ImageError::Cancelled), "{error}");
    assert!(impatient.1.load(Ordering::Relaxed));
    // The build itself takes 300 s.
    assert!(begun.elapsed() < Duration::from_secs(120));
    assert_eq!((fixture.staging(), fixture.processes(), fixture.mounts()), (0, 0, 0));
}

#[test]
fn a_killed_build_leaves_no_process_and_its_rest_is_swept() {
    let fixture = Fixture::new();
    fixture.set("delay", "300");
    let mut child = fixture.spawn_pull();
    fixture.wait_for("started");
    assert!(fixture.processes() > 0);
    // While its maker lives, nobody sweeps it.
    drop(fixture.store());
    assert_eq!(fixture.staging(), 1);
    child.kill().expect("killed");
    child.wait().expect("reaped");
    let deadline = Instant::now() + Duration::from_secs(60);
    while fixture.processes() > 0 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!((fixture.processes(), fixture.mounts()), (0, 0));
    assert_eq!(fixture.staging(), 1);
    let store = fixture.store();
    assert_eq!(fixture.staging(), 0);
    fixture.unset("delay");
    drop(store.ensure(NAME, &Silent).expect("built after all"));
}

#[test]
fn builds_that_are_killed_at_fifty_moments_leave_nothing_half_built() {
    let fixture = Fixture::new();
    let begun = Instant::now();
    drop(fixture.store().ensure(NAME, &Silent).expect("built"));
    let whole = u64::try_from(begun.elapsed().as_micros()).expect("short");
    for moment in 0..50 {
        drop(fixture.store().prune().expect("pruned"));
        let mut child = fixture.spawn_pull();
        // Spread over a build and a little more, the moments not in their order.
        std::thread::sleep(Duration::from_micros(whole * ((moment * 37) % 50) / 40));
        child.kill().expect("killed");
        child.wait().expect("reaped");
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut store = fixture.store();
        // A helper that was just being forked lives, and holds the lock, for a moment longer than its owner.
        while fixture.processes() + fixture.staging() > 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
            store = fixture.store();
        }
        assert_eq!((fixture.staging(), fixture.processes(), fixture.mounts()), (0, 0, 0), "moment {moment}");
        let inspection = store.inspect(NAME).expect("readable");
        assert_eq!(inspection.entry.installed, inspection.verified, "whole or not there: {inspection:?}");
    }
    drop(fixture.store().ensure(NAME, &Silent).expect("built after all"));
}

#[test]
fn a_directory_of_other_things_is_not_made_the_cache() {
    let fixture = Fixture::new();
    fs_err::create_dir(&fixture.cache).expect("made");
    fs_err::write(fixture.cache.join("photo"), "").expect("written");
    let error = fixture.try_store().expect_err("refused");
    assert!(error.hint().is_some(), "{error}");
    assert!(!fixture.cache.join("envs").exists());
}

#[test]
fn a_cache_that_others_may_change_or_that_is_anothers_is_refused_untouched() {
    let fixture = Fixture::new();
    drop(fixture.store().ensure(NAME, &Silent).expect("built"));
    let mode =
        |mode| fs_err::set_permissions(&fixture.cache, std::fs::Permissions::from_mode(mode)).expect("set");
    let refused = || {
        let error = fixture.try_store().expect_err("refused");
        assert_eq!(error.code(), "environment_cache");
        assert!(error.hint().is_some_and(|hint| hint.contains("PYRO_ENVIRONMENT_CACHE_DIR")), "{error}");
        error.to_string()
    };
    mode(0o777);
    let place = fixture.cache.display().to_string();
    assert_eq!(
        refused(),
        format!("the environment cache '{place}' can be changed by other users (mode 0777)")
    );
    assert_eq!(fs_err::metadata(&fixture.cache).expect("there").mode() & 0o777, 0o777, "it was not changed");
    mode(0o755);
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(&fixture.cache, Some(65_534), None).expect("given away");
        assert_eq!(refused(), format!("the environment cache '{place}' belongs to another user (uid 65534)"));
        assert_eq!(
            fs_err::metadata(&fixture.cache).expect("there").mode() & 0o777,
            0o755,
            "it was not changed"
        );
    }
}

/// Lets nobody write to a directory for as long as this value lives; none where this user cannot.
fn read_only(dir: &Path) -> Option<ReadOnly> {
    let dir = dir.to_owned();
    if !rustix::process::geteuid().is_root() {
        fs_err::set_permissions(&dir, std::fs::Permissions::from_mode(0o500)).expect("set");
        return Some(ReadOnly { dir, mounted: false });
    }
    rustix::mount::mount_bind(&dir, &dir).ok()?;
    let flags = rustix::mount::MountFlags::BIND | rustix::mount::MountFlags::RDONLY;
    rustix::mount::mount_remount(&dir, flags, "").expect("mounted");
    Some(ReadOnly { dir, mounted: true })
}

struct ReadOnly {
    dir: PathBuf,
    mounted: bool,
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        if self.mounted {
            rustix::mount::unmount(&self.dir, rustix::mount::UnmountFlags::DETACH).expect("unmounted");
        } else {
            fs_err::set_permissions(&self.dir, std::fs::Permissions::from_mode(0o700)).expect("set");
        }
    }
}

#[test]
fn a_cache_that_can_only_be_read_is_used() {
    let fixture = Fixture::new();
    drop(fixture.store().ensure(NAME, &Silent).expect("built"));
    // As a copy has it: other inodes and times.
    let image = fixture.store().ensure(NAME, &Silent).expect("there").rootfs;
    let copy = image.with_extension("copy");
    fs_err::copy(&image, &copy).expect("copied");
    fs_err::rename(&copy, &image).expect("renamed");
    let Some(guard) = read_only(&fixture.cache) else {
        println!("skipped: nothing can be mounted here");
        return;
    };
    let store = fixture.store();
    assert!(store.installed(NAME).expect("read"));
    let environment = store.ensure(NAME, &Silent).expect("it is there");
    assert!(
        environment.rootfs.starts_with(&fixture.cache) && environment.initramfs.starts_with(&fixture.cache)
    );
    // What another agent needs is made elsewhere.
    let newer = fixture.store_with_agent(b"a newer agent").ensure(NAME, &Silent).expect("it is there");
    assert!(!newer.initramfs.starts_with(&fixture.cache) && newer.initramfs.is_file());
    store.overlay_template(64).expect("made elsewhere");
    let error = store.ensure("debian:12", &Silent).expect_err("it cannot be built there");
    assert_eq!(
        error.to_string(),
        format!(
            "environment 'debian:12' is not installed or damaged, and the environment cache '{}' can only be read",
            fixture.cache.display()
        )
    );
    assert_eq!(store.prune().expect("its own").deleted_environment_dirs, Vec::<PathBuf>::new());
    assert_eq!(fixture.runs(), 1);
    drop((environment, newer, guard));
}

#[test]
fn an_environment_of_another_definition_is_built_anew() {
    let fixture = Fixture::new();
    let environment = fixture.store().ensure(NAME, &Silent).expect("built");
    let manifest = environment.rootfs.with_file_name("manifest.json");
    let text = fs_err::read_to_string(&manifest).expect("readable");
    fs_err::write(&manifest, text.replacen("\"1.0.0\"", "\"0.9.0\"", 1)).expect("written");
    let old = environment.digest.clone();
    drop(environment);
    let store = fixture.store();
    assert!(!store.installed(NAME).expect("readable"));
    // A disk that was made upon it can still be used.
    drop(store.lease(NAME, &old).expect("leased"));
    drop(store.ensure(NAME, &Silent).expect("built anew"));
    assert_eq!(fixture.runs(), 2);
    let lost = store.lease(NAME, &"0".repeat(64)).expect_err("never was");
    assert_eq!(lost.code(), "environment_replaced");
}

/// What passes for a kernel: the head of an ELF file and a banner.
fn kernel_image(release: &str) -> Vec<u8> {
    let mut image = b"\x7fELF\x02\x01".to_vec();
    image.resize(18, 0);
    image.extend([62, 0]);
    image.extend(format!("..Linux version {release} (pyro@pyro)").bytes());
    image
}

#[test]
fn a_kernel_of_ones_own_takes_the_place_of_all_until_it_is_forgotten_or_damaged() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let before = store.ensure(NAME, &Silent).expect("built");
    let image = fixture.cache.with_file_name("vmlinux");
    fs_err::write(&image, "no kernel").expect("written");
    assert_eq!(store.add_kernel(&image).expect_err("refused").code(), "kernel_rejected");
    fs_err::write(&image, kernel_image("6.1.0-own")).expect("written");
    let added = store.add_kernel(&image).expect("stored");
    let digest = added.digest.clone();
    assert_eq!(added.release, "6.1.0-own");
    store.use_kernel(&added).expect("used");
    drop(added);
    let own = store.ensure(NAME, &Silent).expect("there");
    assert_eq!((own.kernel_digest.as_str(), own.digest.as_str()), (digest.as_str(), before.digest.as_str()));
    assert!(fs_err::read(&own.kernel).expect("readable") == kernel_image("6.1.0-own"));
    let archive = fs_err::read(&own.initramfs).expect("readable");
    assert!(!archive.windows(3).any(|window| window == b".ko"), "it has its modules built in");
    let inspection = store.inspect(NAME).expect("readable");
    assert_eq!(inspection.own_kernel_release.as_deref(), Some("6.1.0-own"));
    // It stays when all environments go.
    let path = own.kernel.clone();
    drop((own, before));
    store.prune().expect("pruned");
    assert!(path.exists());

    fs_err::write(&path, "damaged").expect("written");
    let mended = store.ensure(NAME, &Silent).expect("built");
    assert_ne!(mended.kernel_digest, digest);
    assert!(store.kernel_in_use().expect("readable").is_none());
    store.use_kernel(&store.add_kernel(&image).expect("stored again")).expect("used");
    assert!(store.kernel_in_use().expect("readable").is_some());
    assert!(store.forget_kernel().expect("forgotten"));
    assert!(!store.forget_kernel().expect("forgotten already"));
    drop(mended);
    store.prune().expect("pruned");
    assert!(!path.exists());
}

#[test]
fn a_kernel_that_is_only_tried_is_nobody_elses_and_is_gone_when_its_trial_was_killed() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let before = store.ensure(NAME, &Silent).expect("built");
    let image = fixture.cache.with_file_name("vmlinux");
    fs_err::write(&image, kernel_image("6.1.0-own")).expect("written");
    let added = store.add_kernel(&image).expect("stored");
    let trying = fixture.store().trying(&added);
    let tried = trying.ensure(NAME, &Silent).expect("there");
    assert_eq!((&tried.kernel_digest, &tried.digest), (&added.digest, &before.digest));
    // Whoever starts a guest meanwhile, or after a kill at this moment, has the kernel that was there.
    assert!(store.kernel_in_use().expect("readable").is_none());
    assert_eq!(store.ensure(NAME, &Silent).expect("there").kernel_digest, before.kernel_digest);
    store.prune().expect("pruned");
    assert!(tried.kernel.exists(), "a trial keeps its kernel");
    let path = tried.kernel.clone();
    drop((tried, added, before));
    store.prune().expect("pruned");
    assert!(!path.exists());
    // Another kernel must not prove itself in its place.
    store.ensure(NAME, &Silent).expect("built");
    assert_eq!(trying.ensure(NAME, &Silent).expect_err("gone").code(), "environment_cache");
}

/// Not a test of its own: the process that `a_killed_build_…` kills.
#[test]
fn pull_helper() {
    let Some(root) = std::env::var_os(PULL_HELPER) else { return };
    let fixture = Fixture::at(root.into());
    drop(fixture.store().pull(NAME, &Silent));
}

#[test]
fn stores_can_be_shared_between_threads() {
    fn shared<T: Send + Sync + std::fmt::Debug>() {}
    shared::<Store>();
    shared::<pyro_image::Environment>();
}

#[test]
fn the_doctor_checks_what_a_build_needs() {
    let checks = Fixture::new().store().doctor();
    for name in
        ["mmdebstrap", "mke2fs", "unshare", "package sources", "archive keyring", "namespaces", "disk space"]
    {
        let check = checks.iter().find(|check| check.name == name).expect("checked");
        assert!(check.ok && check.remedy.is_none(), "{check:?}");
    }
}
