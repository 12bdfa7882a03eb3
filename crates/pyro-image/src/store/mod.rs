//! The cache directory: what is in it, and who may change it when.
//!
//! ```text
//! envs/<name>/<digest>/rootfs.erofs, manifest.json     one installed environment
//! envs/<name>/current                                  which of them is the present one
//! kernels/<digest>/vmlinux, modules/, manifest.json    a kernel, named by its package's digest
//! kernels/<digest>/initramfs-<agent digest>.cpio       one for each agent, and its record (.json)
//! templates/<key>/memory, state, overlay.ext4          a saved machine that others go on from, and its manifest.json
//! kernels/own                                          which of them takes the place of all others, if any
//! overlay-<MiB>.ext4                                   blank writable layers, to be copied
//! staging/<random>/                                    unfinished work
//! locks/<name>                                         held by whoever builds an environment
//! ```
//!
//! Install directories are made in `staging`, synced, and renamed into place whole. Whoever uses one holds a
//! shared lock on the directory itself (and on its initramfs); whoever removes one holds it exclusively and
//! renames it away first.

mod doctor;
mod entry;
mod install;
mod kernels;
mod overlay;
mod own_kernel;
mod paths;
mod prune;
mod templates;

use std::borrow::Cow;
use std::ffi::OsString;
use std::path::PathBuf;

pub use self::doctor::Check;
pub use self::entry::{Entry, Inspection, Pulled};
pub use self::own_kernel::AddedKernel;
use self::paths::Paths;
pub use self::prune::Pruned;
pub use self::templates::{Template, TemplateBuild, TemplateEntry, TemplateFiles, TemplateShape};
use crate::catalog::{self, CATALOG};
use crate::lock::Lock;
use crate::progress::Progress;
use crate::tool::Tools;
use crate::{ImageError, staging};

/// What a store is opened with.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// Where everything is kept; made when missing, with mode 0700.
    pub cache_dir: PathBuf,
    /// Where templates, locks and disks are kept instead, when `cache_dir` can only be read; made then.
    pub private_dir: PathBuf,
    /// The sources file to build from; looked for in `/etc/apt` when not given.
    pub apt_sources: Option<PathBuf>,
    /// Directories to search for tools, in the form of `PATH`.
    pub tool_path: OsString,
    /// The static guest agent, which becomes `/init`.
    pub agent: Cow<'static, [u8]>,
    /// The agent's SHA-256, as hexadecimal digits: each agent has an initramfs of its own.
    pub agent_digest: Cow<'static, str>,
    /// What all templates together may take on disk, in MiB; 0: there are none.
    pub template_limit_mib: u64,
    /// Reported with every entry.
    pub catalog_version: String,
}

/// The store of environments in one cache directory.
#[derive(Debug)]
pub struct Store {
    paths: Paths,
    config: Config,
    tools: Tools,
    /// The kernel that guests of this store boot with, whatever the others boot with.
    tried_kernel: Option<String>,
}

/// The configuration without what would fill a screen in debug output.
struct Config(StoreConfig);

impl std::fmt::Debug for Config {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("StoreConfig")
            .field("cache_dir", &self.0.cache_dir)
            .field("agent_bytes", &self.0.agent.len())
            .finish_non_exhaustive()
    }
}

/// An installed environment, which stays installed for as long as this value lives.
#[derive(Debug)]
pub struct Environment {
    /// Its name in the catalog.
    pub name: String,
    /// The version of its definition.
    pub version: String,
    /// SHA-256 of the root file system, as hexadecimal digits.
    pub digest: String,
    /// SHA-256 of the kernel package, as hexadecimal digits.
    pub kernel_digest: String,
    /// The kernel: an uncompressed ELF file.
    pub kernel: PathBuf,
    /// The initramfs with the agent of this store.
    pub initramfs: PathBuf,
    /// The read-only root file system: an EROFS image.
    pub rootfs: PathBuf,
    _leases: [Lock; 3],
}

impl Store {
    /// Opens the cache directory and removes what dead processes left in it.
    ///
    /// # Errors
    /// When the directories cannot be made.
    pub fn open(config: StoreConfig) -> Result<Self, ImageError> {
        let paths = Paths::create(&config.cache_dir, &config.private_dir)?;
        let tools = Tools::new(&config.tool_path);
        let root = paths.staging();
        staging::sweep(&root, &tools).map_err(ImageError::cache(root))?;
        Ok(Self { paths, config: Config(config), tools, tried_kernel: None })
    }

    /// Checks that the catalog has an environment of this name, without looking at the disk.
    ///
    /// # Errors
    /// [`ImageError::UnknownEnvironment`].
    pub fn check_name(&self, name: &str) -> Result<(), ImageError> {
        catalog::find(name).map(|_definition| ())
    }

    /// All environments of the catalog, in its order.
    ///
    /// # Errors
    /// When the cache cannot be read.
    pub fn list(&self) -> Result<Vec<Entry>, ImageError> {
        CATALOG.iter().map(|definition| self.entry(definition)).collect()
    }

    /// Whether the environment is installed and looks untouched.
    ///
    /// # Errors
    /// When there is no such environment or the cache cannot be read.
    pub fn installed(&self, name: &str) -> Result<bool, ImageError> {
        Ok(self.entry(catalog::find(name)?)?.installed)
    }

    /// One entry, with everything that is installed of it hashed and compared.
    ///
    /// # Errors
    /// When there is no such environment or the cache cannot be read; damage is part of the result.
    pub fn inspect(&self, name: &str) -> Result<Inspection, ImageError> {
        self.inspection(catalog::find(name)?)
    }

    /// Makes sure that the environment is installed and whole: hashes everything, builds when something is
    /// missing or damaged. When another process builds it already, waits and uses its result.
    ///
    /// # Errors
    /// When it cannot be built, or `progress` cancels.
    pub fn pull(&self, name: &str, progress: &dyn Progress) -> Result<Pulled, ImageError> {
        self.pull_definition(catalog::find(name)?, progress)
    }

    /// The files of an environment, installed first when need be.
    ///
    /// Only size, time and inode of what is installed are compared; what differs in them is hashed.
    ///
    /// # Errors
    /// As [`Store::pull`].
    pub fn ensure(&self, name: &str, progress: &dyn Progress) -> Result<Environment, ImageError> {
        self.ensure_definition(catalog::find(name)?, progress)
    }

    /// The files of the installation with this digest, which is not built again: a disk that was made upon other
    /// bytes cannot be used with it.
    ///
    /// # Errors
    /// [`ImageError::Replaced`] when it is gone or damaged.
    pub fn lease(&self, name: &str, digest: &str) -> Result<Environment, ImageError> {
        self.lease_digest(catalog::find(name)?, digest, &crate::Silent)
    }

    /// A blank ext4 file system of `size_mib` MiB to copy, made on first use; sparse.
    ///
    /// # Errors
    /// When the size is out of range or `mke2fs` fails.
    pub fn overlay_template(&self, size_mib: u32) -> Result<PathBuf, ImageError> {
        self.make_overlay_template(size_mib)
    }

    /// Removes everything that nobody uses.
    ///
    /// # Errors
    /// When the cache cannot be read or written.
    pub fn prune(&self) -> Result<Pruned, ImageError> {
        self.prune_all()
    }

    /// Checks what a build needs of this machine.
    pub fn doctor(&self) -> Vec<Check> {
        self.checks()
    }

    fn agent_digest(&self) -> &str {
        &self.config.0.agent_digest
    }
}
