//! Templates: saved machines that new ones go on from, instead of booting.
//!
//! A template is a cache and nothing else: whoever finds none, or a damaged one, boots. It is three files: the guest's
//! memory, the state of its devices, and its disk as of that moment. The memory is mapped by every machine that goes on
//! from it, so it is in the page cache once, which the host may reclaim, and outlives a reboot.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::Store;
use super::entry::usable;
use super::install::{rename_into_place, shared, write_in};
use super::paths::MANIFEST;
use super::prune::{disk_bytes, entries};
use crate::digest::{self, DigestError};
use crate::lock::{self, Attempt, Lock, Mode};
use crate::manifest::{FORMAT_VERSION, FileRecord, ManifestError, TemplateManifest};
use crate::staging::Staging;
use crate::{Environment, ImageError, files, manifest, sparse};

/// The files of a template.
const STATE: &str = "state";
const MEMORY: &str = "memory";
const OVERLAY: &str = "overlay.ext4";
/// The longest state, in bytes: it is read whole before each use.
const STATE_MOST: u64 = 16 << 20;
/// How far two measurements of the same clock may be apart: one in this.
const RATE_TOLERANCE: u32 = 1000;
/// Room that is left on the disk after a template was made, in MiB.
const ROOM_MIB: u64 = 512;

/// What a template is of, besides its environment: two saved machines of the same shape are interchangeable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TemplateShape {
    /// Virtual processors.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// The writable disk in MiB.
    pub disk_mib: u32,
    /// The VMM and all its settings that matter.
    pub machine: String,
    /// The rate that the guest believes its clock to run at, in kHz.
    pub tsc_khz: Option<u32>,
}

/// Three files of a saved machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TemplateFiles {
    /// The state of processors and devices.
    pub state: PathBuf,
    /// The guest's memory; sparse.
    pub memory: PathBuf,
    /// The writable disk as of that moment; sparse.
    pub overlay: PathBuf,
}

/// A template that stays for as long as this value lives.
#[derive(Debug)]
pub struct Template {
    /// Its name: 64 hexadecimal digits.
    pub id: String,
    /// Its files, never to be written.
    pub files: TemplateFiles,
    _lease: Lock,
}

/// The right to make a template: nobody else makes any meanwhile.
#[derive(Debug)]
pub struct TemplateBuild {
    manifest: TemplateManifest,
    _lock: Lock,
}

/// A template as people see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TemplateEntry {
    /// Its name.
    pub id: String,
    /// Virtual processors.
    pub vcpu_count: u8,
    /// Guest memory in MiB.
    pub mem_mib: u32,
    /// The writable disk in MiB.
    pub disk_mib: u32,
    /// The first two words of what it was made with: the VMM and its version.
    pub vmm: String,
    /// What it takes on disk.
    pub bytes: u64,
    /// Epoch seconds.
    pub created_at: u64,
    /// Epoch seconds.
    pub last_used_at: u64,
    /// Whether every byte is what was saved.
    pub verified: bool,
}

impl TemplateFiles {
    fn within(directory: &Path) -> Self {
        Self {
            state: directory.join(STATE),
            memory: directory.join(MEMORY),
            overlay: directory.join(OVERLAY),
        }
    }

    fn named(&self) -> [(&'static str, &Path); 3] {
        [(STATE, &self.state), (MEMORY, &self.memory), (OVERLAY, &self.overlay)]
    }
}

impl Store {
    /// The template of this shape, if there is one that is sound. Its state is hashed; of the two large files, size, time
    /// and inode are compared, and what differs in them is hashed.
    ///
    /// # Errors
    /// When the cache cannot be read; damage makes it none.
    pub fn template(
        &self,
        environment: &Environment,
        shape: &TemplateShape,
    ) -> Result<Option<Template>, ImageError> {
        if self.config.0.template_limit_mib == 0 {
            return Ok(None);
        }
        let wanted = self.template_manifest(environment, shape);
        let id = wanted.id();
        let directory = self.paths.template(&id);
        let Some(lease) = shared(&directory)? else { return Ok(None) };
        let found = match usable(&directory.join(MANIFEST), TemplateManifest::parse) {
            Ok(Some(found)) if found.serves(&wanted) => found,
            Ok(_) | Err(ImageError::Manifest { source: ManifestError::Version { .. }, .. }) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let files = TemplateFiles::within(&directory);
        if !self.looks_sound(&found, &files)? {
            return Ok(None);
        }
        // When it was used last. That it is not known costs the template its place at worst.
        drop(touch(&directory.join(MANIFEST)));
        Ok(Some(Template { id, files, _lease: lease }))
    }

    /// Takes the right to make a template; none where somebody makes one already, or there is no room for it.
    ///
    /// # Errors
    /// When the cache cannot be used.
    pub fn begin_template(
        &self,
        environment: &Environment,
        shape: &TemplateShape,
    ) -> Result<Option<TemplateBuild>, ImageError> {
        if self.config.0.template_limit_mib == 0 {
            return Ok(None);
        }
        let path = self.paths.lock("templates");
        let Attempt::Locked(lock) = lock::attempt_file(&path).map_err(ImageError::cache(&path))? else {
            return Ok(None);
        };
        let (needed_mib, free_mib) = (ROOM_MIB, self.free_mib()?);
        if free_mib < needed_mib {
            return Err(ImageError::DiskSpace { path: self.paths.own().to_owned(), needed_mib, free_mib });
        }
        Ok(Some(TemplateBuild { manifest: self.template_manifest(environment, shape), _lock: lock }))
    }

    /// Puts a template in place of what has its name, by moving its files or, from another file system, copying them;
    /// then removes those that were not used for longest, until all are within their limit. The newest one stays in any case.
    ///
    /// # Errors
    /// When the cache cannot be written; nothing is left then.
    pub fn finish_template(
        &self,
        build: TemplateBuild,
        from: &TemplateFiles,
    ) -> Result<Template, ImageError> {
        let TemplateBuild { mut manifest, _lock } = build;
        let root = self.paths.staging();
        let staging = Staging::create(&root, &self.tools).map_err(ImageError::cache(&root))?;
        let directory = staging.path().join("template");
        files::create_private(&directory).map_err(ImageError::cache(&directory))?;
        let files = TemplateFiles::within(&directory);
        for ((_, from), (name, to)) in from.named().into_iter().zip(files.named()) {
            take_over(from, to).map_err(ImageError::cache(to))?;
            manifest.files.insert(name.to_owned(), record(name, to, &|| false)?);
        }
        manifest.created_at = epoch_seconds(SystemTime::now());
        let bytes = manifest::encode(&manifest).map_err(ImageError::cache(&directory))?;
        write_in(&directory, MANIFEST, &bytes, &|| false)?;
        let (id, home) = (manifest.id(), self.paths.template(&manifest.id()));
        let lease = rename_into_place(&directory, &home, &staging)?;
        self.limit_templates(&id, &staging)?;
        Ok(Template { id, files: TemplateFiles::within(&home), _lease: lease })
    }

    /// Takes a template out of use that has proved to be of none.
    ///
    /// # Errors
    /// When the cache cannot be written.
    pub fn discard_template(&self, template: Template) -> Result<(), ImageError> {
        let directory = self.paths.template(&template.id);
        drop(template);
        let root = self.paths.staging();
        let staging = Staging::create(&root, &self.tools).map_err(ImageError::cache(&root))?;
        self.discard(&directory, &staging).map(drop)
    }

    /// The templates of an installation, every byte of them hashed.
    pub(super) fn templates_of(&self, rootfs_digest: &str) -> Result<Vec<TemplateEntry>, ImageError> {
        let mut found = Vec::new();
        for directory in entries(&self.paths.templates())? {
            let Some(_lease) = shared(&directory)? else { continue };
            let Ok(Some(manifest)) = usable(&directory.join(MANIFEST), TemplateManifest::parse) else {
                continue;
            };
            if manifest.rootfs_digest != rootfs_digest {
                continue;
            }
            found.push(TemplateEntry {
                id: manifest.id(),
                vcpu_count: manifest.vcpu_count,
                mem_mib: manifest.mem_mib,
                disk_mib: manifest.disk_mib,
                vmm: manifest.machine.split(' ').take(2).collect::<Vec<_>>().join(" "),
                bytes: disk_bytes(&directory),
                created_at: manifest.created_at,
                last_used_at: last_used(&directory).map_or(0, epoch_seconds),
                verified: self.is_whole(&manifest, &TemplateFiles::within(&directory), &|| false)?,
            });
        }
        Ok(found)
    }

    /// Removes the templates that nobody can use any more: of an installation or a kernel that is gone, or of another
    /// agent. Returns what that gave back, in bytes.
    pub(super) fn prune_templates(&self, staging: &Staging) -> Result<u64, ImageError> {
        let mut freed = 0;
        for directory in entries(&self.paths.templates())? {
            let manifest = usable(&directory.join(MANIFEST), TemplateManifest::parse);
            let of_use = matches!(manifest, Ok(Some(manifest)) if self.is_of_use(&manifest));
            if !of_use {
                freed += self.discard(&directory, staging)?;
            }
        }
        Ok(freed)
    }

    fn is_of_use(&self, manifest: &TemplateManifest) -> bool {
        self.paths.environment(&manifest.environment).join(&manifest.rootfs_digest).exists()
            && self.paths.kernel(&manifest.kernel_digest).exists()
            && manifest.agent_digest == self.agent_digest()
    }

    fn template_manifest(&self, environment: &Environment, shape: &TemplateShape) -> TemplateManifest {
        TemplateManifest {
            format_version: FORMAT_VERSION,
            environment: environment.name.clone(),
            rootfs_digest: environment.digest.clone(),
            kernel_digest: environment.kernel_digest.clone(),
            agent_digest: self.agent_digest().to_owned(),
            vcpu_count: shape.vcpus,
            mem_mib: shape.memory_mib,
            disk_mib: shape.disk_mib,
            machine: shape.machine.clone(),
            tsc_khz: shape.tsc_khz,
            created_at: 0,
            files: std::collections::BTreeMap::new(),
        }
    }

    fn looks_sound(&self, manifest: &TemplateManifest, files: &TemplateFiles) -> Result<bool, ImageError> {
        let record = |name| manifest.files.get(name);
        let (Some(state), Some(memory), Some(overlay)) = (record(STATE), record(MEMORY), record(OVERLAY))
        else {
            return Ok(false);
        };
        let small = fs_err::symlink_metadata(&files.state).is_ok_and(|found| found.len() <= STATE_MOST);
        if !small || digest_of(STATE, &files.state, &|| false)?.as_ref() != Some(&state.sha256) {
            return Ok(false);
        }
        if memory.looks_untouched(&files.memory) && overlay.looks_untouched(&files.overlay) {
            return Ok(true);
        }
        self.is_whole(manifest, files, &|| false)
    }

    /// Hashes everything.
    fn is_whole(
        &self,
        manifest: &TemplateManifest,
        files: &TemplateFiles,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<bool, ImageError> {
        for (name, path) in files.named() {
            let found = digest_of(name, path, cancelled)?;
            if found.is_none() || found.as_ref() != manifest.files.get(name).map(|record| &record.sha256) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn limit_templates(&self, newest: &str, staging: &Staging) -> Result<(), ImageError> {
        let limit = self.config.0.template_limit_mib << 20;
        let mut all: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
        for directory in entries(&self.paths.templates())? {
            let used = last_used(&directory).unwrap_or(UNIX_EPOCH);
            all.push((used, disk_bytes(&directory), directory));
        }
        all.sort();
        let mut total: u64 = all.iter().map(|(_, bytes, _)| bytes).sum();
        for (_, bytes, directory) in all {
            if total <= limit {
                break;
            }
            if !directory.ends_with(newest) && self.discard(&directory, staging)? > 0 {
                total -= bytes;
            }
        }
        Ok(())
    }

    /// Removes a template unless somebody is about to use it; returns what that gave back, in bytes. Machines that go on
    /// from it already keep its memory for as long as they live.
    fn discard(&self, directory: &Path, staging: &Staging) -> Result<u64, ImageError> {
        match lock::attempt(directory, Mode::Exclusive).map_err(ImageError::cache(directory))? {
            Attempt::Locked(_held) => {
                let bytes = disk_bytes(directory);
                staging.discard(directory).map_err(ImageError::cache(directory))?;
                Ok(bytes)
            }
            Attempt::Held | Attempt::Gone => Ok(0),
        }
    }
}

/// Moves a file of a machine that has ended, makes it ours and durable. What is no plain file is refused.
fn take_over(from: &Path, to: &Path) -> std::io::Result<()> {
    if !fs_err::symlink_metadata(from)?.is_file() {
        return Err(std::io::Error::other("it is no plain file"));
    }
    match fs_err::rename(from, to) {
        Err(error) if error.kind() == std::io::ErrorKind::CrossesDevices => sparse::copy_sparse(from, to)?,
        moved => moved?,
    }
    sparse::release_holes(to)?;
    let (user, group) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    std::os::unix::fs::lchown(to, Some(user), Some(group))?;
    fs_err::File::open(to)?.sync_all()
}

fn record(name: &str, path: &Path, cancelled: &dyn Fn() -> bool) -> Result<FileRecord, ImageError> {
    let gone = || ImageError::cache(path)(std::io::ErrorKind::NotFound.into());
    let sha256 = digest_of(name, path, cancelled)?.ok_or_else(gone)?;
    FileRecord::with_digest(path, sha256).map_err(ImageError::cache(path))
}

/// The digest of a template's file; none where it is missing.
fn digest_of(name: &str, path: &Path, cancelled: &dyn Fn() -> bool) -> Result<Option<String>, ImageError> {
    let found =
        if name == STATE { digest::of_file(path, cancelled) } else { sparse::digest(path, cancelled) };
    match found {
        Ok(found) => Ok(Some(found)),
        Err(DigestError::Cancelled) => Err(ImageError::Cancelled),
        Err(DigestError::Read(error)) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(DigestError::Read(error)) => Err(ImageError::cache(path)(error)),
    }
}

fn touch(path: &Path) -> std::io::Result<()> {
    std::fs::File::options().write(true).open(path)?.set_modified(SystemTime::now())
}

fn last_used(directory: &Path) -> Option<SystemTime> {
    fs_err::metadata(directory.join(MANIFEST)).and_then(|found| found.modified()).ok()
}

fn epoch_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).as_ref().map_or(0, Duration::as_secs)
}

impl TemplateManifest {
    /// The name of what it describes: the rate of the clock, which is measured, is no part of it.
    fn id(&self) -> String {
        let parts = (
            self.format_version,
            [&self.environment, &self.rootfs_digest, &self.kernel_digest, &self.agent_digest, &self.machine],
            [u64::from(self.vcpu_count), u64::from(self.mem_mib), u64::from(self.disk_mib)],
        );
        digest::of_bytes(format!("{parts:?}").as_bytes())
    }

    /// Whether a machine of this description can go on from what `self` describes.
    fn serves(&self, wanted: &Self) -> bool {
        let rates = match (self.tsc_khz, wanted.tsc_khz) {
            (Some(saved), Some(now)) => saved.abs_diff(now) <= saved / RATE_TOLERANCE,
            (saved, now) => saved == now,
        };
        rates && self.id() == wanted.id()
    }
}
