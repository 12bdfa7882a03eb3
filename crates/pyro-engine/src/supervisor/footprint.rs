//! Keeping the supervisor small: it lives for as long as its task, and needs little of what a boot needs.

#![expect(unsafe_code, reason = "advice about this process's own memory")]

use rustix::mm::{Advice, madvise};

/// Lets go of the program code that was mapped for the boot. What is run again is mapped again, from memory that all
/// pyro processes share; what only a boot runs no longer counts.
///
/// Only mappings that hold nothing but code are touched: they are never written, so nothing of them can be lost.
pub(super) fn release_boot_code() {
    let Ok(maps) = fs_err::read_to_string("/proc/self/maps") else { return };
    for (start, length) in maps.lines().filter_map(code) {
        let start = std::ptr::with_exposed_provenance_mut(start);
        // SAFETY: the mapping is of a file, private, executable and not writable: its pages are those of the file,
        // which the next access brings back.
        _ = unsafe { madvise(start, length, Advice::LinuxDontNeed) };
    }
}

/// Start and length of a mapping of code from a file.
fn code(line: &str) -> Option<(usize, usize)> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let is_code = fields.next()? == "r-xp" && fields.nth(3)?.starts_with('/');
    let (start, end) = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
    is_code.then_some((start, end.checked_sub(start)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_of_files_is_let_go_of() {
        let line = "55d0c0a00000-55d0c0a01000 r-xp 00001000 fe:00 131 /usr/bin/pyro";
        assert_eq!(code(line), Some((0x55d0_c0a0_0000, 0x1000)));
        for other in [
            "55d0c0a00000-55d0c0a01000 r--p 00001000 fe:00 131 /usr/bin/pyro",
            "55d0c0a00000-55d0c0a01000 rwxp 00001000 fe:00 131 /usr/bin/pyro",
            "7ffd1000-7ffd2000 r-xp 00000000 00:00 0 [vdso]",
            "7ffd1000-7ffd2000 r-xp 00000000 00:00 0",
            "",
        ] {
            assert_eq!(code(other), None, "{other}");
        }
    }

    #[test]
    fn a_program_goes_on_without_its_code_in_memory() {
        release_boot_code();
        assert_eq!("still".to_owned() + " here", "still here");
    }
}
