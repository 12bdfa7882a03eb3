//! The text form of a rule.

use std::net::{IpAddr, Ipv6Addr};

use ipnet::{IpNet, Ipv6Net};

use super::name::{self, HOST_NAME};
use super::ports::Ports;
use super::rule::{MAX_RULE, Target};

/// `::ffff:0:0/96`, the IPv4 addresses in IPv6 form.
const MAPPED: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0, 0), 96);

/// Reads a rule; otherwise returns what is wrong and how to write it.
pub(super) fn parse(text: &str) -> Result<(Target, Ports), String> {
    if text.len() > MAX_RULE {
        return Err(format!("a rule has at most {MAX_RULE} characters"));
    }
    if text.trim() != text {
        return Err("remove the spaces around it".to_owned());
    }
    if let Some((_, rest)) = text.split_once("://") {
        let host = rest.split(['/', '?', '#']).next().unwrap_or(rest);
        let host = host.rsplit('@').next().unwrap_or(host);
        return Err(match host {
            "" => "write a name instead of a URL, such as example.com:443".to_owned(),
            _ => format!("write the host instead of a URL: {host}"),
        });
    }
    let (host, ports) = split(text)?;
    let ports = ports.map(Ports::parse).transpose()?.unwrap_or_default();
    Ok((target(host, &ports)?, ports))
}

/// Splits a rule into its host and its ports.
fn split(text: &str) -> Result<(&str, Option<&str>), String> {
    if let Some(rest) = text.strip_prefix('[') {
        let (host, after) = rest.split_once(']').ok_or("the ']' is missing; write [2001:db8::/32]:443")?;
        if !host.contains(':') {
            return Err("brackets are for IPv6 addresses only; remove them".to_owned());
        }
        return match after.strip_prefix(':') {
            Some(ports) => Ok((host, Some(ports))),
            None if after.is_empty() => Ok((host, None)),
            None => Err("write an IPv6 network inside the brackets, such as [2001:db8::/32]:443".to_owned()),
        };
    }
    match text.split_once(':') {
        // More than one colon is an IPv6 address without ports.
        Some((_, rest)) if rest.contains(':') => Ok((text, None)),
        Some((host, ports)) => Ok((host, Some(ports))),
        None => Ok((text, None)),
    }
}

fn target(host: &str, ports: &Ports) -> Result<Target, String> {
    if let Ok(address) = host.parse::<IpAddr>() {
        return network(address.into());
    }
    if host.contains(':') {
        let net = host.parse::<IpNet>();
        let advice =
            "this is no IPv6 network; write one as [2001:db8::/32]:443, and a name as example.com:443";
        return network(net.map_err(|_| advice)?);
    }
    if let Some((before, after)) = host.split_once('/') {
        let is_address = before.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
        if !is_address {
            return Err(format!("a rule has no path; write {before}"));
        }
        let net = host.parse::<IpNet>();
        return network(net.map_err(|_| {
            format!("'{after}' with '{before}' is no network; write one such as 192.0.2.0/24, at most /32")
        })?);
    }
    let (rest, is_below) = match host.strip_prefix("*.") {
        Some(parent) => (parent, true),
        None => (host, false),
    };
    if host == "*" {
        return Err(
            "to allow every public host, open the network (--network); '*.example.com' covers the names \
                    below one"
                .to_owned(),
        );
    }
    if rest.contains('*') {
        return Err("'*' stands alone before the first dot, such as *.example.com".to_owned());
    }
    if rest.contains('@') {
        return Err("write the host without a user".to_owned());
    }
    let name = name::normal(rest).map_err(|reason| reason.to_string())?;
    let is_reserved = name == "pyro.internal" || name.ends_with(".pyro.internal");
    if is_reserved && (is_below || name != HOST_NAME) {
        return Err(format!("names below pyro.internal are reserved; write {HOST_NAME}:PORT"));
    }
    match name {
        _ if is_below => Ok(Target::Below(name)),
        _ if name != HOST_NAME => Ok(Target::Name(name)),
        _ if ports.is_unwritten() => {
            Err(format!("name the ports of the host's services, such as {HOST_NAME}:5432"))
        }
        _ => Ok(Target::Host),
    }
}

fn network(net: IpNet) -> Result<Target, String> {
    if let IpNet::V6(v6) = net
        && MAPPED.contains(&v6)
    {
        return Err("write it as an IPv4 address".to_owned());
    }
    if net.trunc() != net {
        return Err(format!("the address has more bits than the prefix; write {}", net.trunc()));
    }
    Ok(Target::Network(net))
}
