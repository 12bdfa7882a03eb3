//! The decoders of foreign bytes as plain functions, for fuzz targets and tests.

pub use crate::kernel::{parse_modinfo, unpack_kernel};
use crate::manifest::{Manifest, ManifestError};
use crate::tree::{Layer, Limits, Tree, TreeError, flatten};

/// Merges one layer given as bytes, of any compression, with limits that suit small machines.
///
/// # Errors
/// As [`flatten`].
pub fn flatten_bytes(layer: &[u8]) -> Result<Tree, TreeError> {
    let limits = Limits {
        total_bytes: 64 << 20,
        inodes: 1 << 14,
        metadata: 16 << 20,
        tails: 16 << 20,
        ..Limits::default()
    };
    flatten(&[Layer::Bytes(layer.into())], &limits, &|| false)
}

/// Decodes the manifest of an environment.
///
/// # Errors
/// When it is not one of this version.
pub fn parse_manifest(bytes: &[u8]) -> Result<Manifest, ManifestError> {
    Manifest::parse(bytes)
}
