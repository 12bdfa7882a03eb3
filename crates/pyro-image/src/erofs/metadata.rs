//! Metadata: first every inode gets its place, then everything is written in one sweep.

use super::Output;
use super::data::{Contents, advance, fits_behind_inode};
use super::directory::{Directory, size_of};
use super::ondisk::{
    BLOCK, DataLayout, INODE, Inode, ROOT_SLOT, SLOT, Superblock, encode_xattrs, xattr_bytes,
};
use crate::tree::{Kind, NodeId, Reached, Tree, TreeError};

/// Where everything goes.
#[derive(Debug)]
pub(super) struct Plan {
    contents: Contents,
    /// In the order of the inodes.
    places: Vec<Place>,
    /// By node index: the inode's slot.
    slots: Vec<u64>,
    metadata_block: u32,
    blocks: u32,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    /// Bytes from the start of the metadata.
    offset: u64,
    size: u64,
    /// The first whole block of the contents.
    block: u32,
    /// Bytes behind the inode and its attributes.
    tail: usize,
}

impl Plan {
    /// Length of the image in bytes.
    pub(super) fn bytes(&self) -> u64 {
        u64::from(self.blocks) * BLOCK as u64
    }
}

pub(super) fn plan(tree: &Tree, inodes: &[Reached], contents: Contents) -> Result<Plan, TreeError> {
    let mut next_block = contents.next_block;
    let mut offset = u64::from(ROOT_SLOT) * SLOT as u64;
    let mut places = Vec::with_capacity(inodes.len());
    let mut slots = vec![0; tree.capacity()];
    for reached in inodes {
        let node = tree.node(reached.node);
        let xattrs = xattr_bytes(&node.meta);
        let size = size_of(tree, reached);
        let (block, tail) = match node.kind {
            Kind::Directory(_) | Kind::Symlink(_) => {
                let tail = usize::try_from(size % BLOCK as u64).unwrap_or(0);
                let tail = if fits_behind_inode(xattrs, tail) { tail } else { 0 };
                let block = next_block;
                let blocks = (size - tail as u64).div_ceil(BLOCK as u64);
                next_block = advance(next_block, usize::try_from(blocks).unwrap_or(usize::MAX))?;
                (block, tail)
            }
            _ => {
                let placement = &contents.placements[reached.node.index()];
                (placement.block, placement.tail.len())
            }
        };
        let needed = (INODE + xattrs + tail) as u64;
        let within = offset % BLOCK as u64;
        // An inode and its tail must stand in one block; large attributes may run on into the next.
        if within + needed.min(BLOCK as u64) > BLOCK as u64 {
            offset += BLOCK as u64 - within;
        }
        slots[reached.node.index()] = offset / SLOT as u64;
        places.push(Place { offset, size, block, tail });
        offset = (offset + needed).next_multiple_of(SLOT as u64);
    }
    let metadata_blocks = usize::try_from(offset.div_ceil(BLOCK as u64)).unwrap_or(usize::MAX);
    let blocks = advance(next_block, metadata_blocks)?;
    Ok(Plan { contents, places, slots, metadata_block: next_block, blocks })
}

pub(super) fn write(
    tree: &Tree,
    inodes: &[Reached],
    plan: &Plan,
    output: &mut dyn Output,
) -> std::io::Result<()> {
    let slot = |node: NodeId| plan.slots[node.index()];
    let base = u64::from(plan.metadata_block) * BLOCK as u64;
    let mut pending = Pending { output, offset: base, bytes: Vec::new() };
    for (number, (reached, place)) in inodes.iter().zip(&plan.places).enumerate() {
        let node = tree.node(reached.node);
        let made = match &node.kind {
            Kind::Symlink(target) => target.clone(),
            Kind::Directory(_) => {
                Directory::new(tree, reached).map(|entries| entries.encode(tree, slot)).unwrap_or_default()
            }
            _ => Vec::new(),
        };
        let (whole, made_tail) = made.split_at(made.len() - if made.is_empty() { 0 } else { place.tail });
        if !whole.is_empty() {
            pending.output.write_at(whole, u64::from(place.block) * BLOCK as u64)?;
        }
        let file_tail = plan.contents.placements[reached.node.index()].tail.as_slice();
        let tail = if made.is_empty() { file_tail } else { made_tail };
        pending.start_at(base + place.offset)?;
        let inode = Inode {
            kind: &node.kind,
            meta: &node.meta,
            layout: if tail.is_empty() { DataLayout::Plain } else { DataLayout::Inline },
            xattr_bytes: xattr_bytes(&node.meta),
            size: place.size,
            block: place.block,
            serial: u32::try_from(number + 1).unwrap_or(u32::MAX),
            links: reached.links,
        };
        inode.encode(&mut pending.bytes);
        encode_xattrs(&node.meta, &mut pending.bytes);
        pending.bytes.extend_from_slice(tail);
    }
    pending.flush()?;
    output.set_length(plan.bytes())?;
    let superblock =
        Superblock { inodes: inodes.len() as u64, blocks: plan.blocks, metadata_block: plan.metadata_block };
    output.write_at(&superblock.encode(), 0)
}

/// Gathers neighbouring metadata into large writes.
struct Pending<'a> {
    output: &'a mut dyn Output,
    offset: u64,
    bytes: Vec<u8>,
}

impl Pending<'_> {
    const MOST: usize = 1 << 20;

    /// Fills up with zeros to the place of the next inode.
    fn start_at(&mut self, offset: u64) -> std::io::Result<()> {
        let gap = offset - self.offset;
        self.bytes.resize(usize::try_from(gap).map_err(std::io::Error::other)?, 0);
        if self.bytes.len() >= Self::MOST {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.output.write_at(&self.bytes, self.offset)?;
        self.offset += self.bytes.len() as u64;
        self.bytes.clear();
        Ok(())
    }
}
