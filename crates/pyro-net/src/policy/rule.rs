//! One rule of a policy, as users write it.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::name::HOST_NAME;
use super::parse::parse;
use super::ports::Ports;
use crate::address::lies_in_special;

/// The longest rule, in bytes. Also what an error shows of one.
pub(super) const MAX_RULE: usize = 1024;
/// What a policy allows or denies: a name, the names below one, a network, or a service of the host.
///
/// Written as `HOST[:PORTS]`, `*.HOST[:PORTS]`, `CIDR[:PORTS]` or `host.pyro.internal:PORTS`. `*.HOST` covers names of
/// any depth below `HOST`, and not `HOST` itself. PORTS are `443`, `80,443` or `8000-8010`; without them a rule covers
/// every port. An IPv6 network with ports has brackets around all of it: `[2001:db8::/32]:443`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Rule {
    target: Target,
    ports: Ports,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Target {
    /// Exactly this name.
    Name(String),
    /// Every name that ends with a dot and this one.
    Below(String),
    Network(IpNet),
    /// The services of the host on its loopback.
    Host,
}

/// A text that is no rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid network rule '{}': {}", shown(rule), shown(reason))]
pub struct RuleError {
    /// The text.
    pub rule: String,
    /// What is wrong with it, and how to write it.
    pub reason: String,
}

impl Rule {
    /// Returns whether this rule is about a name, with any port. The name has the form of [`normal`](super::name::normal).
    pub(crate) fn names(&self, name: &str) -> bool {
        match &self.target {
            // The host is reached by its own rule only, not by `*.internal`.
            _ if name == HOST_NAME => self.target == Target::Host,
            Target::Name(own) => own == name,
            Target::Below(parent) => {
                name.strip_suffix(parent.as_str()).is_some_and(|rest| rest.len() > 1 && rest.ends_with('.'))
            }
            Target::Network(_) | Target::Host => false,
        }
    }

    /// Returns whether this rule is about connections to this name and port.
    pub(crate) fn covers_name(&self, name: &str, port: u16) -> bool {
        self.names(name) && self.ports.contains(port)
    }

    /// Returns whether this rule is about an address and port. The address is not IPv4 in IPv6 form.
    pub(crate) fn covers_address(&self, address: IpAddr, port: u16) -> bool {
        matches!(&self.target, Target::Network(net) if net.contains(&address)) && self.ports.contains(port)
    }

    /// Returns whether this rule is for special addresses only, and so means them.
    pub(crate) fn is_special(&self) -> bool {
        matches!(self.target, Target::Network(net) if lies_in_special(net))
    }

    /// Returns whether this rule is about names of other hosts.
    pub(crate) fn is_by_name(&self) -> bool {
        matches!(self.target, Target::Name(_) | Target::Below(_))
    }

    pub(crate) fn has_every_port(&self) -> bool {
        self.ports.is_every()
    }

    /// Returns whether it was written without ports.
    pub(crate) fn is_without_ports(&self) -> bool {
        self.ports.is_unwritten()
    }
}

impl FromStr for Rule {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        parse(text)
            .map(|(target, ports)| Self { target, ports })
            .map_err(|reason| RuleError { rule: text.to_owned(), reason })
    }
}

impl TryFrom<String> for Rule {
    type Error = RuleError;

    fn try_from(text: String) -> Result<Self, RuleError> {
        text.parse()
    }
}

impl From<Rule> for String {
    fn from(rule: Rule) -> Self {
        rule.to_string()
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.target {
            Target::Name(name) => f.write_str(name)?,
            Target::Below(parent) => write!(f, "*.{parent}")?,
            Target::Host => f.write_str(HOST_NAME)?,
            Target::Network(net) => {
                let is_single = net.prefix_len() == net.max_prefix_len();
                let text = if is_single { net.addr().to_string() } else { net.to_string() };
                let brackets = net.addr().is_ipv6() && !self.ports.is_unwritten();
                if brackets { write!(f, "[{text}]")? } else { f.write_str(&text)? }
            }
        }
        if self.ports.is_unwritten() { Ok(()) } else { write!(f, ":{}", self.ports) }
    }
}

/// The start of a text, for an error. Rules come from files, so what a terminal would obey is escaped.
fn shown(text: &str) -> String {
    let mut shown = String::new();
    for (at, character) in text.chars().enumerate() {
        if at == MAX_RULE {
            shown.push('…');
            break;
        }
        if character.is_control() {
            shown.extend(character.escape_debug());
        } else {
            shown.push(character);
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use proptest::prelude::*;

    use super::*;

    fn rule(text: &str) -> Rule {
        text.parse().unwrap_or_else(|error| panic!("{error}"))
    }

    fn address(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn rules_print_as_one_would_write_them() {
        for (text, printed) in [
            ("PyPI.org", "pypi.org"),
            ("pypi.org.:443", "pypi.org:443"),
            ("*.Example.com:443,80", "*.example.com:80,443"),
            ("a.b:8000-8010,22", "a.b:22,8000-8010"),
            ("a.b:80,81,80-82", "a.b:80-82"),
            ("a.b:1-65535", "a.b:1-65535"),
            ("localhost:5432", "localhost:5432"),
            ("bücher.example", "xn--bcher-kva.example"),
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("192.0.2.1:443", "192.0.2.1:443"),
            ("192.0.2.1/32", "192.0.2.1"),
            ("2001:DB8::/32", "2001:db8::/32"),
            ("2001:db8::1", "2001:db8::1"),
            ("[2001:db8::1]", "2001:db8::1"),
            ("[2001:db8::/32]:443", "[2001:db8::/32]:443"),
            ("[2001:db8::1]:80,443", "[2001:db8::1]:80,443"),
            ("Host.Pyro.Internal:5432", "host.pyro.internal:5432"),
            ("0.0.0.0/0", "0.0.0.0/0"),
        ] {
            assert_eq!(rule(text).to_string(), printed);
            assert_eq!(rule(printed), rule(text));
        }
        let json = serde_json::to_string(&rule("A.b:1")).expect("json");
        assert_eq!(json, "\"a.b:1\"");
        assert_eq!(serde_json::from_str::<Rule>(&json).expect("a rule"), rule("a.b:1"));
    }

    #[test]
    fn what_is_no_rule_is_refused_with_a_remedy() {
        for (text, reason) in [
            ("", "write a name or an address, such as example.com"),
            ("https://x", "write the host instead of a URL: x"),
            ("https://u:p@x:8443/y?z", "write the host instead of a URL: x:8443"),
            ("x/y", "a rule has no path; write x"),
            ("a.*.com", "'*' stands alone before the first dot, such as *.example.com"),
            ("*x.com", "'*' stands alone before the first dot, such as *.example.com"),
            ("*.*.com", "'*' stands alone before the first dot, such as *.example.com"),
            ("a.b:0", "port 0 does not exist; ports are 1 to 65535"),
            ("a.b:65536", "'65536' is no port; ports are 1 to 65535"),
            ("a.b:+1", "'+1' is no port; ports are 1 to 65535"),
            ("a.b:9-8", "the range is reversed; write 8-9"),
            ("a.b:", "write a port after ':', or remove it"),
            ("a.b:80,", "write a port after each ',', such as 80,443"),
            ("a.b:http", "'http' is no port; ports are 1 to 65535"),
            (" a.b", "remove the spaces around it"),
            ("user@a.b", "write the host without a user"),
            ("10.0.0.1/8", "the address has more bits than the prefix; write 10.0.0.0/8"),
            (
                "10.0.0.0/33",
                "'33' with '10.0.0.0' is no network; write one such as 192.0.2.0/24, at most /32",
            ),
            ("127.1", "this is no name; write an address as four numbers, such as 192.0.2.1"),
            ("[2001:db8::]/32:443", "write an IPv6 network inside the brackets, such as [2001:db8::/32]:443"),
            ("[2001:db8::1", "the ']' is missing; write [2001:db8::/32]:443"),
            ("[a.b]:443", "brackets are for IPv6 addresses only; remove them"),
            ("::ffff:10.0.0.1", "write it as an IPv4 address"),
            ("host.pyro.internal", "name the ports of the host's services, such as host.pyro.internal:5432"),
            ("*.pyro.internal:1", "names below pyro.internal are reserved; write host.pyro.internal:PORT"),
            (
                "*",
                "to allow every public host, open the network (--network); '*.example.com' covers the names below one",
            ),
        ] {
            let error = text.parse::<Rule>().expect_err(text);
            assert_eq!(error.to_string(), format!("invalid network rule '{text}': {reason}"));
        }
        for text in
            ["*.", "*", "a b", "a..b", "*.host.pyro.internal", "x.pyro.internal", "fe80::1%eth0", "a:b:c"]
        {
            text.parse::<Rule>().expect_err(text);
        }
        let long = "x".repeat(5000).parse::<Rule>().expect_err("long").to_string();
        assert!(long.len() < 1200, "{}", long.len());
        for text in ["https://\u{1b}[2J", "\u{1b}/24", "1.2.3.4/\u{1b}"] {
            let error = text.parse::<Rule>().expect_err("no rule").to_string();
            assert!(!error.contains('\u{1b}'), "{error:?}");
        }
        assert!("\u{1b}[31m".parse::<Rule>().expect_err("no name").to_string().is_ascii());
    }

    #[test]
    fn a_wildcard_covers_any_depth_below_but_not_the_name_itself() {
        let below = rule("*.example.com:443");
        assert!(below.covers_name("a.example.com", 443) && below.covers_name("a.b.example.com", 443));
        for other in ["example.com", "badexample.com", ".example.com", "a.example.com.evil.test", ""] {
            assert!(!below.names(other), "{other}");
        }
        assert!(!below.covers_name("a.example.com", 80));
        assert!(below.names("a.example.com"));
        let name = rule("example.com");
        assert!(name.covers_name("example.com", 1) && !name.names("a.example.com"));
    }

    #[test]
    fn no_wildcard_covers_the_host() {
        assert!(!rule("*.internal").names(HOST_NAME));
        assert!(rule("*.internal").names("db.internal"));
        let host = rule("host.pyro.internal:5432");
        assert!(host.covers_name(HOST_NAME, 5432) && !host.covers_name(HOST_NAME, 5433));
        assert!(!host.names("other.test") && !host.is_by_name());
    }

    #[test]
    fn networks_cover_addresses_and_names_do_not() {
        assert!(rule("10.0.0.0/8:80-90").covers_address(address("10.1.2.3"), 85));
        assert!(!rule("10.0.0.0/8:80-90").covers_address(address("10.1.2.3"), 91));
        assert!(!rule("10.0.0.0/8").covers_address(address("11.0.0.0"), 80));
        assert!(!rule("0.0.0.0/0").covers_address(address("2000::1"), 80));
        assert!(rule("2000::/3").covers_address(address("2000::1"), 80));
        assert!(!rule("a.b").covers_address(address("10.1.2.3"), 80));
        assert!(
            rule("10.0.0.0/9").is_special() && !rule("0.0.0.0/0").is_special() && !rule("a.b").is_special()
        );
    }

    proptest! {
        #[test]
        fn every_rule_prints_as_text_that_is_the_same_rule(
            text in "(\\*\\.)?[a-zA-Z0-9._*-]{1,20}(/[0-9]{1,2})?(:[0-9]{1,5}([,-][0-9]{1,5}){0,3})?",
        ) {
            if let Ok(parsed) = text.parse::<Rule>() {
                let printed = parsed.to_string();
                prop_assert_eq!(printed.parse::<Rule>(), Ok(parsed.clone()));
                prop_assert_eq!(parsed.to_string(), printed);
            }
        }

        #[test]
        fn networks_print_as_the_same_network(bits in any::<u128>(), prefix in 0..=128_u8, port in 1..=u16::MAX) {
            let v6 = IpNet::new(Ipv6Addr::from(bits).into(), prefix).expect("a prefix").trunc();
            for text in [v6.to_string(), format!("[{v6}]:{port}")] {
                if let Ok(parsed) = text.parse::<Rule>() {
                    prop_assert_eq!(parsed.to_string().parse::<Rule>(), Ok(parsed));
                }
            }
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in "\\PC{0,40}") {
            if let Ok(parsed) = text.parse::<Rule>() {
                prop_assert_eq!(parsed.to_string().parse::<Rule>(), Ok(parsed));
            }
        }
    }
}
