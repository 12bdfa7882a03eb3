//! A Debian root file system and kernel package, made by `mmdebstrap` from the host's own package sources.
//!
//! apt checks the whole chain from the archive's signature to each package; the kernel package comes out of
//! the same run. Root and other users get the same bytes: the tool always runs as root of its own namespaces,
//! with fixed time, zone and locale. What it leaves of the build host (name, resolver, sources, settings) is
//! replaced by a second layer, see [`finish`](self::finish::layer).

mod aptconf;
mod finish;
mod sources;

use std::path::{Path, PathBuf};

use crate::catalog::Definition;
use crate::progress::Progress;
use crate::tool::{self, ToolError, Tools};
use crate::tree::{Archive, Layer, Limits, MemberKind, TreeError};
use crate::{Package, files};

pub(crate) use self::sources::Sources;

/// Clamps every time in the image: 2026-02-02 02:40:00 UTC.
const SOURCE_DATE_EPOCH: &str = "1770000000";
const SUITE: &str = "bookworm";
/// The status file of dpkg is a few MiB in the largest image.
const MOST_STATUS: u64 = 64 << 20;

/// What is left out of the image: documentation and translations.
const DPKG_OPTIONS: &[&str] = &[
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/locale/*",
    "path-include=/usr/share/locale/locale.alias",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/lintian/*",
    "path-exclude=/usr/share/gtk-doc/*",
];
const APT_OPTIONS: &[&str] =
    &["APT::Install-Recommends \"false\"", "Acquire::Languages \"none\"", "Acquire::Retries \"3\""];

/// Fetches the kernel package, unless one with its digest is stored already.
const KERNEL_HOOK: &str = r#"set -eu
cd "$PYRO_KERNEL_DIR"
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: *\(linux-image-[^ ]*\)$/\1/p' | head -n 1)
test -n "$package"
apt-get download --print-uris "$package" > uris
digest=$(sed -n 's/.* SHA256:\([0-9a-f]*\).*/\1/p' uris)
case "${digest:-none} $PYRO_KERNELS_STORED " in
"$digest "*" $digest "*) echo "$digest" > stored ;;
*) apt-get download "$package" ;;
esac"#;

/// Why a root file system could not be built.
#[derive(Debug, thiserror::Error)]
pub enum DebianError {
    /// No sources file was given and none was found.
    #[error("no package sources for Debian 12 ({SUITE}) were found in '{}'", directory.display())]
    NoSources {
        /// Where they were looked for.
        directory: PathBuf,
    },
    /// The sources file that was given does not serve.
    #[error("'{}' names no '{SUITE}' suite of Debian", path.display())]
    UnfitSources {
        /// The file.
        path: PathBuf,
    },
    /// This user may not map other ids.
    #[error("user '{user}' has no subordinate ids in '{file}'")]
    NoSubordinateIds {
        /// The user's name or number.
        user: String,
        /// The file that lacks them.
        file: &'static str,
    },
    /// A tool is missing or failed.
    #[error(transparent)]
    Tool(ToolError),
    /// A file could not be read or written.
    #[error("'{}' cannot be used", path.display())]
    Files {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The tool ended well but left no kernel package.
    #[error("the build left no kernel package")]
    NoKernel,
}

impl DebianError {
    pub(crate) fn code(&self) -> &'static str {
        match self {
            Self::NoSources { .. } | Self::UnfitSources { .. } => "no_debian_sources",
            Self::NoSubordinateIds { .. } => "no_subordinate_ids",
            Self::Tool(error) => error.code(),
            Self::Files { .. } => "environment_cache",
            Self::NoKernel => "tool_failed",
        }
    }

    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            Self::NoSources { .. } => Some(
                "set apt_sources to a Debian 12 sources file (deb822 .sources or one-line .list)".to_owned(),
            ),
            Self::UnfitSources { .. } => {
                Some(format!("set apt_sources to a file whose sources name the suite {SUITE}"))
            }
            Self::NoSubordinateIds { user, .. } => Some(subordinate_remedy(user)),
            Self::Tool(error) => error.hint(),
            Self::Files { .. } | Self::NoKernel => None,
        }
    }

    fn files(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Files { path, source }
    }
}

impl From<ToolError> for DebianError {
    fn from(error: ToolError) -> Self {
        Self::Tool(error)
    }
}

/// What a build is made from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request<'a> {
    pub(crate) definition: &'a Definition,
    pub(crate) sources: &'a Sources,
    pub(crate) tools: &'a Tools,
    /// An empty directory for everything in between.
    pub(crate) staging: &'a Path,
    /// Digests of the kernel packages that need not be fetched.
    pub(crate) kernels_stored: &'a [String],
}

/// What a build gave.
#[derive(Debug)]
pub(crate) struct Built {
    /// The lowest first.
    pub(crate) layers: Vec<Layer>,
    pub(crate) kernel: KernelSource,
    /// Sorted by name.
    pub(crate) packages: Vec<Package>,
}

/// Where the kernel is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum KernelSource {
    /// A package file.
    Package(PathBuf),
    /// Stored already, under the digest of its package.
    Stored(String),
}

/// Builds the root file system of a definition.
pub(crate) fn build(request: &Request<'_>, progress: &dyn Progress) -> Result<Built, DebianError> {
    let staging = request.staging;
    let (temporary, kernel) = (staging.join("tmp"), staging.join("kernel-package"));
    for directory in [&temporary, &kernel] {
        fs_err::create_dir(directory).map_err(DebianError::files(directory))?;
    }
    let sources = staging.join(request.sources.file_name());
    files::write_new(&sources, request.sources.text().as_bytes()).map_err(DebianError::files(&sources))?;
    let archive = staging.join("rootfs.tar");

    let mut spawn = request.tools.confined("mmdebstrap", staging)?;
    spawn
        .env("TMPDIR", &temporary)
        .env("HOME", &temporary)
        .env("SOURCE_DATE_EPOCH", SOURCE_DATE_EPOCH)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("PYRO_KERNEL_DIR", &kernel)
        .env("PYRO_KERNELS_STORED", request.kernels_stored.join(" "))
        .args(["--mode=root", "--variant=minbase", "--format=tar", "--architectures=amd64"])
        .args(DPKG_OPTIONS.iter().map(|option| format!("--dpkgopt={option}")))
        .args(APT_OPTIONS.iter().map(|option| format!("--aptopt={option}")));
    // In a file: a proxy's password must not be in a process listing.
    let options = staging.join("apt.conf");
    let text: String =
        aptconf::host_options(request.tools, staging).iter().map(|option| format!("{option};\n")).collect();
    files::write_new(&options, text.as_bytes()).map_err(DebianError::files(&options))?;
    spawn.arg(format!("--aptopt={}", options.display()));
    let definition = request.definition;
    let packages = definition.default_packages.iter().chain(definition.further_packages);
    spawn
        .arg(format!("--include={}", packages.copied().collect::<Vec<_>>().join(",")))
        .arg(format!("--customize-hook={KERNEL_HOOK}"))
        .arg(SUITE)
        .args([&archive, &sources]);
    let mut phase = Phase::new(progress);
    tool::run("mmdebstrap", spawn, &mut |line| phase.line(line), &|| progress.cancelled())?;

    let packages = installed_packages(&archive)?;
    let finish = finish::layer(request.sources).map_err(DebianError::files("the last layer"))?;
    let layers = vec![Layer::File(archive), Layer::Bytes(finish.into())];
    Ok(Built { layers, kernel: kernel_source(&kernel)?, packages })
}

fn kernel_source(directory: &Path) -> Result<KernelSource, DebianError> {
    let stored = directory.join("stored");
    if stored.exists() {
        let digest = fs_err::read_to_string(&stored).map_err(DebianError::files(&stored))?;
        return Ok(KernelSource::Stored(digest.trim().to_owned()));
    }
    for entry in fs_err::read_dir(directory).map_err(DebianError::files(directory))? {
        let path = entry.map_err(DebianError::files(directory))?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            return Ok(KernelSource::Package(path));
        }
    }
    Err(DebianError::NoKernel)
}

/// Reads the list of packages out of dpkg's status file in the archive.
fn installed_packages(archive: &Path) -> Result<Vec<Package>, DebianError> {
    let damaged = |error: TreeError| DebianError::Files {
        path: archive.to_owned(),
        source: std::io::Error::other(error),
    };
    let reader = Layer::File(archive.to_owned()).open().map_err(DebianError::files(archive))?;
    let limits = Limits::default();
    let mut members = Archive::new(reader, 0, &limits, &|| false);
    while let Some(member) = members.next_member().map_err(damaged)? {
        if member.kind == MemberKind::File && member.path.ends_with(b"var/lib/dpkg/status") {
            let status = members.read_whole(MOST_STATUS).map_err(damaged)?;
            return Ok(parse_status(&String::from_utf8_lossy(&status)));
        }
    }
    Ok(Vec::new())
}

fn parse_status(status: &str) -> Vec<Package> {
    let field = |stanza: &str, name: &str| {
        stanza.lines().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(": ")?.to_owned()))
    };
    let mut packages: Vec<Package> = status
        .split("\n\n")
        .filter_map(|stanza| {
            Some(Package { name: field(stanza, "Package")?, version: field(stanza, "Version")? })
        })
        .collect();
    packages.sort();
    packages
}

/// The command that gives a user subordinate ids.
pub(crate) fn subordinate_remedy(user: &str) -> String {
    format!("usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}")
}

/// Checks that this user may map ids of others, which root need not.
pub(crate) fn check_subordinate_ids() -> Result<(), DebianError> {
    let uid = rustix::process::geteuid();
    if uid.is_root() {
        return Ok(());
    }
    let number = uid.as_raw().to_string();
    let passwd = fs_err::read_to_string("/etc/passwd").unwrap_or_default();
    let user = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == number).then(|| name.to_owned())
    });
    // A user from a directory service may have its ranges there as well; the tool will tell.
    let Some(user) = user else { return Ok(()) };
    for file in ["/etc/subuid", "/etc/subgid"] {
        let ranges = fs_err::read_to_string(file).unwrap_or_default();
        let listed = ranges.lines().any(|line| {
            let owner = line.split(':').next().unwrap_or_default();
            owner == user || owner == number
        });
        if !listed {
            return Err(DebianError::NoSubordinateIds { user, file });
        }
    }
    Ok(())
}

/// Turns the tool's words into phases; their exact form is not promised, so unknown lines change nothing.
struct Phase<'a> {
    progress: &'a dyn Progress,
    current: &'static str,
}

impl<'a> Phase<'a> {
    fn new(progress: &'a dyn Progress) -> Self {
        progress.phase("preparing", "");
        Self { progress, current: "preparing" }
    }

    fn line(&mut self, line: &str) {
        const PHASES: &[(&str, &str)] = &[
            ("I: running apt-get update", "fetching package lists"),
            ("I: downloading packages", "fetching packages"),
            ("I: extracting archives", "unpacking"),
            ("I: installing", "configuring"),
            ("I: running --customize-hook", "fetching kernel"),
            ("I: cleaning", "cleaning"),
            ("I: creating tarball", "archiving"),
        ];
        if let Some((_, phase)) = PHASES.iter().find(|(start, _)| line.starts_with(start)) {
            self.current = phase;
            self.progress.phase(phase, "");
        } else if let Some(rest) = line.strip_prefix("Get:") {
            // "Get:7 URL SUITE ARCH NAME ARCH VERSION [SIZE]"
            self.progress.phase(self.current, rest.split(' ').nth(4).unwrap_or_default());
        } else if let Some(rest) =
            line.strip_prefix("Setting up ").or_else(|| line.strip_prefix("Unpacking "))
        {
            self.progress.phase(self.current, rest.split(' ').next().unwrap_or_default());
        }
    }
}
