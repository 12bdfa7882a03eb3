//! Writing a tree as an uncompressed EROFS image.
//!
//! Every inode is of the extended form (32-bit owners, its own time). Whole blocks of files come first, in
//! the order of the layers, then blocks of directories, then all metadata: inodes with their attributes and,
//! behind them, the last partial block of their contents. The superblock comes last, so an image that was
//! cut short is no image. The same tree gives the same bytes: the UUID and the build time are constants.
//!
//! Blocks of zeros are not written, so the file is sparse where the contents are.

mod data;
mod directory;
mod metadata;
mod ondisk;

use std::fs::File;
use std::os::unix::fs::FileExt;

pub(crate) use self::ondisk::xattr_index;
use crate::tree::{Layer, Limits, Tree, TreeError};

/// What became of a tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Inodes in the image.
    pub inodes: u64,
    /// Length of the image in bytes, holes included.
    pub bytes: u64,
}

/// Where an image is written.
pub trait Output {
    /// Writes `bytes` at `offset`, in bytes from the start.
    ///
    /// # Errors
    /// When the bytes cannot be stored.
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> std::io::Result<()>;

    /// Sets the length of the whole, in bytes; what was not written reads as zeros.
    ///
    /// # Errors
    /// When the length cannot be set.
    fn set_length(&mut self, length: u64) -> std::io::Result<()>;
}

impl Output for File {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> std::io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn set_length(&mut self, length: u64) -> std::io::Result<()> {
        self.set_len(length)
    }
}

impl Output for Vec<u8> {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> std::io::Result<()> {
        let start = usize::try_from(offset).map_err(std::io::Error::other)?;
        let end = start + bytes.len();
        if self.len() < end {
            self.resize(end, 0);
        }
        self[start..end].copy_from_slice(bytes);
        Ok(())
    }

    fn set_length(&mut self, length: u64) -> std::io::Result<()> {
        self.resize(usize::try_from(length).map_err(std::io::Error::other)?, 0);
        Ok(())
    }
}

/// Writes `tree`, whose file contents are in `layers`, to `output`, which must be empty.
///
/// # Errors
/// When a layer changed since it was flattened or cannot be read, the output cannot be written, or
/// `interrupted` says yes.
pub fn write_image(
    tree: &Tree,
    layers: &[Layer],
    limits: &Limits,
    output: &mut dyn Output,
    interrupted: &dyn Fn() -> bool,
) -> Result<Summary, TreeError> {
    let inodes = tree.inodes();
    let contents = data::write(tree, &inodes, layers, limits, output, interrupted)?;
    let plan = metadata::plan(tree, &inodes, contents)?;
    metadata::write(tree, &inodes, &plan, output).map_err(TreeError::Write)?;
    Ok(Summary { inodes: inodes.len() as u64, bytes: plan.bytes() })
}
