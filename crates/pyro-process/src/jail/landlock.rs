//! Landlock: rules about files that a process lays upon itself, on top of what its mounts and its user allow.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreated, RulesetCreatedAttr, Scope,
};

use super::Bind;

/// The newest version whose rights are handled; a kernel with an older one handles those that it knows.
const NEWEST: ABI = ABI::V6;

/// Whether this kernel has Landlock.
pub fn has_landlock() -> bool {
    // SAFETY: asks for a version number; no memory is read.
    #[expect(unsafe_code, reason = "no library asks without making a ruleset")]
    let version = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<libc::c_void>(), 0_usize, 1_u32)
    };
    version > 0
}

/// Allows everything below `root`, and what `files` say; nothing else. None where the kernel has no Landlock.
pub(super) fn ruleset<'a>(
    root: Option<&Path>,
    files: impl Iterator<Item = (&'a Path, Bind)>,
) -> io::Result<Option<OwnedFd>> {
    let made = || -> Result<Option<OwnedFd>, Box<dyn std::error::Error + Send + Sync>> {
        let mut ruleset = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(NEWEST))?
            .handle_access(AccessNet::from_all(NEWEST))?
            .scope(Scope::from_all(NEWEST))?
            .create()?;
        if let Some(root) = root {
            ruleset = allow(ruleset, root, AccessFs::from_all(NEWEST))?;
        }
        let read = AccessFs::ReadFile | AccessFs::Execute;
        let write = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::IoctlDev;
        for (file, bind) in files {
            let access = match bind {
                Bind::Read => read,
                Bind::Write if file.is_dir() => AccessFs::from_all(NEWEST),
                Bind::Write => write,
            };
            // A rule is about the file itself, so it holds wherever the file is shown.
            ruleset = allow(ruleset, file, access)?;
        }
        Ok(ruleset.into())
    };
    made().map_err(io::Error::other)
}

fn allow(
    ruleset: RulesetCreated,
    path: &Path,
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, Box<dyn std::error::Error + Send + Sync>> {
    Ok(ruleset.add_rule(PathBeneath::new(PathFd::new(path)?, access))?)
}

/// Lays the rules upon this process for good.
#[expect(unsafe_code, reason = "a Landlock ruleset that was made before the fork")]
pub(super) fn restrict(ruleset: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: a system call on a descriptor.
    match unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0_u32) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
