//! The aliases of one sandbox: each name has one IPv4 address that is its own.
//!
//! So a connection to an alias tells the exact name, for every protocol. The table belongs to the disk of the task and is
//! copied with it: a restored guest has cached addresses, and they must still mean the same names.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::address::{POOL, is_special};
use crate::append;
use crate::policy::{HOST_NAME, is_normal};

/// The most names that a sandbox may have. The pool has more addresses, so it never lacks one.
pub const MAX_NAMES: usize = 60_000;
/// The greatest length of the file, in bytes.
const MAX_FILE: u64 = 8 << 20;

/// The table of aliases, append-only and one-to-one.
#[derive(Debug, Default)]
pub struct Names {
    by_name: HashMap<Arc<str>, Ipv4Addr>,
    by_address: HashMap<Ipv4Addr, Arc<str>>,
    /// The pool's first address that was never given out; none when it is used up.
    next: Option<Ipv4Addr>,
    file: Option<Table>,
}

/// The file of the table.
#[derive(Debug)]
struct Table {
    path: PathBuf,
    file: File,
    len: u64,
    /// A torn line could not be cut off, so that nothing may follow it.
    is_broken: bool,
}

/// What keeps a name from an alias.
#[derive(Debug, thiserror::Error)]
pub enum NamesError {
    /// The text is no name of a host in lower case.
    #[error("this is no name of a host")]
    NotAName,
    /// The sandbox has used as many names as it may.
    #[error("the table of names of this sandbox is full (at most {MAX_NAMES} names); start another one")]
    Full,
    /// The file cannot be opened, read or written.
    #[error("the table of names '{}' cannot be used", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file does not have the form that this version writes.
    #[error("the table of names '{}', line {line}: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong there.
        reason: &'static str,
    },
}

impl Names {
    /// An empty table that is kept in memory only.
    pub fn new() -> Self {
        Self { next: Some(*POOL.start()), ..Self::default() }
    }

    /// Opens the table in a file, which is made if it does not exist. A last line without an end is removed: its writer
    /// died before anybody was given the alias.
    ///
    /// # Errors
    /// When the file cannot be used, or holds anything but a table.
    pub fn open(path: &Path) -> Result<Self, NamesError> {
        let error = |source| NamesError::Io { path: path.to_owned(), source };
        let file = append::open(path).map_err(error)?;
        let mut bytes = Vec::new();
        (&file).take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(error)?;
        if bytes.len() as u64 > MAX_FILE {
            return Err(error(io::Error::other("it is larger than 8 MiB")));
        }
        let end = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
        if end < bytes.len() {
            file.set_len(end as u64).map_err(error)?;
            bytes.truncate(end);
        }
        let mut names = Self::new();
        for (at, line) in bytes.split_inclusive(|byte| *byte == b'\n').enumerate() {
            let malformed = |reason| NamesError::Malformed { path: path.to_owned(), line: at + 1, reason };
            let (name, address) = parse(line).ok_or_else(|| malformed("write 'NAME ADDRESS'"))?;
            // The first of two entries wins, because the guest has it. A writer that was ending may have added the second.
            if names.by_name.contains_key(name) || names.by_address.contains_key(&address) {
                continue;
            }
            names.check(name, address).map_err(malformed)?;
            names.insert(name, address);
        }
        names.file = Some(Table { path: path.to_owned(), file, len: end as u64, is_broken: false });
        Ok(names)
    }

    /// Returns the alias of a name. A new one is the first of the name's `real` addresses that is public and not another
    /// name's, because programs refuse special addresses for names of the internet; otherwise one of the pool.
    ///
    /// # Errors
    /// When there are too many names, or the alias cannot be written down.
    pub fn alias(&mut self, name: &str, real: &[Ipv4Addr]) -> Result<Ipv4Addr, NamesError> {
        if let Some(alias) = self.by_name.get(name) {
            return Ok(*alias);
        }
        if !is_normal(name) {
            return Err(NamesError::NotAName);
        }
        if self.by_name.len() >= MAX_NAMES {
            return Err(NamesError::Full);
        }
        // The host is no site of the internet; its name never stands for one's address.
        let real = if name == HOST_NAME { &[] } else { real };
        let is_free = |address: &&Ipv4Addr| {
            !is_special(IpAddr::V4(**address)) && !self.by_address.contains_key(*address)
        };
        let alias = real.iter().find(is_free).copied().or(self.next).ok_or(NamesError::Full)?;
        if let Some(table) = &mut self.file {
            table.append(&format!("{name} {alias}\n"))?;
        }
        self.insert(name, alias);
        Ok(alias)
    }

    /// Returns the alias that a name has already.
    pub fn alias_of(&self, name: &str) -> Option<Ipv4Addr> {
        self.by_name.get(name).copied()
    }

    /// Returns the name whose alias this address is. An alias may be a real address, so a rule for that address itself
    /// may still allow what no rule for the name does.
    pub fn name_of(&self, address: Ipv4Addr) -> Option<&str> {
        self.by_address.get(&address).map(|name| &**name)
    }

    /// How many names have an alias.
    pub fn len(&self) -> usize {
        self.by_name.len()
    }

    /// Returns whether no name has an alias.
    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    /// Judges an entry that a file brings; otherwise returns what is wrong.
    fn check(&self, name: &str, address: Ipv4Addr) -> Result<(), &'static str> {
        let is_pool = POOL.contains(&address);
        match name {
            _ if !is_normal(name) => Err("this is no name in lower case"),
            _ if !is_pool && (name == HOST_NAME || is_special(IpAddr::V4(address))) => {
                Err("no name may have this address")
            }
            _ if self.by_name.len() >= MAX_NAMES => Err("there are too many names"),
            _ => Ok(()),
        }
    }

    fn insert(&mut self, name: &str, address: Ipv4Addr) {
        let name: Arc<str> = name.into();
        self.by_name.insert(Arc::clone(&name), address);
        self.by_address.insert(address, name);
        if POOL.contains(&address) && self.next.is_some_and(|next| address >= next) {
            let next = Ipv4Addr::from(u32::from(address) + 1);
            self.next = POOL.contains(&next).then_some(next);
        }
    }
}

impl Table {
    /// Writes a line. It is not synced: the guest may have seen the alias only while the host kept running, and a crash
    /// of the host ends the guest with its caches.
    fn append(&mut self, line: &str) -> Result<(), NamesError> {
        let len = self.len + line.len() as u64;
        if len > MAX_FILE {
            return Err(NamesError::Full);
        }
        let error = |source| NamesError::Io { path: self.path.clone(), source };
        if self.is_broken {
            return Err(error(io::Error::other("an earlier write has failed halfway")));
        }
        if let Err(cause) = self.file.write_all(line.as_bytes()) {
            // A part of the line may be there, and the next one must not be joined to it.
            self.is_broken = self.file.set_len(self.len).is_err();
            return Err(error(cause));
        }
        self.len = len;
        Ok(())
    }
}

/// Reads a whole line; none if it is not of the form that is written.
fn parse(line: &[u8]) -> Option<(&str, Ipv4Addr)> {
    let (name, address) = str::from_utf8(line).ok()?.strip_suffix('\n')?.split_once(' ')?;
    Some((name, address.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn ip(text: &str) -> Ipv4Addr {
        text.parse().expect("an address")
    }

    #[test]
    fn a_name_keeps_its_alias_and_two_names_never_share_one() {
        let mut names = Names::new();
        let real = [ip("10.0.0.1"), ip("8.8.8.8"), ip("8.8.4.4")];
        assert_eq!(names.alias("a.test", &real).expect("an alias"), ip("8.8.8.8"), "the first public one");
        assert_eq!(names.alias("b.test", &real).expect("an alias"), ip("8.8.4.4"), "not another name's");
        assert_eq!(names.alias("c.test", &real).expect("an alias"), ip("198.18.1.0"));
        assert_eq!(names.alias("d.test", &[]).expect("an alias"), ip("198.18.1.1"));
        assert_eq!(names.alias("a.test", &[ip("9.9.9.9")]).expect("an alias"), ip("8.8.8.8"), "kept");
        assert_eq!(names.alias(HOST_NAME, &[ip("9.9.9.9")]).expect("an alias"), ip("198.18.1.2"));
        assert_eq!(names.name_of(ip("8.8.4.4")), Some("b.test"));
        assert_eq!(names.name_of(ip("9.9.9.9")), None);
        assert_eq!(names.len(), 5);
        for name in ["", "A.test", "a b", "a\n", "a.test."] {
            assert!(matches!(names.alias(name, &[]), Err(NamesError::NotAName)), "{name:?}");
        }
    }

    #[test]
    fn the_file_brings_the_same_aliases_back() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("names");
        let mut names = Names::open(&path).expect("a new table");
        assert!(names.is_empty());
        names.alias("a.test", &[ip("8.8.8.8")]).expect("an alias");
        names.alias("b.test", &[]).expect("an alias");
        assert_eq!(fs_err::read_to_string(&path).expect("text"), "a.test 8.8.8.8\nb.test 198.18.1.0\n");
        assert_eq!(fs_err::metadata(&path).expect("a file").permissions().mode() & 0o777, 0o600);
        drop(names);
        let mut names = Names::open(&path).expect("the table");
        assert_eq!(names.name_of(ip("8.8.8.8")), Some("a.test"));
        assert_eq!(names.alias("b.test", &[ip("9.9.9.9")]).expect("an alias"), ip("198.18.1.0"));
        assert_eq!(names.alias("c.test", &[]).expect("an alias"), ip("198.18.1.1"));
    }

    #[test]
    fn a_torn_last_line_is_cut_off() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("names");
        let whole = "a.test 8.8.8.8\nb.test 198.18.1.0\n";
        for cut in 0..whole.len() {
            fs_err::write(&path, &whole[..cut]).expect("written");
            let mut names = Names::open(&path).expect("a table");
            let lines = whole[..cut].matches('\n').count();
            assert_eq!(names.len(), lines);
            names.alias("c.test", &[]).expect("an alias");
            let text = fs_err::read_to_string(&path).expect("text");
            assert_eq!(text.matches('\n').count(), lines + 1);
            assert!(text.ends_with("c.test 198.18.1.0\n"), "{text}");
        }
    }

    #[test]
    fn what_is_no_table_is_refused_with_the_line() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("names");
        for (text, line, reason) in [
            ("a.test 8.8.8.8\n\n", 2, "write 'NAME ADDRESS'"),
            ("a.test\n", 1, "write 'NAME ADDRESS'"),
            ("a.test 8.8.8.8 \n", 1, "write 'NAME ADDRESS'"),
            ("a.test ::1\n", 1, "write 'NAME ADDRESS'"),
            ("A.test 8.8.8.8\n", 1, "this is no name in lower case"),
            ("a.test 10.0.0.1\n", 1, "no name may have this address"),
            ("a.test 198.18.0.2\n", 1, "no name may have this address"),
            ("host.pyro.internal 8.8.8.8\n", 1, "no name may have this address"),
        ] {
            fs_err::write(&path, text).expect("written");
            let error = Names::open(&path).expect_err(text).to_string();
            assert_eq!(error, format!("the table of names '{}', line {line}: {reason}", path.display()));
            assert_eq!(fs_err::read_to_string(&path).expect("text"), text, "left as it was");
        }
        fs_err::write(&path, "a.test 8.8.8.8\na.test 8.8.4.4\nb.test 8.8.8.8\n").expect("written");
        let names = Names::open(&path).expect("the first entry holds");
        assert_eq!(
            (names.alias_of("a.test"), names.alias_of("b.test")),
            (Some(Ipv4Addr::new(8, 8, 8, 8)), None)
        );
        fs_err::write(&path, b"\xff\xfe 8.8.8.8\n").expect("written");
        assert!(matches!(Names::open(&path), Err(NamesError::Malformed { line: 1, .. })));
    }

    #[test]
    fn no_link_and_no_device_is_taken_for_the_file() {
        let dir = tempfile::tempdir().expect("a directory");
        let link = dir.path().join("link");
        fs_err::os::unix::fs::symlink(dir.path().join("other"), &link).expect("a link");
        assert!(matches!(Names::open(&link), Err(NamesError::Io { .. })));
        assert!(!dir.path().join("other").exists());
        assert!(matches!(Names::open(Path::new("/dev/null")), Err(NamesError::Io { .. })));
    }

    #[test]
    fn names_have_a_limit_and_old_ones_are_still_answered() {
        let mut names = Names::new();
        for at in 0..MAX_NAMES {
            names.alias(&format!("n{at}.test"), &[]).expect("an alias");
        }
        assert!(matches!(names.alias("more.test", &[]), Err(NamesError::Full)));
        assert_eq!(names.alias("n0.test", &[]).expect("an alias"), ip("198.18.1.0"));
        let last = names.alias(&format!("n{}.test", MAX_NAMES - 1), &[]).expect("an alias");
        assert!(POOL.contains(&last));
    }

    #[test]
    fn a_long_file_takes_no_more_names() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("names");
        let mut names = Names::open(&path).expect("a new table");
        let label = "x".repeat(60);
        let long = |at: usize| format!("n{at}.{label}.{label}.{label}.test");
        let full = (0..MAX_NAMES).find(|at| matches!(names.alias(&long(*at), &[]), Err(NamesError::Full)));
        assert!(full.is_some_and(|at| at > 35_000), "{full:?}");
        assert!(fs_err::metadata(&path).expect("a file").len() <= MAX_FILE);
        assert_eq!(Names::open(&path).expect("the table").len(), names.len());
    }

    #[test]
    fn the_pool_ends() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("names");
        fs_err::write(&path, format!("a.test {}\n", POOL.end())).expect("written");
        let mut names = Names::open(&path).expect("a table");
        assert!(matches!(names.alias("b.test", &[]), Err(NamesError::Full)));
        assert_eq!(names.alias("b.test", &[ip("8.8.8.8")]).expect("a public one"), ip("8.8.8.8"));
    }

    #[test]
    fn an_alias_that_cannot_be_written_is_not_given_out() {
        let full = File::options().write(true).open("/dev/full").expect("Linux has it");
        let mut names = Names::new();
        names.file = Some(Table { path: "/dev/full".into(), file: full, len: 0, is_broken: false });
        for _ in 0..2 {
            assert!(matches!(names.alias("a.test", &[]), Err(NamesError::Io { .. })));
        }
        assert!(names.is_empty() && names.name_of(*POOL.start()).is_none());
    }
}
