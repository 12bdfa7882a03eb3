//! Environment images: built, stored, verified, leased and pruned.
//!
//! An environment is a read-only root file system (EROFS) together with a kernel and the initramfs that
//! carries the guest agent. [`Store`] owns the cache directory in which they live; everything else here is
//! what it needs to make them: [`tree`] merges layers, [`erofs`] writes the image, `debian` has the packages
//! installed by the distribution's own tools, [`kernel`] takes a kernel package apart.
//!
//! The crate is synchronous and prints nothing; whoever calls it gives a [`Progress`] to hear what happens.

pub mod erofs;
#[doc(hidden)]
pub mod fuzzing;
pub mod kernel;
pub mod tree;

mod catalog;
mod debian;
mod digest;
mod error;
mod files;
mod initramfs;
mod lock;
mod manifest;
mod progress;
mod sparse;
mod staging;
mod store;
mod tool;
mod trust;

pub use self::catalog::{CATALOG, Definition};
pub use self::debian::DebianError;
pub use self::error::ImageError;
pub use self::manifest::{FileRecord, Manifest, ManifestError, Package};
pub use self::progress::{Progress, Silent};
pub use self::sparse::copy_sparse;
pub use self::store::{
    AddedKernel, Check, Entry, Environment, Inspection, Pruned, Pulled, Store, StoreConfig, Template,
    TemplateBuild, TemplateEntry, TemplateFiles, TemplateShape,
};
pub use self::tool::ToolError;
pub use self::trust::{Distrust, Trust};
