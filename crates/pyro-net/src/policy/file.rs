//! Policy files: TOML with rules, and with other files to include.
//!
//! ```toml
//! include = ["python", "./team.toml"]
//! allow = ["example.com:443"]
//! deny = ["upload.example.com"]
//! open = false
//!
//! [hosts]
//! "registry.example.com" = "127.0.0.1:8443"
//!
//! [inspect]
//! "api.example.com" = ["GET /v1/*"]
//! ```

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::name::{HOST_NAME, normal};
use super::{Hosts, Inspected, PolicyFileError, Rule, RuleError};

/// The longest policy file, in bytes.
pub const MAX_FILE: u64 = 256 << 10;
/// How deep files may include each other.
pub(super) const MAX_DEPTH: usize = 8;
/// How many files one policy may consist of.
pub(super) const MAX_FILES: usize = 64;
/// How many rules are read before files are given up. More than a policy may hold, because files repeat rules.
pub(super) const MAX_READ_RULES: usize = 100_000;
/// Stands for a path in errors about a policy that was given as an object.
const OBJECT: &str = "(object)";

/// What a file or an object says, as written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PolicyText {
    /// Other policies: names, or paths with a slash.
    pub include: Vec<String>,
    /// Whether the public internet is allowed without a rule.
    pub open: Option<bool>,
    /// Rules that allow.
    pub allow: Vec<String>,
    /// Rules that deny.
    pub deny: Vec<String>,
    /// Names with addresses of their own, as in a hosts file. The outermost file that has a name decides.
    pub hosts: BTreeMap<String, String>,
    /// Hosts whose requests are read, with those that are allowed; none: all of them. The outermost file that has a host
    /// decides.
    pub inspect: BTreeMap<String, Vec<String>>,
}

/// The rules of a policy with everything that it includes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicyParts {
    /// Whether the public internet is allowed without a rule.
    pub open: bool,
    /// Rules that allow.
    pub allow: Vec<Rule>,
    /// Rules that deny.
    pub deny: Vec<Rule>,
    /// Names with addresses of their own.
    pub hosts: Hosts,
    /// Hosts whose requests are read.
    pub inspect: Inspected,
}

/// Reads the policy file that a user named, and all that it includes. A value without a slash is the name of a file
/// `NAME.toml` in `policies_dir`; another is a path below `cwd`.
///
/// # Errors
/// When a file cannot be found, read or understood.
pub fn load(value: &str, cwd: &Path, policies_dir: Option<&Path>) -> Result<PolicyParts, PolicyFileError> {
    let mut loader = Loader::new(policies_dir);
    let open = loader.file(&loader.path_of(value, cwd)?)?;
    Ok(PolicyParts { open: open == Some(true), ..loader.parts })
}

impl PolicyText {
    /// Reads the text of a policy file.
    ///
    /// # Errors
    /// When it is not TOML or has a key that no policy has. `path` is for the error only.
    pub fn parse(text: &str, path: &Path) -> Result<Self, PolicyFileError> {
        toml_edit::de::from_str(text).map_err(|error| {
            let before = error.span().and_then(|span| text.as_bytes().get(..span.start)).unwrap_or_default();
            let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
            let reason = error.message().replace('\n', "; ");
            PolicyFileError::Syntax { path: path.to_owned(), line, reason }
        })
    }

    /// Reads all that this object includes, and its rules. Paths are below `cwd`.
    ///
    /// # Errors
    /// As [`load`].
    pub fn resolve(self, cwd: &Path, policies_dir: Option<&Path>) -> Result<PolicyParts, PolicyFileError> {
        let mut loader = Loader::new(policies_dir);
        let open = loader.text(&self, Path::new(OBJECT), cwd)?;
        Ok(PolicyParts { open: open == Some(true), ..loader.parts })
    }
}

struct Loader<'a> {
    policies_dir: Option<&'a Path>,
    /// What each file that was read says about `open`. Each file is read once; otherwise a file that includes another
    /// twice would double the work at every level.
    seen: HashMap<PathBuf, Option<bool>>,
    /// The files that are being read, from the outermost.
    chain: Vec<PathBuf>,
    parts: PolicyParts,
}

impl<'a> Loader<'a> {
    fn new(policies_dir: Option<&'a Path>) -> Self {
        Self { policies_dir, seen: HashMap::new(), chain: Vec::new(), parts: PolicyParts::default() }
    }

    fn path_of(&self, value: &str, base: &Path) -> Result<PathBuf, PolicyFileError> {
        if value.contains('/') && !value.contains('\0') {
            return Ok(base.join(value));
        }
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        if value.is_empty() || value.len() > 128 || value.starts_with('.') || !value.bytes().all(is_plain) {
            return Err(PolicyFileError::BadName(
                value.chars().take(128).flat_map(char::escape_debug).collect(),
            ));
        }
        let dir = self.policies_dir.ok_or_else(|| PolicyFileError::NoDirectory(value.to_owned()))?;
        let path = dir.join(format!("{value}.toml"));
        match path.try_exists() {
            Ok(false) => Err(PolicyFileError::NoSuchName { name: value.to_owned(), path }),
            // Other faults are better told by opening it.
            _ => Ok(path),
        }
    }

    /// Adds the rules of a file; returns what it says about `open`.
    fn file(&mut self, path: &Path) -> Result<Option<bool>, PolicyFileError> {
        let read_error = |source| PolicyFileError::Read { path: path.to_owned(), source };
        // One file has many paths; a cycle is found by the one without links.
        let real = path.canonicalize().map_err(read_error)?;
        if let Some(at) = self.chain.iter().position(|outer| *outer == real) {
            let mut chain = self.chain.split_off(at);
            chain.push(real);
            return Err(PolicyFileError::Cycle(chain));
        }
        if let Some(open) = self.seen.get(&real) {
            return Ok(*open);
        }
        if self.chain.len() >= MAX_DEPTH || self.seen.len() >= MAX_FILES {
            return Err(PolicyFileError::TooMuch { path: path.to_owned() });
        }
        let text = PolicyText::parse(&read(&real)?, path)?;
        self.chain.push(real.clone());
        let dir = path.parent().expect("a path to a file has a parent");
        let open = self.text(&text, path, dir)?;
        self.chain.pop();
        self.seen.insert(real, open);
        Ok(open)
    }

    /// Adds the rules of a text and of all that it includes; returns what it says about `open`. Its own word holds.
    /// Without one, what it includes opens the network only if all of it that has a word agrees.
    fn text(&mut self, text: &PolicyText, path: &Path, base: &Path) -> Result<Option<bool>, PolicyFileError> {
        let mut included = None;
        for value in &text.include {
            let open = self.file(&self.path_of(value, base)?)?;
            included = match (included, open) {
                (Some(one), Some(other)) => Some(one && other),
                (one, other) => one.or(other),
            };
        }
        for (key, texts) in [("allow", &text.allow), ("deny", &text.deny)] {
            if self.parts.allow.len() + self.parts.deny.len() + texts.len() > MAX_READ_RULES {
                return Err(PolicyFileError::TooMuch { path: path.to_owned() });
            }
            for text in texts {
                let rule = text.parse();
                let rule =
                    rule.map_err(|fault| PolicyFileError::Rule { path: path.to_owned(), key, fault })?;
                if key == "allow" { self.parts.allow.push(rule) } else { self.parts.deny.push(rule) }
            }
        }
        let fault = |key: &'static str, written: &str, reason: String| {
            let rule = written.chars().flat_map(char::escape_debug).take(128).collect();
            PolicyFileError::Rule { path: path.to_owned(), key, fault: RuleError { rule, reason } }
        };
        for (name, address) in &text.hosts {
            let fault = |reason| fault("hosts", &format!("{name} = {address}"), reason);
            let name = normal(name).map_err(|error| fault(error.to_string()))?;
            if name == HOST_NAME {
                return Err(fault("this name always means the loopback of this host".to_owned()));
            }
            let address = address.parse().map_err(|reason: &str| fault(reason.to_owned()))?;
            self.parts.hosts.insert(name, address);
        }
        for (host, rules) in &text.inspect {
            let pattern = host.parse().map_err(|reason| fault("inspect", host, reason))?;
            let rule = |rule: &String| {
                rule.parse().map_err(|reason: &str| fault("inspect", rule, reason.to_owned()))
            };
            let rules = rules.iter().map(rule).collect::<Result<_, _>>()?;
            self.parts.inspect.insert(pattern, rules);
        }
        Ok(text.open.or(included))
    }
}

/// Reads a whole file of bounded length.
fn read(path: &Path) -> Result<String, PolicyFileError> {
    let error = |source| PolicyFileError::Read { path: path.to_owned(), source };
    // Opening a FIFO would wait for a writer.
    let nonblocking = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let file = std::fs::OpenOptions::new().read(true).custom_flags(nonblocking).open(path).map_err(error)?;
    if !file.metadata().map_err(error)?.is_file() {
        return Err(error(io::Error::other("it is not a regular file")));
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(error)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(PolicyFileError::Long { path: path.to_owned() });
    }
    String::from_utf8(bytes).map_err(|_| error(io::Error::other("it is not UTF-8 text")))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tests::rules;
    use super::*;

    /// A directory with these files, and `policies` for named ones.
    fn dir(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a directory");
        fs_err::create_dir_all(dir.path().join("policies/sub")).expect("made");
        for (name, text) in files {
            fs_err::write(dir.path().join(name), text).expect("written");
        }
        dir
    }

    fn load_in(dir: &tempfile::TempDir, value: &str) -> Result<PolicyParts, PolicyFileError> {
        load(value, dir.path(), Some(&dir.path().join("policies")))
    }

    fn fault(files: &[(&str, &str)], value: &str) -> String {
        let dir = dir(files);
        let error = load_in(&dir, value).expect_err(value).to_string();
        error.replace(&*dir.path().to_string_lossy(), "DIR")
    }

    #[test]
    fn files_include_others_by_name_and_by_path() {
        let dir = dir(&[
            (
                "main.toml",
                "include = ['python', './policies/sub/x.toml']\nallow = ['A.b:443']\ndeny = ['c.d']\n",
            ),
            ("policies/python.toml", "allow = ['pypi.org']"),
            ("policies/sub/x.toml", "include = ['../y.toml', 'python']\ndeny = ['e.f']"),
            ("policies/y.toml", "deny = ['g.h']"),
        ]);
        let parts = load_in(&dir, "./main.toml").expect("a policy");
        assert_eq!(parts.allow, rules(&["pypi.org", "a.b:443"]));
        assert_eq!(parts.deny, rules(&["g.h", "e.f", "c.d"]));
        assert!(!parts.open);
        assert_eq!(load_in(&dir, "python").expect("named").allow, rules(&["pypi.org"]));
        assert_eq!(
            load_in(&dir, dir.path().join("policies/y.toml").to_str().expect("text"))
                .expect("absolute")
                .allow,
            []
        );
    }

    #[test]
    fn the_outer_word_about_open_holds_and_included_ones_must_agree() {
        let open = |main: &str| {
            let files = [
                ("main.toml", main),
                ("policies/yes.toml", "open = true"),
                ("policies/no.toml", "open = false"),
                ("policies/silent.toml", ""),
            ];
            load_in(&dir(&files), "./main.toml").expect("a policy").open
        };
        assert!(open("open = true") && open("include = ['yes', 'silent']"));
        assert!(!open("") && !open("include = ['yes', 'no']") && !open("include = ['no', 'yes']"));
        assert!(!open("include = ['yes']\nopen = false") && open("include = ['no']\nopen = true"));
    }

    #[test]
    fn what_is_wrong_is_told_with_file_key_and_line() {
        let error = fault(&[("a.toml", "open = true\n\nallowed = ['a.b']")], "./a.toml");
        assert!(
            error.starts_with(
                "network policy 'DIR/./a.toml', line 3: unknown field `allowed`, expected one of"
            ),
            "{error}"
        );
        let error = fault(&[("a.toml", "allow = [\n 'a.b'\n")], "./a.toml");
        assert!(error.starts_with("network policy 'DIR/./a.toml', line "), "{error}");
        let error = fault(&[("a.toml", "\nopen = 'yes'")], "./a.toml");
        assert!(error.starts_with("network policy 'DIR/./a.toml', line 2: invalid type: string"), "{error}");
        let error = fault(&[("a.toml", "deny = ['a.b', 'x:0']")], "./a.toml");
        assert_eq!(
            error,
            "network policy 'DIR/./a.toml', key 'deny': invalid network rule 'x:0': port 0 does not exist; ports are 1 to 65535"
        );
        assert_eq!(
            fault(&[], "python"),
            "there is no network policy 'python': no file 'DIR/policies/python.toml'; write a path with a slash, such as \
             ./python, for another file"
        );
        for name in ["", ".hidden", "..", "a b", "a\0b", "a\0/b"] {
            assert!(matches!(load_in(&dir(&[]), name), Err(PolicyFileError::BadName(_))), "{name:?}");
        }
        assert!(matches!(load("python", Path::new("/"), None), Err(PolicyFileError::NoDirectory(_))));
        assert!(matches!(load_in(&dir(&[]), "./none.toml"), Err(PolicyFileError::Read { .. })));
        assert!(matches!(load_in(&dir(&[]), "./policies"), Err(PolicyFileError::Read { .. })));
    }

    #[test]
    fn includes_have_an_end() {
        let files = [
            ("a.toml", "include = ['./b.toml']"),
            ("b.toml", "include = ['./c.toml']"),
            ("c.toml", "include = ['./b.toml']"),
        ];
        assert_eq!(
            fault(&files, "./a.toml"),
            "network policies include each other: DIR/b.toml -> DIR/c.toml -> DIR/b.toml; remove one 'include'"
        );
        let deep: Vec<_> =
            (0..9).map(|at| (format!("{at}.toml"), format!("include = ['./{}.toml']", at + 1))).collect();
        let mut deep: Vec<_> = deep.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
        deep[7].1 = "";
        load_in(&dir(&deep), "./0.toml").expect("eight levels");
        deep[7].1 = "include = ['./8.toml']";
        assert!(fault(&deep, "./0.toml").contains("includes too much"));
        let fork: Vec<_> = (0..8)
            .map(|at| {
                (
                    format!("{at}.toml"),
                    format!("include = [{}]", format!("'./{}.toml',", at + 1).repeat(1000)),
                )
            })
            .collect();
        let mut fork: Vec<_> = fork.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
        fork[7].1 = "allow = ['a.b']";
        assert_eq!(load_in(&dir(&fork), "./0.toml").expect("read once each").allow.len(), 1);
    }

    #[test]
    fn a_file_has_a_greatest_length_and_is_a_file() {
        let comment = |len: usize| format!("#{}", "x".repeat(len - 1));
        let max = usize::try_from(MAX_FILE).expect("small");
        load_in(&dir(&[("a.toml", &comment(max))]), "./a.toml").expect("as long as allowed");
        let error = fault(&[("a.toml", &comment(max + 1))], "./a.toml");
        assert!(error.contains("larger than 256 KiB"), "{error}");
        let deep = format!("allow = {}", "[".repeat(100_000));
        assert!(fault(&[("a.toml", &deep)], "./a.toml").contains("line 1: "), "no stack is deep enough");
        assert!(matches!(load("/dev/zero", Path::new("/"), None), Err(PolicyFileError::Read { .. })));
    }

    #[test]
    fn an_object_is_a_policy_too() {
        let dir = dir(&[("policies/python.toml", "allow = ['pypi.org']"), ("x.toml", "open = true")]);
        let text: PolicyText = serde_json::from_str(
            r#"{"include": ["python", "./x.toml"], "deny": ["a.b"], "allow": ["10.0.0.0/8:80"]}"#,
        )
        .expect("an object");
        let parts = text.resolve(dir.path(), Some(&dir.path().join("policies"))).expect("a policy");
        assert_eq!(parts.allow, rules(&["pypi.org", "10.0.0.0/8:80"]));
        assert_eq!((parts.open, parts.deny), (true, rules(&["a.b"])));
        serde_json::from_str::<PolicyText>(r#"{"allowed": []}"#).expect_err("an unknown key");
        let bad = PolicyText { allow: vec!["*".to_owned()], ..PolicyText::default() };
        let error = bad.resolve(dir.path(), None).expect_err("no rule").to_string();
        assert!(
            error.starts_with("network policy '(object)', key 'allow': invalid network rule '*'"),
            "{error}"
        );
    }

    proptest! {
        #[test]
        fn no_text_makes_the_reader_panic(text in "(allow|deny|open|include|[\\[\\]{}='\"\\\\.,#\n 0-9a-zäß])*") {
            drop(PolicyText::parse(&text, Path::new("x")));
        }
    }
}
