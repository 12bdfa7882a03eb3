//! Changes to the policy of a running sandbox.

use super::{Policy, PolicyError, Rule};

/// A change to a policy. Rules are revoked before others are added, so that one change can replace a rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Rules to add to those that allow.
    pub allow: Vec<Rule>,
    /// Rules to remove from those that allow or, where it is not among them, from those that deny.
    pub revoke: Vec<Rule>,
    /// Rules to add to those that deny.
    pub deny: Vec<Rule>,
    /// Whether to open the public internet or to close it. Closing keeps the rules.
    pub mode: Option<Opening>,
}

/// Whether the public internet is allowed without a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opening {
    /// It is allowed.
    Open,
    /// Only what rules allow is allowed.
    Closed,
}

/// A change that cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// A guest cannot get a device while it runs.
    #[error("this sandbox was started without a network; start one with --network or --allow")]
    NoNetwork,
    /// The rule to revoke is not there.
    #[error("the network policy has no rule '{rule}'; it has {}", listed(rules))]
    NoSuchRule {
        /// The rule to revoke.
        rule: Rule,
        /// The rules that are there.
        rules: Vec<Rule>,
    },
    /// The changed policy cannot be.
    #[error(transparent)]
    Policy(#[from] PolicyError),
}

impl Policy {
    /// Returns this policy with a change made to it.
    ///
    /// # Errors
    /// When the guest has no network device, a rule to revoke is not there, or there would be too many rules.
    pub fn change(&self, change: &Change) -> Result<Self, ChangeError> {
        if !self.has_nic() {
            return Err(ChangeError::NoNetwork);
        }
        let (mut allow, mut deny) = (self.allow.clone(), self.deny.clone());
        for rule in &change.revoke {
            let list = if allow.contains(rule) { &mut allow } else { &mut deny };
            let Some(at) = list.iter().position(|other| other == rule) else {
                let rules = [self.allow(), self.deny()].concat();
                return Err(ChangeError::NoSuchRule { rule: rule.clone(), rules });
            };
            list.remove(at);
        }
        allow.extend_from_slice(&change.allow);
        deny.extend_from_slice(&change.deny);
        let open = match change.mode {
            Some(opening) => opening == Opening::Open,
            None => self.mode == super::Mode::Open,
        };
        Ok(Self::new(open, allow, deny)?
            .with_hosts(self.hosts.clone())?
            .with_inspect(self.inspect.clone())?)
    }
}

/// Rules as a list for an error, of a length that a terminal shows.
fn listed(rules: &[Rule]) -> String {
    const SHOWN: usize = 20;
    if rules.is_empty() {
        return "none".to_owned();
    }
    let list = rules.iter().take(SHOWN).map(|rule| format!("'{rule}'")).collect::<Vec<_>>().join(", ");
    match rules.len().checked_sub(SHOWN) {
        None | Some(0) => list,
        Some(more) => format!("{list} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Mode;
    use super::super::tests::{policy, rules};
    use super::*;

    #[test]
    fn rules_come_and_go_and_the_mode_follows() {
        let closed = policy(false, &[], &[]);
        let allowed =
            closed.change(&Change { allow: rules(&["a.b", "a.b"]), ..Change::default() }).expect("added");
        assert_eq!(allowed, policy(false, &["a.b"], &[]));
        let replaced = Change { allow: rules(&["a.b:443"]), revoke: rules(&["A.b"]), ..Change::default() };
        assert_eq!(allowed.change(&replaced).expect("replaced"), policy(false, &["a.b:443"], &[]));
        let opened = Change { mode: Some(Opening::Open), deny: rules(&["x.y"]), ..Change::default() };
        let opened = allowed.change(&opened).expect("opened");
        assert_eq!(opened, policy(true, &["a.b"], &["x.y"]));
        let kept = opened.change(&Change { revoke: rules(&["x.y"]), ..Change::default() }).expect("revoked");
        assert_eq!(kept, policy(true, &["a.b"], &[]));
        let shut = kept.change(&Change { mode: Some(Opening::Closed), ..Change::default() }).expect("closed");
        assert_eq!(shut, allowed);
        let last = shut.change(&Change { revoke: rules(&["a.b"]), ..Change::default() }).expect("revoked");
        assert_eq!(last.mode(), Mode::Deny);
    }

    #[test]
    fn a_rule_that_both_allows_and_denies_is_revoked_from_the_allowing_side_first() {
        let both = policy(true, &["a.b"], &["a.b"]);
        let revoked = both.change(&Change { revoke: rules(&["a.b"]), ..Change::default() }).expect("revoked");
        assert_eq!(revoked, policy(true, &[], &["a.b"]), "the denial still holds");
    }

    #[test]
    fn an_unknown_rule_is_refused_with_those_that_are_there() {
        let change = |revoke: &[&str]| Change { revoke: rules(revoke), ..Change::default() };
        let error = policy(false, &["a.b:443"], &["c.d"]).change(&change(&["a.b"])).expect_err("another one");
        assert_eq!(error.to_string(), "the network policy has no rule 'a.b'; it has 'a.b:443', 'c.d'");
        let error = policy(false, &[], &[]).change(&change(&["a.b"])).expect_err("none is there");
        assert_eq!(error.to_string(), "the network policy has no rule 'a.b'; it has none");
        let many: Vec<_> = (0..25).map(|at| format!("h{at}.test")).collect();
        let many: Vec<_> = many.iter().map(String::as_str).collect();
        let error = policy(false, &many, &[]).change(&change(&["a.b"])).expect_err("another one");
        assert!(error.to_string().ends_with("'h19.test' and 5 more"), "{error}");
    }

    #[test]
    fn a_guest_without_a_device_cannot_get_one() {
        let opened = Change { mode: Some(Opening::Open), ..Change::default() };
        assert_eq!(Policy::none().change(&opened), Err(ChangeError::NoNetwork));
    }
}
