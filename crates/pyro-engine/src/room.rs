//! The host's disk, watched while guests may write to it. Their disks are sparse and may be promised many times over, so
//! what must still be written when the disk is nearly full, the ends of commands above all, has a reserve: a floor below
//! which commands are ended.

use std::path::Path;
use std::time::Duration;

/// What stays free of a file system: this, or a tenth of a small one, in bytes. Guests still write between a look that
/// is late, as on a busy host, and the moment in which the last of them is paused.
const FLOOR: u64 = 128 << 20;
const FLOOR_PART: u64 = 10;
/// The fastest that a disk is taken to fill, in bytes a second: the next look comes before the floor can be reached.
const FASTEST: u64 = 2 << 30;
/// The longest and the shortest pauses between two looks; the latter also where no command runs.
const LONGEST: Duration = Duration::from_secs(10);
const SHORTEST: Duration = Duration::from_millis(10);
const SHORTEST_IDLE: Duration = Duration::from_millis(200);

/// The space of a file system, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Room {
    free: u64,
    floor: u64,
}

impl Room {
    /// That of the file system of a directory; none where it does not tell.
    fn of(dir: &Path) -> Option<Self> {
        let found = rustix::fs::statvfs(dir).ok()?;
        let total = found.f_blocks.saturating_mul(found.f_frsize);
        let free = found.f_bavail.saturating_mul(found.f_frsize);
        Some(Self { free, floor: FLOOR.min(total / FLOOR_PART) })
    }

    /// How long no guest can bring the space below the floor.
    fn pause(self, is_busy: bool) -> Duration {
        let above = self.free.saturating_sub(self.floor);
        let shortest = if is_busy { SHORTEST } else { SHORTEST_IDLE };
        Duration::from_millis(above / (FASTEST / 1000)).clamp(shortest, LONGEST)
    }
}

/// Waits until the file system of a directory is nearly full. A disk has no event for that.
pub(crate) async fn until_low(dir: &Path, is_busy: impl Fn() -> bool) {
    loop {
        let pause = match Room::of(dir) {
            Some(room) if room.free < room.floor => return,
            Some(room) => room.pause(is_busy()),
            None => LONGEST,
        };
        tokio::time::sleep(pause).await;
    }
}

/// Waits until there is room again: some more than the floor, so that not every freed block lets a guest go on.
pub(crate) async fn until_back(dir: &Path) {
    while Room::of(dir).is_none_or(|room| room.free < room.floor + room.floor / 4) {
        tokio::time::sleep(SHORTEST_IDLE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_looked_at_before_it_can_be_full_and_seldom_when_it_is_far_from_that() {
        let room = |free| Room { free, floor: FLOOR };
        assert_eq!(room(FLOOR + (100 << 30)).pause(true), LONGEST);
        for mib in [40, 400, 4000] {
            let room = room(FLOOR + (mib << 20));
            let filled = FASTEST * u64::try_from(room.pause(true).as_millis()).expect("short") / 1000;
            assert!(room.free - filled >= FLOOR, "{mib} MiB");
        }
        assert_eq!((room(FLOOR).pause(true), room(FLOOR).pause(false)), (SHORTEST, SHORTEST_IDLE));
    }

    #[tokio::test]
    async fn a_disk_with_room_is_waited_for() {
        let dir = tempfile::tempdir().expect("a directory");
        let low = tokio::time::timeout(Duration::from_millis(100), until_low(dir.path(), || true));
        low.await.expect_err("it has room");
        until_back(dir.path()).await;
        let gone =
            tokio::time::timeout(Duration::from_millis(100), until_low(Path::new("/nonexistent"), || true));
        gone.await.expect_err("what cannot be known ends no command");
    }
}
