//! The addresses of every sandbox, and which addresses are not the public internet.
//!
//! Every guest has the same addresses: each is alone in its own namespace, and a template serves any of them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// The guest's own address.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 2);
/// The guest's gateway and resolver, which is the host's end of the link.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
/// The network that holds the guest and its gateway.
pub const SUBNET: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 0);
/// The length of the prefix that holds both.
pub const PREFIX: u8 = 30;
/// The guest's hardware address: locally administered, then "pyro".
pub const GUEST_MAC: [u8; 6] = [0x02, 0x70, 0x79, 0x72, 0x6f, 0x02];
/// The gateway's hardware address.
pub(crate) const GATEWAY_MAC: [u8; 6] = [0x02, 0x70, 0x79, 0x72, 0x6f, 0x01];
/// Addresses for names that have no free public address of their own.
pub(crate) const POOL: RangeInclusive<Ipv4Addr> =
    Ipv4Addr::new(198, 18, 1, 0)..=Ipv4Addr::new(198, 18, 255, 255);

/// IPv4 networks that are not the public internet (IANA's special-purpose registry, multicast, reserved).
const SPECIAL_V4: [Ipv4Net; 17] = [
    v4([0, 0, 0, 0], 8),
    v4([10, 0, 0, 0], 8),
    v4([100, 64, 0, 0], 10),
    v4([127, 0, 0, 0], 8),
    // A cloud's own services, which are metadata of its machines too.
    v4([168, 63, 129, 16], 32),
    v4([169, 254, 0, 0], 16),
    v4([172, 16, 0, 0], 12),
    v4([192, 0, 0, 0], 24),
    v4([192, 0, 2, 0], 24),
    v4([192, 88, 99, 0], 24),
    v4([192, 168, 0, 0], 16),
    v4([198, 18, 0, 0], 15),
    v4([198, 51, 100, 0], 24),
    v4([203, 0, 113, 0], 24),
    v4([224, 0, 0, 0], 4),
    v4([240, 0, 0, 0], 4),
    v4([255, 255, 255, 255], 32),
];

/// The only IPv6 network from which public addresses are given out.
const GLOBAL_V6: Ipv6Net = v6([0x2000, 0, 0], 3);

/// What is special inside [`GLOBAL_V6`]: IETF protocols with Teredo, documentation, and 6to4. A tunnel's address may
/// hold any IPv4 address, also a private one.
const SPECIAL_V6: [Ipv6Net; 4] =
    [v6([0x2001, 0, 0], 23), v6([0x2001, 0xdb8, 0], 32), v6([0x2002, 0, 0], 16), v6([0x3fff, 0, 0], 20)];

const fn v4(octets: [u8; 4], prefix: u8) -> Ipv4Net {
    let [a, b, c, d] = octets;
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), prefix)
}

const fn v6(start: [u16; 3], prefix: u8) -> Ipv6Net {
    let [a, b, c] = start;
    Ipv6Net::new_assert(Ipv6Addr::new(a, b, c, 0, 0, 0, 0, 0), prefix)
}

/// Returns whether an address is anything but the public internet. An IPv4 address in IPv6 form
/// (`::ffff:a.b.c.d`) is judged as the IPv4 address, because the kernel connects to that.
pub fn is_special(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(address) => SPECIAL_V4.iter().any(|net| net.contains(&address)),
        IpAddr::V6(address) => {
            !GLOBAL_V6.contains(&address) || SPECIAL_V6.iter().any(|net| net.contains(&address))
        }
    }
}

/// Returns whether a network has special addresses only.
pub(crate) fn lies_in_special(net: IpNet) -> bool {
    match net {
        IpNet::V4(net) => SPECIAL_V4.iter().any(|special| special.contains(&net)),
        IpNet::V6(net) => {
            let is_apart = !GLOBAL_V6.contains(&net) && !net.contains(&GLOBAL_V6);
            is_apart || SPECIAL_V6.iter().any(|special| special.contains(&net))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn both_edges_of_every_special_ipv4_network_are_special() {
        for (first, last) in [
            ("0.0.0.0", "0.255.255.255"),
            ("10.0.0.0", "10.255.255.255"),
            ("100.64.0.0", "100.127.255.255"),
            ("127.0.0.0", "127.255.255.255"),
            ("169.254.0.0", "169.254.255.255"),
            ("172.16.0.0", "172.31.255.255"),
            ("192.0.0.0", "192.0.0.255"),
            ("192.0.2.0", "192.0.2.255"),
            ("192.88.99.0", "192.88.99.255"),
            ("192.168.0.0", "192.168.255.255"),
            ("198.18.0.0", "198.19.255.255"),
            ("198.51.100.0", "198.51.100.255"),
            ("203.0.113.0", "203.0.113.255"),
            ("224.0.0.0", "255.255.255.255"),
        ] {
            for edge in [first, last] {
                assert!(is_special(address(edge)), "{edge}");
                let IpAddr::V4(v4) = address(edge) else { unreachable!("written above") };
                assert!(is_special(v4.to_ipv6_mapped().into()), "mapped {edge}");
            }
            let before = u32::from(first.parse::<Ipv4Addr>().expect("an address")).checked_sub(1);
            let after = u32::from(last.parse::<Ipv4Addr>().expect("an address")).checked_add(1);
            for outside in before.into_iter().chain(after) {
                let outside = Ipv4Addr::from(outside);
                assert!(!is_special(outside.into()), "{outside}");
                assert!(!is_special(outside.to_ipv6_mapped().into()), "mapped {outside}");
            }
        }
        assert!(!is_special(address("8.8.8.8")) && !is_special(address("1.1.1.1")));
    }

    #[test]
    fn ipv6_is_public_only_in_the_given_out_part() {
        for special in [
            "::",
            "::1",
            "::8.8.8.8",
            "64:ff9b::808:808",
            "100::1",
            "1fff:ffff::",
            "2001::1",
            "2001:1ff:ffff::1",
            "2001:db8::1",
            "2002:808:808::1",
            "3fff::1",
            "3fff:fff:ffff::",
            "4000::",
            "fc00::1",
            "fd00:ec2::254",
            "fe80::1",
            "fec0::1",
            "ff02::1",
        ] {
            assert!(is_special(address(special)), "{special}");
        }
        for public in ["2000::1", "2001:200::1", "2606:4700::1111", "2a00:1450::1", "3fff:1000::1"] {
            assert!(!is_special(address(public)), "{public}");
        }
    }

    #[test]
    fn a_network_is_special_only_as_a_whole() {
        for special in
            ["10.0.0.0/8", "10.1.2.3/32", "127.0.0.0/8", "fd00::/8", "::/3", "4000::/2", "2002::/16"]
        {
            assert!(lies_in_special(special.parse().expect("a network")), "{special}");
        }
        for mixed in ["0.0.0.0/0", "8.0.0.0/6", "128.0.0.0/1", "::/0", "::/2", "2000::/3", "2001::/16"] {
            assert!(!lies_in_special(mixed.parse().expect("a network")), "{mixed}");
        }
    }

    #[test]
    fn the_guest_and_its_gateway_share_a_link_outside_the_pool() {
        let link = Ipv4Net::new(GATEWAY, PREFIX).expect("a prefix");
        assert!(link.contains(&GUEST));
        assert!(!POOL.contains(&GUEST) && !POOL.contains(&GATEWAY));
        assert!(is_special((*POOL.start()).into()) && is_special((*POOL.end()).into()));
    }
}
