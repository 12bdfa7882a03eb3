//! What the child does that makes a namespace: system calls alone, on what was prepared before the fork.

#![expect(unsafe_code, reason = "system calls that no library wraps")]

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::netlink::{Messages, answers};
use super::rules::{DNS_PORT, LISTENER, filter, route};
use super::{Attach, Step, TAP};
use crate::address::{GATEWAY, GATEWAY_MAC, PREFIX};

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETPERSIST: libc::c_ulong = 0x4004_54cb;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 512;
/// Settings of the namespace, each with a value. What a kernel does not have it cannot do.
const SETTINGS: &[(&CStr, &[u8])] = &[
    // A guest gets no address but its own, and no answer but for the gateway's.
    (c"/proc/sys/net/ipv6/conf/all/disable_ipv6", b"1"),
    (c"/proc/sys/net/ipv6/conf/tap0/disable_ipv6", b"1"),
    (c"/proc/sys/net/ipv4/conf/tap0/arp_ignore", b"1"),
    (c"/proc/sys/net/ipv4/conf/tap0/rp_filter", b"1"),
    // The most memory that the kernel may hold for one connection of the guest: it may have a thousand of them.
    (c"/proc/sys/net/ipv4/tcp_rmem", b"4096 131072 1048576"),
    (c"/proc/sys/net/ipv4/tcp_wmem", b"4096 131072 1048576"),
];

type Done<T> = Result<T, (u8, Errno)>;

/// Everything that the child needs, made before it is there.
#[derive(Debug)]
pub(super) struct Plan {
    attach: Attach,
    tun: CString,
    /// The maps of users and groups, where the caller may not make a network namespace as it is.
    maps: Option<[String; 2]>,
    route: Messages,
    filter: Messages,
}

/// Names the step that an error belongs to.
trait At<T> {
    fn at(self, step: Step) -> Done<T>;
}

impl<T> At<T> for rustix::io::Result<T> {
    fn at(self, step: Step) -> Done<T> {
        self.map_err(|error| (step as u8, error))
    }
}

impl Plan {
    pub(super) fn new(attach: Attach, tun: &Path) -> io::Result<Self> {
        let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
        let maps = [format!("{0} {0} 1", user.as_raw()), format!("{0} {0} 1", group.as_raw())];
        Ok(Self {
            attach,
            tun: CString::new(tun.as_os_str().as_bytes())?,
            maps: (!user.is_root()).then_some(maps),
            route: route(),
            filter: filter(),
        })
    }

    pub(super) fn has_user_namespace(&self) -> bool {
        self.maps.is_some()
    }

    /// The tap, the network namespace, its user namespace, the listening socket and that of name queries.
    pub(super) fn carry_out(&self) -> Done<[OwnedFd; 5]> {
        if let Some([users, groups]) = &self.maps {
            unshare(libc::CLONE_NEWUSER).at(Step::UserNamespace)?;
            write(c"/proc/self/setgroups", b"deny").at(Step::UserMap)?;
            write(c"/proc/self/uid_map", users.as_bytes()).at(Step::UserMap)?;
            write(c"/proc/self/gid_map", groups.as_bytes()).at(Step::UserMap)?;
        }
        unshare(libc::CLONE_NEWNET).at(Step::NetNamespace)?;
        // The tap belongs to the namespace in which the device is opened.
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let tap = rustix::fs::open(&self.tun, flags, Mode::empty()).at(Step::Tun)?;
        make_tap(&tap).at(Step::Tap)?;
        for (path, value) in SETTINGS {
            match write(path, value) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(error) => return Err(error).at(Step::Settings),
            }
        }
        set_up_links().at(Step::Links)?;
        exchange(libc::NETLINK_ROUTE, &self.route).at(Step::Links)?;
        exchange(libc::NETLINK_NETFILTER, &self.filter).at(Step::Rules)?;
        let tcp = bound_socket(libc::SOCK_STREAM, LISTENER.0.octets(), LISTENER.1).at(Step::Sockets)?;
        rustix::net::listen(&tcp, BACKLOG).at(Step::Sockets)?;
        let dns = bound_socket(libc::SOCK_DGRAM, [0; 4], DNS_PORT).at(Step::Sockets)?;
        let open = |path: &CStr| rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        let net = open(c"/proc/self/ns/net").at(Step::Handle)?;
        let user = open(c"/proc/self/ns/user").at(Step::Handle)?;
        // It ends with its namespace, and not when its last descriptor is closed: a VMM that ends would wait for the kernel to
        // take the device apart, some 15 ms, which a namespace does by itself.
        control(&tap, TUNSETPERSIST, 1).at(Step::Tap)?;
        if self.attach == Attach::Name {
            // It has one queue, which is the VMM's: the owner must not have it.
            drop(tap);
            let stand_in = open(c"/dev/null").at(Step::Handle)?;
            return Ok([stand_in, net, user, tcp, dns]);
        }
        Ok([tap, net, user, tcp, dns])
    }
}

fn checked(result: libc::c_int) -> rustix::io::Result<libc::c_int> {
    // SAFETY: the address of this thread's own number.
    if result < 0 { Err(Errno::from_raw_os_error(unsafe { *libc::__errno_location() })) } else { Ok(result) }
}

fn unshare(kind: libc::c_int) -> rustix::io::Result<()> {
    // SAFETY: a system call; this process has one thread.
    checked(unsafe { libc::unshare(kind) }).map(drop)
}

fn write(path: &CStr, text: &[u8]) -> rustix::io::Result<()> {
    let file = rustix::fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::write(file, text).map(drop)
}

fn control(fd: &OwnedFd, request: libc::c_ulong, value: libc::c_ulong) -> rustix::io::Result<()> {
    // SAFETY: the request takes a number.
    checked(unsafe { libc::ioctl(fd.as_raw_fd(), request, value) }).map(drop)
}

/// A request about the link of this name.
fn about(name: &str) -> libc::ifreq {
    // SAFETY: all-zero is a valid value of this structure of the kernel.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request
}

/// `vnet_hdr` lets guest and host hand over 64 KiB at a time: four times the speed.
fn make_tap(tap: &OwnedFd) -> rustix::io::Result<()> {
    let mut request = about(TAP);
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap_or_default();
    // SAFETY: the request reads and writes the structure.
    checked(unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETIFF, &raw mut request) }).map(drop)
}

/// Gives the tap its address, and raises it and the loopback link.
fn set_up_links() -> rustix::io::Result<()> {
    let socket = socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
    let ask = |code: libc::c_ulong, request: &libc::ifreq| {
        // SAFETY: the request reads the structure.
        checked(unsafe { libc::ioctl(socket.as_raw_fd(), code, &raw const *request) }).map(drop)
    };
    let raise = |name| {
        let mut request = about(name);
        request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP).unwrap_or_default();
        ask(libc::SIOCSIFFLAGS, &request)
    };
    raise("lo")?;
    let mut mac = about(TAP);
    // SAFETY: an address of a link and one of IPv4 have their family at the same place, and both fit.
    unsafe {
        mac.ifr_ifru.ifru_hwaddr.sa_family = libc::ARPHRD_ETHER;
        for (to, from) in mac.ifr_ifru.ifru_hwaddr.sa_data.iter_mut().zip(GATEWAY_MAC) {
            *to = libc::c_char::from_ne_bytes([from]);
        }
    }
    ask(libc::SIOCSIFHWADDR, &mac)?;
    let mut address = about(TAP);
    address.ifr_ifru.ifru_addr = plain(internet(GATEWAY.octets(), 0));
    ask(libc::SIOCSIFADDR, &address)?;
    let mut mask = about(TAP);
    let bits = u32::MAX << (32 - u32::from(PREFIX));
    mask.ifr_ifru.ifru_netmask = plain(internet(bits.to_be_bytes(), 0));
    ask(libc::SIOCSIFNETMASK, &mask)?;
    raise(TAP)
}

fn internet(address: [u8; 4], port: u16) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: libc::sa_family_t::try_from(libc::AF_INET).unwrap_or_default(),
        sin_port: port.to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(address) },
        sin_zero: [0; 8],
    }
}

fn plain(address: libc::sockaddr_in) -> libc::sockaddr {
    // SAFETY: both are sixteen bytes, without padding, and any bytes are valid.
    unsafe { std::mem::transmute::<libc::sockaddr_in, libc::sockaddr>(address) }
}

fn socket(family: libc::c_int, kind: libc::c_int, protocol: libc::c_int) -> rustix::io::Result<OwnedFd> {
    // SAFETY: a system call on numbers.
    let number = checked(unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) })?;
    // SAFETY: the kernel has just made it, for nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

fn set_option(socket: &OwnedFd, level: libc::c_int, name: libc::c_int) -> rustix::io::Result<()> {
    let on: libc::c_int = 1;
    let length = libc::socklen_t::try_from(size_of::<libc::c_int>()).unwrap_or_default();
    // SAFETY: the option reads a number.
    checked(unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const on).cast(), length) })
        .map(drop)
}

/// A socket that may be anybody's address: that which the guest wanted to reach.
fn bound_socket(kind: libc::c_int, address: [u8; 4], port: u16) -> rustix::io::Result<OwnedFd> {
    let socket = socket(libc::AF_INET, kind | libc::SOCK_NONBLOCK, 0)?;
    set_option(&socket, libc::SOL_IP, libc::IP_TRANSPARENT)?;
    if kind == libc::SOCK_DGRAM {
        set_option(&socket, libc::SOL_IP, libc::IP_PKTINFO)?;
    }
    let address = internet(address, port);
    let length = libc::socklen_t::try_from(size_of::<libc::sockaddr_in>()).unwrap_or_default();
    // SAFETY: the call reads an address of this length.
    checked(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) })?;
    Ok(socket)
}

/// Sends messages and reads the answers to all of them.
fn exchange(protocol: libc::c_int, messages: &Messages) -> rustix::io::Result<()> {
    let socket = socket(libc::AF_NETLINK, libc::SOCK_RAW, protocol)?;
    rustix::net::send(socket.as_fd(), messages.bytes(), rustix::net::SendFlags::empty())?;
    let mut left = messages.answers();
    let mut space = [0_u8; 16 << 10];
    while left > 0 {
        let (_, received) = rustix::net::recv(&socket, &mut space, rustix::net::RecvFlags::empty())?;
        left = left.saturating_sub(answers(&space[..received.min(space.len())])?.max(1));
    }
    Ok(())
}
