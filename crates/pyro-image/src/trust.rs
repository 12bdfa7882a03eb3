//! Whether a directory can be trusted: what is in it is run, mapped and believed, so nobody else may change it. It is looked
//! at before anything in it is made, changed or read.

use std::fmt;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::Access;

/// A directory that can be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// This user's, or not there yet.
    Own,
    /// One that this user can only read: root's, or on a file system that is mounted so.
    ReadOnly,
}

/// Why a directory cannot be trusted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Distrust {
    path: PathBuf,
    reason: Reason,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reason {
    NoDirectory,
    Foreign { user: u32 },
    Open { mode: u32 },
}

impl Trust {
    /// Looks at a directory, and changes nothing.
    ///
    /// # Errors
    /// Where it cannot be looked at; a directory that cannot be trusted is the inner error.
    pub fn of(path: &Path) -> io::Result<Result<Self, Distrust>> {
        let found = match fs_err::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Ok(Self::Own)),
            found => found?,
        };
        let distrust = |reason| Ok(Err(Distrust { path: path.to_owned(), reason }));
        let (owner, user, mode) = (found.uid(), rustix::process::geteuid().as_raw(), found.mode() & 0o7777);
        if !found.is_dir() {
            return distrust(Reason::NoDirectory);
        }
        if owner != user && owner != 0 {
            return distrust(Reason::Foreign { user: owner });
        }
        if mode & 0o022 != 0 {
            return distrust(Reason::Open { mode });
        }
        let is_writable = owner == user && rustix::fs::access(path, Access::WRITE_OK).is_ok();
        Ok(Ok(if is_writable { Self::Own } else { Self::ReadOnly }))
    }
}

impl Distrust {
    /// The command that mends it, where it can be mended.
    pub fn remedy(&self) -> Option<String> {
        match self.reason {
            Reason::Open { .. } => Some(format!("run: chmod go-w '{}'", self.path.display())),
            Reason::NoDirectory | Reason::Foreign { .. } => None,
        }
    }
}

impl fmt::Display for Distrust {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        match self.reason {
            Reason::NoDirectory => write!(formatter, "'{path}' is no directory"),
            Reason::Foreign { user } => write!(formatter, "'{path}' belongs to another user (uid {user})"),
            Reason::Open { mode } => {
                write!(formatter, "'{path}' can be changed by other users (mode {mode:04o})")
            }
        }
    }
}

impl std::error::Error for Distrust {}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn mode(path: &Path, mode: u32) {
        fs_err::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("set");
    }

    #[test]
    fn a_directory_that_others_may_change_is_not_trusted() {
        let root = tempfile::tempdir().expect("a directory");
        let dir = root.path().join("dir");
        let of = || Trust::of(&dir).expect("looked at");
        assert_eq!(of(), Ok(Trust::Own), "it will be made");
        fs_err::write(&dir, "").expect("written");
        assert_eq!(of().expect_err("a file").to_string(), format!("'{}' is no directory", dir.display()));
        fs_err::remove_file(&dir).expect("removed");
        fs_err::create_dir(&dir).expect("made");
        for trusted in [0o700, 0o755, 0o750] {
            mode(&dir, trusted);
            assert_eq!(of(), Ok(Trust::Own), "{trusted:o}");
        }
        for open in [0o777, 0o775, 0o1777, 0o702] {
            mode(&dir, open);
            let distrust = of().expect_err("open");
            assert!(distrust.to_string().ends_with(&format!("(mode {open:04o})")), "{distrust}");
            assert!(distrust.remedy().is_some_and(|remedy| remedy.contains("chmod")));
        }
        mode(&dir, 0o700);
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&dir, Some(65_534), None).expect("given away");
            assert!(of().expect_err("foreign").to_string().ends_with("(uid 65534)"));
        }
        assert_eq!(
            fs_err::metadata(&dir).expect("there").permissions().mode() & 0o777,
            0o700,
            "nothing was changed"
        );
    }
}
