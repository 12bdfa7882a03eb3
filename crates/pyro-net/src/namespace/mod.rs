//! The network namespace that a guest is alone in.
//!
//! ```text
//!   guest ─ virtio-net ─ tap0 │ 198.18.0.1 ─ rules ─► listening socket ──► owner (outside)
//!                             └──────────── the namespace ───────────┘
//! ```
//!
//! A child makes it, hands its descriptors out and ends: a tap for the VMM, and two sockets for the owner, who uses them from
//! outside. Every packet of the guest ends at these sockets or is dropped; nothing is forwarded, so the host's own network
//! is not changed. The namespace has no name. It ends with the last descriptor, so a crash leaves nothing behind.

mod child;
mod netlink;
mod rules;

use std::io;
use std::net::{TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use pyro_process::HandOverError;

use self::child::Plan;
pub(crate) use self::netlink::answers;

/// How long it may take; 2 ms on a quiet host. Modules of the kernel may have to be loaded.
const WITHIN: Duration = Duration::from_secs(20);
/// The name of the tap in its namespace.
pub const TAP: &str = "tap0";

/// How the VMM gets the tap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attach {
    /// By a descriptor. The VMM itself can be in any namespace.
    Descriptor,
    /// By its name: the VMM enters the namespace and opens the tap there.
    Name,
}

/// A network namespace with a tap and the sockets at which all that a guest sends ends.
#[derive(Debug)]
pub struct Namespace {
    /// The tap, where the VMM gets it by descriptor.
    pub tap: Option<OwnedFd>,
    /// The namespace, to enter it.
    pub net: OwnedFd,
    /// The user namespace that it belongs to, where the caller is not root.
    pub user: Option<OwnedFd>,
    /// Accepts every TCP connection of the guest; its local address is the one that the guest dialled.
    pub tcp: TcpListener,
    /// Receives every datagram to port 53, to whatever address.
    pub dns: UdpSocket,
}

/// A step of making a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// Opening `/dev/net/tun`.
    Tun = 1,
    /// Making a user namespace.
    UserNamespace,
    /// Mapping the caller into the user namespace.
    UserMap,
    /// Making the network namespace.
    NetNamespace,
    /// Making the tap.
    Tap,
    /// Setting the namespace's own kernel settings.
    Settings,
    /// Giving links their addresses and routes.
    Links,
    /// Installing the packet filter.
    Rules,
    /// Making the sockets.
    Sockets,
    /// Opening the namespace, to hand it over.
    Handle,
}

/// Why a namespace could not be made.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// The kernel refused a step.
    #[error("{}", step.describe())]
    Step {
        /// The step.
        step: Step,
        /// What the kernel said.
        source: io::Error,
    },
    /// The child that makes it failed as such.
    #[error("the process that makes the network namespace failed")]
    Child(#[source] io::Error),
}

impl Namespace {
    /// Makes one. Blocks for some milliseconds. `tun` is the device, `/dev/net/tun`.
    ///
    /// # Errors
    /// When the host refuses a step; [`NamespaceError::remedy`] says what helps.
    pub fn make(attach: Attach, tun: &Path) -> Result<Self, NamespaceError> {
        let plan = Plan::new(attach, tun).map_err(NamespaceError::Child)?;
        // SAFETY: the plan was made before, and what the child does with it are system calls.
        #[expect(unsafe_code, reason = "code of a forked child")]
        let made = unsafe { pyro_process::descriptors_from_child(WITHIN, || plan.carry_out()) };
        let [tap, net, user, tcp, dns] = made.map_err(|error| match error {
            HandOverError::Step(number, source) => match Step::of(number) {
                Some(step) => NamespaceError::Step { step, source },
                None => NamespaceError::Child(source),
            },
            HandOverError::Child(source) => NamespaceError::Child(source),
        })?;
        Ok(Self {
            tap: (attach == Attach::Descriptor).then_some(tap),
            net,
            user: plan.has_user_namespace().then_some(user),
            tcp: tcp.into(),
            dns: dns.into(),
        })
    }
}

impl Step {
    const ALL: [Self; 10] = [
        Self::Tun,
        Self::UserNamespace,
        Self::UserMap,
        Self::NetNamespace,
        Self::Tap,
        Self::Settings,
        Self::Links,
        Self::Rules,
        Self::Sockets,
        Self::Handle,
    ];

    fn of(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|step| *step as u8 == number)
    }

    /// What fails when this step does.
    fn describe(self) -> &'static str {
        match self {
            Self::Tun => "cannot open /dev/net/tun",
            Self::UserNamespace => "cannot make a user namespace",
            Self::UserMap => "cannot map this user into a user namespace",
            Self::NetNamespace => "cannot make a network namespace",
            Self::Tap => "cannot make a tap device",
            Self::Settings => "cannot set the kernel's settings of a network namespace",
            Self::Links => "cannot set addresses and routes in a network namespace",
            Self::Rules => "cannot install packet filter rules in a network namespace",
            Self::Sockets => "cannot make transparent sockets",
            Self::Handle => "cannot open a network namespace",
        }
    }
}

impl NamespaceError {
    /// What the user can do about it.
    pub fn remedy(&self) -> &'static str {
        let Self::Step { step, source } = self else {
            return "free memory or processes on this host, and try again";
        };
        match (step, source.kind()) {
            (Step::Tun, io::ErrorKind::NotFound) => {
                "load the module: `sudo modprobe tun`; in a container, pass the device: --device /dev/net/tun"
            }
            (Step::Tun, io::ErrorKind::PermissionDenied) => {
                "let users open the device, as most distributions do: `sudo chmod 666 /dev/net/tun`"
            }
            (Step::Tun, _) => "load the module: `sudo modprobe tun`",
            (Step::NetNamespace | Step::Tap, io::ErrorKind::PermissionDenied)
                if rustix::process::geteuid().is_root() =>
            {
                "run pyro outside of the container, or give it the privileges: --cap-add SYS_ADMIN --cap-add NET_ADMIN"
            }
            (Step::UserNamespace | Step::UserMap | Step::Tap, io::ErrorKind::PermissionDenied) => {
                "allow unprivileged user namespaces: `sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0` \
                 (Ubuntu) or `sudo sysctl kernel.unprivileged_userns_clone=1` (Debian); or run pyro as root"
            }
            (Step::UserNamespace | Step::NetNamespace, _) => {
                "raise the limits: `sudo sysctl user.max_user_namespaces=10000 user.max_net_namespaces=10000`"
            }
            (Step::Rules, _) => {
                "load the modules: `sudo modprobe -a nf_tables nft_tproxy nft_limit nft_reject_inet`"
            }
            (Step::UserMap | Step::Tap | Step::Settings | Step::Links | Step::Sockets | Step::Handle, _) => {
                "run pyro as root, or outside of a container that confines system calls"
            }
        }
    }
}

#[cfg(test)]
mod tests;
