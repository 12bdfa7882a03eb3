//! Building an environment and putting it in place.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use pyro_process::lock_holder;

use super::entry::{Installation, Pulled};
use super::kernels::StoredKernel;
use super::paths::{MANIFEST, POINTER, ROOTFS};
use super::{Environment, Store};
use crate::catalog::Definition;
use crate::debian::{self, KernelSource, Request, Sources};
use crate::digest::DigestError;
use crate::lock::{self, Attempt, Lock, Mode};
use crate::manifest::{self, FORMAT_VERSION, FileRecord, Manifest, Pointer};
use crate::progress::Progress;
use crate::staging::Staging;
use crate::tree::{Limits, flatten};
use crate::{ImageError, erofs, files};

const SOURCE: &str = "debian-packages";
/// How often a lock that somebody else holds is tried.
const BEAT: Duration = Duration::from_millis(100);
/// How often its holder is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// How long it is waited for: longer than a build takes.
const LONGEST_BUILD: Duration = Duration::from_secs(3600);
/// How long it is waited for while its holder is stopped, and so does not build.
const STOPPED: Duration = Duration::from_secs(7);

/// How closely an installation is looked at before it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scrutiny {
    /// Size, time and inode; what differs in them is hashed.
    Cheap,
    /// Every byte.
    Full,
}

impl Store {
    pub(super) fn ensure_definition(
        &self,
        definition: &Definition,
        progress: &dyn Progress,
    ) -> Result<Environment, ImageError> {
        const ATTEMPTS: usize = 3;
        // A prune may remove what was just installed before it is leased; then it is installed again.
        for _ in 0..ATTEMPTS {
            if let Some(environment) = self.lease_current(definition, Scrutiny::Cheap, progress)? {
                return Ok(environment);
            }
            let (environment, _built) = self.install(definition, Scrutiny::Cheap, progress)?;
            if let Some(environment) = environment {
                return Ok(environment);
            }
        }
        Err(ImageError::InUse { name: definition.name.to_owned() })
    }

    pub(super) fn pull_definition(
        &self,
        definition: &Definition,
        progress: &dyn Progress,
    ) -> Result<Pulled, ImageError> {
        let (environment, built) = self.install(definition, Scrutiny::Full, progress)?;
        let environment =
            environment.ok_or_else(|| ImageError::InUse { name: definition.name.to_owned() })?;
        Ok(Pulled {
            entry: self.entry(definition)?,
            kernel_image: environment.kernel.clone(),
            initramfs_image: environment.initramfs.clone(),
            rootfs_image: environment.rootfs.clone(),
            source: if built { SOURCE } else { "cache" }.to_owned(),
        })
    }

    /// Builds unless there is a whole installation; says whether it built.
    fn install(
        &self,
        definition: &Definition,
        scrutiny: Scrutiny,
        progress: &dyn Progress,
    ) -> Result<(Option<Environment>, bool), ImageError> {
        let _lock = self.lock_environment(definition, progress)?;
        if let Some(environment) = self.lease_current(definition, scrutiny, progress)? {
            return Ok((Some(environment), false));
        }
        self.build(definition, progress)?;
        Ok((self.lease_current(definition, Scrutiny::Cheap, progress)?, true))
    }

    fn lock_environment(&self, definition: &Definition, progress: &dyn Progress) -> Result<Lock, ImageError> {
        let path = self.paths.lock(definition.name);
        let began = Instant::now();
        let mut told = None;
        let mut looked: Option<Instant> = None;
        // Since when its holder is stopped, as by Ctrl-Z.
        let mut stopped: Option<Instant> = None;
        loop {
            match lock::attempt_file(&path).map_err(ImageError::cache(&path))? {
                Attempt::Locked(file) => return Ok(file),
                Attempt::Held | Attempt::Gone => {}
            }
            if progress.cancelled() {
                return Err(ImageError::Cancelled);
            }
            if looked.is_none_or(|looked| looked.elapsed() >= LOOK) {
                looked = Some(Instant::now());
                let holder = lock_holder(&path);
                let words = holder.as_ref().map_or_else(|| "another process".to_owned(), ToString::to_string);
                if told.as_ref() != Some(&words) {
                    let detail = format!("for {words}, to pull the same environment");
                    progress.phase("waiting", &detail);
                    told = Some(words);
                }
                let is_stopped = holder.as_ref().is_some_and(|holder| holder.is_stopped);
                stopped = is_stopped.then(|| stopped.unwrap_or_else(Instant::now));
                let waited = began.elapsed();
                if waited >= LONGEST_BUILD || stopped.is_some_and(|since| since.elapsed() >= STOPPED) {
                    return Err(ImageError::LockHeld { name: definition.name.to_owned(), holder, waited });
                }
            }
            std::thread::sleep(BEAT);
        }
    }

    /// Leases the present installation if it is whole.
    fn lease_current(
        &self,
        definition: &Definition,
        scrutiny: Scrutiny,
        progress: &dyn Progress,
    ) -> Result<Option<Environment>, ImageError> {
        let Some(installation) = self.installation(definition)? else { return Ok(None) };
        self.lease_installation(definition, &installation, scrutiny, progress)
    }

    /// The installation that a disk was made upon, which may not be the present one any more.
    pub(super) fn lease_digest(
        &self,
        definition: &Definition,
        digest: &str,
        progress: &dyn Progress,
    ) -> Result<Environment, ImageError> {
        let lost = || ImageError::Replaced { name: definition.name.to_owned(), digest: digest.to_owned() };
        if !crate::digest::is_digest(digest) {
            return Err(lost());
        }
        let installation = self.installation_of(definition, digest)?.ok_or_else(lost)?;
        self.lease_installation(definition, &installation, Scrutiny::Cheap, progress)?.ok_or_else(lost)
    }

    fn lease_installation(
        &self,
        definition: &Definition,
        installation: &Installation,
        scrutiny: Scrutiny,
        progress: &dyn Progress,
    ) -> Result<Option<Environment>, ImageError> {
        let cancelled = || progress.cancelled();
        let Some(rootfs_lease) = shared(&installation.directory)? else { return Ok(None) };
        // What looks touched and is whole gets its present times written down, so that the next look is cheap again.
        if scrutiny == Scrutiny::Full || !installation.looks_untouched() {
            progress.phase("verifying", definition.name);
            if installation.verify(&cancelled)?.is_some() {
                return Ok(None);
            }
            if !installation.looks_untouched() && !self.paths.is_read_only() {
                refresh(installation, &cancelled)?;
            }
        }
        let Some((kernel, kernel_lease)) = self.kernel_for(installation, scrutiny, progress)? else {
            return Ok(None);
        };
        let (initramfs, initramfs_lease) = self.initramfs(&kernel)?;
        Ok(Some(Environment {
            name: definition.name.to_owned(),
            version: installation.manifest.version.clone(),
            digest: installation.manifest.digest.clone(),
            kernel_digest: kernel.manifest.digest.clone(),
            kernel: kernel.image(),
            initramfs,
            rootfs: installation.rootfs(),
            _leases: [rootfs_lease, kernel_lease, initramfs_lease],
        }))
    }

    /// The kernel that guests of an installation boot with, and a lease on it: one's own, or that of the installation.
    fn kernel_for(
        &self,
        installation: &Installation,
        scrutiny: Scrutiny,
        progress: &dyn Progress,
    ) -> Result<Option<(StoredKernel, Lock)>, ImageError> {
        let cancelled = || progress.cancelled();
        let own = self.own_kernel()?;
        if let (Some(tried), None) = (&self.tried_kernel, &own) {
            // It would be another kernel that proves itself.
            let path = self.paths.kernel(tried);
            return Err(ImageError::cache(path)(std::io::ErrorKind::NotFound.into()));
        }
        let digest = &installation.manifest.kernel_digest;
        let Some(lease) = shared(&self.paths.kernel(digest))? else { return Ok(None) };
        let Some(kernel) = self.stored_kernel(digest)? else { return Ok(None) };
        if scrutiny == Scrutiny::Full || !kernel.looks_untouched() {
            progress.phase("verifying", "kernel");
            if kernel.verify(&cancelled)?.is_some() {
                return Ok(None);
            }
            if !kernel.looks_untouched() && !self.paths.is_read_only() {
                kernel.refresh(&cancelled)?;
            }
        }
        Ok(Some(own.unwrap_or((kernel, lease))))
    }

    fn build(&self, definition: &Definition, progress: &dyn Progress) -> Result<(), ImageError> {
        let cancelled = || progress.cancelled();
        self.paths
            .check_writable(|| format!("environment '{}' is not installed or damaged", definition.name))?;
        self.check_space(definition.build_mib)?;
        let sources = Sources::find(self.config.0.apt_sources.as_deref())?;
        debian::check_subordinate_ids()?;
        let root = self.paths.staging();
        let staging = Staging::create(&root, &self.tools).map_err(ImageError::cache(&root))?;
        // Held until the end, so that a kernel that is not fetched again cannot go away.
        let mut kernels = self.whole_kernels(&cancelled)?;
        let kernels_stored: Vec<String> = kernels.keys().cloned().collect();
        let request = Request {
            definition,
            sources: &sources,
            tools: &self.tools,
            staging: staging.path(),
            kernels_stored: &kernels_stored,
        };
        let built = debian::build(&request, progress)?;
        let (kernel_digest, _kernel_lease) = match &built.kernel {
            KernelSource::Package(package) => {
                progress.phase("storing kernel", "");
                self.store_kernel(package, &staging, &cancelled)?
            }
            KernelSource::Stored(digest) => {
                let lease = kernels.remove(digest).ok_or(debian::DebianError::NoKernel)?;
                (digest.clone(), lease)
            }
        };
        progress.phase("writing image", "");
        let directory = staging.path().join("environment");
        files::create_private(&directory).map_err(ImageError::cache(&directory))?;
        let image = directory.join(ROOTFS);
        let limits = Limits::default();
        let tree = flatten(&built.layers, &limits, &cancelled)?;
        let mut file = fs_err::File::create_new(&image).map_err(ImageError::cache(&image))?.into_file();
        erofs::write_image(&tree, &built.layers, &limits, &mut file, &cancelled)?;
        file.sync_all().map_err(ImageError::cache(&image))?;
        drop(file);
        progress.phase("installing", "");
        let record = recorded(&image, &cancelled)?;
        let manifest = Manifest {
            format_version: FORMAT_VERSION,
            name: definition.name.to_owned(),
            version: definition.version.to_owned(),
            catalog_version: self.config.0.catalog_version.clone(),
            digest: record.sha256.clone(),
            kernel_digest,
            source: SOURCE.to_owned(),
            packages: built.packages,
            files: BTreeMap::from([(ROOTFS.to_owned(), record)]),
        };
        let bytes = manifest::encode(&manifest).map_err(ImageError::cache(&directory))?;
        write_in(&directory, MANIFEST, &bytes, &cancelled)?;

        let home = self.paths.environment(definition.name);
        files::create_private_all(&home).map_err(ImageError::cache(&home))?;
        let _lease = rename_into_place(&directory, &home.join(&manifest.digest), &staging)?;
        let pointer = Pointer { format_version: FORMAT_VERSION, digest: manifest.digest };
        let pointer = manifest::encode(&pointer).map_err(ImageError::cache(&home))?;
        files::replace(&home.join(POINTER), &pointer).map_err(ImageError::cache(&home))?;
        files::sync_directory(&self.paths.environments()).map_err(ImageError::cache(&home))
    }

    /// Refuses a build that would fill the disk.
    fn check_space(&self, needed_mib: u64) -> Result<(), ImageError> {
        let free_mib = self.free_mib()?;
        if free_mib < needed_mib {
            return Err(ImageError::DiskSpace { path: self.paths.root().to_owned(), needed_mib, free_mib });
        }
        Ok(())
    }

    pub(super) fn free_mib(&self) -> Result<u64, ImageError> {
        let root = self.paths.own();
        let found = rustix::fs::statvfs(root).map_err(|errno| ImageError::cache(root)(errno.into()))?;
        Ok(found.f_bavail.saturating_mul(found.f_frsize) >> 20)
    }
}

/// Writes the present times and inodes down, so that the next look is cheap again.
fn refresh(installation: &Installation, cancelled: &dyn Fn() -> bool) -> Result<(), ImageError> {
    let mut manifest = installation.manifest.clone();
    manifest.files.insert(ROOTFS.to_owned(), recorded(&installation.rootfs(), cancelled)?);
    let path = installation.directory.join(MANIFEST);
    let bytes = manifest::encode(&manifest).map_err(ImageError::cache(&path))?;
    files::replace(&path, &bytes).map_err(ImageError::cache(path))
}

/// A shared lock on a directory or file; `None` when it is gone or being removed.
pub(super) fn shared(path: &Path) -> Result<Option<Lock>, ImageError> {
    // A prune holds what it looks at for a moment only, and may decide to keep it.
    const ATTEMPTS: usize = 100;
    for _ in 0..ATTEMPTS {
        match lock::attempt(path, Mode::Shared).map_err(ImageError::cache(path))? {
            Attempt::Locked(lease) => return Ok(Some(lease)),
            Attempt::Gone => return Ok(None),
            Attempt::Held => std::thread::sleep(Duration::from_millis(10)),
        }
    }
    Ok(None)
}

pub(super) fn recorded(path: &Path, cancelled: &dyn Fn() -> bool) -> Result<FileRecord, ImageError> {
    FileRecord::take(path, cancelled).map_err(|error| match error {
        DigestError::Cancelled => ImageError::Cancelled,
        DigestError::Read(source) => ImageError::cache(path)(source),
    })
}

/// Writes and syncs a new file of an install directory.
pub(super) fn write_in(
    directory: &Path,
    name: &str,
    bytes: &[u8],
    cancelled: &dyn Fn() -> bool,
) -> Result<FileRecord, ImageError> {
    let path = directory.join(name);
    files::write_new(&path, bytes).map_err(ImageError::cache(&path))?;
    recorded(&path, cancelled)
}

/// Moves a finished directory to its place, durably, and returns a lease on it.
///
/// What stands there already is damaged or the same: it is moved out of the way. Whoever has its files open
/// keeps them.
pub(super) fn rename_into_place(from: &Path, to: &Path, staging: &Staging) -> Result<Lock, ImageError> {
    files::sync_directory(from).map_err(ImageError::cache(from))?;
    // Locked before anybody else can see it, so that no prune comes between.
    let Attempt::Locked(lease) = lock::attempt(from, Mode::Shared).map_err(ImageError::cache(from))? else {
        let error = std::io::Error::other("somebody else holds an unfinished directory");
        return Err(ImageError::cache(from)(error));
    };
    match staging.discard(to) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(ImageError::cache(to)(error)),
    }
    fs_err::rename(from, to).map_err(ImageError::cache(to))?;
    let parent = to.parent().unwrap_or(to);
    files::sync_directory(parent).map_err(ImageError::cache(parent))?;
    Ok(lease)
}
