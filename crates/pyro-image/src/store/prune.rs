//! Removing what nobody uses.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::Store;
use super::entry::usable;
use super::paths::{MANIFEST, POINTER, file_name};
use crate::catalog::CATALOG;
use crate::lock::{self, Attempt, Mode};
use crate::manifest::{Manifest, Pointer};
use crate::staging::{self, Staging};
use crate::{ImageError, digest, files};

/// The result of a prune.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Pruned {
    /// Install directories that were removed, sorted.
    pub deleted_environment_dirs: Vec<PathBuf>,
    /// How many these are.
    pub count: usize,
    /// Environments that were kept because a guest or a pull uses them, sorted.
    pub in_use: Vec<String>,
    /// Bytes on disk that were given back, as far as they could be counted.
    pub freed_bytes: u64,
}

impl Store {
    pub(super) fn prune_all(&self) -> Result<Pruned, ImageError> {
        let root = self.paths.staging();
        staging::sweep(&root, &self.tools).map_err(ImageError::cache(&root))?;
        let staging = Staging::create(&root, &self.tools).map_err(ImageError::cache(&root))?;
        let mut pruned = Pruned::default();
        let mut in_use = BTreeSet::new();
        // Environments that can only be read are another's to remove.
        if !self.paths.is_read_only() {
            let mut kernels_kept: BTreeSet<String> = self.own_kernel_digest()?.into_iter().collect();
            for home in entries(&self.paths.environments())? {
                self.prune_environment(&home, &staging, &mut pruned, &mut in_use, &mut kernels_kept)?;
            }
            self.prune_kernels(&kernels_kept, &staging, &mut pruned)?;
        }
        pruned.freed_bytes += self.prune_templates(&staging)?;
        if in_use.is_empty() {
            self.prune_overlays(&mut pruned)?;
        }
        pruned.deleted_environment_dirs.sort();
        pruned.count = pruned.deleted_environment_dirs.len();
        pruned.in_use = in_use.into_iter().collect();
        Ok(pruned)
    }

    fn prune_environment(
        &self,
        home: &Path,
        staging: &Staging,
        pruned: &mut Pruned,
        in_use: &mut BTreeSet<String>,
        kernels_kept: &mut BTreeSet<String>,
    ) -> Result<(), ImageError> {
        let directory_name = home.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let name = CATALOG
            .iter()
            .map(|definition| definition.name)
            .find(|name| file_name(name) == directory_name)
            .map_or(directory_name, str::to_owned);
        // Whoever pulls it holds this lock; without it, what is being installed could be taken for old.
        let lock = self.paths.lock(&name);
        let Attempt::Locked(_pull_lock) = lock::attempt_file(&lock).map_err(ImageError::cache(lock))? else {
            for install in entries(home)? {
                kernels_kept.extend(kernel_of(&install)?);
            }
            in_use.insert(name);
            return Ok(());
        };
        let mut kept = false;
        for install in entries(home)? {
            if !is_digest_directory(&install) {
                continue;
            }
            match lock::attempt(&install, Mode::Exclusive).map_err(ImageError::cache(&install))? {
                Attempt::Locked(_held) => {
                    pruned.freed_bytes += disk_bytes(&install);
                    staging.discard(&install).map_err(ImageError::cache(&install))?;
                    pruned.deleted_environment_dirs.push(install);
                }
                Attempt::Held => {
                    kept = true;
                    kernels_kept.extend(kernel_of(&install)?);
                    in_use.insert(name.clone());
                }
                Attempt::Gone => {}
            }
        }
        let pointer = home.join(POINTER);
        let dangling = match usable(&pointer, Pointer::parse) {
            Ok(found) => found.is_none_or(|found| !home.join(found.digest).exists()),
            // A newer pyro has written it, and may have installations that are not known here.
            Err(ImageError::Manifest { .. }) => {
                in_use.insert(name);
                return files::sync_directory(home).map_err(ImageError::cache(home));
            }
            Err(error) => return Err(error),
        };
        if dangling && pointer.exists() {
            fs_err::remove_file(&pointer).map_err(ImageError::cache(&pointer))?;
        }
        if kept {
            return files::sync_directory(home).map_err(ImageError::cache(home));
        }
        staging.discard(home).map_err(ImageError::cache(home))
    }

    fn prune_kernels(
        &self,
        kept: &BTreeSet<String>,
        staging: &Staging,
        pruned: &mut Pruned,
    ) -> Result<(), ImageError> {
        for directory in entries(&self.paths.kernels())? {
            let digest = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if kept.contains(&digest) {
                self.prune_initramfs(&directory)?;
                continue;
            }
            // A lock that is held belongs to a guest, or to a pull that has yet to name this kernel; one that is free
            // may belong to a pull that has named it since the first look.
            if let Attempt::Locked(_held) =
                lock::attempt(&directory, Mode::Exclusive).map_err(ImageError::cache(&directory))?
                && !self.kernels_named()?.contains(&digest)
            {
                pruned.freed_bytes += disk_bytes(&directory);
                staging.discard(&directory).map_err(ImageError::cache(&directory))?;
            }
        }
        Ok(())
    }

    /// The kernels that any installation needs now.
    fn kernels_named(&self) -> Result<BTreeSet<String>, ImageError> {
        let mut named = BTreeSet::new();
        for home in entries(&self.paths.environments())? {
            for install in entries(&home)? {
                named.extend(kernel_of(&install)?);
            }
        }
        Ok(named)
    }

    /// Those of other agents, unless a guest that such an agent serves still has its own.
    fn prune_initramfs(&self, kernel: &Path) -> Result<(), ImageError> {
        for file in entries(kernel)? {
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let old = name.starts_with("initramfs-")
                && name.ends_with(".cpio")
                && !name.contains(self.agent_digest());
            if old
                && let Attempt::Locked(_held) =
                    lock::attempt(&file, Mode::Exclusive).map_err(ImageError::cache(&file))?
            {
                let record = file.with_extension("json");
                for path in [&file, &record] {
                    match fs_err::remove_file(path) {
                        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                            return Err(ImageError::cache(path)(error));
                        }
                        _ => {}
                    }
                }
            }
        }
        Ok(())
    }

    /// Templates are remade in a moment, so they go whenever no guest can be about to copy one.
    fn prune_overlays(&self, pruned: &mut Pruned) -> Result<(), ImageError> {
        for file in entries(self.paths.own())? {
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.starts_with("overlay-") && name.ends_with(".ext4") {
                pruned.freed_bytes += disk_bytes(&file);
                fs_err::remove_file(&file).map_err(ImageError::cache(&file))?;
            }
        }
        Ok(())
    }
}

pub(super) fn entries(directory: &Path) -> Result<Vec<PathBuf>, ImageError> {
    let found = fs_err::read_dir(directory).and_then(|entries| {
        entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<PathBuf>>>()
    });
    let mut found = match found {
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => Vec::new(),
        other => other.map_err(ImageError::cache(directory))?,
    };
    found.sort();
    Ok(found)
}

fn is_digest_directory(path: &Path) -> bool {
    path.is_dir() && path.file_name().and_then(|name| name.to_str()).is_some_and(digest::is_digest)
}

/// The kernel that an install directory needs; a garbled manifest needs none.
fn kernel_of(install: &Path) -> Result<Option<String>, ImageError> {
    if !is_digest_directory(install) {
        return Ok(None);
    }
    match usable(&install.join(MANIFEST), Manifest::parse) {
        Ok(manifest) => Ok(manifest.map(|manifest| manifest.kernel_digest)),
        // Written by a newer pyro: its kernel has a name that is not known here.
        Err(ImageError::Manifest { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

pub(super) fn disk_bytes(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;

    let Ok(metadata) = fs_err::symlink_metadata(path) else { return 0 };
    let below = if metadata.is_dir() {
        entries(path).unwrap_or_default().iter().map(|path| disk_bytes(path)).sum()
    } else {
        0
    };
    metadata.blocks() * 512 + below
}
