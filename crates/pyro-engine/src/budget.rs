//! Whether the host has room for another machine: what is free now must hold it, and so must what the host has, together
//! with all that was promised to other machines. A guest may take all the memory that it was promised; its disk is sparse,
//! so a floor is kept free, and disks may be promised many times over.

use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind};

/// Disk that must be free in the state directory, in MiB: the journal, and what a guest writes at first.
const DISK_FLOOR_MIB: u64 = 256;
/// What a VMM takes beside the guest's memory, in MiB.
const OVERHEAD_MIB: u32 = 64;
const CGROUPS: &str = "/sys/fs/cgroup";

/// What a machine may come to take of the host, in MiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Promise {
    /// The guest's memory and its VMM's.
    pub(crate) mem_mib: u32,
    pub(crate) disk_mib: u32,
}

/// What was promised to a number of machines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Promised {
    pub(crate) machines: u64,
    pub(crate) mem_mib: u64,
    pub(crate) disk_mib: u64,
}

/// How many times what the host has may be promised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Overcommit {
    pub(crate) memory: f64,
    pub(crate) disk: f64,
}

/// What the host has, in MiB; none where it does not tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Capacity {
    memory_mib: Option<u64>,
    free_disk_mib: Option<u64>,
}

impl Promise {
    /// What a guest of this size is promised.
    pub(crate) fn of(mem_mib: u32, disk_mib: u32) -> Self {
        Self { mem_mib: mem_mib + OVERHEAD_MIB, disk_mib }
    }
}

impl Promised {
    /// Adds what one more machine was promised.
    pub(crate) fn add(&mut self, promise: Promise) {
        self.machines += 1;
        self.mem_mib += u64::from(promise.mem_mib);
        self.disk_mib += u64::from(promise.disk_mib);
    }
}

impl Capacity {
    /// What this host has for machines with this state directory.
    pub(crate) fn of_host(state_dir: &Path) -> Self {
        let total = meminfo_mib("MemTotal:");
        let limit = memory_limit_mib(Path::new(CGROUPS));
        Self { memory_mib: total.into_iter().chain(limit).min(), free_disk_mib: free_disk_mib(state_dir) }
    }
}

impl Overcommit {
    /// Refuses a machine that does not fit beside what was promised to others.
    pub(crate) fn check(self, host: Capacity, promised: Promised, asked: Promise) -> Result<(), Error> {
        if asked == Promise::default() {
            return Ok(());
        }
        let Promised { machines, mem_mib, disk_mib } = promised;
        let lacks = |host_mib: Option<u64>, factor: f64, sum_mib: u64| {
            host_mib.filter(|host_mib| sum_mib as f64 > *host_mib as f64 * factor)
        };
        let others = match machines {
            1 => "1 machine was".to_owned(),
            _ => format!("{machines} machines were"),
        };
        if let Some(has) = lacks(host.memory_mib, self.memory, mem_mib + u64::from(asked.mem_mib)) {
            let text = format!(
                "not enough memory: this machine needs {} MiB; {others} promised {mem_mib} MiB of {has} MiB \
                 (overcommit {})",
                asked.mem_mib, self.memory
            );
            return Err(Error::new(ErrorKind::HostResources, text).hint(
                "delete machines, ask for less with --mem-mib (mem_mib), or raise PYRO_MEMORY_OVERCOMMIT",
            ));
        }
        if let Some(free) = lacks(host.free_disk_mib, self.disk, disk_mib + u64::from(asked.disk_mib)) {
            let text = format!(
                "not enough disk space: this machine's disk may grow to {} MiB; {others} promised {disk_mib} MiB, and \
                 {free} MiB are free (overcommit {})",
                asked.disk_mib, self.disk
            );
            return Err(Error::new(ErrorKind::HostResources, text).hint(
                "delete machines, ask for less with --disk-mib (disk_mib), or raise PYRO_DISK_OVERCOMMIT",
            ));
        }
        Ok(())
    }
}

/// Refuses a machine for which the host lacks memory or disk now.
pub(crate) fn check(state_dir: &Path, mem_mib: u32) -> Result<(), Error> {
    check_memory(meminfo_mib("MemAvailable:"), mem_mib)?;
    check_disk(state_dir, free_disk_mib(state_dir))
}

fn check_memory(available: Option<u64>, mem_mib: u32) -> Result<(), Error> {
    let needed = u64::from(mem_mib + OVERHEAD_MIB);
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

/// A line of `/proc/meminfo`.
fn meminfo_mib(name: &str) -> Option<u64> {
    let text = fs_err::read("/proc/meminfo").ok()?;
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib >> 10)
}

/// The least memory limit of this process's control group and those above it, as a container has one.
fn memory_limit_mib(cgroups: &Path) -> Option<u64> {
    let groups = fs_err::read_to_string("/proc/self/cgroup").ok()?;
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    least_limit_mib(cgroups, own)
}

fn least_limit_mib(cgroups: &Path, own: &str) -> Option<u64> {
    let own = cgroups.join(own);
    let with_parents = own.ancestors().take_while(|group| group.starts_with(cgroups));
    let limit = |group: &Path| {
        let path: PathBuf = group.join("memory.max");
        fs_err::read_to_string(path).ok()?.trim().parse::<u64>().ok().map(|bytes| bytes >> 20)
    };
    with_parents.filter_map(limit).min()
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
        assert!(meminfo_mib("MemAvailable:").is_some_and(|mib| mib > 0));
    }

    #[test]
    fn four_machines_of_16_gib_do_not_fit_a_host_of_60() {
        let host = Capacity { memory_mib: Some(60_000), free_disk_mib: Some(1000) };
        let overcommit = Overcommit { memory: 1.0, disk: 100.0 };
        let (mut promised, asked) = (Promised::default(), Promise::of(16_384, 8192));
        for _ in 0..3 {
            overcommit.check(host, promised, asked).expect("it fits");
            promised.add(asked);
        }
        let error = overcommit.check(host, promised, asked).expect_err("the fourth does not");
        assert_eq!(
            error.to_string(),
            "not enough memory: this machine needs 16448 MiB; 3 machines were promised 49344 MiB of 60000 MiB \
             (overcommit 1)"
        );
        assert!(error.remedy().is_some_and(|hint| hint.contains("PYRO_MEMORY_OVERCOMMIT")));
        Overcommit { memory: 1.5, ..overcommit }.check(host, promised, asked).expect("overcommitted");
        overcommit
            .check(host, promised, Promise::default())
            .expect("a command on the host is promised nothing");
    }

    #[test]
    fn disks_may_be_promised_many_times_over_and_not_without_end() {
        let host = Capacity { memory_mib: None, free_disk_mib: Some(400) };
        let overcommit = Overcommit { memory: 1.0, disk: 100.0 };
        let mut promised = Promised::default();
        while overcommit.check(host, promised, Promise::of(256, 8192)).is_ok() {
            promised.add(Promise::of(256, 8192));
        }
        assert_eq!(promised.machines, 4, "as many as the default cap lets in, on the smallest disk");
        let error = overcommit.check(host, promised, Promise::of(256, 8192)).expect_err("not the fifth");
        assert_eq!(
            error.to_string(),
            "not enough disk space: this machine's disk may grow to 8192 MiB; 4 machines were promised 32768 MiB, and \
             400 MiB are free (overcommit 100)"
        );
    }

    #[test]
    fn the_least_limit_of_a_control_group_and_its_parents_counts() {
        let dir = tempfile::tempdir().expect("a directory");
        let groups = dir.path();
        let limit = |group: &str, text: &str| {
            fs_err::create_dir_all(groups.join(group)).expect("made");
            fs_err::write(groups.join(group).join("memory.max"), text).expect("written");
        };
        assert_eq!(least_limit_mib(groups, "a/b"), None);
        limit("a/b", "max\n");
        assert_eq!(least_limit_mib(groups, "a/b"), None);
        limit("a", "4294967296\n");
        assert_eq!(least_limit_mib(groups, "a/b"), Some(4096));
        limit("a/b", "1073741824\n");
        assert_eq!(least_limit_mib(groups, "a/b"), Some(1024));
        assert_eq!(least_limit_mib(groups, ""), None);
    }
}
