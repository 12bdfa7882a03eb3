//! The names of everything in the cache directory.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::{ImageError, files};

#[derive(Clone, Debug)]
pub(super) struct Paths {
    root: PathBuf,
}

pub(super) const ROOTFS: &str = "rootfs.erofs";
pub(super) const MANIFEST: &str = "manifest.json";
pub(super) const POINTER: &str = "current";
/// Which kernel takes the place of those of all environments; among the kernels.
pub(super) const OWN_KERNEL: &str = "own";
pub(super) const VMLINUX: &str = "vmlinux";
pub(super) const MODULES: &str = "modules";

impl Paths {
    /// Makes the directories; only their owner may look into them.
    pub(super) fn create(root: &Path) -> Result<Self, ImageError> {
        let root = std::path::absolute(root).map_err(ImageError::cache(root))?;
        let paths = Self { root };
        paths.refuse_anothers().map_err(ImageError::cache(&paths.root))?;
        for directory in [
            paths.root.clone(),
            paths.environments(),
            paths.kernels(),
            paths.staging(),
            paths.templates(),
            paths.root.join("locks"),
        ] {
            files::create_private_all(&directory).map_err(ImageError::cache(&directory))?;
        }
        let mode =
            fs_err::metadata(&paths.root).map_err(ImageError::cache(&paths.root))?.permissions().mode();
        if mode & 0o777 != 0o700 {
            let private = std::fs::Permissions::from_mode(0o700);
            fs_err::set_permissions(&paths.root, private).map_err(ImageError::cache(&paths.root))?;
        }
        Ok(paths)
    }

    /// A directory that holds other things is not made private and filled.
    fn refuse_anothers(&self) -> std::io::Result<()> {
        let entries = match fs_err::read_dir(&self.root) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            opened => opened?,
        };
        // What another process has just begun to make is ours; and a disk of its own has `lost+found`.
        let ours = ["envs", "kernels", "staging", "locks", "templates", "lost+found"];
        let mut others =
            entries.flatten().filter(|entry| !ours.iter().any(|name| entry.file_name() == *name));
        if self.environments().exists() || others.next().is_none() {
            return Ok(());
        }
        Err(std::io::Error::other("it holds other things; choose an empty directory"))
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn staging(&self) -> PathBuf {
        self.root.join("staging")
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
        self.root.join("locks").join(file_name(name))
    }

    pub(super) fn kernel(&self, digest: &str) -> PathBuf {
        self.kernels().join(digest)
    }

    pub(super) fn templates(&self) -> PathBuf {
        self.root.join("templates")
    }

    pub(super) fn template(&self, id: &str) -> PathBuf {
        self.templates().join(id)
    }

    pub(super) fn overlay(&self, size_mib: u32) -> PathBuf {
        self.root.join(format!("overlay-{size_mib}.ext4"))
    }
}

pub(super) fn file_name(name: &str) -> String {
    name.replace(':', "_")
}
