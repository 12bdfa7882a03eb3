//! Why a set of layers cannot become an image.

use std::io;

/// A layer that was rejected or could not be read.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// One member is not acceptable.
    #[error("layer {layer}: '{path}': {reason}")]
    Member {
        /// The number of the layer, from 0.
        layer: usize,
        /// The member's path: lossy, bounded, control characters escaped.
        path: String,
        /// What is wrong with it.
        reason: Reason,
    },
    /// The layer's archive or compression is damaged, or the file cannot be read.
    #[error("layer {layer} cannot be read")]
    Read {
        /// The number of the layer, from 0.
        layer: usize,
        /// The cause.
        source: io::Error,
    },
    /// The layers ask for more than the limits allow.
    #[error("the layers exceed the limit of {limit} {what}")]
    Limit {
        /// What there is too much of, in plural.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// The image file cannot be written.
    #[error("the image cannot be written")]
    Write(#[source] io::Error),
    /// The caller asked to stop.
    #[error("cancelled")]
    Cancelled,
}

/// What is wrong with one member of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// A header field is not what the format allows.
    #[error("malformed header field: {0}")]
    Malformed(&'static str),
    /// The header's checksum is wrong.
    #[error("header checksum mismatch")]
    Checksum,
    /// A `..` component.
    #[error("path contains '..'")]
    DotDot,
    /// A NUL byte in a name or target.
    #[error("path contains a NUL byte")]
    Nul,
    /// A path, name or target that is too long or too deep.
    #[error("{0} is too long")]
    TooLong(&'static str),
    /// A whiteout that names nothing sensible.
    #[error("malformed whiteout")]
    Whiteout,
    /// The root as anything but a directory.
    #[error("the root must be a directory")]
    Root,
    /// A parent that is not a directory.
    #[error("a parent is not a directory")]
    Parent,
    /// Symbolic links that lead in a circle.
    #[error("too many symbolic links in the parents")]
    Loop,
    /// A hard link whose target is not there.
    #[error("hard link to a missing file")]
    LinkMissing,
    /// A hard link to a directory.
    #[error("hard link to a directory")]
    LinkDirectory,
    /// A hard link to itself.
    #[error("hard link to itself")]
    LinkItself,
    /// An owner that no file can have.
    #[error("owner id out of range")]
    Owner,
    /// A time out of range.
    #[error("modification time out of range")]
    Time,
    /// Too many extended attributes, or one that the image cannot hold.
    #[error("extended attributes are too large")]
    Xattrs,
    /// An extended attribute outside of the known namespaces.
    #[error("extended attribute of an unknown namespace")]
    XattrNamespace,
    /// A sparse file in one of tar's dialects.
    #[error("sparse files are not supported")]
    Sparse,
    /// A device number out of range, or 0:0, which overlayfs would read as a whiteout.
    #[error("device number out of range")]
    Device,
    /// An unknown type of member.
    #[error("unknown type of member")]
    Type,
    /// The archive ends inside the member.
    #[error("the archive ends inside the member")]
    Truncated,
    /// The layer changed between the two times that it was read.
    #[error("the layer changed while it was read")]
    Changed,
}

/// A path from a layer as text for people: lossy, at most 200 characters, control characters escaped.
pub(crate) fn show(path: &[u8]) -> String {
    const MOST: usize = 200;
    let mut text = String::new();
    for (count, character) in String::from_utf8_lossy(path).chars().enumerate() {
        if count == MOST {
            text.push('…');
            break;
        }
        if character.is_control() {
            text.extend(character.escape_default());
        } else {
            text.push(character);
        }
    }
    text
}
