//! The modules of a package and the order in which they can be loaded.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;

use super::modinfo::{is_name, normalized};
use super::{KernelError, MOST_MODULE, ModinfoError, parse_modinfo};
use crate::tree::decoder_with_xz;

/// A module file, uncompressed.
#[derive(Clone, Debug)]
pub(crate) struct Module {
    pub(crate) name: String,
    pub(crate) bytes: Vec<u8>,
}

/// The module's name if `path` is a module's.
pub(super) fn name_of(path: &str) -> Option<String> {
    let file = path.rsplit('/').next()?;
    let stem = [".ko", ".ko.xz", ".ko.zst", ".ko.gz"].iter().find_map(|end| file.strip_suffix(end))?;
    is_name(stem).then(|| normalized(stem))
}

/// All modules of a package.
#[derive(Debug)]
pub(super) struct Set {
    files: BTreeMap<String, Vec<u8>>,
    builtin: BTreeSet<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mark {
    Open,
    Done,
}

impl Set {
    /// `builtin` is the text of `modules.builtin`: one path a line.
    pub(super) fn new(files: BTreeMap<String, Vec<u8>>, builtin: &str) -> Self {
        Self { files, builtin: builtin.lines().filter_map(name_of).collect() }
    }

    /// Each list with everything that it needs beside the lists before it, no module twice.
    pub(super) fn select<'a>(
        &self,
        wanted: impl IntoIterator<Item = &'a [&'a str]>,
    ) -> Result<Vec<Vec<Module>>, KernelError> {
        let mut marks = BTreeMap::new();
        let mut list = |names: &[&str]| {
            let mut list = Vec::new();
            names.iter().try_for_each(|name| self.visit(name, &mut marks, &mut list)).map(|()| list)
        };
        wanted.into_iter().map(&mut list).collect()
    }

    /// Depth first: a module comes after all that it needs. The depth is bounded by the number of modules
    /// that are open at once, each of which is another one.
    fn visit(
        &self,
        name: &str,
        marks: &mut BTreeMap<String, Mark>,
        list: &mut Vec<Module>,
    ) -> Result<(), KernelError> {
        const DEEPEST: usize = 64;
        if self.builtin.contains(name) {
            return Ok(());
        }
        match marks.get(name) {
            Some(Mark::Done) => return Ok(()),
            Some(Mark::Open) => return Err(KernelError::Cycle(name.to_owned())),
            None => {}
        }
        let file = self.files.get(name).ok_or_else(|| KernelError::MissingModule(name.to_owned()))?;
        let damaged = |source| KernelError::Module { name: name.to_owned(), source };
        let mut bytes = decompressed(file).map_err(damaged)?;
        bytes.truncate(unsigned_length(&bytes));
        let info = parse_modinfo(&bytes).map_err(damaged)?;
        marks.insert(name.to_owned(), Mark::Open);
        if marks.values().filter(|mark| **mark == Mark::Open).count() > DEEPEST {
            return Err(KernelError::Cycle(name.to_owned()));
        }
        // A soft dependency may be an alias or left out of the build: what is not there is not needed.
        let soft = info.softdeps.iter().filter(|name| self.files.contains_key(*name));
        for needed in soft.chain(&info.depends) {
            self.visit(needed, marks, list)?;
        }
        marks.insert(name.to_owned(), Mark::Done);
        list.push(Module { name: name.to_owned(), bytes });
        Ok(())
    }
}

/// The length of a module without the signature behind it.
///
/// The package was verified before it came here, and the kernel does not insist: checking it once more in every boot
/// costs several milliseconds for each module where the processor is emulated.
fn unsigned_length(module: &[u8]) -> usize {
    const MARK: &[u8] = b"~Module signature appended~\n";
    /// `struct module_signature`, whose last four bytes are the length of what precedes it.
    const TRAILER: usize = 12;
    let signed = || {
        let before = module.strip_suffix(MARK)?;
        let (rest, trailer) = before.split_at_checked(before.len().checked_sub(TRAILER)?)?;
        let length = u32::from_be_bytes(trailer.last_chunk().copied()?);
        rest.len().checked_sub(usize::try_from(length).ok()?)
    };
    signed().unwrap_or(module.len())
}

fn decompressed(file: &[u8]) -> Result<Vec<u8>, ModinfoError> {
    let mut bytes = Vec::new();
    let read =
        decoder_with_xz(file).and_then(|decoder| decoder.take(MOST_MODULE + 1).read_to_end(&mut bytes));
    match read {
        Ok(length) if length as u64 <= MOST_MODULE => Ok(bytes),
        _ => Err(ModinfoError::Compression),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_is_cut_off_and_nothing_else_is() {
        let signed = |length: u32| {
            let trailer = [&[0_u8; 8][..], &length.to_be_bytes(), b"~Module signature appended~\n"].concat();
            [b"module", &b"signature"[..], &trailer].concat()
        };
        assert_eq!(unsigned_length(&signed(9)), 6);
        // What lies about its length is taken as it is.
        for length in [16, u32::MAX] {
            assert_eq!(unsigned_length(&signed(length)), signed(length).len());
        }
        for plain in [&b""[..], b"module", b"~Module signature appended~\n"] {
            assert_eq!(unsigned_length(plain), plain.len());
        }
    }
}
