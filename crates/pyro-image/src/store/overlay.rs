//! Blank writable layers: formatted once for each size, then copied for every guest.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::Store;
use crate::staging::Staging;
use crate::{ImageError, files, tool};

/// Sizes that are made, in MiB.
const SIZES: std::ops::RangeInclusive<u32> = 64..=1 << 20;
/// One identity for all: the file systems are told apart by the guest that they belong to.
const UUID: &str = "70797261-6f76-4572-8c61-790000000001";
/// Without room to grow the group descriptors (`resize_inode`), which takes 2 MiB of zeros on disk.
const FEATURES: &str = "^resize_inode,has_journal,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super,\
                        large_file,huge_file,dir_nlink,extra_isize,metadata_csum";
/// 2026-02-02, as in the images.
const FAKE_TIME: &str = "1770000000";

impl Store {
    pub(super) fn make_overlay_template(&self, size_mib: u32) -> Result<PathBuf, ImageError> {
        if !SIZES.contains(&size_mib) {
            return Err(ImageError::OverlaySize);
        }
        let path = self.paths.overlay(size_mib);
        if is_whole(&path, size_mib) {
            return Ok(path);
        }
        let root = self.paths.staging();
        let staging = Staging::create(&root, &self.tools).map_err(ImageError::cache(&root))?;
        let made = staging.path().join("overlay.ext4");
        let file = fs_err::File::create_new(&made).map_err(ImageError::cache(&made))?;
        file.set_len(u64::from(size_mib) << 20).map_err(ImageError::cache(&made))?;
        let mut spawn = self.tools.plain("mke2fs", staging.path())?;
        spawn
            .env("E2FSPROGS_FAKE_TIME", FAKE_TIME)
            .env("SOURCE_DATE_EPOCH", FAKE_TIME)
            // Unless named here, the host's own configuration would decide about features.
            .env("MKE2FS_CONFIG", "/dev/null")
            .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-i", "16384", "-m", "0"])
            .args(["-U", UUID, "-O", FEATURES, "-J", "size=8", "-E"])
            .arg(format!("lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0,hash_seed={UUID}"))
            .arg(&made);
        tool::run("mke2fs", spawn, &mut |_line| {}, &|| false)?;
        file.sync_all().map_err(ImageError::cache(&made))?;
        fs_err::rename(&made, &path).map_err(ImageError::cache(&path))?;
        files::sync_directory(self.paths.own()).map_err(ImageError::cache(self.paths.own()))?;
        Ok(path)
    }
}

/// Whether there is a file of the right length with a superblock in it.
fn is_whole(path: &Path, size_mib: u32) -> bool {
    const MAGIC_OFFSET: u64 = 1024 + 0x38;
    let Ok(file) = fs_err::File::open(path) else { return false };
    let mut magic = [0; 2];
    file.metadata().is_ok_and(|found| found.len() == u64::from(size_mib) << 20)
        && file.into_file().read_exact_at(&mut magic, MAGIC_OFFSET).is_ok()
        && magic == [0x53, 0xef]
}
