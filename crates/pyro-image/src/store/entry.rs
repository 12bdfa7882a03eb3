//! What the store tells about an environment.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::paths::{MANIFEST, POINTER, ROOTFS};
use super::{Store, TemplateEntry};
use crate::ImageError;
use crate::catalog::Definition;
use crate::digest::{self, DigestError};
use crate::manifest::{self, FileRecord, Manifest, ManifestError, Package, Pointer};

/// An environment of the catalog and what is installed of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Entry {
    /// Such as `debian:12`.
    pub name: String,
    /// The version of the definition.
    pub version: String,
    /// One line for people.
    pub description: String,
    /// What users may rely on.
    pub default_packages: Vec<String>,
    /// `debian`.
    pub distribution: String,
    /// `12`.
    pub distribution_version: String,
    /// `linux-x86_64`.
    pub platform: String,
    /// None: built from packages.
    pub oci_registry: Option<String>,
    /// None: built from packages.
    pub oci_repository: Option<String>,
    /// None: built from packages.
    pub oci_reference: Option<String>,
    /// `sha256:` and the digest of the installed root file system; none when not installed.
    pub source_digest: Option<String>,
    /// The versions of pyro that can use it.
    pub compatibility: String,
    /// As configured.
    pub catalog_version: String,
    /// Whether it is installed and looks untouched.
    pub installed: bool,
    /// The cache directory.
    pub cache_dir: PathBuf,
    /// Where it is installed.
    pub install_dir: Option<PathBuf>,
    /// The manifest of what is installed.
    pub install_manifest: Option<PathBuf>,
}

/// An entry with the result of a full verification.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Inspection {
    /// The entry itself.
    #[serde(flatten)]
    pub entry: Entry,
    /// Whether every installed byte is what was built; false when nothing is installed.
    pub verified: bool,
    /// What is wrong, empty when nothing is.
    pub problems: Vec<String>,
    /// SHA-256 of the root file system.
    pub rootfs_digest: Option<String>,
    /// SHA-256 of the kernel package.
    pub kernel_digest: Option<String>,
    /// The kernel's release name.
    pub kernel_release: Option<String>,
    /// The release name of the kernel that guests boot with instead, if there is one.
    pub own_kernel_release: Option<String>,
    /// Length of the root file system in bytes.
    pub rootfs_bytes: Option<u64>,
    /// What is installed in it, sorted by name.
    pub packages: Vec<Package>,
    /// Saved machines of it, that new ones go on from.
    pub templates: Vec<TemplateEntry>,
}

/// The result of a pull.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Pulled {
    /// The entry, installed.
    #[serde(flatten)]
    pub entry: Entry,
    /// The kernel.
    pub kernel_image: PathBuf,
    /// The initramfs that goes with it.
    pub initramfs_image: PathBuf,
    /// The root file system.
    pub rootfs_image: PathBuf,
    /// `debian-packages` when it was built now, `cache` when it was there.
    pub source: String,
}

/// An installation as its manifest describes it.
#[derive(Clone, Debug)]
pub(super) struct Installation {
    pub(super) directory: PathBuf,
    pub(super) manifest: Manifest,
}

impl Installation {
    pub(super) fn rootfs(&self) -> PathBuf {
        self.directory.join(ROOTFS)
    }

    fn record(&self) -> Option<&FileRecord> {
        let record = self.manifest.files.get(ROOTFS)?;
        (record.sha256 == self.manifest.digest).then_some(record)
    }

    /// Compares size, time and inode only.
    pub(super) fn looks_untouched(&self) -> bool {
        self.record().is_some_and(|record| record.looks_untouched(&self.rootfs()))
    }

    /// Hashes everything; the text says what is wrong.
    pub(super) fn verify(&self, cancelled: &dyn Fn() -> bool) -> Result<Option<String>, ImageError> {
        let Some(record) = self.record() else { return Ok(Some("the manifest does not fit".to_owned())) };
        verify_file(&self.rootfs(), record, cancelled)
    }
}

/// Hashes one file; the text says what is wrong.
pub(super) fn verify_file(
    path: &Path,
    record: &FileRecord,
    cancelled: &dyn Fn() -> bool,
) -> Result<Option<String>, ImageError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    match digest::of_file(path, cancelled) {
        Ok(found) if found == record.sha256 => Ok(None),
        Ok(_other) => Ok(Some(format!("'{name}' has other contents than when it was installed"))),
        Err(DigestError::Cancelled) => Err(ImageError::Cancelled),
        Err(DigestError::Read(error)) if error.kind() == std::io::ErrorKind::NotFound => {
            Ok(Some(format!("'{name}' is missing")))
        }
        Err(DigestError::Read(error)) => Err(ImageError::cache(path)(error)),
    }
}

impl Store {
    /// What the pointer names, if anything. A manifest of another version is an error: a newer program put
    /// it there and must not lose it to an older one. One that is cut short or garbled counts as no install.
    pub(super) fn installation(&self, definition: &Definition) -> Result<Option<Installation>, ImageError> {
        let home = self.paths.environment(definition.name);
        let Some(pointer) = usable(&home.join(POINTER), Pointer::parse)? else { return Ok(None) };
        let found = self.installation_of(definition, &pointer.digest)?;
        // One that was built from another definition is built anew.
        Ok(found.filter(|found| found.manifest.version == definition.version))
    }

    /// The installation of this digest, the present one or an older one.
    pub(super) fn installation_of(
        &self,
        definition: &Definition,
        digest: &str,
    ) -> Result<Option<Installation>, ImageError> {
        let directory = self.paths.environment(definition.name).join(digest);
        let Some(manifest) = usable(&directory.join(MANIFEST), Manifest::parse)? else { return Ok(None) };
        let fits = manifest.digest == digest && manifest.name == definition.name;
        Ok(fits.then_some(Installation { directory, manifest }))
    }

    pub(super) fn entry(&self, definition: &Definition) -> Result<Entry, ImageError> {
        let installation = self.installation(definition)?;
        let installed = match &installation {
            Some(installation) => {
                let kernel = self.stored_kernel(&installation.manifest.kernel_digest)?;
                // Where new times and inodes cannot be written down, they say nothing: each use hashes the files.
                let is_read_only = self.paths.is_read_only();
                (installation.looks_untouched() || is_read_only)
                    && kernel.is_some_and(|kernel| kernel.looks_untouched() || is_read_only)
            }
            None => false,
        };
        let installation = installation.as_ref();
        Ok(Entry {
            name: definition.name.to_owned(),
            version: definition.version.to_owned(),
            description: definition.description.to_owned(),
            default_packages: definition.default_packages.iter().map(|name| (*name).to_owned()).collect(),
            distribution: "debian".to_owned(),
            distribution_version: "12".to_owned(),
            platform: "linux-x86_64".to_owned(),
            oci_registry: None,
            oci_repository: None,
            oci_reference: None,
            source_digest: installation.map(|found| format!("sha256:{}", found.manifest.digest)),
            compatibility: ">=2.0.0,<3.0.0".to_owned(),
            catalog_version: self.config.0.catalog_version.clone(),
            installed,
            cache_dir: self.paths.root().to_owned(),
            install_dir: installation.map(|found| found.directory.clone()),
            install_manifest: installation.map(|found| found.directory.join(MANIFEST)),
        })
    }

    pub(super) fn inspection(&self, definition: &Definition) -> Result<Inspection, ImageError> {
        let entry = self.entry(definition)?;
        let mut inspection = Inspection {
            entry,
            verified: false,
            problems: Vec::new(),
            rootfs_digest: None,
            kernel_digest: None,
            kernel_release: None,
            own_kernel_release: None,
            rootfs_bytes: None,
            packages: Vec::new(),
            templates: Vec::new(),
        };
        let Some(installation) = self.installation(definition)? else { return Ok(inspection) };
        inspection.problems.extend(installation.verify(&|| false)?);
        match self.stored_kernel(&installation.manifest.kernel_digest)? {
            Some(kernel) => {
                inspection.problems.extend(kernel.verify(&|| false)?);
                inspection.kernel_release = Some(kernel.manifest.release);
            }
            None => inspection.problems.push("the kernel is missing".to_owned()),
        }
        inspection.own_kernel_release = self.kernel_in_use()?.map(|(_digest, release)| release);
        inspection.templates = self.templates_of(&installation.manifest.digest)?;
        // A template that is damaged is not used, and so is no damage of the environment.
        inspection.verified = inspection.problems.is_empty();
        inspection.rootfs_bytes = installation.record().map(|record| record.size);
        inspection.rootfs_digest = Some(installation.manifest.digest);
        inspection.kernel_digest = Some(installation.manifest.kernel_digest);
        inspection.packages = installation.manifest.packages;
        Ok(inspection)
    }
}

/// Reads a manifest; one that is garbled counts as none.
pub(super) fn usable<T>(
    path: &Path,
    parse: impl FnOnce(&[u8]) -> Result<T, ManifestError>,
) -> Result<Option<T>, ImageError> {
    match manifest::read(path, parse) {
        Ok(found) => Ok(found),
        Err(ManifestError::Malformed(_) | ManifestError::Field(_)) => Ok(None),
        Err(ManifestError::Read(error)) if error.kind() == std::io::ErrorKind::FileTooLarge => Ok(None),
        Err(source) => Err(ImageError::Manifest { path: path.to_owned(), source }),
    }
}
