//! Addresses that a policy gives to names, as a hosts file does.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The address to which connections to a name go, in place of what the host's resolver says. The user chose it, so it may be
/// a special address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Pinned {
    /// The address.
    pub address: IpAddr,
    /// The port in place of the one that was dialled.
    pub port: Option<u16>,
}

impl FromStr for Pinned {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let pinned = match (text.parse::<IpAddr>(), text.parse::<SocketAddr>()) {
            (Ok(address), _) => Self { address, port: None },
            (_, Ok(both)) => Self { address: both.ip(), port: Some(both.port()) },
            _ => return Err("write an address, perhaps with a port, such as 192.0.2.1 or [2001:db8::1]:443"),
        };
        if pinned.address.is_unspecified() || pinned.address.is_multicast() || pinned.port == Some(0) {
            return Err("write the address and the port of a server");
        }
        Ok(pinned)
    }
}

impl TryFrom<String> for Pinned {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Pinned> for String {
    fn from(pinned: Pinned) -> Self {
        pinned.to_string()
    }
}

impl fmt::Display for Pinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            Some(port) => SocketAddr::new(self.address, port).fmt(f),
            None => self.address.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_with_or_without_a_port_survives_its_text() {
        for text in ["10.0.0.1", "10.0.0.1:8443", "2001:db8::1", "[2001:db8::1]:443"] {
            assert_eq!(text.parse::<Pinned>().expect(text).to_string(), text);
        }
        for text in ["", "example.com", "10.0.0", "0.0.0.0", "10.0.0.1:0", "10.0.0.1:x", "224.0.0.1"] {
            assert!(text.parse::<Pinned>().is_err(), "{text}");
        }
    }
}
