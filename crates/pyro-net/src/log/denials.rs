//! The last different denials, so that the result of a command can tell what was denied while it ran.

use std::fmt;
use std::net::IpAddr;

use serde::Serialize;

use super::{Entry, Kind};

/// How many different denials are kept.
const KEPT: usize = 64;

/// Something that the policy has denied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Denial {
    /// Whether it was a question, a connection or a request.
    pub kind: Kind,
    /// The name, if there was one.
    pub name: Option<String>,
    /// The address; of the first time, where there was a name too.
    pub address: Option<IpAddr>,
    /// The port; none for a question.
    pub port: Option<u16>,
    /// The reason.
    pub why: Option<String>,
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = match (&self.name, self.address) {
            (Some(name), _) => name.clone(),
            (None, Some(address)) => address.to_string(),
            (None, None) => "?".to_owned(),
        };
        match (self.kind, self.port) {
            (Kind::Dns, _) => write!(f, "resolve {place}"),
            (_, Some(port)) => write!(f, "connect to {place}:{port}"),
            (_, None) => write!(f, "connect to {place}"),
        }
    }
}

/// Denials, each with the number of its last occurrence.
#[derive(Debug, Default)]
pub(super) struct Denials {
    last: u64,
    kept: Vec<(u64, Denial)>,
}

impl Denials {
    pub(super) fn add(&mut self, entry: &Entry) {
        self.last += 1;
        let is_same = |denial: &Denial| {
            let is_name = match &denial.name {
                None => entry.name.is_none() && denial.address == entry.address,
                name => *name == entry.name,
            };
            is_name && denial.port == entry.port
        };
        if let Some((at, _)) = self.kept.iter_mut().find(|(_, denial)| is_same(denial)) {
            *at = self.last;
            return;
        }
        if self.kept.len() == KEPT
            && let Some(oldest) = (0..KEPT).min_by_key(|at| self.kept[*at].0)
        {
            self.kept.swap_remove(oldest);
        }
        let Entry { kind, name, address, port, why, .. } = entry.clone();
        self.kept.push((self.last, Denial { kind, name, address, port, why }));
    }

    pub(super) fn mark(&self) -> u64 {
        self.last
    }

    pub(super) fn since(&self, mark: u64) -> Vec<Denial> {
        let mut since: Vec<_> = self.kept.iter().filter(|(at, _)| *at > mark).collect();
        since.sort_unstable_by_key(|(at, _)| *at);
        since.into_iter().map(|(_, denial)| denial.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn denied(name: &str, port: u16) -> Entry {
        Entry { name: Some(name.to_owned()), port: Some(port), ..Entry::new(0.0, Kind::Connect) }
    }

    #[test]
    fn what_was_denied_after_a_mark_is_told_once() {
        let mut denials = Denials::default();
        denials.add(&denied("a.test", 443));
        denials.add(&denied("b.test", 443));
        let mark = denials.mark();
        assert_eq!(denials.since(mark), []);
        for _ in 0..3 {
            denials.add(&denied("c.test", 80));
            denials.add(&denied("a.test", 443));
        }
        denials.add(&Entry { address: Some(IpAddr::from([10, 0, 0, 1])), ..Entry::new(0.0, Kind::Connect) });
        denials.add(&Entry { address: Some(IpAddr::from([10, 0, 0, 2])), ..Entry::new(0.0, Kind::Connect) });
        let names: Vec<_> = denials.since(mark).into_iter().map(|denial| denial.name).collect();
        assert_eq!(names, [Some("c.test".to_owned()), Some("a.test".to_owned()), None, None]);
        assert_eq!(denials.since(0).len(), 5);
    }

    #[test]
    fn only_the_last_ones_are_kept() {
        let mut denials = Denials::default();
        for port in 1..=1000 {
            denials.add(&denied("a.test", port));
            denials.add(&denied("again.test", 1));
        }
        let since = denials.since(0);
        assert_eq!(since.len(), KEPT);
        assert_eq!(since.last().and_then(|denial| denial.name.as_deref()), Some("again.test"));
        assert_eq!(since.first().and_then(|denial| denial.port), Some(1000 - 62));
    }
}
