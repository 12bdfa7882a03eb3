//! SHA-256 of bytes and files, as 64 lower-case hexadecimal digits.

use std::io::{self, Read};
use std::path::Path;

use sha2::{Digest, Sha256};

/// Why a file's digest could not be had.
#[derive(Debug)]
pub(crate) enum DigestError {
    Read(io::Error),
    Cancelled,
}

/// Reads the whole file; `cancelled` is asked for every MiB.
pub(crate) fn of_file(path: &Path, cancelled: &dyn Fn() -> bool) -> Result<String, DigestError> {
    let mut file = fs_err::File::open(path).map_err(DigestError::Read)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(hex(&hasher.finalize())),
            Ok(read) => hasher.update(&buffer[..read]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(DigestError::Read(error)),
        }
        if cancelled() {
            return Err(DigestError::Cancelled);
        }
    }
}

/// The digest of bytes in memory.
pub(crate) fn of_bytes(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Whether `text` has the form of a digest, and so may be part of a path.
pub(crate) fn is_digest(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes
        .iter()
        .flat_map(|byte| [DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]])
        .map(char::from)
        .collect()
}
