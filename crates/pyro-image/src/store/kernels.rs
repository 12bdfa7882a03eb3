//! Stored kernels, and the initramfs for each agent.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::Store;
use super::entry::{usable, verify_file};
use super::install::{recorded, rename_into_place, shared, write_in};
use super::paths::{MANIFEST, MODULES, VMLINUX};
use crate::initramfs::{self, ModuleFile};
use crate::kernel::{self, Kernel, Module};
use crate::lock::{self, Attempt, Lock, Mode};
use crate::manifest::{self, FORMAT_VERSION, InitramfsManifest, KernelManifest};
use crate::staging::Staging;
use crate::{ImageError, digest, files};

/// A kernel as its manifest describes it.
#[derive(Clone, Debug)]
pub(super) struct StoredKernel {
    directory: PathBuf,
    pub(super) manifest: KernelManifest,
}

impl StoredKernel {
    pub(super) fn image(&self) -> PathBuf {
        self.directory.join(VMLINUX)
    }

    pub(super) fn looks_untouched(&self) -> bool {
        self.is_complete()
            && self
                .manifest
                .files
                .iter()
                .all(|(name, record)| record.looks_untouched(&self.directory.join(name)))
    }

    /// Hashes everything; the text says what is wrong.
    pub(super) fn verify(&self, cancelled: &dyn Fn() -> bool) -> Result<Option<String>, ImageError> {
        if !self.is_complete() {
            return Ok(Some("the kernel's manifest is incomplete".to_owned()));
        }
        for (name, record) in &self.manifest.files {
            let problem = verify_file(&self.directory.join(name), record, cancelled)?;
            if problem.is_some() {
                return Ok(problem);
            }
        }
        Ok(None)
    }

    /// Writes the present times and inodes down.
    pub(super) fn refresh(&self, cancelled: &dyn Fn() -> bool) -> Result<(), ImageError> {
        let mut manifest = self.manifest.clone();
        for (name, record) in &mut manifest.files {
            *record = recorded(&self.directory.join(name), cancelled)?;
        }
        let path = self.directory.join(MANIFEST);
        let bytes = manifest::encode(&manifest).map_err(ImageError::cache(&path))?;
        files::replace(&path, &bytes).map_err(ImageError::cache(path))
    }

    fn is_complete(&self) -> bool {
        let has = |name: &str| self.manifest.files.contains_key(name);
        has(VMLINUX) && kernel::LISTS.iter().all(|(order, _)| has(&in_modules(order)))
    }
}

impl Store {
    /// The kernel of this package digest; `None` when it is missing or its manifest is garbled.
    pub(super) fn stored_kernel(&self, digest: &str) -> Result<Option<StoredKernel>, ImageError> {
        let directory = self.paths.kernel(digest);
        let found = usable(&directory.join(MANIFEST), KernelManifest::parse)?;
        Ok(found
            .filter(|manifest| manifest.digest == digest)
            .map(|manifest| StoredKernel { directory, manifest }))
    }

    /// The kernels that are whole, each held by a shared lock so that it stays.
    pub(super) fn whole_kernels(
        &self,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<BTreeMap<String, Lock>, ImageError> {
        let root = self.paths.kernels();
        let mut whole = BTreeMap::new();
        for entry in fs_err::read_dir(&root).map_err(ImageError::cache(&root))? {
            let entry = entry.map_err(ImageError::cache(&root))?;
            let Some(digest) =
                entry.file_name().to_str().filter(|name| digest::is_digest(name)).map(str::to_owned)
            else {
                continue;
            };
            let directory = entry.path();
            let Attempt::Locked(lease) =
                lock::attempt(&directory, Mode::Shared).map_err(ImageError::cache(&directory))?
            else {
                continue;
            };
            if let Some(kernel) = self.stored_kernel(&digest)?
                && kernel.verify(cancelled)?.is_none()
            {
                whole.insert(digest, lease);
            }
        }
        Ok(whole)
    }

    /// Takes a package apart and stores what is in it; returns its digest and a lease.
    pub(super) fn store_kernel(
        &self,
        package: &Path,
        staging: &Staging,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<(String, Lock), ImageError> {
        let digest = recorded(package, cancelled)?.sha256;
        let file = fs_err::File::open(package).map_err(ImageError::cache(package))?;
        let kernel = kernel::unpack_package(std::io::BufReader::new(file), cancelled)?;
        let directory = write_kernel(&kernel, &digest, staging, cancelled)?;
        let lease = rename_into_place(&directory, &self.paths.kernel(&digest), staging)?;
        Ok((digest, lease))
    }

    /// The initramfs of a kernel with this store's agent, made when it is missing or was touched, and a lease
    /// on it.
    pub(super) fn initramfs(&self, kernel: &StoredKernel) -> Result<(PathBuf, Lock), ImageError> {
        const ATTEMPTS: usize = 3;
        let name = format!("initramfs-{}.cpio", self.agent_digest());
        let mut path = kernel.directory.join(&name);
        if self.paths.is_read_only() && !path.exists() {
            let directory = self.paths.own_initramfs(&kernel.manifest.digest);
            files::create_private_all(&directory).map_err(ImageError::cache(&directory))?;
            path = directory.join(name);
        }
        let record = path.with_extension("json");
        for _ in 0..ATTEMPTS {
            if let Some(manifest) = usable(&record, InitramfsManifest::parse)?
                && let Some(lease) = shared(&path)?
                && manifest.file.looks_untouched(&path)
            {
                return Ok((path, lease));
            }
            // Deterministic: whoever else makes it at this moment writes the same bytes, so that only the
            // record may have to be written once more.
            let bytes = self.build_initramfs(kernel).map_err(ImageError::cache(&path))?;
            files::replace(&path, &bytes).map_err(ImageError::cache(&path))?;
            let manifest =
                InitramfsManifest { format_version: FORMAT_VERSION, file: recorded(&path, &|| false)? };
            let text = manifest::encode(&manifest).map_err(ImageError::cache(&record))?;
            files::replace(&record, &text).map_err(ImageError::cache(&record))?;
        }
        let error = std::io::Error::other("other processes keep changing it");
        Err(ImageError::cache(path)(error))
    }

    fn build_initramfs(&self, kernel: &StoredKernel) -> std::io::Result<Vec<u8>> {
        const MOST: u64 = 64 << 20;
        let directory = kernel.directory.join(MODULES);
        let read = |name: &str| -> std::io::Result<ModuleFile> {
            Ok(ModuleFile { name: name.to_owned(), bytes: files::read_bounded(&directory.join(name), MOST)? })
        };
        let mut modules = Vec::new();
        for (list, _) in kernel::LISTS {
            let order = read(list)?;
            let names = String::from_utf8_lossy(&order.bytes).into_owned();
            for name in names.lines() {
                modules.push(read(name)?);
            }
            modules.push(order);
        }
        initramfs::build(&self.config.0.agent, &modules)
    }
}

/// Writes a kernel with its manifest into the staging directory.
pub(super) fn write_kernel(
    kernel: &Kernel,
    digest: &str,
    staging: &Staging,
    cancelled: &dyn Fn() -> bool,
) -> Result<PathBuf, ImageError> {
    let directory = staging.path().join("kernel");
    let modules = directory.join(MODULES);
    for made in [&directory, &modules] {
        fs_err::create_dir(made).map_err(ImageError::cache(made))?;
    }
    let mut files = BTreeMap::new();
    let mut add = |name: String, bytes: &[u8]| -> Result<(), ImageError> {
        files.insert(name.clone(), write_in(&directory, &name, bytes, cancelled)?);
        Ok(())
    };
    add(VMLINUX.to_owned(), &kernel.image)?;
    let mut number = 0;
    for (list, (order, _)) in kernel.modules.iter().zip(kernel::LISTS) {
        let named = named(list, &mut number);
        let text: String = named.iter().map(|(name, _)| format!("{name}\n")).collect();
        add(in_modules(order), text.as_bytes())?;
        for (name, module) in named {
            add(in_modules(&name), &module.bytes)?;
        }
    }
    let manifest = KernelManifest {
        format_version: FORMAT_VERSION,
        digest: digest.to_owned(),
        release: kernel.release.clone(),
        files,
    };
    let bytes = manifest::encode(&manifest).map_err(ImageError::cache(&directory))?;
    write_in(&directory, MANIFEST, &bytes, cancelled)?;
    files::sync_directory(&modules).map_err(ImageError::cache(&modules))?;
    Ok(directory)
}

fn in_modules(name: &str) -> String {
    format!("{MODULES}/{name}")
}

/// File names that sort in the order of loading.
fn named<'a>(modules: &'a [Module], number: &mut usize) -> Vec<(String, &'a Module)> {
    modules
        .iter()
        .map(|module| {
            *number += 1;
            (format!("{:02}-{}.ko", *number, module.name), module)
        })
        .collect()
}
