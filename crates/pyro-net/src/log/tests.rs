//! Tests of the log.

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

#[test]
fn a_full_file_ends_with_one_line_that_tells_so() {
    let (_dir, path, mut log) = log(4096);
    let now = Instant::now();
    for at in 0..1000 {
        log.record(decision(&format!("h{at}.test"), false), now);
    }
    let written = entries(&path);
    let last = written.last().expect("a last entry");
    assert_eq!((last.kind, last.why.as_deref()), (Kind::Policy, Some(MARK)));
    assert_eq!(written.len() as u64 - 1 + log.dropped(), 1000);
    let len = fs_err::metadata(&path).expect("a file").len();
    assert!(len <= 4096, "{len}");
    drop(log);
    let mut log = Log::open(Some(path.clone()), 4096).expect("the full log");
    log.record(decision("a.test", true), now);
    assert_eq!((log.dropped(), fs_err::metadata(&path).expect("a file").len()), (1, len), "and only one");
    let mut log = Log::open(Some(path.with_extension("none")), 0).expect("a log without room");
    log.record(decision("a.test", true), now);
    assert_eq!(log.dropped(), 1);
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
    log.file = Some(Out { file, len: 0, limit: 1 << 20, is_full: false, is_torn: false });
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
    fn every_decision_is_in_a_line_or_counted_as_dropped(
        steps in proptest::collection::vec((0..5_u8, any::<bool>(), 0..700_u64), 1..200),
        limit in 0..20_000_u64,
    ) {
        let (_dir, path, mut log) = log(limit);
        let mut now = Instant::now();
        for (name, allowed, ms) in &steps {
            now += Duration::from_millis(*ms);
            log.record(decision(&format!("h{name}.test"), *allowed), now);
            if *ms > 600 {
                log.flush(now);
            }
        }
        log.finish();
        let written = entries(&path).into_iter().filter(|entry| entry.kind != Kind::Policy);
        let written: u64 = written.map(|entry| entry.count.unwrap_or(1)).sum();
        prop_assert_eq!(written + log.dropped(), steps.len() as u64);
        prop_assert!(fs_err::metadata(&path).expect("a file").len() <= limit);
    }
}
