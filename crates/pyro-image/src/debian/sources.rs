//! The package sources of the host, which are also those of the guest, without their credentials.

use std::path::{Path, PathBuf};

use super::{DebianError, SUITE};
use crate::files;

/// Longer files are no sources files.
const MOST: u64 = 1 << 20;

/// The text of a sources file that names Debian 12.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sources {
    path: PathBuf,
    text: String,
    deb822: bool,
}

impl Sources {
    /// Takes the file that was given, or looks for one in `/etc/apt`.
    pub(crate) fn find(given: Option<&Path>) -> Result<Self, DebianError> {
        Self::find_in(given, Path::new("/etc/apt"))
    }

    fn find_in(given: Option<&Path>, directory: &Path) -> Result<Self, DebianError> {
        if let Some(path) = given {
            let text = files::read_bounded(path, MOST).map_err(DebianError::files(path))?;
            return Self::fitting(path, &text)
                .ok_or_else(|| DebianError::UnfitSources { path: path.to_owned() });
        }
        let parts = directory.join("sources.list.d");
        let mut candidates = vec![parts.join("debian.sources"), directory.join("sources.list")];
        let mut others: Vec<PathBuf> = fs_err::read_dir(&parts)
            .map(|entries| entries.filter_map(Result::ok).map(|entry| entry.path()).collect())
            .unwrap_or_default();
        others.retain(|path| path.extension().is_some_and(|end| end == "sources" || end == "list"));
        others.sort();
        candidates.extend(others);
        candidates
            .iter()
            .filter_map(|path| Self::fitting(path, &files::read_bounded(path, MOST).ok()?))
            .next()
            .ok_or_else(|| DebianError::NoSources { directory: directory.to_owned() })
    }

    fn fitting(path: &Path, text: &[u8]) -> Option<Self> {
        let text = String::from_utf8(text.to_vec()).ok()?;
        let deb822 = path.extension().is_some_and(|end| end == "sources");
        let fits = if deb822 { stanzas_fit(&text) } else { lines_fit(&text) };
        fits.then(|| Self { path: path.to_owned(), text, deb822 })
    }

    /// The file on the host.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The text as the host has it, credentials included.
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// A name that tells tools which of the two forms the text has.
    pub(super) fn file_name(&self) -> &'static str {
        if self.deb822 { "debian.sources" } else { "sources.list" }
    }

    /// Where the guest has them, below the root, and their text without credentials.
    pub(super) fn for_guest(&self) -> (&'static str, String) {
        let path = if self.deb822 { "etc/apt/sources.list.d/debian.sources" } else { "etc/apt/sources.list" };
        (path, without_credentials(&self.text))
    }
}

/// Whether a stanza has the suite and Debian's main component; others have such suite names too.
fn stanzas_fit(text: &str) -> bool {
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    lines.split(|line| line.trim().is_empty()).any(|stanza| {
        let has = |field: &str, wanted: &str| {
            let mut inside = false;
            stanza.iter().any(|line| {
                let value = if line.starts_with([' ', '\t']) {
                    line
                } else {
                    let (name, value) = line.split_once(':').unwrap_or_default();
                    inside = name.eq_ignore_ascii_case(field);
                    value
                };
                inside && value.split_whitespace().any(|word| word == wanted)
            })
        };
        has("Suites", SUITE) && has("Components", "main") && has("Types", "deb") && !has("Enabled", "no")
    })
}

fn lines_fit(text: &str) -> bool {
    text.lines().any(|line| {
        let mut rest = line.split('#').next().unwrap_or_default().trim();
        let Some(after) = rest.strip_prefix("deb").filter(|rest| rest.starts_with([' ', '\t'])) else {
            return false;
        };
        rest = after.trim_start();
        if rest.starts_with('[') {
            rest = rest.split_once(']').map_or("", |(_, rest)| rest);
        }
        let words: Vec<&str> = rest.split_whitespace().collect();
        words.get(1) == Some(&SUITE) && words.iter().skip(2).any(|word| *word == "main")
    })
}

/// Removes `user:password@` from every address, in comments too.
fn without_credentials(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let (before, after) = rest.split_at(at + 3);
        out.push_str(before);
        let end = after.find(|letter: char| letter == '/' || letter.is_whitespace()).unwrap_or(after.len());
        let authority = &after[..end];
        out.push_str(authority.rsplit_once('@').map_or(authority, |(_, host)| host));
        rest = &after[end..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_do_not_reach_the_guest() {
        let text = "URIs: https://me:s3cret@mirror.example/debian http://plain.example/x\n# ftp://u@h\n";
        assert_eq!(
            without_credentials(text),
            "URIs: https://mirror.example/debian http://plain.example/x\n# ftp://h\n"
        );
        assert_eq!(without_credentials("a://p@ss@h/x@y"), "a://h/x@y");
    }

    #[test]
    fn other_vendors_with_the_same_suite_name_do_not_serve() {
        assert!(!lines_fit("deb https://download.example/linux/debian bookworm stable"));
        assert!(!lines_fit("# deb http://mirror.example/debian bookworm main"));
        assert!(!lines_fit("deb https://packages.example/apt cloud-sdk-bookworm main"));
        assert!(lines_fit("deb [arch=amd64 signed-by=/k] http://mirror.example/debian bookworm main # ok"));
        assert!(stanzas_fit(
            "Types: deb\nURIs: http://x\nSuites: bookworm-updates\n bookworm\nComponents: main\n"
        ));
        assert!(!stanzas_fit("Types: deb\nURIs: http://x\nSuites: nodistro\nComponents: main\n"));
        assert!(!stanzas_fit("Types: deb\nSuites: bookworm\nComponents: main\nEnabled: no\n"));
    }

    #[test]
    fn debian_sources_come_before_others() {
        let root = tempfile::tempdir().expect("a directory");
        let parts = root.path().join("sources.list.d");
        fs_err::create_dir(&parts).expect("made");
        assert!(matches!(Sources::find_in(None, root.path()), Err(DebianError::NoSources { .. })));
        let line = "deb http://mirror.example/debian bookworm main\n";
        fs_err::write(parts.join("a.list"), line).expect("written");
        assert_eq!(Sources::find_in(None, root.path()).expect("found").path(), parts.join("a.list"));
        fs_err::write(root.path().join("sources.list"), line).expect("written");
        let found = Sources::find_in(None, root.path()).expect("found");
        assert_eq!(found.path(), root.path().join("sources.list"));
        assert_eq!(found.for_guest().0, "etc/apt/sources.list");
    }
}
