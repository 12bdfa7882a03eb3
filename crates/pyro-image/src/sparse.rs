//! Files that are mostly holes: the memory and the disks of machines.

use std::fs::{File, Permissions};
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use rustix::fs::{FallocateFlags, SeekFrom as Region};
use sha2::{Digest, Sha256};

use crate::digest::{self, DigestError};

/// Contents are compared in pieces of this size: a piece of zeros and a hole are the same.
const PIECE: u64 = 64 << 10;

/// Copies a sparse file, without its holes, to a path that must be free.
///
/// # Errors
/// When a file cannot be read or written, or the target is there.
pub fn copy_sparse(from: &Path, to: &Path) -> io::Result<()> {
    let source = fs_err::File::open(from)?.into_file();
    let mut target = fs_err::File::create_new(to)?.into_file();
    let length = source.metadata()?.len();
    for data in regions(&source, length) {
        let data = data?;
        (&source).seek(SeekFrom::Start(data.start))?;
        target.seek(SeekFrom::Start(data.start))?;
        io::copy(&mut (&source).take(data.end - data.start), &mut target)?;
    }
    target.set_len(length)
}

/// Gives back the room of a file's holes, which may have been reserved before anything was written there. A file that nobody
/// may write is as unwritable afterwards.
///
/// # Errors
/// When the file is not this user's own, or cannot be read.
pub(crate) fn release_holes(path: &Path) -> io::Result<()> {
    let mode = fs_err::metadata(path)?.permissions();
    // Only root may write it all the same.
    fs_err::set_permissions(path, Permissions::from_mode(0o600))?;
    let released = release_holes_of_writable(path);
    fs_err::set_permissions(path, mode)?;
    released
}

fn release_holes_of_writable(path: &Path) -> io::Result<()> {
    let file = fs_err::OpenOptions::new().read(true).write(true).open(path)?.into_file();
    let length = file.metadata()?.len();
    let punch = |from: u64, to: u64| {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // A file system that cannot do it has reserved nothing.
        if from < to {
            rustix::fs::fallocate(&file, flags, from, to - from).ok();
        }
    };
    let mut end = 0;
    for data in regions(&file, length) {
        let data = data?;
        punch(end, data.start);
        end = data.end;
    }
    punch(end, length);
    Ok(())
}

/// The SHA-256 of what is in a file and where, as 64 hexadecimal digits. Zeros do not count, whether they are written
/// down or are a hole: a copy has the same digest.
pub(crate) fn digest(path: &Path, cancelled: &dyn Fn() -> bool) -> Result<String, DigestError> {
    let file = fs_err::File::open(path).map_err(DigestError::Read)?;
    let length = file.metadata().map_err(DigestError::Read)?.len();
    let file = file.into_file();
    let mut hasher = Sha256::new();
    hasher.update(length.to_le_bytes());
    let mut buffer = vec![0; usize::try_from(PIECE).unwrap_or(0)];
    let mut next = 0;
    for data in regions(&file, length) {
        let data = data.map_err(DigestError::Read)?;
        // Whole pieces: where a hole ends is the file system's affair.
        for piece in (data.start.max(next) / PIECE)..data.end.div_ceil(PIECE) {
            let start = piece * PIECE;
            let read = usize::try_from(PIECE.min(length - start)).unwrap_or(0);
            file.read_exact_at(&mut buffer[..read], start).map_err(DigestError::Read)?;
            if buffer[..read].iter().any(|byte| *byte != 0) {
                hasher.update(start.to_le_bytes());
                hasher.update(&buffer[..read]);
            }
            next = start + PIECE;
            if cancelled() {
                return Err(DigestError::Cancelled);
            }
        }
    }
    Ok(digest::hex(&hasher.finalize()))
}

/// The regions of a file that hold data, in their order.
fn regions(file: &File, length: u64) -> impl Iterator<Item = io::Result<Range<u64>>> + '_ {
    let mut position = 0;
    std::iter::from_fn(move || {
        if position >= length {
            return None;
        }
        let data = match rustix::fs::seek(file, Region::Data(position)) {
            Ok(data) if data < length => data,
            // No more data: the rest is a hole.
            Ok(_) | Err(rustix::io::Errno::NXIO) => return None,
            Err(error) => {
                position = length;
                return Some(Err(error.into()));
            }
        };
        match rustix::fs::seek(file, Region::Hole(data)) {
            Ok(hole) => {
                position = hole.min(length);
                Some(Ok(data..position))
            }
            Err(error) => {
                position = length;
                Some(Err(error.into()))
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn island(path: &Path, at: u64, text: &[u8]) {
        let file = fs_err::File::create(path).expect("created").into_file();
        file.set_len(1 << 30).expect("sized");
        file.write_all_at(text, at).expect("written");
    }

    #[test]
    fn a_copy_of_a_sparse_file_is_sparse_and_the_same() {
        let dir = tempfile::tempdir().expect("a directory");
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        island(&from, 500 << 20, b"island");
        copy_sparse(&from, &to).expect("copied");
        let found = fs_err::metadata(&to).expect("there");
        assert_eq!(found.len(), 1 << 30);
        assert!(found.blocks() * 512 < 1 << 20, "{} blocks", found.blocks());
        let mut read = [0; 6];
        fs_err::File::open(&to).expect("there").file().read_exact_at(&mut read, 500 << 20).expect("read");
        assert_eq!(&read, b"island");
        assert_eq!(digest(&from, &|| false).expect("read"), digest(&to, &|| false).expect("read"));
        assert_eq!(copy_sparse(&from, &to).expect_err("there").kind(), io::ErrorKind::AlreadyExists);
    }

    #[test]
    fn what_was_reserved_and_not_written_is_given_back() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("memory");
        let file = fs_err::File::create_new(&path).expect("created").into_file();
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, 64 << 20).expect("reserved");
        file.write_all_at(b"island", 32 << 20).expect("written");
        // A saved machine is not to be changed, and its owner is no root everywhere: scripts/test-qemu.sh runs it as another.
        fs_err::set_permissions(&path, Permissions::from_mode(0o444)).expect("set");
        let before = digest(&path, &|| false).expect("read");
        assert!(file.metadata().expect("there").blocks() * 512 >= 64 << 20);
        release_holes(&path).expect("released");
        let found = file.metadata().expect("there");
        assert_eq!((found.len(), found.permissions().mode() & 0o777), (64 << 20, 0o444));
        assert!(found.blocks() * 512 < 1 << 20, "{} blocks", found.blocks());
        assert_eq!(digest(&path, &|| false).expect("read"), before);
    }

    #[test]
    fn a_digest_tells_what_is_where_and_not_how_it_is_stored() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = |name: &str| dir.path().join(name);
        let of = |name: &str| digest(&path(name), &|| false).expect("read");
        island(&path("one"), 1 << 20, b"island");
        island(&path("elsewhere"), 2 << 20, b"island");
        island(&path("other"), 1 << 20, b"Island");
        island(&path("zeros"), 1 << 20, b"island");
        let zeros = fs_err::OpenOptions::new().write(true).open(path("zeros")).expect("there");
        zeros.file().write_all_at(&[0; 1 << 17], 5 << 20).expect("written");
        assert_eq!(of("one"), of("zeros"));
        assert_ne!(of("one"), of("elsewhere"));
        assert_ne!(of("one"), of("other"));
        zeros.file().set_len(1 << 29).expect("cut");
        assert_ne!(of("one"), of("zeros"));
        assert!(matches!(digest(&path("one"), &|| true), Err(DigestError::Cancelled)));
    }
}
