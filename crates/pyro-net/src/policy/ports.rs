//! The ports of a rule.

use std::fmt;
use std::num::NonZeroU16;

/// How many ports and ranges a rule may list.
const MAX_RANGES: usize = 64;

/// Ports as sorted ranges that neither overlap nor touch; none stands for every port.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Ports(Vec<(u16, u16)>);

impl Ports {
    /// Reads `443`, `80,443`, `8000-8010` or a list of these; otherwise returns what is wrong.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("write a port after ':', or remove it".to_owned());
        }
        let mut ranges = Vec::new();
        for part in text.split(',') {
            if part.is_empty() {
                return Err("write a port after each ',', such as 80,443".to_owned());
            }
            if ranges.len() == MAX_RANGES {
                return Err(format!("a rule lists at most {MAX_RANGES} ports and ranges"));
            }
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (port(first)?, port(last)?);
            if first > last {
                return Err(format!("the range is reversed; write {last}-{first}"));
            }
            ranges.push((first, last));
        }
        ranges.sort_unstable();
        let mut merged: Vec<(u16, u16)> = Vec::new();
        for (first, last) in ranges {
            match merged.last_mut() {
                Some(before) if first <= before.1.saturating_add(1) => before.1 = before.1.max(last),
                _ => merged.push((first, last)),
            }
        }
        Ok(Self(merged))
    }

    pub(crate) fn contains(&self, port: u16) -> bool {
        self.is_unwritten() || self.0.iter().any(|&(first, last)| (first..=last).contains(&port))
    }

    /// Returns whether the rule was written without ports.
    pub(crate) fn is_unwritten(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn is_every(&self) -> bool {
        self.is_unwritten() || self.0 == [(1, u16::MAX)]
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, (first, last)) in self.0.iter().enumerate() {
            let comma = if at == 0 { "" } else { "," };
            match first == last {
                true => write!(f, "{comma}{first}")?,
                false => write!(f, "{comma}{first}-{last}")?,
            }
        }
        Ok(())
    }
}

fn port(text: &str) -> Result<u16, String> {
    // The standard parser would take a sign.
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    match text.parse::<u16>() {
        Ok(0) if is_number => Err("port 0 does not exist; ports are 1 to 65535".to_owned()),
        Ok(port) if is_number => Ok(port),
        _ => Err(format!("'{}' is no port; ports are 1 to {}", text.escape_debug(), NonZeroU16::MAX)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_overlap_or_touch_become_one() {
        for (text, printed) in [
            ("443", "443"),
            ("443,80", "80,443"),
            ("80-90,85-100,101", "80-101"),
            ("1-65535,65535", "1-65535"),
            ("65535,65534", "65534-65535"),
            ("0443", "443"),
        ] {
            assert_eq!(Ports::parse(text).expect(text).to_string(), printed);
        }
        assert!(Ports::parse("1-65535").expect("ports").is_every() && Ports::default().is_every());
        assert!(!Ports::parse("1-65534").expect("ports").is_every());
    }

    #[test]
    fn ports_are_matched_at_their_edges() {
        let ports = Ports::parse("80,8000-8010").expect("ports");
        for (port, is_in) in
            [(79, false), (80, true), (81, false), (7999, false), (8000, true), (8010, true), (8011, false)]
        {
            assert_eq!(ports.contains(port), is_in, "{port}");
        }
        assert!(Ports::default().contains(1) && Ports::default().contains(u16::MAX));
    }

    #[test]
    fn a_list_has_an_end() {
        let list = |len: usize| (0..len).map(|at| (at * 2 + 1).to_string()).collect::<Vec<_>>().join(",");
        assert!(Ports::parse(&list(64)).is_ok());
        assert_eq!(Ports::parse(&list(65)), Err("a rule lists at most 64 ports and ranges".to_owned()));
    }
}
