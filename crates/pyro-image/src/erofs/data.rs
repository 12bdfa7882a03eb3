//! File contents: whole blocks go to the image as they are read, tails wait for their inode.

use super::Output;
use super::ondisk::{BLOCK, INODE, xattr_bytes};
use crate::tree::{Layer, Limits, Reached, Tree, TreeError, stream_files};

/// Where the contents of an inode went.
#[derive(Clone, Debug, Default)]
pub(super) struct Placement {
    /// The first whole block.
    pub(super) block: u32,
    /// What stands behind the inode instead of in a block.
    pub(super) tail: Vec<u8>,
}

/// The contents of all files.
#[derive(Debug)]
pub(super) struct Contents {
    /// By node index; directories and others have the default.
    pub(super) placements: Vec<Placement>,
    /// The first block behind the data.
    pub(super) next_block: u32,
}

const CHUNK: usize = 256 * BLOCK;

pub(super) fn write(
    tree: &Tree,
    inodes: &[Reached],
    layers: &[Layer],
    limits: &Limits,
    output: &mut dyn Output,
    interrupted: &dyn Fn() -> bool,
) -> Result<Contents, TreeError> {
    let mut placements = vec![Placement::default(); tree.capacity()];
    // Block 0 is the superblock's.
    let mut next_block: u32 = 1;
    let mut tails = 0;
    let mut buffer = vec![0; CHUNK];
    stream_files(tree, inodes, layers, limits, interrupted, &mut |node, size, source| {
        if interrupted() {
            return Err(TreeError::Cancelled);
        }
        let tail_length = usize::try_from(size % BLOCK as u64).unwrap_or(0);
        let inline = fits_behind_inode(xattr_bytes(&tree.node(node).meta), tail_length)
            && tails + tail_length <= limits.tails;
        let mut left = size;
        let mut tail = Vec::new();
        let start = next_block;
        while left > 0 {
            let read = source(&mut buffer)?;
            if read == 0 {
                break;
            }
            left -= read as u64;
            let mut whole = read - read % BLOCK;
            if whole < read {
                if inline {
                    tail.extend_from_slice(&buffer[whole..read]);
                } else {
                    let padded = read.next_multiple_of(BLOCK);
                    buffer[read..padded].fill(0);
                    whole = padded;
                }
            }
            write_blocks(&buffer[..whole], next_block, output).map_err(TreeError::Write)?;
            next_block = advance(next_block, whole / BLOCK)?;
            if interrupted() {
                return Err(TreeError::Cancelled);
            }
        }
        tails += tail.len();
        placements[node.index()] = Placement { block: start, tail };
        Ok(())
    })?;
    Ok(Contents { placements, next_block })
}

/// Whether an inode with such attributes leaves room in its block for a tail.
pub(super) fn fits_behind_inode(xattr_bytes: usize, tail: usize) -> bool {
    tail > 0 && INODE + xattr_bytes + tail <= BLOCK
}

pub(super) fn advance(block: u32, blocks: usize) -> Result<u32, TreeError> {
    u32::try_from(blocks)
        .ok()
        .and_then(|blocks| block.checked_add(blocks))
        .ok_or_else(|| TreeError::Limit { what: "blocks", limit: u64::from(u32::MAX) })
}

/// Writes runs of blocks that hold anything and leaves holes for the others.
fn write_blocks(bytes: &[u8], first: u32, output: &mut dyn Output) -> std::io::Result<()> {
    let base = u64::from(first) * BLOCK as u64;
    let mut run = 0;
    for (number, block) in bytes.chunks(BLOCK).enumerate() {
        let at = number * BLOCK;
        if block.iter().all(|byte| *byte == 0) {
            if run < at {
                output.write_at(&bytes[run..at], base + run as u64)?;
            }
            run = at + BLOCK;
        }
    }
    if run < bytes.len() {
        output.write_at(&bytes[run..], base + run as u64)?;
    }
    Ok(())
}
