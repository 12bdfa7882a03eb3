//! What the store writes down about what it installed.
//!
//! A manifest is read as if a stranger had written it: bounded, of a known version, and nothing in it becomes
//! part of a path before its form was checked.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::digest::{self, DigestError};
use crate::files;

/// The version that this code writes and reads.
pub(crate) const FORMAT_VERSION: u32 = 1;
/// The longest manifest, in bytes.
pub(crate) const MOST: u64 = 1 << 20;

/// A manifest that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// It cannot be read or is too long.
    #[error("it cannot be read")]
    Read(#[source] std::io::Error),
    /// It is not what this program writes.
    #[error("it is malformed")]
    Malformed(#[source] serde_json::Error),
    /// Another version of this program wrote it.
    #[error("its format version is {found}, this pyro knows {FORMAT_VERSION}")]
    Version {
        /// The version in the manifest.
        found: u64,
    },
    /// A field has a form that this program never writes.
    #[error("its field '{0}' is malformed")]
    Field(&'static str),
}

/// A Debian package in an image.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
}

/// What a file was when it was installed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// 64 hexadecimal digits.
    pub sha256: String,
    /// Length in bytes.
    pub size: u64,
    /// Modification time in nanoseconds since 1970.
    pub mtime_ns: i64,
    /// The number of its inode.
    pub inode: u64,
}

/// The manifest of an installed environment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// `FORMAT_VERSION`.
    pub format_version: u32,
    /// The environment's name.
    pub name: String,
    /// The version of its definition.
    pub version: String,
    /// The catalog's version when it was built.
    pub catalog_version: String,
    /// SHA-256 of the root file system.
    pub digest: String,
    /// SHA-256 of the kernel package.
    pub kernel_digest: String,
    /// What it was made from, such as `debian-packages`.
    pub source: String,
    /// Sorted by name.
    pub packages: Vec<Package>,
    /// By name within the install directory.
    pub files: BTreeMap<String, FileRecord>,
}

/// The manifest of a stored kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct KernelManifest {
    pub(crate) format_version: u32,
    /// SHA-256 of the package.
    pub(crate) digest: String,
    pub(crate) release: String,
    /// `vmlinux`, and below `modules/` the module files and the two lists.
    pub(crate) files: BTreeMap<String, FileRecord>,
}

/// Which installation of an environment is the present one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pointer {
    pub(crate) format_version: u32,
    pub(crate) digest: String,
}

/// An initramfs and the agent that is in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct InitramfsManifest {
    pub(crate) format_version: u32,
    pub(crate) file: FileRecord,
}

/// A saved machine that others go on from; see `store::templates`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TemplateManifest {
    pub(crate) format_version: u32,
    pub(crate) environment: String,
    pub(crate) rootfs_digest: String,
    pub(crate) kernel_digest: String,
    pub(crate) agent_digest: String,
    pub(crate) vcpu_count: u8,
    pub(crate) mem_mib: u32,
    pub(crate) disk_mib: u32,
    /// The VMM and its settings.
    pub(crate) machine: String,
    pub(crate) tsc_khz: Option<u32>,
    /// Epoch seconds.
    pub(crate) created_at: u64,
    pub(crate) files: BTreeMap<String, FileRecord>,
}

impl Manifest {
    /// Decodes and checks a manifest.
    ///
    /// # Errors
    /// When it is too long, malformed, or of another version.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        let manifest: Self = parse(bytes)?;
        check_digest(&manifest.digest, "digest")?;
        check_digest(&manifest.kernel_digest, "kernel_digest")?;
        check_files(&manifest.files)?;
        Ok(manifest)
    }
}

impl KernelManifest {
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        let manifest: Self = parse(bytes)?;
        check_digest(&manifest.digest, "digest")?;
        check_files(&manifest.files)?;
        Ok(manifest)
    }
}

impl Pointer {
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        let pointer: Self = parse(bytes)?;
        check_digest(&pointer.digest, "digest")?;
        Ok(pointer)
    }
}

impl TemplateManifest {
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        let manifest: Self = parse(bytes)?;
        check_digest(&manifest.rootfs_digest, "rootfs_digest")?;
        check_digest(&manifest.kernel_digest, "kernel_digest")?;
        check_files(&manifest.files)?;
        Ok(manifest)
    }
}

impl InitramfsManifest {
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        let manifest: Self = parse(bytes)?;
        check_digest(&manifest.file.sha256, "sha256")?;
        Ok(manifest)
    }
}

/// Reads a manifest file; `None` when there is none.
pub(crate) fn read<T>(
    path: &Path,
    parse: impl FnOnce(&[u8]) -> Result<T, ManifestError>,
) -> Result<Option<T>, ManifestError> {
    match files::read_bounded(path, MOST) {
        Ok(bytes) => parse(&bytes).map(Some),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(ManifestError::Read(error)),
    }
}

/// The text of a manifest.
pub(crate) fn encode<T: Serialize>(manifest: &T) -> std::io::Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec_pretty(manifest).map_err(std::io::Error::other)?;
    bytes.push(b'\n');
    Ok(bytes)
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ManifestError> {
    #[derive(Deserialize)]
    struct Version {
        format_version: u64,
    }
    if bytes.len() as u64 > MOST {
        let error = std::io::Error::new(std::io::ErrorKind::FileTooLarge, format!("more than {MOST} bytes"));
        return Err(ManifestError::Read(error));
    }
    // Another version may have any other shape, so the version is looked at alone and first.
    let version: Version = serde_json::from_slice(bytes).map_err(ManifestError::Malformed)?;
    if version.format_version != u64::from(FORMAT_VERSION) {
        return Err(ManifestError::Version { found: version.format_version });
    }
    serde_json::from_slice(bytes).map_err(ManifestError::Malformed)
}

fn check_digest(text: &str, field: &'static str) -> Result<(), ManifestError> {
    if digest::is_digest(text) { Ok(()) } else { Err(ManifestError::Field(field)) }
}

/// File names are plain relative paths of at most two parts.
fn check_files(files: &BTreeMap<String, FileRecord>) -> Result<(), ManifestError> {
    for (name, record) in files {
        let plain = |part: &str| {
            !part.is_empty()
                && part.len() <= 100
                && !part.starts_with('.')
                && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
        };
        if name.split('/').count() > 2 || !name.split('/').all(plain) {
            return Err(ManifestError::Field("files"));
        }
        check_digest(&record.sha256, "sha256")?;
    }
    Ok(())
}

impl FileRecord {
    /// Hashes a file and records what it is now.
    pub(crate) fn take(path: &Path, cancelled: &dyn Fn() -> bool) -> Result<Self, DigestError> {
        let sha256 = digest::of_file(path, cancelled)?;
        Self::with_digest(path, sha256).map_err(DigestError::Read)
    }

    pub(crate) fn with_digest(path: &Path, sha256: String) -> std::io::Result<Self> {
        let metadata = fs_err::symlink_metadata(path)?;
        Ok(Self {
            sha256,
            size: metadata.len(),
            mtime_ns: metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec()),
            inode: metadata.ino(),
        })
    }

    /// Whether the file looks untouched: no byte of it is read.
    pub(crate) fn looks_untouched(&self, path: &Path) -> bool {
        Self::with_digest(path, self.sha256.clone()).is_ok_and(|now| now == *self)
    }
}
