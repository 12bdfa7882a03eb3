//! The file tree of an image, in memory: metadata only.
//!
//! Layers (tar archives, bottom up) are merged into one [`Tree`] without unpacking anything on the host: a
//! regular file keeps only where its bytes are (layer and member number), and whoever writes the image
//! streams the layers a second time. Nothing is ever created under a name that a layer chose, so hostile
//! names can do no harm outside of the image; nonsense is rejected all the same.

mod archive;
mod decompress;
mod error;
mod layer;
mod member;
mod stream;

use std::collections::BTreeMap;

pub(crate) use self::archive::Archive;
pub(crate) use self::decompress::decoder_with_xz;
pub(crate) use self::error::show;
pub use self::error::{Reason, TreeError};
pub use self::layer::flatten;
pub(crate) use self::member::MemberKind;
pub(crate) use self::stream::stream_files;

/// Where the bytes of one layer are.
#[derive(Clone, Debug)]
pub enum Layer {
    /// A file on the host: plain tar, gzip or zstd, told apart by its first bytes.
    File(std::path::PathBuf),
    /// The same in memory.
    Bytes(std::sync::Arc<[u8]>),
}

/// What a set of layers may ask for; every field is an upper bound.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Sum of the sizes of all regular files, and length of each decompressed layer, in bytes.
    pub total_bytes: u64,
    /// Number of members over all layers, which bounds the number of inodes.
    pub inodes: u64,
    /// Number of layers.
    pub layers: usize,
    /// Length of one path, in bytes.
    pub path: usize,
    /// Number of components of one path after symbolic links are followed.
    pub depth: usize,
    /// Length of one name, in bytes.
    pub name: usize,
    /// Names and values of the extended attributes of one inode, in bytes.
    pub xattrs: usize,
    /// Extension headers (long names, pax records) in front of one member, in bytes.
    pub extension: u64,
    /// Paths, link targets and extended attributes of all members together, in bytes.
    pub metadata: u64,
    /// File ends kept in memory for the image writer, in bytes; more are written as whole blocks.
    pub tails: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            total_bytes: 16 << 30,
            inodes: 1 << 20,
            layers: 128,
            path: 4096,
            depth: 128,
            name: 255,
            xattrs: 64 << 10,
            extension: 2 << 20,
            metadata: 256 << 20,
            tails: 256 << 20,
        }
    }
}

/// Names one node of a [`Tree`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct NodeId(u32);

impl NodeId {
    pub(crate) const ROOT: Self = Self(0);

    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// Owner, mode, time and attributes of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Meta {
    /// The permission bits, `0o7777` at most.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds since 1970, possibly negative.
    pub(crate) mtime: i64,
    pub(crate) mtime_nsec: u32,
    /// By full name, such as `security.capability`.
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// What a node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Directory(BTreeMap<Vec<u8>, NodeId>),
    /// `layer` and `member` say where the bytes are.
    File {
        size: u64,
        layer: u32,
        member: u32,
    },
    Symlink(Vec<u8>),
    Character(u32, u32),
    Block(u32, u32),
    Fifo,
}

/// A node: one inode of the image.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) kind: Kind,
    pub(crate) meta: Meta,
}

/// The merged file tree of all layers.
#[derive(Clone, Debug)]
pub struct Tree {
    nodes: Vec<Node>,
}

/// One inode that is still reachable, in the order of [`Tree::inodes`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reached {
    pub(crate) node: NodeId,
    /// The directory in which it was met first; the root is its own parent.
    pub(crate) parent: NodeId,
    pub(crate) links: u32,
}

impl Tree {
    pub(crate) fn new() -> Self {
        let meta = Meta { mode: 0o755, ..Meta::default() };
        Self { nodes: vec![Node { kind: Kind::Directory(BTreeMap::new()), meta }] }
    }

    pub(crate) fn node(&self, id: NodeId) -> &Node {
        // Ids are only made by `add`, and nodes are never removed.
        &self.nodes[id.index()]
    }

    fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id.index()]
    }

    pub(crate) fn children(&self, id: NodeId) -> Option<&BTreeMap<Vec<u8>, NodeId>> {
        match &self.node(id).kind {
            Kind::Directory(children) => Some(children),
            _ => None,
        }
    }

    fn children_mut(&mut self, id: NodeId) -> Option<&mut BTreeMap<Vec<u8>, NodeId>> {
        match &mut self.node_mut(id).kind {
            Kind::Directory(children) => Some(children),
            _ => None,
        }
    }

    /// The number of nodes ever made, replaced ones included.
    pub(crate) fn capacity(&self) -> usize {
        self.nodes.len()
    }

    /// The inodes that names lead to, parents before children, siblings by name; the root comes first.
    pub(crate) fn inodes(&self) -> Vec<Reached> {
        let mut position = vec![usize::MAX; self.nodes.len()];
        let mut order: Vec<Reached> = Vec::with_capacity(self.nodes.len());
        let mut stack = vec![(NodeId::ROOT, NodeId::ROOT)];
        while let Some((node, parent)) = stack.pop() {
            let seen = position[node.index()];
            if seen != usize::MAX {
                order[seen].links += 1;
                continue;
            }
            position[node.index()] = order.len();
            let mut links = 1;
            if let Some(children) = self.children(node) {
                links = 2;
                for child in children.values().rev() {
                    links += u32::from(self.children(*child).is_some());
                    stack.push((*child, node));
                }
            }
            order.push(Reached { node, parent, links });
        }
        order
    }

    /// The number of inodes and the sum of their file sizes in bytes.
    pub fn extent(&self) -> (u64, u64) {
        let inodes = self.inodes();
        let bytes = inodes
            .iter()
            .map(|reached| match self.node(reached.node).kind {
                Kind::File { size, .. } => size,
                _ => 0,
            })
            .sum();
        (inodes.len() as u64, bytes)
    }
}

#[cfg(test)]
mod tests;
