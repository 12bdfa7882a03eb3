//! What the store answers when it cannot do what was asked.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use pyro_process::Holder;

use crate::debian::DebianError;
use crate::kernel::KernelError;
use crate::manifest::ManifestError;
use crate::tool::ToolError;
use crate::tree::TreeError;
use crate::trust::Distrust;

/// An error of the image store.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The catalog has no such environment.
    #[error("unknown environment '{name}'; expected one of: {expected}", expected = crate::catalog::names())]
    UnknownEnvironment {
        /// The name that was asked for.
        name: String,
    },
    /// The cache directory does not allow what the store must do with it.
    #[error("the environment cache '{}' cannot be used", path.display())]
    Cache {
        /// The file or directory concerned.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Another user could put anything into the cache directory.
    #[error("the environment cache {0}")]
    Distrusted(Distrust),
    /// What is asked for would have to be written to a cache directory that this user can only read.
    #[error("{what}, and the environment cache '{}' can only be read", path.display())]
    ReadOnly {
        /// What is asked for, or missing.
        what: String,
        /// The cache directory.
        path: PathBuf,
    },
    /// There is no room for a build.
    #[error("not enough disk space in '{}': {needed_mib} MiB needed, {free_mib} MiB free", path.display())]
    DiskSpace {
        /// The cache directory.
        path: PathBuf,
        /// What the build may take, in MiB.
        needed_mib: u64,
        /// What is free, in MiB.
        free_mib: u64,
    },
    /// The disk became full during a build.
    #[error("the disk became full during the build")]
    DiskFull,
    /// The root file system could not be built from Debian packages.
    #[error(transparent)]
    Debian(DebianError),
    /// A tool failed.
    #[error(transparent)]
    Tool(ToolError),
    /// The built files could not become an image.
    #[error("the image cannot be made")]
    Tree(#[source] TreeError),
    /// The kernel package could not be taken apart.
    #[error("the kernel package cannot be used")]
    Kernel(#[source] KernelError),
    /// A manifest in the cache cannot be used.
    #[error("the manifest '{}' cannot be used", path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// The cause.
        source: ManifestError,
    },
    /// What is installed is not what was built.
    #[error("the installed environment '{name}' is damaged: {detail}")]
    Damaged {
        /// The environment.
        name: String,
        /// The first thing found wrong.
        detail: String,
    },
    /// The environment is not installed.
    #[error("environment '{name}' is not installed")]
    NotInstalled {
        /// The environment.
        name: String,
    },
    /// Another process kept removing what this one had just installed.
    #[error("environment '{name}' is being changed by other processes")]
    InUse {
        /// The environment.
        name: String,
    },
    /// Another process has held the lock of an environment for too long, or is stopped.
    #[error(
        "environment '{name}' is locked by {holder}; waited {seconds} s",
        holder = holder.as_ref().map_or_else(|| "another process".to_owned(), ToString::to_string),
        seconds = waited.as_secs()
    )]
    LockHeld {
        /// The environment.
        name: String,
        /// Who holds it, where the kernel tells.
        holder: Option<Holder>,
        /// How long it was waited for.
        waited: Duration,
    },
    /// A disk belongs to an installation that is gone.
    #[error("environment '{name}' has changed: its installation {digest} is gone or damaged")]
    Replaced {
        /// The environment.
        name: String,
        /// What the disk was made upon.
        digest: String,
    },
    /// The size of a writable layer is out of range.
    #[error("overlay size must be between 64 and 1048576 MiB")]
    OverlaySize,
    /// The caller asked to stop.
    #[error("cancelled")]
    Cancelled,
}

impl ImageError {
    /// A stable name for this kind of error, in snake_case.
    pub fn code(&self) -> &'static str {
        match self {
            Self::UnknownEnvironment { .. } => "unknown_environment",
            Self::Cache { .. } | Self::Distrusted(_) | Self::ReadOnly { .. } => "environment_cache",
            Self::DiskSpace { .. } | Self::DiskFull => "disk_full",
            Self::Debian(error) => error.code(),
            Self::Tool(error) => error.code(),
            Self::Tree(_) => "image_rejected",
            Self::Kernel(_) => "kernel_rejected",
            Self::Manifest { .. } => "environment_manifest",
            Self::Damaged { .. } => "environment_damaged",
            Self::NotInstalled { .. } => "environment_not_installed",
            Self::InUse { .. } => "environment_in_use",
            Self::LockHeld { .. } => "lock_held",
            Self::Replaced { .. } => "environment_replaced",
            Self::OverlaySize => "overlay_size",
            Self::Cancelled => "cancelled",
        }
    }

    /// The kind of the error of the file system behind it, where there is one.
    pub fn io_kind(&self) -> Option<io::ErrorKind> {
        let mut next: Option<&(dyn std::error::Error + 'static)> = Some(self);
        while let Some(error) = next {
            if let Some(error) = error.downcast_ref::<io::Error>() {
                return Some(error.kind());
            }
            next = error.source();
        }
        None
    }

    /// What the user can do about it, where there is something.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::DiskSpace { path, .. } => Some(format!(
                "free some space on the file system of '{}', or run: pyro env prune",
                path.display()
            )),
            Self::DiskFull => Some("free some disk space, or run: pyro env prune".to_owned()),
            Self::Debian(error) => error.hint(),
            Self::Tool(error) => error.hint(),
            Self::Distrusted(distrust) => Some(match distrust.remedy() {
                Some(remedy) => format!("{remedy}, or set PYRO_ENVIRONMENT_CACHE_DIR to one of your own"),
                None => "set PYRO_ENVIRONMENT_CACHE_DIR to one of your own".to_owned(),
            }),
            Self::ReadOnly { .. } => {
                Some("ask its owner, or set PYRO_ENVIRONMENT_CACHE_DIR to one of your own".to_owned())
            }
            Self::Cache { path, .. } => Some(format!("check the owner and mode of '{}'", path.display())),
            Self::Manifest { .. } => {
                Some("use the newer pyro that wrote it, or run: pyro env prune".to_owned())
            }
            Self::Damaged { name, .. } | Self::NotInstalled { name } => {
                Some(format!("run: pyro env pull {name}"))
            }
            Self::LockHeld { holder, .. } => Some(holder.as_ref().map_or_else(
                || "find a pyro process that is stopped, as by Ctrl-Z, and let it go on".to_owned(),
                Holder::remedy,
            )),
            Self::InUse { name } => Some(format!("run again: pyro env pull {name}")),
            Self::Replaced { .. } => {
                Some("the disk cannot be used any more: delete the task and create a new one".to_owned())
            }
            Self::UnknownEnvironment { .. }
            | Self::Tree(_)
            | Self::Kernel(_)
            | Self::OverlaySize
            | Self::Cancelled => None,
        }
    }

    /// Wraps an error of the file system; `path` is what was worked on.
    pub(crate) fn cache(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| if is_full(&source) { Self::DiskFull } else { Self::Cache { path, source } }
    }
}

impl From<ToolError> for ImageError {
    fn from(error: ToolError) -> Self {
        match error {
            ToolError::Cancelled => Self::Cancelled,
            ToolError::DiskFull => Self::DiskFull,
            other => Self::Tool(other),
        }
    }
}

impl From<DebianError> for ImageError {
    fn from(error: DebianError) -> Self {
        match error {
            DebianError::Tool(error) => error.into(),
            DebianError::Files { source, .. } if is_full(&source) => Self::DiskFull,
            other => Self::Debian(other),
        }
    }
}

impl From<TreeError> for ImageError {
    fn from(error: TreeError) -> Self {
        match error {
            TreeError::Cancelled => Self::Cancelled,
            TreeError::Write(source) if is_full(&source) => Self::DiskFull,
            other => Self::Tree(other),
        }
    }
}

impl From<KernelError> for ImageError {
    fn from(error: KernelError) -> Self {
        match error {
            KernelError::Cancelled => Self::Cancelled,
            other => Self::Kernel(other),
        }
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
