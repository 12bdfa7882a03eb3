//! Merging layers into one tree: whiteouts, hard links, parents behind symbolic links.

use std::collections::BTreeMap;

use super::archive::Archive;
use super::member::{Member, MemberKind};
use super::{Kind, Layer, Limits, Meta, Node, NodeId, Reason, Tree, TreeError, show};

/// Components followed while looking up one path, those of links included. Without it a small layer could keep
/// us busy for hours.
const MOST_STEPS: usize = 1024;
/// Symbolic links followed while looking up one path; as the kernel's own bound.
const MOST_LINKS: usize = 40;
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Merges `layers`, the lowest first, into one tree.
///
/// `interrupted` is asked between members; when it says yes the result is [`TreeError::Cancelled`].
///
/// # Errors
/// When a layer is damaged, holds something unacceptable, or exceeds `limits`.
pub fn flatten(layers: &[Layer], limits: &Limits, interrupted: &dyn Fn() -> bool) -> Result<Tree, TreeError> {
    if layers.len() > limits.layers {
        return Err(TreeError::Limit { what: "layers", limit: limits.layers as u64 });
    }
    let mut merge = Merge { tree: Tree::new(), limits, members: 0, bytes: 0, metadata: 0 };
    for (number, layer) in layers.iter().enumerate() {
        let reader = layer.open().map_err(|source| TreeError::Read { layer: number, source })?;
        merge.add_layer(number, Archive::new(reader, number, limits, interrupted), interrupted)?;
    }
    Ok(merge.tree)
}

struct Merge<'a> {
    tree: Tree,
    limits: &'a Limits,
    members: u64,
    bytes: u64,
    metadata: u64,
}

/// A member whose path was checked and split; the index is its number in the layer.
struct Placed {
    index: u32,
    path: Vec<u8>,
    kind: MemberKind,
    size: u64,
    meta: Meta,
}

/// Whether a look-up may make the directories that are missing.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Missing {
    Make,
    Leave,
}

impl Merge<'_> {
    fn add_layer<R: std::io::Read>(
        &mut self,
        number: usize,
        mut archive: Archive<'_, R>,
        interrupted: &dyn Fn() -> bool,
    ) -> Result<(), TreeError> {
        let layer = u32::try_from(number).unwrap_or(u32::MAX);
        let mut placed = Vec::new();
        // Whiteouts hide what lower layers hold, wherever they stand in their own layer; so they go first
        // and all other members wait.
        let mut index = 0;
        while let Some(member) = archive.next_member()? {
            if interrupted() {
                return Err(TreeError::Cancelled);
            }
            let shown = show(&member.path);
            let reject = |reason| TreeError::Member { layer: number, path: shown.clone(), reason };
            self.account(&member)?;
            let parts = self.split(&member.path).map_err(reject)?;
            let whiteout = parts.last().is_some_and(|name| name.starts_with(WHITEOUT));
            if whiteout {
                self.whiteout(&parts).map_err(reject)?;
            } else if parts.iter().any(|name| name.starts_with(WHITEOUT)) {
                return Err(reject(Reason::Whiteout));
            } else {
                let Member { path, kind, size, meta } = member;
                placed.push(Placed { index, path, kind, size, meta });
            }
            index += 1;
        }
        for member in placed {
            if interrupted() {
                return Err(TreeError::Cancelled);
            }
            let path = member.path.clone();
            self.place(layer, member).map_err(|reason| TreeError::Member {
                layer: number,
                path: show(&path),
                reason,
            })?;
            // Directories that were only implied count as well.
            self.within(self.tree.capacity() as u64, self.limits.inodes, "inodes")?;
        }
        Ok(())
    }

    fn account(&mut self, member: &Member) -> Result<(), TreeError> {
        let target = match &member.kind {
            MemberKind::HardLink(target) | MemberKind::Symlink(target) => target.len(),
            _ => 0,
        };
        let xattrs: usize = member.meta.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum();
        self.members += 1;
        self.bytes = self.bytes.saturating_add(member.size);
        self.metadata += (member.path.len() + target + xattrs) as u64;
        self.within(self.members, self.limits.inodes, "inodes")?;
        self.within(self.bytes, self.limits.total_bytes, "bytes")?;
        self.within(self.metadata, self.limits.metadata, "bytes of metadata")
    }

    fn within(&self, value: u64, limit: u64, what: &'static str) -> Result<(), TreeError> {
        if value > limit { Err(TreeError::Limit { what, limit }) } else { Ok(()) }
    }

    /// The components of a path below the root; none for the root itself.
    fn split<'p>(&self, path: &'p [u8]) -> Result<Vec<&'p [u8]>, Reason> {
        if path.len() > self.limits.path {
            return Err(Reason::TooLong("path"));
        }
        if path.contains(&0) {
            return Err(Reason::Nul);
        }
        let mut parts = Vec::new();
        for part in path.split(|byte| *byte == b'/') {
            match part {
                b"" | b"." => {}
                b".." => return Err(Reason::DotDot),
                _ if part.len() > self.limits.name => return Err(Reason::TooLong("name")),
                _ => parts.push(part),
            }
        }
        if parts.len() > self.limits.depth {
            return Err(Reason::TooLong("path"));
        }
        Ok(parts)
    }

    fn whiteout(&mut self, parts: &[&[u8]]) -> Result<(), Reason> {
        let Some((name, parents)) = parts.split_last() else { return Ok(()) };
        let hidden = &name[WHITEOUT.len()..];
        if *name != OPAQUE {
            // Other names of this form are aufs's own bookkeeping.
            if hidden.starts_with(WHITEOUT) {
                return Ok(());
            }
            if matches!(hidden, b"" | b"." | b"..") {
                return Err(Reason::Whiteout);
            }
        }
        if parents.iter().any(|parent| parent.starts_with(WHITEOUT)) {
            return Err(Reason::Whiteout);
        }
        let directory = match self.parent(parents, Missing::Leave) {
            Ok(Some(directory)) => directory,
            // Hiding something that is not there is harmless.
            Ok(None) | Err(Reason::Parent) => return Ok(()),
            Err(reason) => return Err(reason),
        };
        if let Some(children) = self.tree.children_mut(directory) {
            if *name == OPAQUE {
                children.clear();
            } else {
                children.remove(hidden);
            }
        }
        Ok(())
    }

    fn place(&mut self, layer: u32, member: Placed) -> Result<(), Reason> {
        let parts = self.split(&member.path)?;
        if member.meta.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>()
            > self.limits.xattrs
        {
            return Err(Reason::Xattrs);
        }
        let Some((name, parents)) = parts.split_last() else {
            if member.kind != MemberKind::Directory {
                return Err(Reason::Root);
            }
            self.tree.node_mut(NodeId::ROOT).meta = member.meta;
            return Ok(());
        };
        let parent = self.parent(parents, Missing::Make)?.ok_or(Reason::Parent)?;
        let existing = self.tree.children(parent).and_then(|children| children.get(*name).copied());
        let kind = match member.kind {
            MemberKind::Directory => {
                if let Some(existing) = existing
                    && self.tree.children(existing).is_some()
                {
                    self.tree.node_mut(existing).meta = member.meta;
                    return Ok(());
                }
                Kind::Directory(BTreeMap::new())
            }
            MemberKind::HardLink(target) => {
                let target = self.hard_link_target(&target)?;
                if existing == Some(target) {
                    return Err(Reason::LinkItself);
                }
                self.insert(parent, name, target);
                return Ok(());
            }
            MemberKind::File => Kind::File { size: member.size, layer, member: member.index },
            MemberKind::Symlink(target) => {
                if target.is_empty() {
                    return Err(Reason::Malformed("symbolic link"));
                }
                if target.contains(&0) {
                    return Err(Reason::Nul);
                }
                // The kernel's PATH_MAX counts the NUL at the end.
                if target.len() >= self.limits.path {
                    return Err(Reason::TooLong("symbolic link"));
                }
                Kind::Symlink(target)
            }
            MemberKind::Character(major, minor) => Kind::Character(major, minor),
            MemberKind::Block(major, minor) => Kind::Block(major, minor),
            MemberKind::Fifo => Kind::Fifo,
        };
        let node = self.add(kind, member.meta)?;
        self.insert(parent, name, node);
        Ok(())
    }

    fn hard_link_target(&mut self, target: &[u8]) -> Result<NodeId, Reason> {
        let parts = self.split(target)?;
        let Some((name, parents)) = parts.split_last() else { return Err(Reason::LinkDirectory) };
        let parent = match self.parent(parents, Missing::Leave) {
            Ok(Some(parent)) => parent,
            Ok(None) | Err(Reason::Parent) => return Err(Reason::LinkMissing),
            Err(reason) => return Err(reason),
        };
        let found = self.tree.children(parent).and_then(|children| children.get(*name).copied());
        let found = found.ok_or(Reason::LinkMissing)?;
        if self.tree.children(found).is_some() { Err(Reason::LinkDirectory) } else { Ok(found) }
    }

    /// Follows `parts` from the root, through symbolic links inside of the tree, to a directory.
    fn parent(&mut self, parts: &[&[u8]], missing: Missing) -> Result<Option<NodeId>, Reason> {
        let mut trail = vec![NodeId::ROOT];
        // A stack of components still to follow, the next one last.
        let mut ahead: Vec<Vec<u8>> = parts.iter().rev().map(|part| part.to_vec()).collect();
        let (mut links, mut steps) = (0, 0);
        while let Some(part) = ahead.pop() {
            steps += 1;
            if steps > MOST_STEPS {
                return Err(Reason::Loop);
            }
            let here = trail.last().copied().unwrap_or(NodeId::ROOT);
            if part == b".." {
                // Above the root is the root.
                if trail.len() > 1 {
                    trail.pop();
                }
                continue;
            }
            let children = self.tree.children(here).ok_or(Reason::Parent)?;
            let next = match children.get(&part) {
                Some(next) => *next,
                None if missing == Missing::Leave => return Ok(None),
                None => {
                    if part.len() > self.limits.name {
                        return Err(Reason::TooLong("name"));
                    }
                    let meta = Meta { mode: 0o755, ..Meta::default() };
                    let made = self.add(Kind::Directory(BTreeMap::new()), meta)?;
                    self.insert(here, &part, made);
                    made
                }
            };
            match &self.tree.node(next).kind {
                Kind::Directory(_) => trail.push(next),
                Kind::Symlink(target) => {
                    links += 1;
                    if links > MOST_LINKS {
                        return Err(Reason::Loop);
                    }
                    if target.starts_with(b"/") {
                        trail.truncate(1);
                    }
                    let target = target.clone();
                    ahead.extend(
                        target
                            .split(|byte| *byte == b'/')
                            .filter(|part| !matches!(*part, b"" | b"."))
                            .rev()
                            .map(<[u8]>::to_vec),
                    );
                }
                _ => return Err(Reason::Parent),
            }
            if trail.len() > self.limits.depth || ahead.len() > self.limits.path {
                return Err(Reason::TooLong("path"));
            }
        }
        Ok(trail.last().copied())
    }

    fn add(&mut self, kind: Kind, meta: Meta) -> Result<NodeId, Reason> {
        let id = u32::try_from(self.tree.nodes.len()).map_err(|_many| Reason::TooLong("tree"))?;
        self.tree.nodes.push(Node { kind, meta });
        Ok(NodeId(id))
    }

    fn insert(&mut self, parent: NodeId, name: &[u8], node: NodeId) {
        if let Some(children) = self.tree.children_mut(parent) {
            children.insert(name.to_vec(), node);
        }
    }
}
