//! A guest's network, under policy by name.
//!
//! ```text
//!   guest ─► namespace ─► owner: who is it for? ─► policy ─► resolve, dial ─► the outside
//!                │                  │
//!                └─ port 53 ─► resolver ─► table of names
//! ```
//!
//! A guest is alone in a network namespace ([`Namespace`]) that nothing is routed into or out of. The host's kernel ends
//! the guest's TCP connections there, on one socket, whatever address the guest dialled. The owner of a [`Network`] accepts
//! them outside, and opens a connection of its own for each that the [`policy`] allows.
//!
//! A guest asks our resolver ([`dns`]), which gives each name that the policy allows an address of its own ([`names`]).
//! A connection to that address is judged by the name, its TLS hello must agree ([`hello`]), and the host resolves the name
//! again. Every decision is logged ([`log`]).
//!
//! TLS passes by unread, but for hosts that a [`secret`] is for or whose requests the policy inspects: there it ends, with
//! a certificate of the network's own towards the guest, and the requests are read and passed on over verified TLS.

mod address;
mod append;
mod certificates;
mod connect;
mod dial;
pub mod dns;
#[doc(hidden)]
pub mod fuzzing;
pub mod hello;
mod http;
pub mod log;
pub mod names;
mod namespace;
mod network;
mod outbound;
pub mod policy;
mod relay;
mod resolver;
pub mod secret;

pub use address::{GATEWAY, GUEST, GUEST_MAC, PREFIX, SUBNET, is_special};
pub use namespace::{Attach, Namespace, NamespaceError, Step, TAP};
pub use network::{Changed, Network, Settings};
pub use outbound::Outbound;
pub use policy::Policy;
