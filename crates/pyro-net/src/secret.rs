//! Secrets that a guest uses and never sees: it holds a placeholder, which the host replaces in requests to the hosts that
//! the secret is for.

use std::fmt;
use std::io::Read;
use std::path::PathBuf;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hyper::HeaderMap;
use hyper::header::{AUTHORIZATION, HeaderValue};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::policy::HostPattern;

/// The longest value of a secret, in bytes: what servers take of one header.
pub const MAX_VALUE: usize = 16 << 10;
/// The most secrets of a machine, and hosts of a secret.
pub const MAX_SECRETS: usize = 64;
/// How each placeholder begins.
const PLACEHOLDER: &str = "pyro-secret-";

/// Where the value of a secret comes from: `env:VAR` or `file:PATH`, on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum SecretSource {
    /// A variable of the process that makes or starts the machine.
    Variable(String),
    /// A file that this process reads.
    File(PathBuf),
}

/// A secret in words.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SecretText {
    /// `env:VARIABLE` or `file:PATH`.
    pub value_from: String,
    /// Names of hosts, `*.HOST` for those below one.
    pub hosts: Vec<String>,
}

/// A secret as it is asked for and recorded: everything but its value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Secret {
    /// Where its value comes from.
    pub value_from: SecretSource,
    /// The hosts that it is sent to.
    pub hosts: Vec<HostPattern>,
    /// What the guest has in its place.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub placeholder: String,
}

/// A secret with its value. Its text shows no value.
#[derive(Clone, Serialize, Deserialize)]
pub struct HeldSecret {
    /// The variable that the guest finds the placeholder in.
    pub name: String,
    /// The rest of what is known of it.
    pub secret: Secret,
    value: Zeroizing<Vec<u8>>,
}

/// Why a secret cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// It was asked for in words that mean none.
    #[error("invalid secret '{name}': {reason}")]
    Invalid {
        /// The secret, or all of what was written where it has no name.
        name: String,
        /// What is wrong, and how to write it.
        reason: String,
    },
    /// Its value cannot be read.
    #[error("the value of secret '{name}' cannot be read from {source_text}: {reason}")]
    Unreadable {
        /// The secret.
        name: String,
        /// Where it should have come from.
        source_text: String,
        /// What is wrong.
        reason: String,
    },
}

impl FromStr for SecretSource {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            Some(("env", variable)) if is_variable(variable) => Ok(Self::Variable(variable.to_owned())),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            _ => Err("its value comes from env:VARIABLE or file:PATH"),
        }
    }
}

impl TryFrom<String> for SecretSource {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<SecretSource> for String {
    fn from(source: SecretSource) -> Self {
        source.to_string()
    }
}

impl fmt::Display for SecretSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Variable(variable) => write!(f, "env:{variable}"),
            Self::File(path) => write!(f, "file:{}", path.display()),
        }
    }
}

fn is_variable(name: &str) -> bool {
    let is_letter = |byte: u8| byte.is_ascii_alphabetic() || byte == b'_';
    name.len() <= 128
        && name.bytes().next().is_some_and(is_letter)
        && name.bytes().all(|byte| is_letter(byte) || byte.is_ascii_digit())
}

impl SecretText {
    /// Reads one from the form that command lines have: `NAME=env:VAR@HOST[,HOST]`. Returns its name, too.
    ///
    /// # Errors
    /// When it has another form.
    pub fn parse(text: &str) -> Result<(String, Self), SecretError> {
        let shape = || SecretError::Invalid {
            // What stands there may be the value itself.
            name: text.chars().take_while(|c| *c != '=').take(32).flat_map(char::escape_debug).collect(),
            reason: "write NAME=env:VARIABLE@HOST or NAME=file:PATH@HOST, with more hosts after commas"
                .to_owned(),
        };
        let (name, rest) = text.split_once('=').ok_or_else(shape)?;
        let (source, hosts) = rest.rsplit_once('@').ok_or_else(shape)?;
        let hosts = hosts.split(',').map(str::to_owned).collect();
        Ok((name.to_owned(), Self { value_from: source.to_owned(), hosts }))
    }
}

impl Secret {
    /// Makes one from words.
    ///
    /// # Errors
    /// When a word is not as it should be.
    pub fn of(name: &str, text: &SecretText) -> Result<Self, SecretError> {
        let invalid = |reason: String| SecretError::Invalid {
            name: name.chars().take(128).flat_map(char::escape_debug).collect(),
            reason,
        };
        if !is_variable(name) {
            return Err(invalid("its name must be that of a variable: letters, digits and '_'".to_owned()));
        }
        let value_from = text.value_from.parse().map_err(|reason: &str| invalid(reason.to_owned()))?;
        let hosts: Vec<HostPattern> =
            text.hosts.iter().map(|host| host.parse()).collect::<Result<_, _>>().map_err(invalid)?;
        if !(1..=MAX_SECRETS).contains(&hosts.len()) {
            return Err(invalid(format!("name 1 to {MAX_SECRETS} hosts that it is sent to")));
        }
        Ok(Self { value_from, hosts, placeholder: String::new() })
    }

    /// A new placeholder, of 16 random bytes.
    pub fn new_placeholder(random: [u8; 16]) -> String {
        random.iter().fold(PLACEHOLDER.to_owned(), |text, byte| format!("{text}{byte:02x}"))
    }

    /// Reads its value.
    ///
    /// # Errors
    /// When there is none, or it cannot stand in a header.
    pub fn hold(self, name: &str) -> Result<HeldSecret, SecretError> {
        let unreadable = |reason: &str| SecretError::Unreadable {
            name: name.to_owned(),
            source_text: self.value_from.to_string(),
            reason: reason.to_owned(),
        };
        let mut value = match &self.value_from {
            SecretSource::Variable(variable) => {
                let value =
                    std::env::var_os(variable).ok_or_else(|| unreadable("the variable is not set"))?;
                Zeroizing::new(std::os::unix::ffi::OsStringExt::into_vec(value))
            }
            SecretSource::File(path) => read(path).map_err(|error| unreadable(&error.to_string()))?,
        };
        // Files end with the end of a line.
        while value.last().is_some_and(|byte| matches!(byte, b'\n' | b'\r')) {
            value.pop();
        }
        if value.is_empty() {
            return Err(unreadable("it is empty"));
        }
        if value.len() > MAX_VALUE {
            return Err(unreadable(&format!("it is longer than {MAX_VALUE} bytes")));
        }
        if HeaderValue::from_bytes(&value).is_err() || value.contains(&b'\t') {
            return Err(unreadable("it has characters that no header of a request can have"));
        }
        Ok(HeldSecret { name: name.to_owned(), secret: self, value })
    }
}

fn read(path: &std::path::Path) -> std::io::Result<Zeroizing<Vec<u8>>> {
    use std::os::unix::fs::OpenOptionsExt;
    // Opening a FIFO would wait for a writer.
    let nonblocking = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let file = std::fs::OpenOptions::new().read(true).custom_flags(nonblocking).open(path)?;
    // At its full length from the start: a vector that grows leaves copies behind.
    let mut value = Zeroizing::new(Vec::with_capacity(MAX_VALUE + 16));
    file.take(MAX_VALUE as u64 + 8).read_to_end(&mut value)?;
    Ok(value)
}

impl fmt::Debug for HeldSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeldSecret")
            .field("name", &self.name)
            .field("secret", &self.secret)
            .finish_non_exhaustive()
    }
}

/// Returns whether one of them is for this host.
pub(crate) fn covers(secrets: &[HeldSecret], name: &str) -> bool {
    secrets.iter().any(|held| held.is_for(name))
}

impl HeldSecret {
    /// The length of its value, in bytes.
    #[expect(clippy::len_without_is_empty, reason = "a value is never empty")]
    pub fn len(&self) -> usize {
        self.value.len()
    }

    /// One of this value, for `own.test`.
    pub(crate) fn for_fuzzing(value: &str) -> Self {
        let text = SecretText { value_from: "env:UNUSED".to_owned(), hosts: vec!["own.test".to_owned()] };
        let mut secret = Secret::of("SECRET", &text).expect("a secret");
        secret.placeholder = Secret::new_placeholder([7; 16]);
        Self { name: "SECRET".to_owned(), secret, value: Zeroizing::new(value.as_bytes().to_vec()) }
    }

    fn is_for(&self, name: &str) -> bool {
        self.secret.hosts.iter().any(|host| host.covers(name))
    }
}

/// Puts values in the place of placeholders in the headers of a request to this host; returns the names of those that were
/// used. The text of `Authorization: Basic` is looked into.
///
/// # Errors
/// When a header would be longer than a header can be.
pub(crate) fn fill(
    secrets: &[HeldSecret],
    name: &str,
    headers: &mut HeaderMap,
) -> Result<Vec<String>, &'static str> {
    let mut used = Vec::new();
    let own: Vec<&HeldSecret> = secrets.iter().filter(|held| held.is_for(name)).collect();
    for (header, value) in headers.iter_mut() {
        let filled = match value.as_bytes().split_at_checked(6) {
            Some((scheme, text)) if *header == AUTHORIZATION && scheme.eq_ignore_ascii_case(b"basic ") => {
                let decoded = STANDARD.decode(text.trim_ascii()).ok().map(Zeroizing::new);
                let filled = decoded.and_then(|decoded| replace(&own, &decoded, &mut used));
                filled.map(|filled| {
                    let encoded = Zeroizing::new(STANDARD.encode(&*filled));
                    Zeroizing::new([b"Basic ", encoded.as_bytes()].concat())
                })
            }
            _ => replace(&own, value.as_bytes(), &mut used),
        };
        if let Some(filled) = filled {
            if filled.len() > MAX_VALUE * 2 {
                return Err("a header with its secrets would be too long");
            }
            let mut filled = HeaderValue::from_bytes(&filled)
                .map_err(|_| "a header with its secrets would not be valid")?;
            // HTTP/2 keeps such a header out of its tables.
            filled.set_sensitive(true);
            *value = filled;
        }
    }
    used.sort_unstable();
    used.dedup();
    Ok(used)
}

/// The text with values in the place of placeholders, if it has any.
fn replace(secrets: &[&HeldSecret], text: &[u8], used: &mut Vec<String>) -> Option<Zeroizing<Vec<u8>>> {
    let mut at = find(text, PLACEHOLDER.as_bytes())?;
    let mut filled = Zeroizing::new(Vec::with_capacity(text.len() + MAX_VALUE));
    let mut rest = text;
    let mut is_filled = false;
    loop {
        filled.extend_from_slice(&rest[..at]);
        rest = &rest[at..];
        let held = secrets.iter().find(|held| rest.starts_with(held.secret.placeholder.as_bytes()));
        let taken = match held {
            Some(held) if filled.len() <= MAX_VALUE * 2 => {
                filled.extend_from_slice(&held.value);
                used.push(held.name.clone());
                is_filled = true;
                held.secret.placeholder.len()
            }
            // Another host's, or none at all: it goes out as it is.
            _ => {
                filled.extend_from_slice(&rest[..PLACEHOLDER.len()]);
                PLACEHOLDER.len()
            }
        };
        rest = &rest[taken..];
        match find(rest, PLACEHOLDER.as_bytes()) {
            Some(next) => at = next,
            None => break,
        }
    }
    filled.extend_from_slice(rest);
    is_filled.then_some(filled)
}

fn find(text: &[u8], part: &[u8]) -> Option<usize> {
    text.windows(part.len()).position(|window| window == part)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn held(name: &str, value: &str, host: &str) -> HeldSecret {
        let text = SecretText { value_from: "env:UNUSED".to_owned(), hosts: vec![host.to_owned()] };
        let mut secret = Secret::of(name, &text).expect("a secret");
        secret.placeholder = Secret::new_placeholder([name.as_bytes()[0]; 16]);
        HeldSecret { name: name.to_owned(), secret, value: Zeroizing::new(value.as_bytes().to_vec()) }
    }

    fn filled(secrets: &[HeldSecret], host: &str, name: &str, value: &str) -> (String, Vec<String>) {
        let mut headers = HeaderMap::new();
        let key = hyper::header::HeaderName::from_bytes(name.as_bytes()).expect("a name");
        headers.insert(key.clone(), HeaderValue::from_str(value).expect("a value"));
        let used = fill(secrets, host, &mut headers).expect("filled");
        (headers[key].to_str().expect("text").to_owned(), used)
    }

    #[test]
    fn placeholders_become_values_for_their_hosts_only() {
        let secrets = [held("A", "alpha", "a.test"), held("B", "beta", "*.b.test")];
        let (a, b) = (secrets[0].secret.placeholder.as_str(), secrets[1].secret.placeholder.as_str());
        let name = |name: &str| vec![name.to_owned()];
        let bearer = format!("Bearer {a}");
        assert_eq!(
            filled(&secrets, "a.test", "authorization", &bearer),
            ("Bearer alpha".to_owned(), name("A"))
        );
        assert_eq!(filled(&secrets, "x.a.test", "authorization", &bearer), (bearer.clone(), vec![]));
        assert_eq!(filled(&secrets, "x.b.test", "x-key", b), ("beta".to_owned(), name("B")));
        assert_eq!(filled(&secrets, "b.test", "x-key", b), (b.to_owned(), vec![]));
        // Several in one, another host's among them.
        let both = format!("{a},{b},{a}{PLACEHOLDER}{PLACEHOLDER}");
        let expected = format!("alpha,{b},alpha{PLACEHOLDER}{PLACEHOLDER}");
        assert_eq!(filled(&secrets, "a.test", "x-key", &both), (expected, name("A")));
    }

    #[test]
    fn the_text_of_basic_authorization_is_looked_into() {
        let secrets = [held("A", "alpha", "a.test")];
        let basic = |text: &str| format!("Basic {}", STANDARD.encode(text));
        let text = basic(&format!("user:{}", secrets[0].secret.placeholder));
        let (value, used) = filled(&secrets, "a.test", "authorization", &text);
        assert_eq!((value, used), (basic("user:alpha"), vec!["A".to_owned()]));
        for other in [basic("user:word"), "Basic !!!".to_owned(), "Basic ".to_owned(), "basic".to_owned()] {
            assert_eq!(filled(&secrets, "a.test", "authorization", &other), (other.clone(), vec![]));
        }
    }

    #[test]
    fn a_header_that_repeats_a_placeholder_stays_bounded() {
        let secrets = [held("A", &"v".repeat(MAX_VALUE), "a.test")];
        let mut headers = HeaderMap::new();
        let many = secrets[0].secret.placeholder.repeat(1000);
        headers.insert("x-key", HeaderValue::from_str(&many).expect("a value"));
        assert!(fill(&secrets, "a.test", &mut headers).is_err());
    }

    fn parsed(text: &str) -> Result<(String, Secret), SecretError> {
        let (name, words) = SecretText::parse(text)?;
        Secret::of(&name, &words).map(|secret| (name, secret))
    }

    #[test]
    fn a_secret_is_read_from_the_form_of_the_command_line() {
        let (name, secret) =
            parsed("GH_TOKEN=env:TOKEN@api.github.com,*.githubusercontent.com").expect("good");
        assert_eq!((name.as_str(), secret.value_from.to_string().as_str()), ("GH_TOKEN", "env:TOKEN"));
        assert_eq!(secret.hosts.len(), 2);
        let (_, at) = parsed("K=file:/a@b/c@h.test").expect("a path with an at sign");
        assert_eq!(at.value_from.to_string(), "file:/a@b/c");
        for text in [
            "",
            "K",
            "K=env:V",
            "K=V@h.test",
            "1K=env:V@h.test",
            "K=env:@h.test",
            "K=env:V@",
            "K=env:V@h.test:443",
            "K=env:V@10.0.0.1",
            "K=env:A B@h.test",
        ] {
            let error = parsed(text).expect_err(text).to_string();
            assert!(error.starts_with("invalid secret '"), "{error}");
        }
        // Who writes the value itself does not find it in an error.
        let error = parsed("K=hunter2").expect_err("no source").to_string();
        assert!(!error.contains("hunter2"), "{error}");
    }

    #[test]
    fn a_value_is_read_whole_and_must_fit_into_a_header() {
        let secret = |source: String| {
            let text = SecretText { value_from: source, hosts: vec!["h.test".to_owned()] };
            Secret::of("K", &text).expect("good")
        };
        let file = tempfile::NamedTempFile::new().expect("a file");
        let hold = |bytes: &[u8]| {
            fs_err::write(file.path(), bytes).expect("written");
            secret(format!("file:{}", file.path().display())).hold("K")
        };
        assert_eq!(*hold(b"word\r\n").expect("a value").value, b"word");
        assert!(!format!("{:?}", hold(b"hunter2").expect("a value")).contains("hunter2"));
        hold(&[b'x'; MAX_VALUE]).expect("as long as allowed");
        for bad in [&b""[..], b"\n", b"two\nlines", b"\0", &[b'x'; MAX_VALUE + 1]] {
            hold(bad).expect_err("refused");
        }
        let text = secret("env:PYRO_NO_SUCH_VARIABLE".to_owned()).hold("K").expect_err("absent").to_string();
        assert!(
            text.ends_with("cannot be read from env:PYRO_NO_SUCH_VARIABLE: the variable is not set"),
            "{text}"
        );
    }
}
