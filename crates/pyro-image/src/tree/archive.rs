//! Reading the members of one tar archive.
//!
//! The header fields are decoded by the `tar` crate, the iteration is our own: the crate's iterator buffers
//! extension headers whole whatever their size, and splits pax records at newlines, which binary attribute
//! values may contain.

use std::io::{self, Read};

use tar::{EntryType, Header};

use super::member::{Extensions, Member};
use super::{Limits, Reason, TreeError, show};

const BLOCK: u64 = 512;
/// Archivers fill their last record up, with some KiB at most.
const MOST_BEHIND_END: u64 = 64 << 20;
/// After how many bytes the caller is asked again whether to stop.
const BEAT: u64 = 1 << 20;

/// A tar archive that is read from start to end.
pub(crate) struct Archive<'a, R> {
    reader: R,
    interrupted: &'a dyn Fn() -> bool,
    /// The number of the layer, for errors.
    layer: usize,
    limits: Limits,
    /// What is left of the current member's data, and of the padding behind it.
    data: u64,
    padding: u64,
    /// Bytes read so far, and how many there were when the caller was last asked whether to stop.
    consumed: u64,
    asked: u64,
    path: Vec<u8>,
}

impl<'a, R: Read> Archive<'a, R> {
    pub(crate) fn new(reader: R, layer: usize, limits: &Limits, interrupted: &'a dyn Fn() -> bool) -> Self {
        Self {
            reader,
            layer,
            interrupted,
            limits: limits.clone(),
            data: 0,
            padding: 0,
            consumed: 0,
            asked: 0,
            path: Vec::new(),
        }
    }

    /// The next member, or `None` at the end; what was not read of the last one is skipped.
    pub(crate) fn next_member(&mut self) -> Result<Option<Member>, TreeError> {
        self.skip_data()?;
        let mut extensions = Extensions::default();
        let mut extension_bytes = 0;
        loop {
            let Some(header) = self.header()? else {
                if extension_bytes > 0 {
                    return Err(self.reject(&[], Reason::Truncated));
                }
                self.drain()?;
                return Ok(None);
            };
            let kind = header.entry_type();
            if !is_extension(kind) {
                let size = extensions.size;
                let member =
                    extensions.finish(&header).map_err(|(path, reason)| self.reject(&path, reason))?;
                debug_assert!(size.is_none_or(|size| size == member.size), "pax size is the member's size");
                self.expect_data(member.size, &member.path)?;
                self.path.clone_from(&member.path);
                return Ok(Some(member));
            }
            let size =
                header.entry_size().map_err(|_bad| self.reject(&[], Reason::Malformed("extension size")))?;
            extension_bytes += BLOCK;
            extension_bytes = size.saturating_add(extension_bytes);
            if extension_bytes > self.limits.extension {
                return Err(self.reject(&header.path_bytes(), Reason::TooLong("extension header")));
            }
            self.expect_data(size, &[])?;
            if kind == EntryType::XGlobalHeader {
                // Global records (git writes one) describe nothing that an image keeps.
                self.skip_data()?;
                continue;
            }
            let body = self.body(size)?;
            match kind {
                EntryType::GNULongName => extensions.long_name = Some(until_nul(body)),
                EntryType::GNULongLink => extensions.long_link = Some(until_nul(body)),
                _ => extensions.add_pax(&body).map_err(|reason| self.reject(&[], reason))?,
            }
        }
    }

    /// Reads from the current member's data; 0 at its end.
    pub(crate) fn read_data(&mut self, buffer: &mut [u8]) -> Result<usize, TreeError> {
        let wanted = usize::try_from(self.data).unwrap_or(usize::MAX).min(buffer.len());
        if wanted == 0 {
            return Ok(0);
        }
        let mut filled = 0;
        // Filled whole, because the image writer works in blocks.
        while filled < wanted {
            let read = self.read_some(&mut buffer[filled..wanted])?;
            if read == 0 {
                let path = self.path.clone();
                return Err(self.reject(&path, Reason::Truncated));
            }
            filled += read;
        }
        self.data -= filled as u64;
        Ok(filled)
    }

    /// The whole data of the current member, at most `most` bytes.
    pub(crate) fn read_whole(&mut self, most: u64) -> Result<Vec<u8>, TreeError> {
        if self.data > most {
            let path = self.path.clone();
            return Err(self.reject(&path, Reason::TooLong("file")));
        }
        self.body(self.data)
    }

    fn body(&mut self, size: u64) -> Result<Vec<u8>, TreeError> {
        let mut body = Vec::new();
        let mut chunk = vec![0; usize::try_from(size.min(64 << 10)).unwrap_or(64 << 10)];
        loop {
            // Grown as the bytes arrive: a header may promise more than the archive holds.
            let read = self.read_data(&mut chunk)?;
            if read == 0 {
                break;
            }
            body.extend_from_slice(&chunk[..read]);
        }
        self.skip_data()?;
        Ok(body)
    }

    fn header(&mut self) -> Result<Option<Header>, TreeError> {
        let mut header = Header::new_old();
        let bytes = header.as_mut_bytes();
        let mut filled = 0;
        while filled < bytes.len() {
            let read = self.read_some(&mut bytes[filled..])?;
            if read == 0 {
                // Some archivers leave the two empty blocks at the end away.
                return if filled == 0 { Ok(None) } else { Err(self.reject(&[], Reason::Truncated)) };
            }
            filled += read;
        }
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let sum: u32 = bytes[..148].iter().chain(&bytes[156..]).map(|byte| u32::from(*byte)).sum();
        let stated = header.cksum().map_err(|_bad| self.reject(&[], Reason::Checksum))?;
        if stated != sum + 8 * u32::from(b' ') {
            return Err(self.reject(&[], Reason::Checksum));
        }
        Ok(Some(header))
    }

    fn expect_data(&mut self, size: u64, path: &[u8]) -> Result<(), TreeError> {
        if size > self.limits.total_bytes {
            let error = TreeError::Limit { what: "bytes", limit: self.limits.total_bytes };
            // A size near 2^64 is a lie, not a large file.
            return Err(if size > i64::MAX.cast_unsigned() / 2 {
                self.reject(path, Reason::Malformed("size"))
            } else {
                error
            });
        }
        self.data = size;
        self.padding = size.next_multiple_of(BLOCK) - size;
        Ok(())
    }

    fn skip_data(&mut self) -> Result<(), TreeError> {
        let mut chunk = [0; 16 << 10];
        while self.read_data(&mut chunk)? > 0 {}
        let mut left = usize::try_from(std::mem::take(&mut self.padding)).unwrap_or(0);
        while left > 0 {
            let read = self.read_some(&mut chunk[..left])?;
            if read == 0 {
                // A last member without its padding is complete all the same.
                break;
            }
            left -= read;
        }
        Ok(())
    }

    /// Reads on to the end of the stream, so that the checksums of the compression are checked.
    fn drain(&mut self) -> Result<(), TreeError> {
        let end = self.consumed;
        let mut chunk = [0; 16 << 10];
        while self.read_some(&mut chunk)? > 0 {
            if self.consumed - end > MOST_BEHIND_END {
                return Err(TreeError::Limit {
                    what: "bytes behind the end of an archive",
                    limit: MOST_BEHIND_END,
                });
            }
        }
        Ok(())
    }

    fn read_some(&mut self, buffer: &mut [u8]) -> Result<usize, TreeError> {
        let read = loop {
            match self.reader.read(buffer) {
                Ok(read) => break read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(TreeError::Read { layer: self.layer, source }),
            }
        };
        self.consumed += read as u64;
        if self.consumed - self.asked >= BEAT {
            self.asked = self.consumed;
            if (self.interrupted)() {
                return Err(TreeError::Cancelled);
            }
        }
        // Headers and padding are never more than the inodes account for.
        let most = self.limits.total_bytes.saturating_add(self.limits.inodes * 4 * BLOCK);
        if self.consumed > most.saturating_add(self.limits.metadata) {
            return Err(TreeError::Limit { what: "bytes", limit: self.limits.total_bytes });
        }
        Ok(read)
    }

    fn reject(&self, path: &[u8], reason: Reason) -> TreeError {
        TreeError::Member { layer: self.layer, path: show(path), reason }
    }
}

fn is_extension(kind: EntryType) -> bool {
    matches!(
        kind,
        EntryType::GNULongName | EntryType::GNULongLink | EntryType::XHeader | EntryType::XGlobalHeader
    )
}

fn until_nul(mut body: Vec<u8>) -> Vec<u8> {
    if let Some(end) = body.iter().position(|byte| *byte == 0) {
        body.truncate(end);
    }
    body
}
