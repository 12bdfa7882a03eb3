//! Decompression by magic: gzip, zstd, and (for packages) xz.

use std::io::{self, BufRead, BufReader, Cursor, Read};

use super::Layer;

/// The largest zstd window that a layer may ask for (2^27 bytes, what `zstd --long` uses).
const ZSTD_WINDOW_LOG: u32 = 27;
/// What the xz decoder may use, in bytes; `xz -9` needs 65 MiB.
const XZ_MEMORY: u64 = 256 << 20;

impl Layer {
    /// Opens the layer and undoes its compression.
    pub(crate) fn open(&self) -> io::Result<Box<dyn Read>> {
        match self {
            Self::File(path) => decoder(BufReader::with_capacity(1 << 16, fs_err::File::open(path)?)),
            Self::Bytes(bytes) => decoder(Cursor::new(std::sync::Arc::clone(bytes))),
        }
    }
}

/// Undoes gzip or zstd; anything else passes through.
fn decoder<'a>(reader: impl BufRead + 'a) -> io::Result<Box<dyn Read + 'a>> {
    sniff(reader, false)
}

/// Undoes gzip, zstd or xz; anything else passes through.
pub(crate) fn decoder_with_xz<'a>(reader: impl BufRead + 'a) -> io::Result<Box<dyn Read + 'a>> {
    sniff(reader, true)
}

fn sniff<'a>(mut reader: impl BufRead + 'a, xz: bool) -> io::Result<Box<dyn Read + 'a>> {
    let start = reader.fill_buf()?;
    if start.starts_with(&[0x1f, 0x8b]) {
        return Ok(Box::new(flate2::bufread::MultiGzDecoder::new(reader)));
    }
    if start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        let mut decoder = zstd::stream::read::Decoder::with_buffer(reader)?;
        decoder.window_log_max(ZSTD_WINDOW_LOG)?;
        return Ok(Box::new(decoder));
    }
    if xz && start.starts_with(b"\xfd7zXZ\0") {
        let stream = liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY, 0)?;
        return Ok(Box::new(liblzma::bufread::XzDecoder::new_stream(reader, stream)));
    }
    Ok(Box::new(reader))
}
