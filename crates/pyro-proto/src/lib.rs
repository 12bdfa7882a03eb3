//! What the host and the guest agent say to each other, over any byte stream.
//!
//! Two layers, both free of I/O:
//!
//! - [`resync`] finds the beginning of a conversation on a stream that may still carry bytes of an earlier
//!   one (virtio-serial keeps no boundary when its host side reconnects);
//! - above it one HTTP/2 connection carries the gRPC service [`agent_server::Agent`], generated from
//!   `proto/agent.proto`: many streams at once, flow control, cancellation.
//!
//! Either side treats the other as hostile: [`limits`] holds the sizes that are enforced before anything is
//! allocated. The wire format is frozen by `tests/golden.rs`.

pub mod limits;
pub mod resync;

#[expect(
    missing_docs,
    clippy::allow_attributes_without_reason,
    reason = "generated code; the words are in proto/agent.proto"
)]
mod generated {
    tonic::include_proto!("pyro.agent");
}

pub use generated::*;

/// The newest generation of the protocol that this code speaks.
pub const GENERATION: u32 = 3;

/// The generation from which on a guest can be given variables and a certificate, and its ports can be dialled.
pub const ENVIRONMENT_AND_DIAL: u32 = 2;

/// The generation from which on a command has a user, and tells of output that comes after its end.
pub const USER_AND_LATER_OUTPUT: u32 = 3;
