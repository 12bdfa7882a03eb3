//! Taking a Debian kernel package apart: the uncompressed kernel, and the modules that a guest needs.
//!
//! Nothing is installed and nothing is run. The package is not hostile (apt checked it), but everything in it
//! is read as if it were.

mod bzimage;
mod modinfo;
mod modules;

use std::collections::BTreeMap;
use std::io::{self, Read};

use crate::tree::{Archive, Limits, MemberKind, TreeError, decoder_with_xz};

pub use self::bzimage::{BzImageError, unpack_kernel};
pub use self::modinfo::{ModinfoError, ModuleInfo, parse_modinfo};
pub(crate) use self::modules::Module;

/// What guests load, as lists of a name each: the first for every guest (disks, channel, the file systems of the
/// root), the others after it where a guest has what they drive. A module costs a boot 5 to 35 ms in software.
pub(crate) const LISTS: &[(&str, &[&str])] = &[
    ("order", &["virtio_mmio", "virtio_blk", "virtio_console", "overlay", "erofs"]),
    ("order.network", &["virtio_net"]),
    ("order.vsock", &["vsock", "vmw_vsock_virtio_transport"]),
];

/// Bounds for what a package may hold, in bytes.
const MOST_PACKAGE: u64 = 4 << 30;
const MOST_KERNEL: u64 = 128 << 20;
const MOST_MODULE: u64 = 64 << 20;
const MOST_MODULES: u64 = 1 << 30;
const MOST_LIST: u64 = 4 << 20;

/// A kernel package that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The package's outer archive is damaged.
    #[error("the package cannot be read")]
    Package(#[source] io::Error),
    /// The package's contents are damaged.
    #[error("the package's contents cannot be read")]
    Contents(#[source] TreeError),
    /// Something that must be there is missing.
    #[error("the package has no {0}")]
    Missing(&'static str),
    /// A module that a guest needs is missing.
    #[error("the package has no module '{0}'")]
    MissingModule(String),
    /// The modules need each other in a circle.
    #[error("module '{0}' depends on itself")]
    Cycle(String),
    /// A module is damaged.
    #[error("module '{name}' cannot be read")]
    Module {
        /// Its name.
        name: String,
        /// The cause.
        source: ModinfoError,
    },
    /// The kernel image is damaged.
    #[error("the kernel image cannot be unpacked")]
    Image(#[source] BzImageError),
    /// It is no uncompressed kernel for x86-64.
    #[error("it is no uncompressed x86-64 kernel (vmlinux)")]
    NoKernel,
    /// The package holds more than any kernel has.
    #[error("it is too large")]
    TooLarge,
    /// The caller asked to stop.
    #[error("cancelled")]
    Cancelled,
}

impl From<TreeError> for KernelError {
    fn from(error: TreeError) -> Self {
        match error {
            TreeError::Cancelled => Self::Cancelled,
            other => Self::Contents(other),
        }
    }
}

/// What a guest needs of a kernel package.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// The release name, such as `6.1.0-56-cloud-amd64`.
    pub(crate) release: String,
    /// The kernel as an ELF file.
    pub(crate) image: Vec<u8>,
    /// For each of [`LISTS`] the modules in the order in which they must be loaded.
    pub(crate) modules: Vec<Vec<Module>>,
}

/// Takes a package (a `.deb`) apart.
pub(crate) fn unpack_package(
    package: impl Read,
    cancelled: &dyn Fn() -> bool,
) -> Result<Kernel, KernelError> {
    let mut outer = ar::Archive::new(package);
    while let Some(entry) = outer.next_entry() {
        let entry = entry.map_err(KernelError::Package)?;
        if entry.header().identifier().starts_with(b"data.tar") {
            let data = io::BufReader::with_capacity(1 << 16, entry);
            let data = decoder_with_xz(data).map_err(KernelError::Package)?;
            return unpack_data(data, cancelled);
        }
    }
    Err(KernelError::Missing("contents"))
}

/// What an uncompressed kernel calls its release.
pub(crate) fn release_of(image: &[u8]) -> Result<String, KernelError> {
    const BANNER: &[u8] = b"Linux version ";
    const LONGEST: usize = 128;
    // An ELF file of 64 bits, little endian, for x86-64.
    let elf = image.starts_with(b"\x7fELF\x02\x01") && image.get(18..20) == Some(&[62, 0]);
    let banner = image.windows(BANNER.len()).position(|window| window == BANNER);
    let rest = banner.filter(|_| elf).map(|at| &image[at + BANNER.len()..]).ok_or(KernelError::NoKernel)?;
    let name: Vec<u8> = rest.iter().copied().take(LONGEST).take_while(u8::is_ascii_graphic).collect();
    String::from_utf8(name).ok().filter(|name| !name.is_empty()).ok_or(KernelError::NoKernel)
}

fn unpack_data(data: impl Read, cancelled: &dyn Fn() -> bool) -> Result<Kernel, KernelError> {
    let limits = Limits { total_bytes: MOST_PACKAGE, ..Limits::default() };
    let mut members = Archive::new(data, 0, &limits, cancelled);
    let mut image = None;
    let mut builtin = None;
    let mut files = BTreeMap::new();
    let mut module_bytes = 0;
    while let Some(member) = members.next_member()? {
        if member.kind != MemberKind::File {
            continue;
        }
        let path = String::from_utf8_lossy(&member.path).into_owned();
        let path = path.trim_start_matches("./").trim_start_matches('/');
        if let Some(release) = path.strip_prefix("boot/vmlinuz-") {
            image = Some((release.to_owned(), members.read_whole(MOST_KERNEL)?));
        } else if path.ends_with("/modules.builtin") {
            builtin = Some(members.read_whole(MOST_LIST)?);
        } else if let Some(name) = modules::name_of(path) {
            let bytes = members.read_whole(MOST_MODULE)?;
            module_bytes += bytes.len() as u64;
            if module_bytes > MOST_MODULES {
                return Err(KernelError::TooLarge);
            }
            files.insert(name, bytes);
        }
    }
    let (release, image) = image.ok_or(KernelError::Missing("kernel image"))?;
    let builtin = builtin.ok_or(KernelError::Missing("list of builtin modules"))?;
    let set = modules::Set::new(files, &String::from_utf8_lossy(&builtin));
    let modules = set.select(LISTS.iter().map(|(_, wanted)| *wanted))?;
    let image = unpack_kernel(&image).map_err(KernelError::Image)?;
    Ok(Kernel { release, image, modules })
}

#[cfg(test)]
mod tests;
