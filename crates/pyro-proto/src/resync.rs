//! Finding the beginning of a conversation.
//!
//! A virtio-serial port keeps no boundary when the host side goes away and another comes: megabytes of the
//! old connection may precede the first byte of the new one, in both directions, and half a message may be
//! glued to its beginning. So each connection starts with four marks, each [`MARK_LEN`] bytes:
//!
//! ```text
//!   host                                   guest
//!     │── SYN(nonce), repeated ──────────────►│   scanning; everything else is thrown away
//!     │◄───────────────────────── ACK(nonce) ─│
//!     │   scanning; stale bytes thrown away    │
//!     │── START(nonce) ──────────────────────►│   all SYNs before it have been read
//!     │◄───────────────────── STARTED(nonce) ─│
//!     │◄═══════════ HTTP/2 from here ═════════►│
//! ```
//!
//! The nonce is random, so that a stale mark never matches. A mark begins like an HTTP/2 frame that is too
//! large, so an old session that still reads the stream fails at once instead of swallowing it.
//!
//! The scanners here are fed bytes and tell what to send; they do no I/O and hold at most one mark.

/// Length of a nonce in bytes.
pub const NONCE_LEN: usize = 16;

/// Length of a mark in bytes: magic, kind, nonce.
pub const MARK_LEN: usize = MAGIC.len() + 1 + NONCE_LEN;

/// How often the host repeats its SYN until it is answered, in milliseconds: an old session in the guest may
/// have taken the last one.
pub const SYN_INTERVAL_MILLIS: u64 = 200;

/// `00 ff 53` reads as an HTTP/2 frame of 65,363 bytes, more than any side here accepts.
const MAGIC: [u8; 16] = *b"\x00\xffSpyro-resync\x01\n";

/// The random number of one connection.
pub type Nonce = [u8; NONCE_LEN];

/// What a mark says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Host: a new connection begins.
    Syn,
    /// Guest: heard; nothing stale follows this mark.
    Ack,
    /// Host: heard; the next byte is the conversation's first.
    Start,
    /// Guest: the next byte is the conversation's first.
    Started,
}

impl Kind {
    fn byte(self) -> u8 {
        match self {
            Self::Syn => b'S',
            Self::Ack => b'A',
            Self::Start => b'G',
            Self::Started => b'R',
        }
    }

    fn from_byte(byte: u8) -> Option<Self> {
        [Self::Syn, Self::Ack, Self::Start, Self::Started].into_iter().find(|kind| kind.byte() == byte)
    }
}

/// The bytes of one mark.
pub fn mark(kind: Kind, nonce: &Nonce) -> [u8; MARK_LEN] {
    let mut bytes = [0; MARK_LEN];
    bytes[..MAGIC.len()].copy_from_slice(&MAGIC);
    bytes[MAGIC.len()] = kind.byte();
    bytes[MAGIC.len() + 1..].copy_from_slice(nonce);
    bytes
}

/// Finds marks in a stream of anything, holding at most one mark's bytes.
#[derive(Debug, Default)]
pub struct Scanner {
    partial: Vec<u8>,
}

impl Scanner {
    /// Takes bytes up to the end of the next mark. Returns how many were taken, and the mark if one ended.
    pub fn feed(&mut self, bytes: &[u8]) -> (usize, Option<(Kind, Nonce)>) {
        let mut index = 0;
        while index < bytes.len() {
            if self.partial.is_empty() {
                // Whatever floods the stream is passed over at the speed of a search.
                match bytes[index..].iter().position(|&byte| byte == MAGIC[0]) {
                    Some(noise) => index += noise,
                    None => break,
                }
            }
            self.partial.push(bytes[index]);
            self.drop_what_cannot_be_a_mark();
            if self.partial.len() == MARK_LEN {
                let found = Kind::from_byte(self.partial[MAGIC.len()]).map(|kind| {
                    let mut nonce = [0; NONCE_LEN];
                    nonce.copy_from_slice(&self.partial[MAGIC.len() + 1..]);
                    (kind, nonce)
                });
                // The nonce of a torn old mark may be the beginning of a whole one.
                self.partial.remove(0);
                self.drop_what_cannot_be_a_mark();
                return (index + 1, found);
            }
            index += 1;
        }
        (bytes.len(), None)
    }

    /// Keeps the longest end of what was read that may still become a mark.
    fn drop_what_cannot_be_a_mark(&mut self) {
        let fits = |bytes: &[u8]| {
            let magic = bytes.len().min(MAGIC.len());
            bytes[..magic] == MAGIC[..magic]
                && bytes.get(MAGIC.len()).is_none_or(|&kind| Kind::from_byte(kind).is_some())
        };
        let mut start = 0;
        while start < self.partial.len() && !fits(&self.partial[start..]) {
            start += 1;
        }
        self.partial.drain(..start);
    }
}

/// What a side must do after it was fed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Read more.
    Read,
    /// Write this mark, then go on.
    Write(Kind, Nonce),
    /// Write this mark; then the conversation begins with the first byte that was not taken.
    WriteAndBegin(Kind, Nonce),
    /// The conversation begins with the first byte that was not taken.
    Begin,
}

/// The guest's side: answers the newest SYN, begins at its START.
#[derive(Debug, Default)]
pub struct Guest {
    scanner: Scanner,
    nonce: Option<Nonce>,
}

impl Guest {
    /// Takes bytes from the host; returns how many were taken and what to do.
    pub fn feed(&mut self, bytes: &[u8]) -> (usize, Step) {
        let (taken, found) = self.scanner.feed(bytes);
        let step = match found {
            Some((Kind::Syn, nonce)) => {
                self.nonce = Some(nonce);
                Step::Write(Kind::Ack, nonce)
            }
            Some((Kind::Start, nonce)) if self.nonce == Some(nonce) => {
                Step::WriteAndBegin(Kind::Started, nonce)
            }
            _ => Step::Read,
        };
        (taken, step)
    }
}

/// The host's side: sends SYN (and again every [`SYN_INTERVAL_MILLIS`] while [`Host::wants_syn`]).
#[derive(Debug)]
pub struct Host {
    scanner: Scanner,
    nonce: Nonce,
    started: bool,
    /// Stale bytes that may still be thrown away.
    patience: u64,
}

/// More bytes than any pipe between the two sides can hold came without a mark: the guest is not an agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the guest sent {limit} bytes without answering the handshake")]
pub struct TooMuchNoise {
    /// The limit in bytes.
    pub limit: u64,
}

impl Host {
    /// Stale bytes that are thrown away at the most.
    pub const NOISE_LIMIT: u64 = 64 << 20;

    /// Begins a connection with this random number.
    pub fn new(nonce: Nonce) -> Self {
        Self { scanner: Scanner::default(), nonce, started: false, patience: Self::NOISE_LIMIT }
    }

    /// The mark to send at first, and again until it is answered.
    pub fn syn(&self) -> [u8; MARK_LEN] {
        mark(Kind::Syn, &self.nonce)
    }

    /// True until the guest has answered.
    pub fn wants_syn(&self) -> bool {
        !self.started
    }

    /// Takes bytes from the guest; returns how many were taken and what to do.
    ///
    /// # Errors
    /// When the guest talks on without a mark.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(usize, Step), TooMuchNoise> {
        let (taken, found) = self.scanner.feed(bytes);
        self.patience =
            self.patience.checked_sub(taken as u64).ok_or(TooMuchNoise { limit: Self::NOISE_LIMIT })?;
        let step = match found {
            Some((Kind::Ack, nonce)) if nonce == self.nonce && !self.started => {
                self.started = true;
                Step::Write(Kind::Start, nonce)
            }
            Some((Kind::Started, nonce)) if nonce == self.nonce && self.started => Step::Begin,
            _ => Step::Read,
        };
        Ok((taken, step))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Runs both sides over two byte queues that start with stale bytes; returns what is left for the
    /// conversation on each side.
    fn converse(stale_to_guest: &[u8], stale_to_host: &[u8], chunk: usize) -> (Vec<u8>, Vec<u8>) {
        let nonce = [7; NONCE_LEN];
        let (mut host, mut guest) = (Host::new(nonce), Guest::default());
        let mut to_guest = [stale_to_guest, &host.syn(), &host.syn()].concat();
        let mut to_host = stale_to_host.to_vec();
        let (mut host_began, mut guest_began) = (false, false);
        for _ in 0..100_000 {
            if !guest_began && !to_guest.is_empty() {
                let part = &to_guest[..to_guest.len().min(chunk)];
                let (taken, step) = guest.feed(part);
                to_guest.drain(..taken);
                match step {
                    Step::Write(kind, nonce) => to_host.extend(mark(kind, &nonce)),
                    Step::WriteAndBegin(kind, nonce) => {
                        to_host.extend(mark(kind, &nonce));
                        to_host.extend(b"from guest");
                        guest_began = true;
                    }
                    _ => {}
                }
            }
            if !host_began && !to_host.is_empty() {
                let part = &to_host[..to_host.len().min(chunk)];
                let (taken, step) = host.feed(part).expect("little noise");
                to_host.drain(..taken);
                match step {
                    Step::Write(kind, nonce) => {
                        to_guest.extend(mark(kind, &nonce));
                    }
                    Step::Begin => {
                        to_guest.extend(b"from host");
                        host_began = true;
                    }
                    _ => {}
                }
            }
            if host_began && guest_began {
                return (to_guest, to_host);
            }
        }
        panic!("the two sides never met");
    }

    #[test]
    fn a_clean_stream_begins_at_once() {
        let (guest, host) = converse(b"", b"", 4096);
        assert_eq!((guest.as_slice(), host.as_slice()), (&b"from host"[..], &b"from guest"[..]));
    }

    #[test]
    fn half_a_mark_of_an_old_connection_is_no_obstacle() {
        let old = mark(Kind::Syn, &[9; NONCE_LEN]);
        let stale = [&old[..], &old[..20]].concat();
        let (guest, host) = converse(&stale, &mark(Kind::Started, &[9; NONCE_LEN]), 5);
        assert_eq!((guest.as_slice(), host.as_slice()), (&b"from host"[..], &b"from guest"[..]));
    }

    #[test]
    fn endless_noise_is_an_error_and_costs_no_memory() {
        let mut host = Host::new([1; NONCE_LEN]);
        let noise = vec![0; 1 << 20];
        let mut fed = 0;
        let error = loop {
            match host.feed(&noise) {
                Ok((taken, _)) => fed += taken as u64,
                Err(error) => break error,
            }
            assert!(host.scanner.partial.len() <= MARK_LEN);
        };
        assert_eq!(error, TooMuchNoise { limit: Host::NOISE_LIMIT });
        assert!(fed <= Host::NOISE_LIMIT);
    }

    #[test]
    fn a_wrong_epoch_is_not_answered() {
        let mut host = Host::new([1; NONCE_LEN]);
        assert_eq!(host.feed(&mark(Kind::Ack, &[2; NONCE_LEN])), Ok((MARK_LEN, Step::Read)));
        let mut guest = Guest::default();
        assert_eq!(guest.feed(&mark(Kind::Start, &[2; NONCE_LEN])), (MARK_LEN, Step::Read));
    }

    proptest! {
        #[test]
        fn whatever_is_stale_the_two_sides_meet(
            to_guest in proptest::collection::vec(any::<u8>(), 0..300),
            to_host in proptest::collection::vec(any::<u8>(), 0..300),
            cut in 0..MARK_LEN,
            chunk in 1..70_usize,
        ) {
            let torn = mark(Kind::Ack, &[3; NONCE_LEN])[..cut].to_vec();
            let (guest, host) =
                converse(&[&to_guest[..], &torn].concat(), &[&to_host[..], &torn].concat(), chunk);
            prop_assert_eq!(guest, b"from host".to_vec());
            prop_assert_eq!(host, b"from guest".to_vec());
        }
    }
}
