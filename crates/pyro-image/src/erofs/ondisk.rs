//! The structures of the on-disk format and their encoding, all little-endian.

use crate::tree::{Kind, Meta};

pub(super) const BLOCK: usize = 4096;
/// Inode numbers count in slots of this many bytes.
pub(super) const SLOT: usize = 32;
pub(super) const INODE: usize = 64;
pub(super) const DIRENT: usize = 12;
/// The root's slot. Slot 0 stays empty because readers of directories take inode number 0 for "deleted".
pub(super) const ROOT_SLOT: u16 = 2;

const SUPERBLOCK_OFFSET: usize = 1024;
const MAGIC: u32 = 0xe0f5_e1e2;
const FEATURE_CHECKSUM: u32 = 1;
const BLOCK_BITS: u8 = 12;
const XATTR_HEADER: usize = 12;
/// "pyro rootfs v1", as bytes: one identity for all images, because their digest tells them apart.
const UUID: [u8; 16] = *b"pyro-rootfs\0\0v1\0";

/// How the contents of an inode are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DataLayout {
    /// In whole blocks.
    Plain,
    /// In whole blocks but for the tail, which stands behind the inode.
    Inline,
}

/// What the superblock says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Superblock {
    pub(super) inodes: u64,
    pub(super) blocks: u32,
    pub(super) metadata_block: u32,
}

impl Superblock {
    /// The whole first block of the image.
    pub(super) fn encode(self) -> Vec<u8> {
        let mut block = vec![0; BLOCK];
        let mut put = |at: usize, bytes: &[u8]| {
            let at = SUPERBLOCK_OFFSET + at;
            block[at..at + bytes.len()].copy_from_slice(bytes);
        };
        put(0, &MAGIC.to_le_bytes());
        put(8, &FEATURE_CHECKSUM.to_le_bytes());
        put(12, &[BLOCK_BITS]);
        put(14, &ROOT_SLOT.to_le_bytes());
        put(16, &self.inodes.to_le_bytes());
        put(36, &self.blocks.to_le_bytes());
        put(40, &self.metadata_block.to_le_bytes());
        put(48, &UUID);
        // The checksum covers the block from the superblock on, itself as zero.
        let checksum = crc32c(&block[SUPERBLOCK_OFFSET..]);
        block[SUPERBLOCK_OFFSET + 4..SUPERBLOCK_OFFSET + 8].copy_from_slice(&checksum.to_le_bytes());
        block
    }
}

/// What one inode says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Inode<'a> {
    pub(super) kind: &'a Kind,
    pub(super) meta: &'a Meta,
    pub(super) layout: DataLayout,
    pub(super) xattr_bytes: usize,
    pub(super) size: u64,
    /// The first block of the contents.
    pub(super) block: u32,
    /// The number that 32-bit `stat` calls see.
    pub(super) serial: u32,
    pub(super) links: u32,
}

impl Inode<'_> {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let (file_type, union) = match *self.kind {
            Kind::Directory(_) => (0o040_000, self.block),
            Kind::File { .. } => (0o100_000, self.block),
            Kind::Symlink(_) => (0o120_000, self.block),
            Kind::Character(major, minor) => (0o020_000, device_number(major, minor)),
            Kind::Block(major, minor) => (0o060_000, device_number(major, minor)),
            Kind::Fifo => (0o010_000, 0),
        };
        let layout: u16 = match self.layout {
            DataLayout::Plain => 0,
            DataLayout::Inline => 2,
        };
        let extended = 1;
        // Bounded by the limit of attribute bytes for one inode.
        let xattr_count = match self.xattr_bytes {
            0 => 0,
            bytes => u16::try_from((bytes - XATTR_HEADER) / 4 + 1).unwrap_or(u16::MAX),
        };
        out.extend_from_slice(&(extended | layout << 1).to_le_bytes());
        out.extend_from_slice(&xattr_count.to_le_bytes());
        out.extend_from_slice(&(file_type | self.meta.mode).to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&self.size.to_le_bytes());
        out.extend_from_slice(&union.to_le_bytes());
        out.extend_from_slice(&self.serial.to_le_bytes());
        out.extend_from_slice(&self.meta.uid.to_le_bytes());
        out.extend_from_slice(&self.meta.gid.to_le_bytes());
        out.extend_from_slice(&self.meta.mtime.to_le_bytes());
        out.extend_from_slice(&self.meta.mtime_nsec.to_le_bytes());
        out.extend_from_slice(&self.links.to_le_bytes());
        out.extend_from_slice(&[0; 16]);
    }
}

/// The type byte of a directory entry.
pub(super) fn entry_type(kind: &Kind) -> u8 {
    match kind {
        Kind::File { .. } => 1,
        Kind::Directory(_) => 2,
        Kind::Character(..) => 3,
        Kind::Block(..) => 4,
        Kind::Fifo => 5,
        Kind::Symlink(_) => 7,
    }
}

/// Splits an attribute's name into the format's namespace number and the rest.
pub(crate) fn xattr_index(name: &[u8]) -> Option<(u8, &[u8])> {
    match name {
        b"system.posix_acl_access" => return Some((2, b"")),
        b"system.posix_acl_default" => return Some((3, b"")),
        _ => {}
    }
    [(1, b"user.".as_slice()), (4, b"trusted."), (6, b"security.")]
        .into_iter()
        .find_map(|(index, prefix)| Some((index, name.strip_prefix(prefix)?)))
        .filter(|(_, rest)| !rest.is_empty())
}

/// The bytes that the attributes take behind their inode; 0 without any.
pub(super) fn xattr_bytes(meta: &Meta) -> usize {
    if meta.xattrs.is_empty() {
        return 0;
    }
    let entries = meta.xattrs.iter().map(|(name, value)| {
        let rest = xattr_index(name).map_or(0, |(_, rest)| rest.len());
        (4 + rest + value.len()).next_multiple_of(4)
    });
    XATTR_HEADER + entries.sum::<usize>()
}

pub(super) fn encode_xattrs(meta: &Meta, out: &mut Vec<u8>) {
    if meta.xattrs.is_empty() {
        return;
    }
    out.extend_from_slice(&[0; XATTR_HEADER]);
    for (name, value) in &meta.xattrs {
        // Names of other namespaces were rejected when the layer was read.
        let Some((index, rest)) = xattr_index(name) else { continue };
        let start = out.len();
        out.push(u8::try_from(rest.len()).unwrap_or(u8::MAX));
        out.push(index);
        out.extend_from_slice(&u16::try_from(value.len()).unwrap_or(u16::MAX).to_le_bytes());
        out.extend_from_slice(rest);
        out.extend_from_slice(value);
        let length = (out.len() - start).next_multiple_of(4);
        out.resize(start + length, 0);
    }
}

/// The kernel's encoding of a device number in 32 bits.
fn device_number(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// CRC-32C without the final inversion, as the kernel's `crc32c(~0, …)`.
fn crc32c(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (POLYNOMIAL & (crc & 1).wrapping_neg()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_matches_the_published_check_value() {
        assert_eq!(!crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn device_numbers_keep_large_minors() {
        assert_eq!(device_number(5, 1), 0x501);
        assert_eq!(device_number(8, 0x12345), 0x1230_0845);
    }
}
