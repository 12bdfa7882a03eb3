//! What a kernel module says about itself: the `.modinfo` section of its ELF file.

/// Most entries that are taken from one list, which is far more than any module has.
const MOST_NAMES: usize = 256;
const NAME: usize = 64;

/// A module that cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModinfoError {
    /// It is not a 64-bit little-endian ELF file.
    #[error("not a 64-bit ELF file")]
    NotElf,
    /// A header points outside of the file.
    #[error("a section lies outside of the file")]
    Range,
    /// It has no such section.
    #[error("no .modinfo section")]
    Missing,
    /// A name in it is not one that a module can have, or there are too many.
    #[error("a dependency is malformed")]
    Dependency,
    /// Its compression is damaged or too large.
    #[error("it cannot be decompressed")]
    Compression,
}

/// What a module needs, all names with `_` in place of `-`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModuleInfo {
    /// Modules that must be loaded before.
    pub depends: Vec<String>,
    /// Modules that should be loaded before, where they exist.
    pub softdeps: Vec<String>,
}

/// Reads the dependencies out of a module.
///
/// # Errors
/// When the file is not a module or names impossible dependencies.
pub fn parse_modinfo(module: &[u8]) -> Result<ModuleInfo, ModinfoError> {
    let section = modinfo_section(module)?;
    let mut info = ModuleInfo::default();
    for record in section.split(|byte| *byte == 0) {
        let Ok(record) = std::str::from_utf8(record) else { continue };
        if let Some(names) = record.strip_prefix("depends=") {
            for dependency in names.split(',').filter(|dependency| !dependency.is_empty()) {
                push(&mut info.depends, dependency)?;
            }
        } else if let Some(words) = record.strip_prefix("softdep=") {
            let mut before = false;
            for word in words.split_whitespace() {
                match word {
                    "pre:" => before = true,
                    "post:" => before = false,
                    _ if before => push(&mut info.softdeps, word)?,
                    _ => {}
                }
            }
        }
    }
    Ok(info)
}

/// The form of a module's name that all lists agree on.
pub(super) fn normalized(name: &str) -> String {
    name.replace('-', "_")
}

pub(super) fn is_name(name: &str) -> bool {
    (1..=NAME).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'))
}

fn push(names: &mut Vec<String>, name: &str) -> Result<(), ModinfoError> {
    if names.len() == MOST_NAMES || !is_name(name) {
        return Err(ModinfoError::Dependency);
    }
    names.push(normalized(name));
    Ok(())
}

fn modinfo_section(module: &[u8]) -> Result<&[u8], ModinfoError> {
    const SECTION_HEADER: usize = 64;
    if !module.starts_with(b"\x7fELF\x02\x01") {
        return Err(ModinfoError::NotElf);
    }
    let table = number(module, 0x28, 8)?;
    let entry_size = number(module, 0x3a, 2)?;
    let count = number(module, 0x3c, 2)?;
    let names_index = number(module, 0x3e, 2)?;
    if entry_size < SECTION_HEADER || names_index >= count {
        return Err(ModinfoError::Range);
    }
    let header = |index: usize| {
        let start = index.checked_mul(entry_size).and_then(|offset| table.checked_add(offset));
        let start = start.ok_or(ModinfoError::Range)?;
        let end = start.checked_add(SECTION_HEADER).ok_or(ModinfoError::Range)?;
        module.get(start..end).ok_or(ModinfoError::Range)
    };
    let contents = |header: &[u8]| {
        let (offset, size) = (number(header, 0x18, 8)?, number(header, 0x20, 8)?);
        let end = offset.checked_add(size).ok_or(ModinfoError::Range)?;
        module.get(offset..end).ok_or(ModinfoError::Range)
    };
    let names = contents(header(names_index)?)?;
    for index in 0..count {
        let section = header(index)?;
        let name = names.get(number(section, 0, 4)?..).ok_or(ModinfoError::Range)?;
        if name.starts_with(b".modinfo\0") {
            return contents(section);
        }
    }
    Err(ModinfoError::Missing)
}

/// A little-endian number of `size` bytes, at most 8.
fn number(bytes: &[u8], at: usize, size: usize) -> Result<usize, ModinfoError> {
    let field = bytes.get(at..at + size).ok_or(ModinfoError::Range)?;
    let value = field.iter().rev().fold(0_u64, |value, byte| value << 8 | u64::from(*byte));
    usize::try_from(value).map_err(|_range| ModinfoError::Range)
}
