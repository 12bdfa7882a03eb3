//! What tells one program, or one processor, from another that a saved machine would not go on with.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The lines of `/proc/cpuinfo` that say which processor it is and what it can do.
const TELLING: &[&str] = &["vendor_id", "cpu family", "model", "stepping", "microcode", "flags"];

/// A program's file as it is now: another build of the same version differs.
pub(crate) fn program_identity(binary: &Path) -> String {
    match fs_err::metadata(binary) {
        Ok(found) => format!("{}+{}.{:09}", found.size(), found.mtime(), found.mtime_nsec()),
        Err(_) => "missing".to_owned(),
    }
}

/// The first processor and the kernel that gives it to guests.
pub(crate) fn cpu_identity() -> String {
    let info = fs_err::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let first = info.split("\n\n").next().unwrap_or_default();
    let lines = first.lines().filter_map(|line| line.split_once(':'));
    let telling =
        lines.filter(|(name, _)| TELLING.contains(&name.trim())).map(|(_, value)| value.trim().to_owned());
    let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
    telling.chain([kernel]).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_and_a_program_are_told_by_what_they_are() {
        assert!(cpu_identity().split(' ').count() > 20, "{}", cpu_identity());
        assert_eq!(cpu_identity(), cpu_identity());
        let dir = tempfile::tempdir().expect("a directory");
        let program = dir.path().join("vmm");
        assert_eq!(program_identity(&program), "missing");
        fs_err::write(&program, "one").expect("written");
        let before = program_identity(&program);
        fs_err::write(&program, "another").expect("written");
        assert_ne!(before, program_identity(&program));
    }
}
