//! Sizes that both sides enforce before they allocate.

/// The largest gRPC message, in bytes. Output travels in chunks of [`CHUNK`]; what is larger is a start
/// request with long arguments.
pub const MESSAGE: usize = 4 << 20;

/// The largest message of a guest, in bytes: a [`CHUNK`], or words about a program. A host decodes no more at once, whatever a
/// hostile guest says.
pub const EVENT: usize = 128 << 10;

/// The largest piece of stdin, stdout or stderr in one message, in bytes.
pub const CHUNK: usize = 64 << 10;

/// HTTP/2 flow-control window of one stream, in bytes: what one unread command may hold in memory.
pub const STREAM_WINDOW: u32 = 256 << 10;

/// HTTP/2 flow-control window of the connection, in bytes: [`STREAMS`] unread streams leave it open, so that a
/// command whose reader stalls never stalls another.
pub const CONNECTION_WINDOW: u32 = STREAMS * STREAM_WINDOW;

/// Header list of one call, in bytes.
pub const HEADERS: u32 = 16 << 10;

/// Calls on one connection at the same time: [`DIALS`], [`LATER_OUTPUTS`], a hundred commands, and what is asked about them.
pub const STREAMS: u32 = 256;

/// Dialled ports at the same time.
pub const DIALS: usize = 64;

/// Commands that have ended and whose later output is still listened to, at the same time.
pub const LATER_OUTPUTS: usize = 32;

/// All arguments and variables of one command together, in bytes: below what Linux takes in one exec.
pub const ARGUMENTS: usize = 1 << 20;

/// One argument or variable, in bytes: Linux refuses more (`MAX_ARG_STRLEN`).
pub const ARGUMENT: usize = 128 << 10;

/// Entropy of one identity message, in bytes.
pub const ENTROPY: std::ops::RangeInclusive<usize> = 32..=512;
