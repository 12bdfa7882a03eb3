//! The names of everything in the cache directory.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::trust::Trust;
use crate::{ImageError, files};

#[derive(Clone, Debug)]
pub(super) struct Paths {
    /// Environments and kernels.
    root: PathBuf,
    /// All that is made for this user's machines: the same directory, unless that can only be read.
    own: PathBuf,
}

pub(super) const ROOTFS: &str = "rootfs.erofs";
pub(super) const MANIFEST: &str = "manifest.json";
pub(super) const POINTER: &str = "current";
/// Which kernel takes the place of those of all environments; among the kernels.
pub(super) const OWN_KERNEL: &str = "own";
pub(super) const VMLINUX: &str = "vmlinux";
pub(super) const MODULES: &str = "modules";

impl Paths {
    /// Makes the directories; only their owner may look into them. Nothing is changed before the cache directory is known to
    /// be this user's. One that can only be read has its environments used; what else is needed goes into `private`.
    pub(super) fn create(root: &Path, private: &Path) -> Result<Self, ImageError> {
        let root = std::path::absolute(root).map_err(ImageError::cache(root))?;
        let trust = Trust::of(&root).map_err(ImageError::cache(&root))?.map_err(ImageError::Distrusted)?;
        let paths = match trust {
            Trust::Own => Self { own: root.clone(), root },
            Trust::ReadOnly if root.join("envs").is_dir() => {
                Self { own: std::path::absolute(private).map_err(ImageError::cache(private))?, root }
            }
            Trust::ReadOnly => {
                let what = "there are no environments".to_owned();
                return Err(ImageError::ReadOnly { what, path: root });
            }
        };
        paths.make_own()?;
        Ok(paths)
    }

    fn make_own(&self) -> Result<(), ImageError> {
        self.refuse_anothers().map_err(ImageError::cache(&self.own))?;
        let mut directories =
            vec![self.own.clone(), self.staging(), self.templates(), self.own.join("locks")];
        if !self.is_read_only() {
            directories.extend([self.environments(), self.kernels()]);
        }
        for directory in directories {
            files::create_private_all(&directory).map_err(ImageError::cache(&directory))?;
        }
        let mode = fs_err::metadata(&self.own).map_err(ImageError::cache(&self.own))?.permissions().mode();
        if mode & 0o777 != 0o700 {
            let private = std::fs::Permissions::from_mode(0o700);
            fs_err::set_permissions(&self.own, private).map_err(ImageError::cache(&self.own))?;
        }
        Ok(())
    }

    /// A directory that holds other things is not made private and filled.
    fn refuse_anothers(&self) -> std::io::Result<()> {
        let entries = match fs_err::read_dir(&self.own) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            opened => opened?,
        };
        // What another process has just begun to make is ours; and a disk of its own has `lost+found`.
        let ours = ["envs", "kernels", "staging", "locks", "templates", "initramfs", "lost+found"];
        let mut others =
            entries.flatten().filter(|entry| !ours.iter().any(|name| entry.file_name() == *name));
        if self.own.join("envs").exists() || self.templates().exists() || others.next().is_none() {
            return Ok(());
        }
        Err(std::io::Error::other("it holds other things; choose an empty directory"))
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Where machines' own files are made.
    pub(super) fn own(&self) -> &Path {
        &self.own
    }

    /// Whether environments and kernels can only be read.
    pub(super) fn is_read_only(&self) -> bool {
        self.own != self.root
    }

    /// Refuses to change environments or kernels that can only be read.
    pub(super) fn check_writable(&self, what: impl FnOnce() -> String) -> Result<(), ImageError> {
        if self.is_read_only() {
            return Err(ImageError::ReadOnly { what: what(), path: self.root.clone() });
        }
        Ok(())
    }

    pub(super) fn staging(&self) -> PathBuf {
        self.own.join("staging")
    }

    pub(super) fn environments(&self) -> PathBuf {
        self.root.join("envs")
    }

    pub(super) fn kernels(&self) -> PathBuf {
        self.root.join("kernels")
    }

    /// The directory of all installations of an environment.
    pub(super) fn environment(&self, name: &str) -> PathBuf {
        self.environments().join(file_name(name))
    }

    pub(super) fn lock(&self, name: &str) -> PathBuf {
        self.own.join("locks").join(file_name(name))
    }

    pub(super) fn kernel(&self, digest: &str) -> PathBuf {
        self.kernels().join(digest)
    }

    /// Where the initramfs of a kernel is made that can only be read.
    pub(super) fn own_initramfs(&self, kernel_digest: &str) -> PathBuf {
        self.own.join("initramfs").join(kernel_digest)
    }

    pub(super) fn templates(&self) -> PathBuf {
        self.own.join("templates")
    }

    pub(super) fn template(&self, id: &str) -> PathBuf {
        self.templates().join(id)
    }

    pub(super) fn overlay(&self, size_mib: u32) -> PathBuf {
        self.own.join(format!("overlay-{size_mib}.ext4"))
    }
}

pub(super) fn file_name(name: &str) -> String {
    name.replace(':', "_")
}
