//! Names of hosts in the one form in which they are compared: lower case, no last dot, A-labels.

use std::fmt;

/// The host itself, as guests call it. Only a rule with a port makes one of its services reachable.
pub const HOST_NAME: &str = "host.pyro.internal";

/// The longest name that DNS can carry, in bytes.
const MAX_NAME: usize = 253;
/// The longest part between two dots.
const MAX_LABEL: usize = 63;

/// Why a text is no name of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotAName {
    Empty,
    Long,
    EmptyLabel,
    LongLabel,
    Character(char),
    Hyphen,
    Number,
    NotIdna,
}

impl fmt::Display for NotAName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("write a name or an address, such as example.com"),
            Self::Long => write!(f, "a name has at most {MAX_NAME} characters"),
            Self::EmptyLabel => f.write_str("two dots follow each other or a dot comes first; remove one"),
            Self::LongLabel => write!(f, "between two dots are at most {MAX_LABEL} characters"),
            Self::Character(found) => {
                let found = found.escape_debug();
                write!(f, "a name has no '{found}'; use letters, digits, '-', '_' and dots")
            }
            Self::Hyphen => f.write_str("no part of a name begins or ends with '-'"),
            Self::Number => {
                f.write_str("this is no name; write an address as four numbers, such as 192.0.2.1")
            }
            Self::NotIdna => f.write_str("write the name in its ASCII form, xn--…"),
        }
    }
}

/// Brings a name into the form in which names are compared.
pub(crate) fn normal(text: &str) -> Result<String, NotAName> {
    let ascii = if text.is_ascii() {
        text.to_ascii_lowercase()
    } else if text.len() > MAX_NAME * 4 {
        return Err(NotAName::Long);
    } else {
        idna::domain_to_ascii(text).map_err(|_| NotAName::NotIdna)?
    };
    let name = ascii.strip_suffix('.').unwrap_or(&ascii);
    check(name)?;
    Ok(name.to_owned())
}

/// Returns whether a name has the form that [`normal`] returns.
pub(crate) fn is_normal(name: &str) -> bool {
    check(name).is_ok() && !name.bytes().any(|byte| byte.is_ascii_uppercase())
}

fn check(name: &str) -> Result<(), NotAName> {
    if name.is_empty() {
        return Err(NotAName::Empty);
    }
    if name.len() > MAX_NAME {
        return Err(NotAName::Long);
    }
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if let Some(found) = name.chars().find(|c| !is_plain(*c)) {
        return Err(NotAName::Character(found));
    }
    for label in name.split('.') {
        match label {
            "" => return Err(NotAName::EmptyLabel),
            _ if label.len() > MAX_LABEL => return Err(NotAName::LongLabel),
            _ if label.starts_with('-') || label.ends_with('-') => return Err(NotAName::Hyphen),
            _ => {}
        }
    }
    // getaddrinfo takes `127.1`, `0x7f.1` and `2130706433` for addresses. No top-level name begins so.
    let last = name.rsplit('.').next().unwrap_or(name);
    let is_number = last.bytes().all(|byte| byte.is_ascii_digit())
        || last.strip_prefix("0x").is_some_and(|hex| hex.bytes().all(|byte| byte.is_ascii_hexdigit()));
    if is_number { Err(NotAName::Number) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_gets_one_form() {
        for (text, name) in [
            ("Example.COM", "example.com"),
            ("example.com.", "example.com"),
            ("localhost", "localhost"),
            ("_dmarc.a-b.x1", "_dmarc.a-b.x1"),
            ("bücher.example", "xn--bcher-kva.example"),
            ("BÜCHER。example", "xn--bcher-kva.example"),
            ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ] {
            assert_eq!(normal(text).as_deref(), Ok(name), "{text}");
            assert!(is_normal(name));
        }
        assert!(!is_normal("Example.com") && !is_normal("example.com."));
    }

    #[test]
    fn what_is_no_name_is_refused_with_the_reason() {
        let long = [&*"a".repeat(63); 4].join(".");
        assert_eq!(long.len(), 255);
        for (text, reason) in [
            ("", NotAName::Empty),
            (".", NotAName::Empty),
            ("a..b", NotAName::EmptyLabel),
            (".a", NotAName::EmptyLabel),
            (&*long, NotAName::Long),
            (&*"a".repeat(64), NotAName::LongLabel),
            ("a b", NotAName::Character(' ')),
            ("a\n", NotAName::Character('\n')),
            ("a\\.b", NotAName::Character('\\')),
            ("-a.b", NotAName::Hyphen),
            ("a-.b", NotAName::Hyphen),
            ("127.1", NotAName::Number),
            ("0x7f.1", NotAName::Number),
            ("a.0X7F", NotAName::Number),
            ("2130706433", NotAName::Number),
            ("１２７.1", NotAName::Number),
        ] {
            assert_eq!(normal(text), Err(reason), "{text}");
        }
        assert_eq!(normal(&"ü".repeat(2000)), Err(NotAName::Long));
        assert!(normal("a\u{ad}\u{200b}．").is_ok_and(|name| name == "a"));
    }
}
