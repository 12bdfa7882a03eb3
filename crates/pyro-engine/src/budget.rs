//! Whether the host has room for another machine. A guest may take all the memory that it was promised, so what is
//! available now must hold it; its disk is sparse, so a floor is kept free.

use std::path::Path;

use crate::error::{Error, ErrorKind};

/// Disk that must be free in the state directory, in MiB: the journal, and what a guest writes at first.
const DISK_FLOOR_MIB: u64 = 256;
/// What a VMM takes beside the guest's memory, in MiB.
const OVERHEAD_MIB: u64 = 64;

/// Refuses a machine for which the host lacks memory or disk.
pub(crate) fn check(state_dir: &Path, mem_mib: u32) -> Result<(), Error> {
    check_memory(available_memory_mib(), mem_mib)?;
    check_disk(state_dir, free_disk_mib(state_dir))
}

fn check_memory(available: Option<u64>, mem_mib: u32) -> Result<(), Error> {
    let needed = u64::from(mem_mib) + OVERHEAD_MIB;
    match available {
        Some(available) if available < needed => {
            let text = format!(
                "not enough memory: {needed} MiB needed for a guest of {mem_mib} MiB, {available} MiB available"
            );
            Err(Error::new(ErrorKind::HostResources, text)
                .hint("stop or delete machines, or ask for less with --mem-mib (mem_mib)"))
        }
        _ => Ok(()),
    }
}

fn check_disk(state_dir: &Path, free: Option<u64>) -> Result<(), Error> {
    match free {
        Some(free) if free < DISK_FLOOR_MIB => {
            let dir = state_dir.display();
            let text =
                format!("not enough disk space in '{dir}': {DISK_FLOOR_MIB} MiB needed, {free} MiB free");
            Err(Error::new(ErrorKind::HostResources, text)
                .hint("delete tasks, free some disk space, or set PYRO_STATE_DIR to a larger file system"))
        }
        _ => Ok(()),
    }
}

/// What the kernel says that programs can still have; none where it does not tell.
fn available_memory_mib() -> Option<u64> {
    let text = fs_err::read("/proc/meminfo").ok()?;
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib >> 10)
}

/// What this user may still write below a directory; none where the file system does not tell.
pub(crate) fn free_disk_mib(dir: &Path) -> Option<u64> {
    let found = rustix::fs::statvfs(dir).ok()?;
    Some(found.f_bavail.saturating_mul(found.f_frsize) >> 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lacking_is_told_with_both_numbers_and_a_remedy() {
        let error = check_memory(Some(1000), 1024).expect_err("too little");
        assert_eq!(
            error.to_string(),
            "not enough memory: 1088 MiB needed for a guest of 1024 MiB, 1000 MiB available"
        );
        assert!(error.remedy().is_some_and(|hint| hint.contains("--mem-mib")));
        let error = check_disk(Path::new("/state"), Some(3)).expect_err("too little");
        assert_eq!(error.to_string(), "not enough disk space in '/state': 256 MiB needed, 3 MiB free");
        check_memory(None, 1024).expect("unknown is no reason");
        assert!(available_memory_mib().is_some_and(|mib| mib > 0));
    }
}
