//! Cases that talk to a guest: commands, streams, limits.

use super::bench::Guest;
use crate::record::Fault;
use crate::spec::{Command, ExecSpec};

pub(super) async fn exit_codes(guest: &Guest) {
    let done = guest.sh("echo out; echo err >&2; exit 7").await;
    assert_eq!((&done.stdout[..], &done.stderr[..]), (&b"out\n"[..], &b"err\n"[..]));
    assert_eq!(done.outcome.exit_code, 7);
    let missing = guest.run(ExecSpec::new(Command::argv(["/nonexistent"]))).await;
    assert_eq!(missing.outcome.exit_code, 127);
    let words = guest.run(ExecSpec::new(Command::argv(["printf", "%s|", "a b", "", "$HOME"]))).await;
    assert_eq!(words.stdout, b"a b||$HOME|", "words are passed on as they are");
}

pub(super) async fn signals(guest: &Guest) {
    assert_eq!(guest.sh("kill -TERM $$").await.outcome.exit_code, 128 + 15);
    assert_eq!(guest.sh("kill -KILL $$").await.outcome.exit_code, 128 + 9);
}

pub(super) async fn bytes(guest: &Guest) {
    let done = guest.sh(r"printf '\377\376\000\200'").await;
    assert_eq!(done.stdout, b"\xff\xfe\x00\x80");
    const LENGTH: usize = 8 << 20;
    let done = guest.sh(&format!("head -c {LENGTH} /dev/zero | tr '\\0' x")).await;
    assert_eq!(done.stdout.len(), LENGTH);
    assert!(done.stdout.iter().all(|byte| *byte == b'x'));
}

pub(super) async fn stdin(guest: &Guest) {
    let input: Vec<u8> = (0..1_u32 << 18).flat_map(u32::to_le_bytes).collect();
    let mut spec = ExecSpec::new(Command::argv(["cat"]));
    spec.stdin = Some(Box::new(std::io::Cursor::new(input.clone())));
    let done = guest.run(spec).await;
    assert!(done.stdout == input, "{} of {} bytes came back", done.stdout.len(), input.len());
    assert_eq!(guest.text("cat; echo end").await, "end", "without input there is its end");
}

pub(super) async fn many(guest: &Guest) {
    let commands = (0..16).map(|number| async move {
        let done =
            guest.sh(&format!("echo {number}; cat /proc/self/cmdline >/dev/null; exit {number}")).await;
        assert_eq!((done.stdout, done.outcome.exit_code), (format!("{number}\n").into_bytes(), number));
    });
    futures_util::future::join_all(commands).await;
}

pub(super) async fn timeout(guest: &Guest) {
    let mut spec = ExecSpec::new(Command::Shell("echo begun; sleep 1000 & sleep 1000".to_owned()));
    spec.timeout_seconds = 3.0;
    let done = guest.run(spec).await;
    assert_eq!((done.outcome.exit_code, done.outcome.fault), (124, Some(Fault::Timeout)));
    assert_eq!(done.stdout, b"begun\n");
    // None of the group lives on.
    assert_eq!(guest.text("cat /proc/[0-9]*/comm 2>/dev/null | grep -c '^sleep$' || true").await, "0");
}

pub(super) async fn disks(guest: &Guest) {
    assert_eq!(guest.text("cat /sys/block/vda/ro /sys/block/vdb/ro | tr '\\n' ' '").await, "1 0");
    // The upper layer takes what the image cannot.
    let script = "echo changed > /etc/issue && cat /etc/issue && dd if=/dev/zero of=/big bs=1M count=16 2>/dev/null \
                  && sync && stat -c %s /big";
    assert_eq!(guest.text(script).await, "changed\n16777216");
    let done = guest.sh("echo x > /dev/vda").await;
    assert_ne!(done.outcome.exit_code, 0, "the image is read-only for the guest's root too");
}

pub(super) async fn console_flood(guest: &Guest) {
    // Each byte is an exit of the machine to its VMM, half a millisecond where that is emulated too.
    guest.text("yes flooded | head -c 10000 > /dev/console; sleep 0.2").await;
    let console = guest.running.machine.console_tail();
    assert!(console.lines().count() <= 40, "{} lines", console.lines().count());
    assert_eq!(guest.text("echo alive").await, "alive");
}

pub(super) async fn out_of_memory(guest: &Guest) {
    let done = guest.sh("perl -e 'push @kept, \"x\" x 1048576 while 1'").await;
    assert_eq!((done.outcome.exit_code, done.outcome.fault), (137, Some(Fault::OutOfMemory)));
    assert_eq!(guest.text("echo alive").await, "alive");
}

/// What a command does to its control group is of no other command, and a group does not stay when it is empty.
pub(super) async fn groups(guest: &Guest) {
    const GROUP: &str = "group=/sys/fs/cgroup$(sed s/^0::// /proc/self/cgroup)";
    let after = async |change: &str| guest.text(&format!("{GROUP}\n{change}\necho $group")).await;
    let state =
        format!("{GROUP}; cd $group; cat pids.max memory.max cgroup.max.depth; grep oom_kill memory.events");
    for change in [
        "echo 9 > $group/pids.max",
        "echo 300M > $group/memory.max",
        "echo 0 > $group/cgroup.max.depth",
        "chown -R 1000 $group",
        "perl -e 'sub most { open F, q(>), qq($ARGV[0]/pids.max); print F $_[0]; close F } most 1; fork; most q(max)' $group",
        "head -c 32000000 /dev/zero > /dev/shm/kept",
        "mkdir $group/below",
        "sleep 1000 >/dev/null 2>&1 &",
        "perl -e 'push @kept, \"x\" x 1048576 while 1'",
    ] {
        let changed = after(change).await;
        assert_ne!(after(":").await, changed, "{change}");
        assert_eq!(guest.text(&state).await, "max\nmax\nmax\noom_kill 0", "{change}");
    }
    // That of `sleep`, that of the command that looks, and those that hold groups or memory that they made.
    let groups: u32 = guest.text("ls -d /sys/fs/cgroup/*/ | wc -l").await.parse().expect("a number");
    assert!(groups < 6, "{groups} groups are left of some twenty");
    guest.text("rm /dev/shm/kept").await;
    let left = "found=$(grep -l '^sleep$' /proc/[0-9]*/comm); kill $(echo $found | tr -cd '0-9 '); echo $found | wc -w";
    assert_eq!(guest.text(left).await, "1", "what was left in the background lives on");
}
