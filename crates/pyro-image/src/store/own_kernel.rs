//! A kernel that somebody built for guests: it takes the place of the one that an environment was built with.
//!
//! It has everything built in that a guest needs, so it comes without modules. Which one is used, a pointer says; where
//! that kernel is missing or damaged, guests have the kernel of their environment again.

use std::path::Path;

use super::Store;
use super::entry::usable;
use super::install::{recorded, rename_into_place, shared};
use super::kernels::{StoredKernel, write_kernel};
use super::paths::OWN_KERNEL;
use crate::kernel::{self, Kernel, KernelError};
use crate::lock::Lock;
use crate::manifest::{self, FORMAT_VERSION, Pointer};
use crate::staging::Staging;
use crate::{ImageError, files};

/// The longest kernel, in bytes.
const MOST_KERNEL: u64 = 128 << 20;

/// A kernel that is in the store, and stays there for as long as this value lives. Guests do not boot with it before
/// [`Store::use_kernel`].
#[derive(Debug)]
pub struct AddedKernel {
    /// The SHA-256 of its file.
    pub digest: String,
    /// What it calls its release.
    pub release: String,
    _lease: Lock,
}

impl Store {
    /// Stores a kernel, an uncompressed `vmlinux`.
    ///
    /// # Errors
    /// When the file is no kernel for x86-64, or the cache cannot be written.
    pub fn add_kernel(&self, image: &Path) -> Result<AddedKernel, ImageError> {
        let bytes = files::read_bounded(image, MOST_KERNEL).map_err(|error| {
            if error.kind() == std::io::ErrorKind::FileTooLarge {
                ImageError::Kernel(KernelError::TooLarge)
            } else {
                ImageError::cache(image)(error)
            }
        })?;
        let release = kernel::release_of(&bytes).map_err(ImageError::Kernel)?;
        self.paths.check_writable(|| "a kernel cannot be stored".to_owned())?;
        let digest = recorded(image, &|| false)?.sha256;
        let root = self.paths.staging();
        let staging = Staging::create(&root, &self.tools).map_err(ImageError::cache(&root))?;
        let modules = kernel::LISTS.iter().map(|_| Vec::new()).collect();
        let kernel = Kernel { release: release.clone(), image: bytes, modules };
        let directory = write_kernel(&kernel, &digest, &staging, &|| false)?;
        let lease = rename_into_place(&directory, &self.paths.kernel(&digest), &staging)?;
        Ok(AddedKernel { digest, release, _lease: lease })
    }

    /// A store whose guests boot with this kernel, and with no other: to try it while all others boot with the one that
    /// they have.
    #[must_use]
    pub fn trying(mut self, kernel: &AddedKernel) -> Self {
        self.tried_kernel = Some(kernel.digest.clone());
        self
    }

    /// Lets all guests boot with this kernel from now on.
    ///
    /// # Errors
    /// When the cache cannot be written.
    pub fn use_kernel(&self, kernel: &AddedKernel) -> Result<(), ImageError> {
        let pointer = Pointer { format_version: FORMAT_VERSION, digest: kernel.digest.clone() };
        let bytes = manifest::encode(&pointer).map_err(ImageError::cache(self.paths.kernels()))?;
        let path = self.paths.kernels().join(OWN_KERNEL);
        files::replace(&path, &bytes).map_err(ImageError::cache(path))
    }

    /// Lets guests have the kernels of their environments again; says whether there was another.
    ///
    /// # Errors
    /// When the cache cannot be written.
    pub fn forget_kernel(&self) -> Result<bool, ImageError> {
        let path = self.paths.kernels().join(OWN_KERNEL);
        match fs_err::remove_file(&path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(ImageError::cache(path)(error)),
        }
    }

    /// The digest and the release of the kernel that takes the place of others, if there is one that is whole.
    ///
    /// # Errors
    /// When the cache cannot be read.
    pub fn kernel_in_use(&self) -> Result<Option<(String, String)>, ImageError> {
        let found = self.own_kernel()?;
        Ok(found.map(|(kernel, _lease)| (kernel.manifest.digest, kernel.manifest.release)))
    }

    /// The kernel that takes the place of others, and a lease on it.
    pub(super) fn own_kernel(&self) -> Result<Option<(StoredKernel, Lock)>, ImageError> {
        let Some(digest) = self.own_kernel_digest()? else { return Ok(None) };
        let Some(lease) = shared(&self.paths.kernel(&digest))? else { return Ok(None) };
        let Some(kernel) = self.stored_kernel(&digest)? else { return Ok(None) };
        if !kernel.looks_untouched() {
            if kernel.verify(&|| false)?.is_some() {
                return Ok(None);
            }
            kernel.refresh(&|| false)?;
        }
        Ok(Some((kernel, lease)))
    }

    pub(super) fn own_kernel_digest(&self) -> Result<Option<String>, ImageError> {
        if self.tried_kernel.is_some() {
            return Ok(self.tried_kernel.clone());
        }
        let pointer = usable(&self.paths.kernels().join(OWN_KERNEL), Pointer::parse)?;
        Ok(pointer.map(|pointer| pointer.digest))
    }
}
