//! A policy as records keep it.

use serde::{Deserialize, Serialize};

use super::{Hosts, Inspected, Mode, Policy, PolicyError, Rule};

/// The recorded form. `digest` may be absent, as in a record that a person wrote.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    mode: Mode,
    #[serde(default)]
    allow: Vec<Rule>,
    #[serde(default)]
    deny: Vec<Rule>,
    #[serde(default, skip_serializing_if = "Hosts::is_empty")]
    hosts: Hosts,
    #[serde(default, skip_serializing_if = "Inspected::is_empty")]
    inspect: Inspected,
    #[serde(default)]
    digest: Option<String>,
}

impl From<Policy> for Record {
    fn from(policy: Policy) -> Self {
        let digest = Some(policy.digest());
        let Policy { mode, allow, deny, hosts, inspect } = policy;
        Self { mode, allow, deny, hosts, inspect, digest }
    }
}

impl TryFrom<Record> for Policy {
    type Error = PolicyError;

    fn try_from(record: Record) -> Result<Self, PolicyError> {
        let Record { mode, allow, deny, hosts, inspect, digest } = record;
        let is_empty = allow.is_empty() && deny.is_empty() && hosts.is_empty() && inspect.is_empty();
        let policy = match mode {
            Mode::None if is_empty => Self::none(),
            Mode::None => return Err(PolicyError::Inconsistent("mode 'none' has no rules")),
            _ => Self::new(mode == Mode::Open, allow, deny)?.with_hosts(hosts)?.with_inspect(inspect)?,
        };
        if policy.mode != mode {
            return Err(PolicyError::Inconsistent("its mode does not fit its rules"));
        }
        if digest.is_some_and(|digest| digest != policy.digest()) {
            return Err(PolicyError::Inconsistent("its digest does not fit its rules"));
        }
        Ok(policy)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::policy;
    use super::*;

    #[test]
    fn a_policy_survives_its_record() {
        for policy in [
            Policy::none(),
            policy(false, &[], &["a.b"]),
            policy(false, &["*.a.b:443", "10.0.0.0/8"], &[]),
            policy(true, &["host.pyro.internal:1"], &["c.d"]),
        ] {
            let json = serde_json::to_value(&policy).expect("json");
            assert_eq!(json["digest"], policy.digest());
            assert_eq!(serde_json::from_value::<Policy>(json).expect("a policy"), policy);
        }
        let json = serde_json::to_string(&policy(false, &["a.b"], &[])).expect("json");
        assert!(json.starts_with(r#"{"mode":"allow","allow":["a.b"],"deny":[],"digest":""#), "{json}");
    }

    #[test]
    fn a_record_whose_parts_disagree_is_refused() {
        for (json, reason) in [
            (r#"{"mode":"none","allow":["a.b"]}"#, "mode 'none' has no rules"),
            (r#"{"mode":"allow"}"#, "its mode does not fit its rules"),
            (r#"{"mode":"deny","allow":["a.b"]}"#, "its mode does not fit its rules"),
            (r#"{"mode":"open","digest":"0123456789abcdef"}"#, "its digest does not fit its rules"),
            (r#"{"mode":"open","deny":["x:0"]}"#, "invalid network rule 'x:0'"),
            (r#"{"mode":"opened"}"#, "unknown variant"),
            (r#"{"mode":"open","denied":["a.b"]}"#, "unknown field"),
            (r#"{}"#, "missing field `mode`"),
        ] {
            let error = serde_json::from_str::<Policy>(json).expect_err(json).to_string();
            assert!(error.contains(reason), "{error}");
        }
    }
}
