//! The environments that this version knows by name.

use crate::ImageError;

/// One environment of the catalog.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Definition {
    /// Such as `debian:12`.
    pub name: &'static str,
    /// The version of this definition.
    pub version: &'static str,
    /// One line for people.
    pub description: &'static str,
    /// What users may rely on, by package name.
    pub default_packages: &'static [&'static str],
    /// Packages installed besides, which users are not promised.
    pub(crate) further_packages: &'static [&'static str],
    /// What a build takes on disk at most, in MiB, with everything in between.
    pub(crate) build_mib: u64,
}

/// All environments, in the order in which they are listed.
pub const CATALOG: &[Definition] = &[
    Definition {
        name: "debian:12",
        version: "1.0.0",
        description: "the default, for agents",
        default_packages: &["bash", "coreutils", "git"],
        further_packages: &["ca-certificates", "netbase"],
        build_mib: 1200,
    },
    Definition {
        name: "debian:12-base",
        version: "1.0.0",
        description: "minimal",
        default_packages: &["bash", "coreutils"],
        further_packages: &["ca-certificates", "netbase"],
        build_mib: 800,
    },
    Definition {
        name: "debian:12-build",
        version: "1.0.0",
        description: "with build tools",
        default_packages: &["bash", "coreutils", "git", "gcc", "make", "cmake", "python3"],
        further_packages: &["ca-certificates", "netbase", "libc6-dev", "g++"],
        build_mib: 2600,
    },
];

/// Looks an environment up by its exact name.
pub(crate) fn find(name: &str) -> Result<&'static Definition, ImageError> {
    CATALOG
        .iter()
        .find(|definition| definition.name == name)
        .ok_or_else(|| ImageError::UnknownEnvironment { name: name.to_owned() })
}

/// All names as one text, for messages.
pub(crate) fn names() -> String {
    CATALOG.iter().map(|definition| definition.name).collect::<Vec<_>>().join(", ")
}
