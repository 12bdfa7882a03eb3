//! The packet filter of a guest's namespace, as messages of nf_tables, and its one route.
//!
//! In the words of `nft`:
//!
//! ```text
//! table inet pyro {
//!   chain guest {
//!     type filter hook prerouting priority mangle; policy drop;
//!     iifname "lo" accept
//!     meta nfproto != ipv4 drop
//!     ip saddr != 198.18.0.2 drop
//!     udp dport 53 limit rate 200/second burst 400 packets accept
//!     udp dport 53 drop
//!     tcp flags & (syn | ack) == syn limit rate over 400/second burst 800 packets drop
//!     meta l4proto tcp tproxy ip to 127.0.0.1:5000 accept
//!     ip daddr 198.18.0.1 icmp type echo-request limit rate 50/second accept
//!     meta l4proto { udp, icmp } limit rate 50/second reject with icmpx admin-prohibited
//!   }
//! }
//! ```
//!
//! There is no connection tracking, so a guest has no table to fill. Fragments are put together by the namespace's own
//! stack before this hook only where it asks for that; a piece without a port matches no rule and is dropped.

use std::net::Ipv4Addr;

use super::netlink::{Messages, attribute, nested, number, text};
use crate::address::{GATEWAY, GUEST};

/// Where the listening socket is bound. Only the rules lead a guest to it.
pub(super) const LISTENER: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 5000);
/// The port of name servers.
pub(super) const DNS_PORT: u16 = 53;

const NLM_F_CREATE: u16 = 0x400;
const NLM_F_APPEND: u16 = 0x800;

const TABLE: &str = "pyro";
const CHAIN: &str = "guest";

/// The register that expressions load into, the first of four bytes; and the one after it.
const REGISTER: u32 = 8;
const SECOND_REGISTER: u32 = 9;

const NFPROTO_INET: u8 = 1;
const NFPROTO_IPV4: u8 = 2;
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// The route that makes every address the namespace's own, so that its sockets can be bound to what the guest dials. It is
/// in the main table, after the link's own subnet, which still leaves by the tap.
pub(super) fn route() -> Messages {
    const RTM_NEWROUTE: u16 = 24;
    const AF_INET: u8 = 2;
    const TABLE_MAIN: u8 = 254;
    const PROTOCOL_BOOT: u8 = 3;
    const SCOPE_HOST: u8 = 254;
    const TYPE_LOCAL: u8 = 2;
    const OUTGOING_LINK: u16 = 4;
    // The kernel gives the loopback link of every namespace this number.
    const LOOPBACK: u32 = 1;
    let mut body = vec![AF_INET, 0, 0, 0, TABLE_MAIN, PROTOCOL_BOOT, SCOPE_HOST, TYPE_LOCAL, 0, 0, 0, 0];
    body.extend(attribute(OUTGOING_LINK, &LOOPBACK.to_ne_bytes()));
    let mut messages = Messages::default();
    messages.add(RTM_NEWROUTE, NLM_F_CREATE, &body);
    messages
}

/// The table, its chain and its rules, as one batch: all of it takes effect, or nothing.
pub(super) fn filter() -> Messages {
    const BEGIN: u16 = 0x10;
    const END: u16 = 0x11;
    const NEW_TABLE: u16 = 0xa00;
    const NEW_CHAIN: u16 = 0xa03;
    const NEW_RULE: u16 = 0xa06;
    const PREROUTING: u32 = 0;
    const MANGLE: i32 = -150;
    const DROP: u32 = 0;
    // The subsystem, nf_tables, in the order of the network.
    let batch = [0, 0, 0, 10];
    let with_family = |parts: &[Vec<u8>]| [vec![NFPROTO_INET, 0, 0, 0], parts.concat()].concat();
    let mut messages = Messages::default();
    messages.add_mark(BEGIN, &batch);
    messages.add(NEW_TABLE, NLM_F_CREATE, &with_family(&[text(1, TABLE)]));
    let hook = nested(4, &[number(1, PREROUTING), attribute(2, &MANGLE.to_be_bytes())]);
    let chain = [text(1, TABLE), text(3, CHAIN), hook, number(5, DROP), text(7, "filter")];
    messages.add(NEW_CHAIN, NLM_F_CREATE, &with_family(&chain));
    for rule in rules() {
        let rule = [text(1, TABLE), text(2, CHAIN), nested(4, &rule.concat())];
        messages.add(NEW_RULE, NLM_F_CREATE | NLM_F_APPEND, &with_family(&rule));
    }
    messages.add_mark(END, &batch);
    messages
}

/// A part of a rule: one or more expressions.
type Part = Vec<Vec<u8>>;

fn rules() -> Vec<Vec<Part>> {
    let dns = || vec![protocol(UDP), transport(2, 2), equals(&DNS_PORT.to_be_bytes())];
    let rule = |parts: Vec<Part>| parts;
    vec![
        rule(vec![from_loopback(), accept()]),
        rule(vec![network_protocol(), differs(&[NFPROTO_IPV4]), drop_it()]),
        rule(vec![is_ipv4(), network(12, 4), differs(&GUEST.octets()), drop_it()]),
        rule([dns(), vec![at_most(200, 400), accept()]].concat()),
        rule([dns(), vec![drop_it()]].concat()),
        // A connection that begins: of SYN and ACK only SYN.
        rule(vec![protocol(TCP), transport(13, 1), masked(0x12), equals(&[0x02]), over(400, 800), drop_it()]),
        rule(vec![is_ipv4(), protocol(TCP), to_listener(), accept()]),
        rule(vec![
            is_ipv4(),
            network(16, 4),
            equals(&GATEWAY.octets()),
            protocol(ICMP),
            // An echo request.
            transport(0, 1),
            equals(&[8]),
            at_most(50, 100),
            accept(),
        ]),
        // Said at once, so that a client of QUIC falls back to TCP at once.
        rule(vec![protocol(UDP), at_most(50, 100), prohibited()]),
        rule(vec![protocol(ICMP), at_most(50, 100), prohibited()]),
    ]
}

fn expression(name: &str, parts: &[Vec<u8>]) -> Part {
    vec![nested(1, &[text(1, name), nested(2, parts)])]
}

fn meta(key: u32) -> Part {
    expression("meta", &[number(1, REGISTER), number(2, key)])
}

fn network_protocol() -> Part {
    meta(15)
}

fn is_ipv4() -> Part {
    [network_protocol(), equals(&[NFPROTO_IPV4])].concat()
}

fn protocol(number: u8) -> Part {
    [meta(16), equals(&[number])].concat()
}

fn from_loopback() -> Part {
    const INCOMING_NAME: u32 = 6;
    const IFNAMSIZ: usize = 16;
    let mut name = [0; IFNAMSIZ];
    name[..2].copy_from_slice(b"lo");
    [meta(INCOMING_NAME), equals(&name)].concat()
}

fn compare(operation: u32, value: &[u8]) -> Part {
    expression("cmp", &[number(1, REGISTER), number(2, operation), nested(3, &[attribute(1, value)])])
}

fn equals(value: &[u8]) -> Part {
    compare(0, value)
}

fn differs(value: &[u8]) -> Part {
    compare(1, value)
}

fn load(base: u32, offset: u32, length: u32) -> Part {
    expression("payload", &[number(1, REGISTER), number(2, base), number(3, offset), number(4, length)])
}

/// Bytes of the network header.
fn network(offset: u32, length: u32) -> Part {
    load(1, offset, length)
}

/// Bytes of the transport header.
fn transport(offset: u32, length: u32) -> Part {
    load(2, offset, length)
}

/// The register, bit by bit with a mask of one byte.
fn masked(mask: u8) -> Part {
    let parts = [
        number(1, REGISTER),
        number(2, REGISTER),
        number(3, 1),
        nested(4, &[attribute(1, &[mask])]),
        nested(5, &[attribute(1, &[0])]),
    ];
    expression("bitwise", &parts)
}

fn limit(per_second: u64, burst: u32, is_over: bool) -> Part {
    let wide = |kind: u16, value: u64| attribute(kind, &value.to_be_bytes());
    let parts =
        [wide(1, per_second), wide(2, 1), number(3, burst), number(4, 0), number(5, u32::from(is_over))];
    expression("limit", &parts)
}

/// Packets up to this rate.
fn at_most(per_second: u64, burst: u32) -> Part {
    limit(per_second, burst, false)
}

/// Packets beyond this rate.
fn over(per_second: u64, burst: u32) -> Part {
    limit(per_second, burst, true)
}

fn set(register: u32, value: &[u8]) -> Part {
    expression("immediate", &[number(1, register), nested(2, &[attribute(1, value)])])
}

fn to_listener() -> Part {
    let (address, port) = LISTENER;
    let to = [number(1, u32::from(NFPROTO_IPV4)), number(2, REGISTER), number(3, SECOND_REGISTER)];
    [set(REGISTER, &address.octets()), set(SECOND_REGISTER, &port.to_be_bytes()), expression("tproxy", &to)]
        .concat()
}

fn verdict(code: u32) -> Part {
    const VERDICT_REGISTER: u32 = 0;
    expression("immediate", &[number(1, VERDICT_REGISTER), nested(2, &[nested(2, &[number(1, code)])])])
}

fn accept() -> Part {
    verdict(1)
}

fn drop_it() -> Part {
    verdict(0)
}

/// Says "packet filtered".
fn prohibited() -> Part {
    const ICMPX: u32 = 2;
    const ADMIN_PROHIBITED: u8 = 3;
    expression("reject", &[number(1, ICMPX), attribute(2, &[ADMIN_PROHIBITED])])
}
