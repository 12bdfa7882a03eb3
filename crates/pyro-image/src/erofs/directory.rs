//! The contents of directories: blocks of sorted entries, each with its names behind it.

use super::ondisk::{BLOCK, DIRENT, entry_type};
use crate::tree::{Kind, NodeId, Reached, Tree};

/// The entries of a directory and how they fill blocks.
#[derive(Debug)]
pub(super) struct Directory<'a> {
    entries: Vec<(&'a [u8], NodeId)>,
    /// How many entries each block holds.
    blocks: Vec<usize>,
    /// Bytes used in the last block.
    last: usize,
}

impl<'a> Directory<'a> {
    /// `.` and `..` are sorted among the others: the kernel looks names up by bisection.
    pub(super) fn new(tree: &'a Tree, reached: &Reached) -> Option<Self> {
        let children = tree.children(reached.node)?;
        let mut entries: Vec<(&[u8], NodeId)> =
            children.iter().map(|(name, node)| (name.as_slice(), *node)).collect();
        entries.push((b".", reached.node));
        entries.push((b"..", reached.parent));
        entries.sort_unstable_by_key(|(name, _)| *name);
        let mut blocks = Vec::new();
        let (mut count, mut used) = (0, 0);
        for (name, _) in &entries {
            let needed = DIRENT + name.len();
            if used + needed > BLOCK {
                blocks.push(count);
                (count, used) = (0, 0);
            }
            count += 1;
            used += needed;
        }
        blocks.push(count);
        Some(Self { entries, blocks, last: used })
    }

    /// Length of the contents in bytes: the last block counts only as far as it is used.
    pub(super) fn size(&self) -> usize {
        (self.blocks.len() - 1) * BLOCK + self.last
    }

    /// The contents, all blocks but the last filled up with zeros.
    pub(super) fn encode(&self, tree: &Tree, slot: impl Fn(NodeId) -> u64) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.size());
        let mut rest = self.entries.as_slice();
        for count in &self.blocks {
            out.resize(out.len().next_multiple_of(BLOCK), 0);
            let (block, after) = rest.split_at(*count);
            rest = after;
            let mut name_offset = count * DIRENT;
            for (name, node) in block {
                out.extend_from_slice(&slot(*node).to_le_bytes());
                // Within a block of 4,096 bytes.
                out.extend_from_slice(&u16::try_from(name_offset).unwrap_or(u16::MAX).to_le_bytes());
                out.push(entry_type(&tree.node(*node).kind));
                out.push(0);
                name_offset += name.len();
            }
            for (name, _) in block {
                out.extend_from_slice(name);
            }
        }
        out
    }
}

/// Contents that the image holds in full length: a directory's entries or a link's target.
pub(super) fn size_of(tree: &Tree, reached: &Reached) -> u64 {
    match &tree.node(reached.node).kind {
        Kind::Directory(_) => Directory::new(tree, reached).map_or(0, |directory| directory.size() as u64),
        Kind::Symlink(target) => target.len() as u64,
        Kind::File { size, .. } => *size,
        Kind::Character(..) | Kind::Block(..) | Kind::Fifo => 0,
    }
}
