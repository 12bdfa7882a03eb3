//! The decisions of a policy.

use std::fmt;
use std::net::IpAddr;

use super::name::{HOST_NAME, is_normal};
use super::{Mode, Policy, Rule};
use crate::address::is_special;

/// Whether something is allowed, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Whether it is allowed.
    pub allowed: bool,
    /// The rule that decided, as text.
    pub rule: Option<String>,
    /// The reason.
    pub why: Why,
}

/// The reason of a decision. Its text is for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// The guest has no network device.
    NoNetwork,
    /// The policy allows nothing at all.
    Closed,
    /// No rule allows it.
    NoRule,
    /// The policy allows the public internet.
    Open,
    /// This rule allows it.
    AllowedBy(String),
    /// This rule denies it.
    DeniedBy(String),
    /// The address is not on the public internet, and no rule for such addresses allows it.
    SpecialAddress,
    /// What the guest asked for cannot be the name of a host.
    NotAName,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoNetwork => f.write_str("there is no network"),
            Self::Closed => f.write_str("policy is closed"),
            Self::NoRule => f.write_str("no rule allows it"),
            Self::Open => f.write_str("policy is open"),
            Self::AllowedBy(rule) => write!(f, "rule {rule}"),
            Self::DeniedBy(rule) => write!(f, "denied by rule {rule}"),
            Self::SpecialAddress => f.write_str("the address is not on the public internet"),
            Self::NotAName => f.write_str("this is no name of a host"),
        }
    }
}

/// What a connection to a name must prove before its bytes flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NameCheck {
    /// The name in the TLS hello, or the Host of each plain HTTP request, must equal the name.
    MustMatch,
    /// Nothing: another name would be allowed too.
    Skip,
}

impl Decision {
    fn allowed(why: Why) -> Self {
        Self { allowed: true, rule: why.rule(), why }
    }

    fn denied(why: Why) -> Self {
        Self { allowed: false, rule: why.rule(), why }
    }
}

impl Why {
    fn rule(&self) -> Option<String> {
        match self {
            Self::AllowedBy(rule) | Self::DeniedBy(rule) => Some(rule.clone()),
            _ => None,
        }
    }
}

impl Policy {
    /// Returns whether DNS may answer a name: a connection to some port of it may be allowed. The name is in lower case
    /// and has no last dot.
    pub fn answers(&self, name: &str) -> bool {
        let is_denied = || self.deny.iter().any(|rule| rule.names(name) && rule.has_every_port());
        let is_allowed = self.is_open_for(name) || self.allow.iter().any(|rule| rule.names(name));
        self.has_nic() && is_normal(name) && is_allowed && !is_denied()
    }

    /// Judges a connection to a name, which the guest has from our DNS.
    pub fn by_name(&self, name: &str, port: u16) -> Decision {
        if !is_normal(name) {
            return Decision::denied(Why::NotAName);
        }
        let covers = |rule: &Rule| rule.covers_name(name, port);
        self.judge(self.is_open_for(name), covers, covers)
    }

    /// Judges a connection to an address that no name led to.
    pub fn by_address(&self, address: IpAddr, port: u16) -> Decision {
        self.judge_address(address, port, self.mode == Mode::Open)
    }

    /// Returns whether a connection may go to an address that the host has found for an allowed name. `by_name_rule`
    /// tells that [`by_name`](Self::by_name) allowed the name; without it the address needs a rule of its own.
    pub fn admits_address(&self, resolved: IpAddr, port: u16, by_name_rule: bool) -> bool {
        self.judge_address(resolved, port, by_name_rule || self.mode == Mode::Open).allowed
    }

    /// Judges a connection to a service on the host's loopback.
    pub fn host_service(&self, port: u16) -> Decision {
        self.by_name(HOST_NAME, port)
    }

    /// Returns what a connection to a name must prove. Where names decide, an address must not serve another name than
    /// the one that was allowed.
    pub fn check(&self, name: &str) -> NameCheck {
        let names_decide = !self.is_open_for(name) || self.deny.iter().any(Rule::is_by_name);
        if names_decide { NameCheck::MustMatch } else { NameCheck::Skip }
    }

    /// Returns whether a name needs no rule. The host's services always need one.
    fn is_open_for(&self, name: &str) -> bool {
        self.mode == Mode::Open && name != HOST_NAME
    }

    /// Judges an address, where a public one may be allowed without a rule.
    fn judge_address(&self, address: IpAddr, port: u16, is_open: bool) -> Decision {
        let address = address.to_canonical();
        let covers = |rule: &Rule| rule.covers_address(address, port);
        if !is_special(address) {
            return self.judge(is_open, covers, covers);
        }
        // A rule such as 0.0.0.0/0 means the internet; only a rule for special addresses alone allows one.
        let mut decision = self.judge(false, covers, |rule| rule.is_special() && covers(rule));
        if decision.why == Why::NoRule {
            decision.why = Why::SpecialAddress;
        }
        decision
    }

    /// Applies the rules: deny, then allow, then what the mode says.
    fn judge(
        &self,
        is_open: bool,
        denies: impl Fn(&Rule) -> bool,
        allows: impl Fn(&Rule) -> bool,
    ) -> Decision {
        if self.mode == Mode::None {
            return Decision::denied(Why::NoNetwork);
        }
        if let Some(rule) = self.deny.iter().find(|rule| denies(rule)) {
            return Decision::denied(Why::DeniedBy(rule.to_string()));
        }
        match self.allow.iter().find(|rule| allows(rule)) {
            Some(rule) => Decision::allowed(Why::AllowedBy(rule.to_string())),
            None if is_open => Decision::allowed(Why::Open),
            None if self.mode == Mode::Deny => Decision::denied(Why::Closed),
            None => Decision::denied(Why::NoRule),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::policy;
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn a_closed_policy_allows_nothing() {
        for (policy, why) in [(Policy::none(), Why::NoNetwork), (policy(false, &[], &[]), Why::Closed)] {
            assert!(!policy.answers("a.b") && !policy.answers(HOST_NAME));
            assert_eq!(policy.by_name("a.b", 443), Decision::denied(why.clone()));
            assert_eq!(policy.by_address(address("8.8.8.8"), 443), Decision::denied(why.clone()));
            assert_eq!(policy.by_address(address("10.0.0.1"), 443), Decision::denied(why.clone()));
            assert_eq!(policy.host_service(80), Decision::denied(why));
            assert!(!policy.admits_address(address("10.0.0.1"), 443, true));
        }
        assert!(!Policy::none().admits_address(address("8.8.8.8"), 443, true));
    }

    #[test]
    fn names_and_addresses_are_judged_by_their_own_rules_only() {
        let policy = policy(false, &["a.b:443", "*.c.d", "8.8.8.0/24:53"], &["x.c.d"]);
        assert!(policy.answers("a.b") && policy.answers("y.c.d"));
        assert!(!policy.answers("x.c.d") && !policy.answers("c.d") && !policy.answers("e.f"));
        let by_rule = policy.by_name("a.b", 443);
        assert_eq!((by_rule.allowed, by_rule.rule.as_deref()), (true, Some("a.b:443")));
        assert_eq!(by_rule.why.to_string(), "rule a.b:443");
        assert_eq!(policy.by_name("a.b", 80), Decision::denied(Why::NoRule));
        assert_eq!(policy.by_name("x.c.d", 80).why.to_string(), "denied by rule x.c.d");
        assert!(policy.by_address(address("8.8.8.8"), 53).allowed);
        assert_eq!(policy.by_address(address("8.8.8.8"), 54), Decision::denied(Why::NoRule));
        assert!(!policy.by_name("dns.google", 53).allowed, "a name is no address");
    }

    #[test]
    fn an_open_policy_allows_the_internet_and_deny_rules_hold() {
        let policy = policy(true, &[], &["a.b", "c.d:25", "9.9.9.0/24", "*.e.f"]);
        assert!(!policy.answers("a.b") && policy.answers("c.d") && policy.answers("g.h"));
        assert!(!policy.answers("x.e.f") && policy.answers("e.f"));
        assert!(!policy.by_name("a.b", 1).allowed && !policy.by_name("c.d", 25).allowed);
        assert_eq!(policy.by_name("c.d", 443), Decision::allowed(Why::Open));
        assert!(!policy.by_address(address("9.9.9.9"), 443).allowed);
        assert!(policy.by_address(address("8.8.8.8"), 443).allowed);
        assert!(!policy.admits_address(address("9.9.9.9"), 443, true), "however it was found");
        assert!(policy.admits_address(address("8.8.8.8"), 443, false));
    }

    #[test]
    fn special_addresses_need_a_rule_that_means_them() {
        let specials =
            ["10.0.0.1", "127.0.0.1", "169.254.169.254", "198.18.1.0", "::1", "fd00::1", "::ffff:10.0.0.1"];
        let wide = ["0.0.0.0/0", "::/0", "8.0.0.0/6", "*.test", "a.test"];
        for policy in [policy(true, &wide, &[]), policy(false, &wide, &[])] {
            for special in specials {
                assert_eq!(policy.by_address(address(special), 80), Decision::denied(Why::SpecialAddress));
                assert!(!policy.admits_address(address(special), 80, true), "{special}");
            }
            assert!(policy.by_address(address("8.8.8.8"), 80).allowed);
            assert!(policy.by_address(address("::ffff:8.8.8.8"), 80).allowed);
            assert!(policy.by_address(address("2606:4700::1111"), 80).allowed);
        }
        let local = policy(false, &["0.0.0.0/0", "10.0.0.0/8:80", "a.test"], &["10.9.0.0/16"]);
        assert_eq!(local.by_address(address("10.0.0.1"), 80).rule.as_deref(), Some("10.0.0.0/8:80"));
        assert!(local.admits_address(address("10.0.0.1"), 80, true));
        assert!(local.admits_address(address("::ffff:10.0.0.1"), 80, true));
        assert!(!local.admits_address(address("10.0.0.1"), 81, true), "another port");
        assert_eq!(local.by_address(address("10.9.0.1"), 80).why, Why::DeniedBy("10.9.0.0/16".to_owned()));
        assert!(!local.admits_address(address("192.168.0.1"), 80, true));
    }

    #[test]
    fn an_allowed_name_brings_its_public_addresses_with_it() {
        let policy = policy(false, &["a.test"], &["9.9.9.9"]);
        assert!(policy.admits_address(address("8.8.8.8"), 443, true));
        assert!(!policy.admits_address(address("8.8.8.8"), 443, false), "no rule for the address");
        assert!(!policy.admits_address(address("9.9.9.9"), 443, true));
    }

    #[test]
    fn the_host_is_reached_by_its_own_rule_only() {
        let open = policy(true, &["*.internal"], &[]);
        assert!(!open.answers(HOST_NAME));
        assert_eq!(open.host_service(80), Decision::denied(Why::NoRule));
        let named = policy(true, &["host.pyro.internal:5432"], &[]);
        assert!(
            named.answers(HOST_NAME) && named.host_service(5432).allowed && !named.host_service(80).allowed
        );
        let denied = policy(true, &["host.pyro.internal:1-65535"], &["host.pyro.internal:22"]);
        assert!(denied.host_service(5432).allowed && !denied.host_service(22).allowed);
        assert!(!policy(false, &["127.0.0.0/8"], &[]).host_service(80).allowed);
    }

    #[test]
    fn what_is_no_name_is_never_answered() {
        let policy = policy(true, &["*.test"], &[]);
        for name in ["", "A.test", "a.test.", "a b.test", "127.1", "a\\046b.test", "ü.test"] {
            assert!(!policy.answers(name), "{name}");
            assert_eq!(policy.by_name(name, 80), Decision::denied(Why::NotAName));
        }
    }

    #[test]
    fn names_are_checked_where_names_decide() {
        assert_eq!(policy(false, &["a.b"], &[]).check("a.b"), NameCheck::MustMatch);
        assert_eq!(policy(true, &["a.b"], &["10.0.0.0/8"]).check("c.d"), NameCheck::Skip);
        assert_eq!(policy(true, &[], &["a.b"]).check("c.d"), NameCheck::MustMatch);
        assert_eq!(policy(true, &["host.pyro.internal:1"], &[]).check(HOST_NAME), NameCheck::MustMatch);
    }
}
