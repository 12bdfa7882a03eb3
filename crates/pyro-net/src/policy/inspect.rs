//! Rules about single requests to a host: method and path, for hosts whose requests are read.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{HOST_NAME, Rule};

/// Hosts whose requests are read, with what is allowed of them.
pub type Inspected = BTreeMap<HostPattern, Vec<RequestRule>>;

/// A name, or the names below one: `example.com`, `*.example.com`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostPattern(Rule);

impl HostPattern {
    /// Returns whether it is about this name, which is in lower case and has no last dot.
    pub fn covers(&self, name: &str) -> bool {
        self.0.names(name)
    }

    /// The name, if it is about one alone.
    pub fn single(&self) -> Option<String> {
        let text = self.0.to_string();
        (!text.starts_with("*.")).then_some(text)
    }

    /// The name without the star: certificates are limited to it and to what is below it.
    pub(crate) fn domain(&self) -> String {
        let text = self.0.to_string();
        text.strip_prefix("*.").map_or_else(|| text.clone(), str::to_owned)
    }
}

impl FromStr for HostPattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let rule: Rule = text.parse().map_err(|error: super::RuleError| error.reason)?;
        if !rule.is_by_name() || !rule.is_without_ports() || rule.names(HOST_NAME) {
            return Err("write the name of a host without ports, such as api.example.com".to_owned());
        }
        Ok(Self(rule))
    }
}

impl TryFrom<String> for HostPattern {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<HostPattern> for String {
    fn from(pattern: HostPattern) -> Self {
        pattern.to_string()
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A method and a path that are allowed: `GET /v1/items`, `POST /v1/*`, `* /health`. A star at the end of the path stands
/// for any rest, a star in place of the method for any method.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RequestRule {
    /// None: any.
    method: Option<String>,
    path: String,
    is_prefix: bool,
}

impl RequestRule {
    fn covers(&self, method: &str, path: &str) -> bool {
        let path_fits = if self.is_prefix { path.starts_with(&self.path) } else { path == self.path };
        path_fits && self.method.as_deref().is_none_or(|own| own == method)
    }
}

impl FromStr for RequestRule {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const SHAPE: &str = "write a method and a path, such as 'GET /v1/*'";
        let (method, path) = text.split_once(' ').ok_or(SHAPE)?;
        let is_method =
            method == "*" || (!method.is_empty() && method.bytes().all(|b| b.is_ascii_uppercase()));
        let is_path = path.starts_with('/')
            && path.len() <= 1024
            && path.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'?' | b'#'));
        if !is_method || !is_path {
            return Err(SHAPE);
        }
        let prefix = path.strip_suffix('*');
        let path = prefix.unwrap_or(path);
        if path.contains('*') {
            return Err("a star stands at the end of a path only");
        }
        if is_ambiguous(path) {
            return Err("write the path without '.', '..', '//', '\\', ';' and encoded '/', '.' or '%'");
        }
        Ok(Self {
            method: (method != "*").then(|| method.to_owned()),
            path: path.to_owned(),
            is_prefix: prefix.is_some(),
        })
    }
}

impl TryFrom<String> for RequestRule {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<RequestRule> for String {
    fn from(rule: RequestRule) -> Self {
        rule.to_string()
    }
}

impl fmt::Display for RequestRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { method, path, is_prefix } = self;
        write!(f, "{} {path}{}", method.as_deref().unwrap_or("*"), if *is_prefix { "*" } else { "" })
    }
}

/// Judges a request by the rules of its host; no rules allow all. The error says why it is refused.
pub(crate) fn judge(rules: &[RequestRule], method: &str, path: &str) -> Result<(), &'static str> {
    if rules.is_empty() {
        return Ok(());
    }
    // A server may take such a path for another one than the rule did.
    if is_ambiguous(path) {
        return Err("a server may read its path in more than one way");
    }
    if rules.iter().any(|rule| rule.covers(method, path)) { Ok(()) } else { Err("no inspect rule allows it") }
}

/// Returns whether servers disagree about what a path means.
fn is_ambiguous(path: &str) -> bool {
    let lower = path.to_ascii_lowercase();
    path.contains("//")
        || path.contains(['\\', ';'])
        || ["%2f", "%2e", "%5c", "%25", "%3b", "%00"].iter().any(|code| lower.contains(code))
        || path.split('/').any(|part| matches!(part, "." | ".."))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(texts: &[&str]) -> Vec<RequestRule> {
        texts.iter().map(|text| text.parse().expect("a rule")).collect()
    }

    #[test]
    fn a_request_needs_a_rule_for_its_method_and_path() {
        let rules = rules(&["GET /v1/*", "POST /v1/items", "* /health"]);
        for (method, path) in [("GET", "/v1/"), ("GET", "/v1/a/b"), ("POST", "/v1/items"), ("PUT", "/health")]
        {
            assert_eq!(judge(&rules, method, path), Ok(()), "{method} {path}");
        }
        for (method, path) in [
            ("GET", "/v1"),
            ("GET", "/"),
            ("get", "/v1/a"),
            ("POST", "/v1/items/1"),
            ("POST", "/v1/a"),
            ("GET", "/health/"),
        ] {
            assert_eq!(judge(&rules, method, path), Err("no inspect rule allows it"), "{method} {path}");
        }
        assert_eq!(judge(&[], "DELETE", "/a/../b"), Ok(()), "only read and logged");
    }

    #[test]
    fn a_path_that_can_be_read_in_two_ways_is_refused() {
        let rules = rules(&["GET /v1/*"]);
        for path in [
            "/v1/../admin",
            "/v1/./a",
            "/v1/%2e%2e/admin",
            "/v1/..%2Fadmin",
            "/v1/a%252f",
            "/v1//admin",
            "/v1/..\\admin",
            "/v1/a;x=1",
            "/v1/..",
            "/v1/a%00",
        ] {
            assert!(judge(&rules, "GET", path).is_err(), "{path}");
        }
    }

    #[test]
    fn rules_survive_their_text_and_others_are_refused() {
        for text in ["GET /v1/*", "* /", "POST /a", "* /*"] {
            assert_eq!(text.parse::<RequestRule>().expect(text).to_string(), text);
        }
        for text in [
            "",
            "GET",
            "/v1",
            "get /v1",
            "GET v1",
            "GET /a*b",
            "GET /a b",
            "GET /a?b",
            "GET /a/../b",
            "GET /a//b",
        ] {
            assert!(text.parse::<RequestRule>().is_err(), "{text}");
        }
        for text in ["api.example.com", "*.example.com"] {
            let pattern: HostPattern = text.parse().expect(text);
            assert_eq!((pattern.to_string(), pattern.domain()), (text.to_owned(), text.replace("*.", "")));
        }
        for text in ["", "a.test:443", "10.0.0.0/8", "host.pyro.internal:1", "a b"] {
            assert!(text.parse::<HostPattern>().is_err(), "{text}");
        }
    }
}
