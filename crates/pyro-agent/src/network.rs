//! The guest's end of its network: the same addresses in every guest, so that a restored one need not be told anything.

#![expect(unsafe_code, reason = "rustix has no calls for links and routes")]

use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType};

/// The guest's address; the host gives the other end of the link the one below it.
const ADDRESS: [u8; 4] = [198, 18, 0, 2];
const MASK: [u8; 4] = [255, 255, 255, 252];
/// The gateway, which is the resolver too.
const GATEWAY: [u8; 4] = [198, 18, 0, 1];
const LINK: &str = "eth0";
/// The kind of a network device, as its virtio bus tells it.
const VIRTIO_NET: &str = "0x0001";

/// Whether the machine has a network device. Its driver need not be loaded.
pub(crate) fn has_nic() -> bool {
    let Ok(devices) = std::fs::read_dir("/sys/bus/virtio/devices") else { return false };
    devices.flatten().any(|device| {
        let kind = std::fs::File::open(device.path().join("device")).and_then(io::read_to_string);
        kind.is_ok_and(|kind| kind.trim() == VIRTIO_NET)
    })
}

/// Raises the loopback link, and the network device where there is one.
///
/// # Errors
/// When the kernel refuses what the device needs. A guest without a loopback link still runs commands.
pub(crate) fn raise(has_nic: bool) -> io::Result<()> {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    drop(raise_link(&socket, "lo"));
    if !has_nic {
        return Ok(());
    }
    // Before the link is up, so that the kernel gives it no address of its own. A kernel without IPv6 has no such file.
    for scope in ["all", "default", LINK] {
        let path = format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6");
        match std::fs::File::options().write(true).open(path).and_then(|mut file| file.write_all(b"1")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    let mut address = about(LINK);
    address.ifr_ifru.ifru_addr = internet(ADDRESS);
    ask(&socket, libc::SIOCSIFADDR, &address)?;
    let mut mask = about(LINK);
    mask.ifr_ifru.ifru_netmask = internet(MASK);
    ask(&socket, libc::SIOCSIFNETMASK, &mask)?;
    raise_link(&socket, LINK)?;
    // SAFETY: all-zero is a valid value of this structure of the kernel.
    let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
    route.rt_dst = internet([0; 4]);
    route.rt_genmask = internet([0; 4]);
    route.rt_gateway = internet(GATEWAY);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    // SAFETY: the request reads the structure.
    checked(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCADDRT, &raw const route) })?;
    Ok(())
}

/// Writes the guest's `resolv.conf` into this directory, where it does not hold one from an earlier boot.
pub(crate) fn name_the_resolver(etc: &str) -> io::Result<()> {
    match rustix::fs::mkdir(etc, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error.into()),
    }
    let [a, b, c, d] = GATEWAY;
    let mut options = std::fs::File::options();
    options.write(true).create_new(true).mode(0o644);
    match options.open(format!("{etc}/resolv.conf")) {
        Ok(mut file) => writeln!(file, "nameserver {a}.{b}.{c}.{d}"),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

fn raise_link(socket: &OwnedFd, name: &str) -> io::Result<()> {
    let mut request = about(name);
    request.ifr_ifru.ifru_flags = i16::try_from(libc::IFF_UP | libc::IFF_RUNNING).unwrap_or_default();
    ask(socket, libc::SIOCSIFFLAGS, &request)
}

/// A request about the link of this name.
fn about(name: &str) -> libc::ifreq {
    // SAFETY: all-zero is a valid value of this structure of the kernel.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request
}

fn ask(socket: &OwnedFd, code: libc::c_ulong, request: &libc::ifreq) -> io::Result<()> {
    // SAFETY: the request reads the structure.
    checked(unsafe { libc::ioctl(socket.as_raw_fd(), code, &raw const *request) })
}

fn checked(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn internet(address: [u8; 4]) -> libc::sockaddr {
    let address = libc::sockaddr_in {
        sin_family: libc::sa_family_t::try_from(libc::AF_INET).unwrap_or_default(),
        sin_port: 0,
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(address) },
        sin_zero: [0; 8],
    };
    // SAFETY: both are sixteen bytes, without padding, and any bytes are valid.
    unsafe { std::mem::transmute::<libc::sockaddr_in, libc::sockaddr>(address) }
}
