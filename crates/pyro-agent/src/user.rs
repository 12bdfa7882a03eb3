//! Who runs a command: names of the guest's own, or numbers.

use std::ffi::CString;
use std::io::{self, Read};

use rustix::fs::OFlags;

use crate::identity::open_in_root;

/// The longest table that is read, in bytes.
const MOST_BYTES: u64 = 4 << 20;
/// The most groups of one user: Linux takes 65,536.
const MOST_GROUPS: usize = 1024;

/// A user of the guest's, as the kernel takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// The other groups.
    pub(crate) groups: Vec<u32>,
    /// Absent where a number was given that the guest does not know.
    pub(crate) name: Option<CString>,
    pub(crate) home: CString,
}

/// Why nobody is meant.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UserError {
    #[error("no such user: {0}")]
    NoUser(String),
    #[error("no such group: {0}")]
    NoGroup(String),
    #[error("/etc/{file} cannot be read: {source}")]
    Table { file: &'static str, source: io::Error },
}

impl User {
    /// Finds `USER` or `USER:GROUP` in the guest's tables. A number needs no entry there.
    pub(crate) fn find(words: &str) -> Result<Self, UserError> {
        Self::among(words, &table("passwd")?, &table("group")?)
    }

    fn among(words: &str, passwd: &str, group: &str) -> Result<Self, UserError> {
        let (user, wanted_group) = match words.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (words, None),
        };
        let lines = |table: &'static str| {
            move |line: &&str| line.split(':').count() >= if table == "passwd" { 6 } else { 4 }
        };
        let number: Option<u32> = user.parse().ok();
        let entry =
            passwd.lines().filter(lines("passwd")).map(|line| line.split(':').collect::<Vec<_>>()).find(
                |entry| {
                    // A name that looks like a number is one, as `chown` has it: first it is looked for by name.
                    entry[0] == user
                },
            );
        let entry = entry.or_else(|| {
            let number = number?;
            passwd
                .lines()
                .filter(lines("passwd"))
                .map(|line| line.split(':').collect::<Vec<_>>())
                .find(|entry| entry[2].parse() == Ok(number))
        });
        let text = |text: &str| CString::new(text).unwrap_or_default();
        let mut found = match (entry, number) {
            (Some(entry), _) => {
                let id = |at: usize| entry[at].parse().map_err(|_| UserError::NoUser(words.to_owned()));
                Self {
                    uid: id(2)?,
                    gid: id(3)?,
                    groups: Vec::new(),
                    name: Some(text(entry[0])),
                    home: text(if entry[5].is_empty() { "/" } else { entry[5] }),
                }
            }
            (None, Some(uid)) => Self { uid, gid: 0, groups: Vec::new(), name: None, home: text("/") },
            (None, None) => return Err(UserError::NoUser(user.to_owned())),
        };
        let groups = || group.lines().filter(lines("group")).map(|line| line.split(':').collect::<Vec<_>>());
        match wanted_group {
            // A group that is named is the only one.
            Some(wanted) => {
                let named = groups().find(|entry| entry[0] == wanted).and_then(|entry| entry[2].parse().ok());
                found.gid = named
                    .or_else(|| wanted.parse().ok())
                    .ok_or_else(|| UserError::NoGroup(wanted.to_owned()))?;
            }
            None => {
                if let Some(name) = &found.name {
                    let is_member = |entry: &Vec<&str>| {
                        entry[3].split(',').any(|member| member.as_bytes() == name.as_bytes())
                    };
                    let ids = groups().filter(is_member).filter_map(|entry| entry[2].parse().ok());
                    found.groups = ids.take(MOST_GROUPS).collect();
                }
            }
        }
        // To the kernel this number says that nothing is to change: the command would stay root.
        if found.uid == u32::MAX || found.gid == u32::MAX {
            return Err(UserError::NoUser(words.to_owned()));
        }
        Ok(found)
    }
}

/// A table of the guest's; empty where it has none.
fn table(file: &'static str) -> Result<String, UserError> {
    let read = || -> io::Result<String> {
        let mut bytes = Vec::new();
        open_in_root(&format!("etc/{file}"), OFlags::RDONLY)?.take(MOST_BYTES).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    match read() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        read => read.map_err(|source| UserError::Table { file, source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\nbroken\nann:x:1000:1001:Ann,,,:/home/ann:/bin/sh\n\
                          7:x:8:9::/seven:/bin/sh\nodd:x:many:0::/:/bin/sh\n";
    const GROUP: &str = "root:x:0:\nann:x:1001:\nvideo:x:44:bob,ann\nbad:x:many:ann\ndocker:x:999:ann\n";

    fn find(words: &str) -> Result<User, String> {
        User::among(words, PASSWD, GROUP).map_err(|error| error.to_string())
    }

    #[test]
    fn users_are_found_by_name_and_by_number() {
        let ann = find("ann").expect("found");
        assert_eq!((ann.uid, ann.gid, ann.groups.as_slice()), (1000, 1001, &[44, 999][..]));
        assert_eq!((ann.name.as_deref(), ann.home.as_c_str()), (Some(c"ann"), c"/home/ann"));
        assert_eq!(find("1000").expect("found"), ann);
        let other = find("ann:video").expect("found");
        assert_eq!((other.gid, other.groups.as_slice()), (44, &[][..]));
        let stranger = find("4242:77").expect("a number needs no entry");
        assert_eq!((stranger.uid, stranger.gid, stranger.name), (4242, 77, None));
        assert_eq!(find("4242").expect("a number").gid, 0);
        assert_eq!(find("7").expect("a name that is a number").uid, 8);
    }

    #[test]
    fn nobody_else_is_found() {
        assert_eq!(find("bob"), Err("no such user: bob".to_owned()));
        assert_eq!(find("ann:none"), Err("no such group: none".to_owned()));
        assert_eq!(find(""), Err("no such user: ".to_owned()));
        assert_eq!(find("-1"), Err("no such user: -1".to_owned()));
        assert_eq!(find("odd"), Err("no such user: odd".to_owned()));
        assert_eq!(find("4294967295"), Err("no such user: 4294967295".to_owned()));
        assert_eq!(find("ann:4294967295"), Err("no such user: ann:4294967295".to_owned()));
        assert_eq!(find("ann:"), Err("no such group: ".to_owned()));
    }
}
