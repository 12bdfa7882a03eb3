//! From a bzImage to the ELF file inside of it.
//!
//! The boot header says where the compressed kernel is, so nothing is searched for.

use std::io::{self, Read};

/// The largest kernel that is unpacked, in bytes.
const MOST: u64 = 512 << 20;
/// Blocks of LZ4's legacy frame hold at most this much.
const LZ4_BLOCK: usize = 8 << 20;

/// A kernel image that cannot be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum BzImageError {
    /// It has no boot header, or one that is too old to name the payload.
    #[error("no boot header of version 2.08 or later")]
    Header,
    /// The header points outside of the image.
    #[error("the payload lies outside of the image")]
    Range,
    /// The compression is none of gzip, xz, zstd and LZ4.
    #[error("unknown compression")]
    Compression,
    /// The payload is damaged.
    #[error("the payload cannot be decompressed")]
    Damaged(#[source] io::Error),
    /// The kernel is larger than any kernel is.
    #[error("the kernel is too large")]
    TooLarge,
    /// What was unpacked is not an ELF file.
    #[error("the payload is not an ELF file")]
    NotElf,
}

/// Unpacks a bzImage to the ELF file in it; an ELF file is returned as it is.
///
/// # Errors
/// When the image is damaged, of an unknown compression, or unreasonably large.
pub fn unpack_kernel(image: &[u8]) -> Result<Vec<u8>, BzImageError> {
    const ELF: &[u8] = b"\x7fELF";
    if image.starts_with(ELF) {
        return Ok(image.to_vec());
    }
    let payload = payload(image)?;
    let kernel = match payload {
        [0x1f, 0x8b, ..] => bounded(flate2::bufread::GzDecoder::new(payload))?,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let mut decoder =
                zstd::stream::read::Decoder::with_buffer(payload).map_err(BzImageError::Damaged)?;
            decoder.window_log_max(27).map_err(BzImageError::Damaged)?;
            // The build system appends the size of the kernel behind the frame.
            bounded(decoder.single_frame())?
        }
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => {
            let stream = liblzma::stream::Stream::new_stream_decoder(256 << 20, 0)
                .map_err(|error| BzImageError::Damaged(error.into()))?;
            bounded(liblzma::bufread::XzDecoder::new_stream(payload, stream))?
        }
        [0x02, 0x21, 0x4c, 0x18, blocks @ ..] => lz4_legacy(blocks)?,
        _ => return Err(BzImageError::Compression),
    };
    if kernel.starts_with(ELF) { Ok(kernel) } else { Err(BzImageError::NotElf) }
}

fn payload(image: &[u8]) -> Result<&[u8], BzImageError> {
    let word = |at: usize| {
        let bytes = image.get(at..at + 4).and_then(|bytes| <[u8; 4]>::try_from(bytes).ok());
        bytes.map(u32::from_le_bytes).ok_or(BzImageError::Header)
    };
    if image.get(0x202..0x206) != Some(b"HdrS") {
        return Err(BzImageError::Header);
    }
    let version = word(0x206)? & 0xffff;
    if version < 0x0208 {
        return Err(BzImageError::Header);
    }
    let setup_sectors = match image.get(0x1f1) {
        // The header's own rule for images of old.
        Some(0) => 4,
        Some(sectors) => usize::from(*sectors),
        None => return Err(BzImageError::Header),
    };
    let offset = usize::try_from(word(0x248)?).map_err(|_range| BzImageError::Range)?;
    let length = usize::try_from(word(0x24c)?).map_err(|_range| BzImageError::Range)?;
    let start = ((setup_sectors + 1) * 512).checked_add(offset).ok_or(BzImageError::Range)?;
    let end = start.checked_add(length).ok_or(BzImageError::Range)?;
    image.get(start..end).ok_or(BzImageError::Range)
}

fn bounded(decoder: impl Read) -> Result<Vec<u8>, BzImageError> {
    let mut kernel = Vec::new();
    decoder.take(MOST + 1).read_to_end(&mut kernel).map_err(BzImageError::Damaged)?;
    if kernel.len() as u64 > MOST { Err(BzImageError::TooLarge) } else { Ok(kernel) }
}

/// Blocks, each with its length in front; the last four bytes are the kernel's size, not a block.
fn lz4_legacy(mut rest: &[u8]) -> Result<Vec<u8>, BzImageError> {
    let damaged =
        |text: &'static str| BzImageError::Damaged(io::Error::new(io::ErrorKind::InvalidData, text));
    let mut kernel = Vec::new();
    let mut block = vec![0; LZ4_BLOCK];
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        if after.is_empty() {
            break;
        }
        let length = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX);
        let packed = after.get(..length).ok_or_else(|| damaged("a block runs over the end"))?;
        let size = lz4_flex::block::decompress_into(packed, &mut block)
            .map_err(|error| BzImageError::Damaged(io::Error::new(io::ErrorKind::InvalidData, error)))?;
        if (kernel.len() + size) as u64 > MOST {
            return Err(BzImageError::TooLarge);
        }
        kernel.extend_from_slice(&block[..size]);
        rest = &after[length..];
    }
    Ok(kernel)
}
