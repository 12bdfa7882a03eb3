//! One line of the log.

use std::net::IpAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// What a line is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A question to the resolver.
    Dns,
    /// A connection of the guest.
    Connect,
    /// A request whose head the host has read.
    Http,
    /// The policy, or the log itself.
    Policy,
    /// A published port.
    Port,
}

impl Kind {
    /// The name that the log uses.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Dns => "dns",
            Self::Connect => "connect",
            Self::Http => "http",
            Self::Policy => "policy",
            Self::Port => "port",
        }
    }
}

/// One line of the log. Keys without a value are written as null, except those that only some kinds have.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// When, in seconds since the epoch.
    pub at: f64,
    /// What it is about.
    pub kind: Kind,
    /// The name that was asked for or connected to.
    pub name: Option<String>,
    /// The address that the guest dialled.
    pub address: Option<IpAddr>,
    /// The port that the guest dialled.
    pub port: Option<u16>,
    /// The rule that decided.
    pub rule: Option<String>,
    /// The decision, or `None` if nothing was decided.
    pub allowed: Option<bool>,
    /// The reason.
    pub why: Option<String>,
    /// Bytes to the guest.
    pub bytes_in: Option<u64>,
    /// Bytes from the guest.
    pub bytes_out: Option<u64>,
    /// The method of a request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
    /// The path of a request, without its query: that may hold tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// How many equal decisions this line stands for, if more than one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<u64>,
    /// In the first line of a file of the log: where this file begins in it, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub begins_at: Option<u64>,
}

/// What makes two decisions equal.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    kind: Kind,
    name: Option<String>,
    address: Option<IpAddr>,
    port: Option<u16>,
    rule: Option<String>,
    allowed: Option<bool>,
    /// The end of a connection is not counted together with decisions.
    is_end: bool,
    request: Option<(Option<String>, Option<String>)>,
}

impl Entry {
    /// An entry of this kind and this moment, without anything else.
    pub(crate) fn now(kind: Kind) -> Self {
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self::new(at.as_secs_f64(), kind)
    }

    /// An entry of this kind without anything else.
    pub fn new(at: f64, kind: Kind) -> Self {
        Self {
            at,
            kind,
            name: None,
            address: None,
            port: None,
            rule: None,
            allowed: None,
            why: None,
            bytes_in: None,
            bytes_out: None,
            method: None,
            path: None,
            count: None,
            begins_at: None,
        }
    }

    pub(super) fn key(&self) -> Key {
        let request = self.method.is_some() || self.path.is_some();
        Key {
            kind: self.kind,
            name: self.name.clone(),
            address: self.address,
            port: self.port,
            rule: self.rule.clone(),
            allowed: self.allowed,
            is_end: self.is_end(),
            request: request.then(|| (self.method.clone(), self.path.clone())),
        }
    }

    /// Returns whether this tells the end of something whose decision was recorded before.
    pub(super) fn is_end(&self) -> bool {
        self.bytes_in.is_some() || self.bytes_out.is_some()
    }

    /// Takes another's bytes to its own.
    pub(super) fn add_bytes(&mut self, other: &Self) {
        let sum = |one: Option<u64>, other: Option<u64>| match (one, other) {
            (Some(one), Some(other)) => Some(one.saturating_add(other)),
            (one, other) => one.or(other),
        };
        self.bytes_in = sum(self.bytes_in, other.bytes_in);
        self.bytes_out = sum(self.bytes_out, other.bytes_out);
    }

    /// Cuts texts that the guest chose to a length that bounds the line and what is kept in memory.
    pub(super) fn clip(&mut self) {
        const LONGEST: usize = 1024;
        let texts = [&mut self.name, &mut self.rule, &mut self.why, &mut self.method, &mut self.path];
        for text in texts.into_iter().flatten() {
            if text.len() > LONGEST {
                text.truncate(text.floor_char_boundary(LONGEST - '…'.len_utf8()));
                text.push('…');
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keys_of_the_contract_are_always_there() {
        let json = serde_json::to_string(&Entry::new(1.5, Kind::Dns)).expect("json");
        assert_eq!(
            json,
            r#"{"at":1.5,"kind":"dns","name":null,"address":null,"port":null,"rule":null,"allowed":null,"why":null,"bytes_in":null,"bytes_out":null}"#
        );
        let full = Entry {
            name: Some("a.test".to_owned()),
            address: Some("8.8.8.8".parse().expect("an address")),
            method: Some("GET".to_owned()),
            path: Some("/".to_owned()),
            count: Some(3),
            ..Entry::new(1.5, Kind::Http)
        };
        let json = serde_json::to_string(&full).expect("json");
        assert!(
            json.contains(r#""address":"8.8.8.8""#)
                && json.ends_with(r#""method":"GET","path":"/","count":3}"#)
        );
        assert_eq!(serde_json::from_str::<Entry>(&json).expect("an entry"), full);
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        let mut entry = Entry { path: Some("ä".repeat(5000)), ..Entry::new(0.0, Kind::Http) };
        entry.clip();
        let path = entry.path.expect("a path");
        assert!(path.len() <= 1024 && path.ends_with("ä…"), "{}", path.len());
    }
}
