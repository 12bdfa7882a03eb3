//! Tests of the log.

use std::fs::File;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use proptest::prelude::*;

use super::*;

fn decision(name: &str, allowed: bool) -> Entry {
    Entry {
        name: Some(name.to_owned()),
        port: Some(443),
        allowed: Some(allowed),
        ..Entry::new(1.0, Kind::Connect)
    }
}

fn entries(path: &Path) -> Vec<Entry> {
    read(path, 0, usize::MAX >> 1).expect("read").0
}

fn log(limit: u64) -> (tempfile::TempDir, PathBuf, Log) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("network.jsonl");
    let log = Log::open(Some(path.clone()), limit).expect("a log");
    (dir, path, log)
}

#[test]
fn equal_decisions_of_a_second_are_counted() {
    let (_dir, path, mut log) = log(1 << 20);
    let start = Instant::now();
    let after = |ms: u64| start + Duration::from_millis(ms);
    for ms in 0..10 {
        log.record(decision("a.test", true), after(ms));
    }
    log.record(decision("a.test", false), after(10));
    let counts = |path: &Path| entries(path).into_iter().map(|entry| entry.count).collect::<Vec<_>>();
    assert_eq!(counts(&path), [None, None], "the first of each at once");
    log.record(decision("a.test", true), after(1500));
    assert_eq!(counts(&path), [None, None, Some(10)], "nine that were held and this one");
    log.record(decision("a.test", true), after(1600));
    log.record(decision("a.test", true), after(1700));
    log.flush(after(1800));
    assert_eq!(counts(&path).len(), 3, "their second is not over");
    log.flush(after(2500));
    assert_eq!(counts(&path).last(), Some(&Some(2)));
    log.record(decision("a.test", true), after(2600));
    log.record(decision("a.test", true), after(2700));
    log.finish();
    assert_eq!(counts(&path)[4..], [None, None]);
    let total: u64 = counts(&path).into_iter().map(|count| count.unwrap_or(1)).sum();
    assert_eq!(total, log.counts().allowed + log.counts().denied, "no decision is lost");
}

#[test]
fn bytes_are_added_up_and_an_end_is_no_decision() {
    let (_dir, path, mut log) = log(1 << 20);
    let now = Instant::now();
    log.record(decision("a.test", true), now);
    for _ in 0..3 {
        let end = Entry { bytes_in: Some(10), bytes_out: Some(1), ..decision("a.test", true) };
        log.record(end, now);
    }
    log.finish();
    assert_eq!(log.counts(), Counts { allowed: 1, bytes_in: 30, bytes_out: 3, ..Counts::default() });
    let bytes: Vec<_> = entries(&path).into_iter().map(|entry| (entry.bytes_in, entry.count)).collect();
    assert_eq!(bytes, [(None, None), (Some(10), None), (Some(20), Some(2))]);
}

/// All entries of a log, read in small parts.
fn all(path: &Path) -> Vec<Entry> {
    let (mut offset, mut all) = (0, Vec::new());
    loop {
        let (entries, next) = read(path, offset, 0).expect("read");
        if next == offset {
            return all;
        }
        all.extend(entries);
        offset = next;
    }
}

#[test]
fn the_newest_entries_are_kept_and_a_reader_goes_on_from_file_to_file() {
    let limit = 1 << 20;
    let (dir, path, mut log) = log(limit);
    let now = Instant::now();
    let (mut offset, mut followed) = (0, Vec::new());
    for at in 0..20_000 {
        log.record(decision(&format!("h{at}.test"), false), now);
        if at % 500 == 0 {
            let (entries, next) = read(&path, offset, 8 << 20).expect("read");
            followed.extend(entries);
            offset = next;
        }
        if at == 15_000 {
            drop(log);
            log = Log::open(Some(path.clone()), limit).expect("the same log");
        }
    }
    log.finish();
    assert_eq!(log.dropped(), 0);
    let files: Vec<u64> = fs_err::read_dir(dir.path())
        .expect("files")
        .map(|file| file.expect("a file").metadata().expect("there").len())
        .collect();
    assert!(files.len() == 2 && files.iter().sum::<u64>() <= limit, "{files:?}");
    let last = |entries: &[Entry]| entries.last().and_then(|entry| entry.name.clone());
    let kept = all(&path);
    assert_eq!(last(&kept).as_deref(), Some("h19999.test"));
    assert!(kept.len() > 2000 && kept.first().is_some_and(|first| first.begins_at.is_some()));
    // A reader that followed it has every entry, in order.
    let mut followed = followed.into_iter().filter(|entry| entry.kind != Kind::Policy).enumerate();
    assert!(followed.all(|(at, entry)| entry.name == Some(format!("h{at}.test"))));
}

#[test]
fn a_log_whose_writer_died_between_two_files_goes_on() {
    let (_dir, path, mut log) = log(4096);
    let now = Instant::now();
    for at in 0..8 {
        log.record(decision(&format!("h{at}.test"), true), now);
    }
    drop(log);
    let before = path.with_extension("jsonl.1");
    fs_err::rename(&path, &before).expect("renamed");
    let (entries, next) = read(&path, 0, 0).expect("read");
    assert_eq!((entries.len(), next), (8, fs_err::metadata(&before).expect("a file").len()));
    let mut log = Log::open(Some(path.clone()), 4096).expect("a log");
    log.record(decision("later.test", true), now);
    let (entries, _) = read(&path, next, 0).expect("read");
    assert_eq!(entries.len(), 2, "the first line of the file, and the entry");
    assert_eq!(entries[0].begins_at, Some(next));
}

#[test]
fn memory_is_bounded_and_decisions_beyond_it_are_written_at_once() {
    let (_dir, path, mut log) = log(16 << 20);
    let now = Instant::now();
    for at in 0..5000 {
        for _ in 0..2 {
            log.record(decision(&format!("h{at}.test"), true), now);
        }
    }
    assert_eq!(log.pending.len(), MAX_PENDING);
    log.finish();
    let total: u64 = entries(&path).into_iter().map(|entry| entry.count.unwrap_or(1)).sum();
    assert_eq!((total, log.dropped()), (10_000, 0));
}

#[test]
fn a_torn_line_is_not_joined_to_the_next() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("network.jsonl");
    fs_err::write(&path, "{\"at\":1.0,\"ki").expect("written");
    let mut log = Log::open(Some(path.clone()), 1 << 20).expect("a log");
    log.record(decision("a.test", true), Instant::now());
    log.record(decision("b.test", true), Instant::now());
    assert_eq!(entries(&path).len(), 2);
}

#[test]
fn the_file_is_its_owners_alone_and_no_link() {
    let (dir, path, log) = log(1 << 20);
    assert_eq!(fs_err::metadata(&path).expect("a file").permissions().mode() & 0o777, 0o600);
    drop(log);
    let link = dir.path().join("link");
    fs_err::os::unix::fs::symlink(&path, &link).expect("a link");
    Log::open(Some(link), 1 << 20).expect_err("a link");
    Log::open(Some("/dev/null".into()), 1 << 20).expect_err("a device");
}

#[test]
fn a_log_that_cannot_be_written_counts_what_it_drops() {
    let file = File::options().write(true).open("/dev/full").expect("Linux has it");
    let mut log = Log::open(None, 0).expect("no file");
    log.record(decision("a.test", true), Instant::now());
    assert_eq!(log.dropped(), 0, "nobody wanted lines");
    log.file = Some(Out::over(file));
    log.record(decision("b.test", false), Instant::now());
    assert_eq!(log.counts(), Counts { allowed: 1, denied: 1, dropped: 1, ..Counts::default() });
}

#[test]
fn denials_are_told_also_when_they_are_only_counted() {
    let mut log = Log::open(None, 0).expect("no file");
    let now = Instant::now();
    log.record(decision("a.test", false), now);
    let mark = log.mark();
    log.record(decision("a.test", false), now);
    log.record(decision("b.test", true), now);
    log.record(
        Entry {
            address: Some(IpAddr::from([10, 0, 0, 1])),
            allowed: Some(false),
            ..Entry::new(1.0, Kind::Connect)
        },
        now,
    );
    let names: Vec<_> = log.denials_since(mark).into_iter().map(|denial| denial.name).collect();
    assert_eq!(names, [Some("a.test".to_owned()), None]);
    assert_eq!(log.denials_since(log.mark()), []);
}

proptest! {
    #[test]
    fn every_decision_is_in_a_line_that_was_written_or_counted_as_dropped(
        steps in proptest::collection::vec((0..5_u8, any::<bool>(), 0..700_u64), 1..200),
        limit in 0..20_000_u64,
    ) {
        let (_dir, path, mut log) = log(limit);
        let mut now = Instant::now();
        let (mut offset, mut written) = (0, 0);
        let mut follow = |offset: &mut u64| {
            let (entries, next) = read(&path, *offset, 1 << 20).expect("read");
            *offset = next;
            let decisions = entries.into_iter().filter(|entry| entry.kind != Kind::Policy);
            written += decisions.map(|entry| entry.count.unwrap_or(1)).sum::<u64>();
        };
        for (name, allowed, ms) in &steps {
            now += Duration::from_millis(*ms);
            log.record(decision(&format!("h{name}.test"), *allowed), now);
            follow(&mut offset);
            if *ms > 600 {
                log.flush(now);
            }
            for _ in 0..3 {
                follow(&mut offset);
            }
        }
        log.finish();
        for _ in 0..3 {
            follow(&mut offset);
        }
        if limit > 16_000 {
            prop_assert_eq!(written + log.dropped(), steps.len() as u64);
        }
        let len = |path: &Path| fs_err::metadata(path).map_or(0, |file| file.len());
        prop_assert!(len(&path) + len(&path.with_extension("jsonl.1")) <= limit.max(1024));
    }
}
