//! What a guest may reach: the rules of one sandbox, and the decisions that follow from them.
//!
//! Everything here is a pure function. A name is judged by rules about names only, and an address that the guest dialled
//! as such by rules about networks only. Deny rules win over allow rules. Special addresses (the host, its networks,
//! cloud metadata) need a rule that is for special addresses alone.

mod change;
mod decision;
mod file;
mod file_error;
mod inspect;
mod name;
mod parse;
mod pinned;
mod ports;
mod record;
mod rule;

use std::collections::BTreeMap;
use std::net::SocketAddr;

pub use change::{Change, ChangeError, Opening};
pub use decision::{Decision, NameCheck, Why};
pub use file::{MAX_FILE, PolicyParts, PolicyText, load};
pub use file_error::PolicyFileError;
pub(crate) use inspect::judge;
pub use inspect::{HostPattern, Inspected, RequestRule};
pub use name::HOST_NAME;
pub(crate) use name::is_normal;
pub use pinned::Pinned;
pub use rule::{Rule, RuleError};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// The most rules that a policy holds.
pub const MAX_RULES: usize = 1000;

/// How a policy treats what no rule names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The guest has no network device.
    None,
    /// The guest has a device and reaches nothing.
    Deny,
    /// The guest reaches what a rule allows.
    Allow,
    /// The guest reaches the public internet, and what a rule allows.
    Open,
}

impl Mode {
    /// The name that records use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Deny => "deny",
            Self::Allow => "allow",
            Self::Open => "open",
        }
    }
}

/// The network policy of one sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "record::Record", into = "record::Record")]
pub struct Policy {
    mode: Mode,
    allow: Vec<Rule>,
    deny: Vec<Rule>,
    hosts: Hosts,
    inspect: Inspected,
}

/// Names with the addresses that a policy gives them.
pub type Hosts = BTreeMap<String, Pinned>;

/// A policy that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// It has more rules than the owner would search for each connection.
    #[error(
        "a network policy has at most {MAX_RULES} rules, this one has {count}; use wider rules, such as *.example.com"
    )]
    TooManyRules {
        /// How many rules it has.
        count: usize,
    },
    /// A record whose parts disagree. It is refused, because guessing could open the network.
    #[error("the recorded network policy is not valid: {0}")]
    Inconsistent(&'static str),
}

impl Policy {
    /// The policy of a guest without a network device.
    pub const fn none() -> Self {
        Self {
            mode: Mode::None,
            allow: Vec::new(),
            deny: Vec::new(),
            hosts: Hosts::new(),
            inspect: Inspected::new(),
        }
    }

    /// Makes the policy of a guest with a network device.
    ///
    /// # Errors
    /// When there are more than [`MAX_RULES`] rules.
    pub fn new(open: bool, allow: Vec<Rule>, deny: Vec<Rule>) -> Result<Self, PolicyError> {
        let (allow, deny) = (distinct(allow), distinct(deny));
        let count = allow.len() + deny.len();
        if count > MAX_RULES {
            return Err(PolicyError::TooManyRules { count });
        }
        let mode = match (open, allow.is_empty()) {
            (true, _) => Mode::Open,
            (false, false) => Mode::Allow,
            (false, true) => Mode::Deny,
        };
        Ok(Self { mode, allow, deny, hosts: Hosts::new(), inspect: Inspected::new() })
    }

    /// Gives names addresses of their own, as a hosts file does. A name needs a rule all the same.
    ///
    /// # Errors
    /// When there are more than [`MAX_RULES`].
    pub fn with_hosts(mut self, hosts: Hosts) -> Result<Self, PolicyError> {
        if hosts.len() > MAX_RULES {
            return Err(PolicyError::TooManyRules { count: hosts.len() });
        }
        if self.has_nic() {
            self.hosts = hosts;
        }
        Ok(self)
    }

    /// Has the requests to some hosts be read, and held against rules of their own.
    ///
    /// # Errors
    /// When there are more than [`MAX_RULES`] hosts and rules.
    pub fn with_inspect(mut self, inspect: Inspected) -> Result<Self, PolicyError> {
        let count = inspect.values().map(|rules| rules.len() + 1).sum();
        if count > MAX_RULES {
            return Err(PolicyError::TooManyRules { count });
        }
        if self.has_nic() {
            self.inspect = inspect;
        }
        Ok(self)
    }

    /// The hosts whose requests are read, with the rules about them.
    pub fn inspect(&self) -> &Inspected {
        &self.inspect
    }

    /// The rules about requests to this host, if they are to be read: those for exactly this name come before others.
    pub(crate) fn inspected(&self, name: &str) -> Option<&[RequestRule]> {
        let fits = |(pattern, _): &(&HostPattern, &Vec<RequestRule>)| pattern.covers(name);
        let exact = self.inspect.iter().filter(fits).find(|(pattern, _)| pattern.single().is_some());
        exact.or_else(|| self.inspect.iter().find(fits)).map(|(_, rules)| rules.as_slice())
    }

    /// The addresses that the policy gives to names.
    pub fn hosts(&self) -> &Hosts {
        &self.hosts
    }

    /// Where a connection to this name and port goes, if the policy says so.
    pub fn pinned(&self, name: &str, port: u16) -> Option<SocketAddr> {
        self.hosts.get(name).map(|pinned| SocketAddr::new(pinned.address, pinned.port.unwrap_or(port)))
    }

    /// How this policy treats what no rule names.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// The rules that allow, in the order in which they were given.
    pub fn allow(&self) -> &[Rule] {
        &self.allow
    }

    /// The rules that deny, in the order in which they were given.
    pub fn deny(&self) -> &[Rule] {
        &self.deny
    }

    /// Returns whether the guest has a network device.
    pub fn has_nic(&self) -> bool {
        self.mode != Mode::None
    }

    /// A short digest, equal for policies that decide alike by the same rules in any order.
    pub fn digest(&self) -> String {
        let sorted = |rules: &[Rule]| {
            let mut rules: Vec<_> = rules.iter().map(Rule::to_string).collect();
            rules.sort_unstable();
            rules
        };
        let mut hash = Sha256::new();
        hash.update(format!("{:?}\n", self.mode));
        for (verb, rules) in [("allow", sorted(&self.allow)), ("deny", sorted(&self.deny))] {
            for rule in rules {
                hash.update(format!("{verb} {rule}\n"));
            }
        }
        for (name, address) in &self.hosts {
            hash.update(format!("host {name} {address}\n"));
        }
        for (host, rules) in &self.inspect {
            hash.update(format!("inspect {host}\n"));
            for rule in rules {
                hash.update(format!("request {rule}\n"));
            }
        }
        hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Removes repeated rules. Up to a few thousand may come from files, so a set finds them.
fn distinct(rules: Vec<Rule>) -> Vec<Rule> {
    let mut seen = std::collections::HashSet::new();
    rules.into_iter().filter(|rule| seen.insert(rule.clone())).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn rules(texts: &[&str]) -> Vec<Rule> {
        texts.iter().map(|text| text.parse().unwrap_or_else(|error| panic!("{error}"))).collect()
    }

    pub(crate) fn policy(open: bool, allow: &[&str], deny: &[&str]) -> Policy {
        Policy::new(open, rules(allow), rules(deny)).expect("few rules")
    }

    #[test]
    fn the_mode_follows_from_what_was_given() {
        assert_eq!(Policy::none().mode(), Mode::None);
        assert!(!Policy::none().has_nic());
        assert_eq!(policy(false, &[], &[]).mode(), Mode::Deny);
        assert_eq!(policy(false, &[], &["a.b"]).mode(), Mode::Deny);
        assert_eq!(policy(false, &["a.b"], &[]).mode(), Mode::Allow);
        assert_eq!(policy(true, &["a.b"], &[]).mode(), Mode::Open);
        assert!(policy(false, &[], &[]).has_nic());
    }

    #[test]
    fn the_digest_depends_on_rules_and_not_on_their_order() {
        let digest = policy(false, &["a.b:1", "c.d"], &["e.f", "g.h"]).digest();
        assert_eq!(digest, policy(false, &["C.D", "a.b:1", "c.d"], &["g.h", "e.f"]).digest());
        assert_eq!(digest, "62592db142512758", "records of earlier versions hold it");
        let others = [
            Policy::none(),
            policy(false, &[], &[]),
            policy(true, &["a.b:1", "c.d"], &["e.f", "g.h"]),
            policy(false, &["a.b:1"], &["c.d", "e.f", "g.h"]),
            policy(false, &["a.b:2", "c.d"], &["e.f", "g.h"]),
        ];
        assert!(others.iter().all(|other| other.digest() != digest));
    }

    #[test]
    fn a_policy_has_a_bounded_number_of_different_rules() {
        let many = |count: usize| {
            (0..count).map(|at| format!("h{at}.test").parse().expect("a rule")).collect::<Vec<Rule>>()
        };
        Policy::new(false, many(600), many(400)).expect("as many as allowed");
        let error = Policy::new(false, many(600), many(401)).expect_err("one more");
        assert_eq!(error, PolicyError::TooManyRules { count: 1001 });
        Policy::new(true, vec![many(1).remove(0); 5000], Vec::new()).expect("the same one");
    }
}
