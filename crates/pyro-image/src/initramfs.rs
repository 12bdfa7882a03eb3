//! The initramfs: the agent as `/init`, and the modules that it loads first.
//!
//! Uncompressed, because loading it is cheaper than unpacking it. The agent finds `/modules/order`:
//! one file name of `/modules` a line, to be loaded in this order; and `/modules/order.vsock`, for a VMM whose channel
//! is a virtio socket.

use std::io::{self, Write};

use cpio::newc::{Builder, ModeFileType, trailer};

/// A file of `/modules`.
#[derive(Clone, Debug)]
pub(crate) struct ModuleFile {
    pub(crate) name: String,
    pub(crate) bytes: Vec<u8>,
}

/// Builds the archive; the same input gives the same bytes.
pub(crate) fn build(agent: &[u8], modules: &[ModuleFile]) -> io::Result<Vec<u8>> {
    let mut archive = Archive { bytes: Vec::new(), serial: 0 };
    for directory in ["dev", "proc", "sys", "guest", "modules"] {
        archive.add(directory, ModeFileType::Directory, 0o755, (0, 0), &[])?;
    }
    // The kernel opens the console for the agent before the agent can mount anything.
    archive.add("dev/console", ModeFileType::Char, 0o600, (5, 1), &[])?;
    archive.add("dev/null", ModeFileType::Char, 0o666, (1, 3), &[])?;
    archive.add("init", ModeFileType::Regular, 0o755, (0, 0), agent)?;
    for module in modules {
        archive.add(
            &format!("modules/{}", module.name),
            ModeFileType::Regular,
            0o644,
            (0, 0),
            &module.bytes,
        )?;
    }
    trailer(archive.bytes)
}

struct Archive {
    bytes: Vec<u8>,
    serial: u32,
}

impl Archive {
    fn add(
        &mut self,
        name: &str,
        kind: ModeFileType,
        mode: u32,
        device: (u32, u32),
        bytes: &[u8],
    ) -> io::Result<()> {
        self.serial += 1;
        let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        let links = if matches!(kind, ModeFileType::Directory) { 2 } else { 1 };
        let mut entry = Builder::new(name)
            .ino(self.serial)
            .nlink(links)
            .mode(mode)
            .set_mode_file_type(kind)
            .rdev_major(device.0)
            .rdev_minor(device.1)
            .write(&mut self.bytes, length);
        entry.write_all(bytes)?;
        entry.finish()?;
        Ok(())
    }
}
