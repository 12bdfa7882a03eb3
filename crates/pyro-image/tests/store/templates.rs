//! Templates in the store: found, refused when damaged, limited, pruned. Their files are stand-ins.

use std::os::unix::fs::FileExt;
use std::path::Path;

use pyro_image::{Environment, Silent, Store, Template, TemplateFiles, TemplateShape};

use crate::support::Fixture;

/// What is wrong with a template, and how it comes to be.
type Damage = (&'static str, fn(&TemplateFiles));

const NAME: &str = "debian:12-base";

fn shape() -> TemplateShape {
    TemplateShape {
        vcpus: 1,
        memory_mib: 512,
        disk_mib: 256,
        machine: "qemu 7.2.22 settings".to_owned(),
        tsc_khz: Some(2_500_000),
    }
}

/// What a saved machine leaves: sparse files, `kib` of data in its memory.
fn saved(dir: &Path, kib: usize) -> TemplateFiles {
    let made = |name: &str, length: u64, bytes: &[u8]| {
        let path = dir.join(name);
        let file = std::fs::File::create(&path).expect("created");
        file.set_len(length).expect("sized");
        file.write_all_at(bytes, 4096).expect("written");
        path
    };
    TemplateFiles {
        state: made("state", 60_000, b"state"),
        memory: made("memory", 512 << 20, &vec![7; kib << 10]),
        overlay: made("overlay", 256 << 20, b"overlay"),
    }
}

fn make(store: &Store, environment: &Environment, shape: &TemplateShape, kib: usize) -> Template {
    let dir = tempfile::tempdir().expect("a directory");
    let build = store.begin_template(environment, shape).expect("usable").expect("free");
    store.finish_template(build, &saved(dir.path(), kib)).expect("made")
}

fn found(store: &Store, environment: &Environment, shape: &TemplateShape) -> bool {
    store.template(environment, shape).expect("readable").is_some()
}

#[test]
fn a_template_serves_its_own_shape_only() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let environment = store.ensure(NAME, &Silent).expect("built");
    assert!(!found(&store, &environment, &shape()));
    let template = make(&store, &environment, &shape(), 64);
    assert!(found(&store, &environment, &shape()));
    assert_eq!(fs_err::metadata(&template.files.memory).expect("there").len(), 512 << 20);
    let others = [
        TemplateShape { vcpus: 2, ..shape() },
        TemplateShape { memory_mib: 513, ..shape() },
        TemplateShape { disk_mib: 257, ..shape() },
        TemplateShape { machine: "qemu 7.2.23 settings".to_owned(), ..shape() },
        TemplateShape { tsc_khz: Some(2_600_000), ..shape() },
        TemplateShape { tsc_khz: None, ..shape() },
    ];
    for other in others {
        assert!(!found(&store, &environment, &other), "{other:?}");
    }
    // The rate is measured, and no two measurements are alike.
    assert!(found(&store, &environment, &TemplateShape { tsc_khz: Some(2_500_900), ..shape() }));
    let agent = fixture.store_with_agent(b"another agent");
    assert!(!found(&agent, &environment, &shape()));
    assert_eq!(fixture.staging(), 0);
}

#[test]
fn what_is_damaged_is_none_and_what_was_only_touched_is_one() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let environment = store.ensure(NAME, &Silent).expect("built");
    let damage: [Damage; 6] = [
        ("a byte of the memory", |files| flip(&files.memory, 4100)),
        ("a byte of the state", |files| flip(&files.state, 4100)),
        ("a byte of the disk", |files| flip(&files.overlay, 4100)),
        ("a memory cut short", |files| cut(&files.memory, 1 << 20)),
        ("no state", |files| fs_err::remove_file(&files.state).expect("removed")),
        ("a manifest of another version", |files| {
            let manifest = files.state.with_file_name("manifest.json");
            fs_err::write(manifest, "{\"format_version\": 2}").expect("written");
        }),
    ];
    for (what, damage) in damage {
        let files = make(&store, &environment, &shape(), 64).files.clone();
        assert!(found(&store, &environment, &shape()), "sound before: {what}");
        damage(&files);
        assert!(!found(&store, &environment, &shape()), "{what}");
    }
    let files = make(&store, &environment, &shape(), 64).files.clone();
    let file = std::fs::File::options().write(true).open(&files.memory).expect("there");
    file.set_modified(std::time::SystemTime::UNIX_EPOCH).expect("touched");
    assert!(found(&store, &environment, &shape()), "whole, whatever its time");
}

fn flip(path: &Path, at: u64) {
    let file = std::fs::File::options().read(true).write(true).open(path).expect("there");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("read");
    file.write_all_at(&[byte[0] ^ 4], at).expect("written");
}

fn cut(path: &Path, length: u64) {
    std::fs::File::options().write(true).open(path).expect("there").set_len(length).expect("cut");
}

#[test]
fn one_is_made_at_a_time_and_a_maker_that_dies_is_no_obstacle() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let environment = store.ensure(NAME, &Silent).expect("built");
    let build = store.begin_template(&environment, &shape()).expect("usable").expect("free");
    assert!(fixture.store().begin_template(&environment, &shape()).expect("usable").is_none());
    drop(build);
    assert!(store.begin_template(&environment, &shape()).expect("usable").is_some());
}

#[test]
fn those_unused_for_longest_go_when_the_limit_is_reached() {
    let fixture = Fixture::new();
    // 1 MiB for all.
    let store = fixture.store();
    let environment = store.ensure(NAME, &Silent).expect("built");
    let of = |memory_mib| TemplateShape { memory_mib, ..shape() };
    for memory_mib in [300, 400] {
        drop(make(&store, &environment, &of(memory_mib), 400));
    }
    // Used, and so not the next to go.
    assert!(found(&store, &environment, &of(300)));
    drop(make(&store, &environment, &of(500), 400));
    let there: Vec<bool> = [300, 400, 500].map(|mib| found(&store, &environment, &of(mib))).to_vec();
    assert_eq!(there, [true, false, true]);
    // One that is too large alone stays until there is a newer one, and one that is about to be used stays too.
    let held = store.template(&environment, &of(300)).expect("readable").expect("there");
    drop(make(&store, &environment, &of(600), 3000));
    let there: Vec<bool> = [300, 500, 600].map(|mib| found(&store, &environment, &of(mib))).to_vec();
    assert_eq!(there, [true, false, true]);
    drop(held);
}

#[test]
fn inspect_shows_templates_and_prune_removes_those_of_no_use() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let environment = store.ensure(NAME, &Silent).expect("built");
    let template = make(&store, &environment, &shape(), 64);
    let inspection = store.inspect(NAME).expect("readable");
    let [entry] = inspection.templates.as_slice() else { panic!("one: {inspection:?}") };
    assert_eq!((entry.id.as_str(), entry.mem_mib, entry.verified), (template.id.as_str(), 512, true));
    assert_eq!(entry.vmm, "qemu 7.2.22");
    assert!(entry.bytes > 60_000 && entry.created_at > 0 && entry.last_used_at >= entry.created_at);
    flip(&template.files.memory, 4100);
    let inspection = store.inspect(NAME).expect("readable");
    assert!(!inspection.templates[0].verified && inspection.verified, "{inspection:?}");
    drop(template);
    // While the environment is in use, so is its template.
    store.prune().expect("pruned");
    assert_eq!(store.inspect(NAME).expect("readable").templates.len(), 1);
    drop(environment);
    store.prune().expect("pruned");
    assert_eq!(fs_err::read_dir(fixture.cache.join("templates")).expect("there").count(), 0);
}
