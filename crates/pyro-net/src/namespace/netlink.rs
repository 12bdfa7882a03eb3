//! Messages of netlink, made before the fork, and the answers to them.
//!
//! The libraries that speak nf_tables call the `nft` program, are under the GPL, or need a C library; and none can make its
//! messages before a fork and send them after it. What is needed here is small: one attribute format and a list of answers.

use rustix::io::Errno;

/// The length of a message's header.
const HEADER: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;

/// Messages in the making. Each one asks for an answer, but for those that begin and end a batch.
#[derive(Debug, Default)]
pub(super) struct Messages {
    bytes: Vec<u8>,
    answers: usize,
}

impl Messages {
    /// Adds a message that is answered.
    pub(super) fn add(&mut self, kind: u16, flags: u16, body: &[u8]) {
        self.answers += 1;
        self.append(kind, flags | NLM_F_ACK, body);
    }

    /// Adds a message that is not answered.
    pub(super) fn add_mark(&mut self, kind: u16, body: &[u8]) {
        self.append(kind, 0, body);
    }

    fn append(&mut self, kind: u16, flags: u16, body: &[u8]) {
        let length = u32::try_from(HEADER + body.len()).expect("messages of a few hundred bytes");
        self.bytes.extend(length.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend((flags | NLM_F_REQUEST).to_ne_bytes());
        self.bytes.extend(u32::try_from(self.answers).expect("a few messages").to_ne_bytes());
        // The kernel's own port.
        self.bytes.extend([0; 4]);
        self.bytes.extend(body);
        pad(&mut self.bytes);
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// How many answers come.
    pub(super) fn answers(&self) -> usize {
        self.answers
    }
}

/// One attribute.
pub(super) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(value.len() + 4).expect("attributes of a few hundred bytes");
    let mut bytes = Vec::new();
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    pad(&mut bytes);
    bytes
}

/// An attribute that holds others.
pub(super) fn nested(kind: u16, parts: &[Vec<u8>]) -> Vec<u8> {
    const NLA_F_NESTED: u16 = 0x8000;
    attribute(kind | NLA_F_NESTED, &parts.concat())
}

/// A number in the order of the network.
pub(super) fn number(kind: u16, value: u32) -> Vec<u8> {
    attribute(kind, &value.to_be_bytes())
}

/// A text, with the zero byte that ends it.
pub(super) fn text(kind: u16, value: &str) -> Vec<u8> {
    attribute(kind, &[value.as_bytes(), &[0]].concat())
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// Counts the answers in what the kernel has sent; it makes no system call and allocates nothing.
///
/// # Errors
/// The first error among them. What is no answer at all is [`Errno::BADMSG`].
pub(crate) fn answers(mut bytes: &[u8]) -> Result<usize, Errno> {
    let mut count = 0;
    while !bytes.is_empty() {
        let Some((length, rest)) = bytes.split_first_chunk::<4>() else { return Err(Errno::BADMSG) };
        let length = usize::try_from(u32::from_ne_bytes(*length)).unwrap_or(usize::MAX);
        let kind = rest.first_chunk::<2>().map(|kind| u16::from_ne_bytes(*kind));
        let (Some(message), Some(NLMSG_ERROR)) = (bytes.get(..length), kind) else {
            return Err(Errno::BADMSG);
        };
        let Some(code) = message.get(HEADER..).and_then(<[u8]>::first_chunk::<4>) else {
            return Err(Errno::BADMSG);
        };
        // An answer to a message that went well has the error 0; others are negative.
        match i32::from_ne_bytes(*code) {
            0 => count += 1,
            code => return Err(Errno::from_raw_os_error(code.wrapping_neg().clamp(1, 4095))),
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(code: i32) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(36_u32.to_ne_bytes());
        bytes.extend(NLMSG_ERROR.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(code.to_ne_bytes());
        bytes.extend([0; 16]);
        bytes
    }

    #[test]
    fn answers_are_counted_and_the_first_error_is_told() {
        assert_eq!(answers(&[]), Ok(0));
        assert_eq!(answers(&[answer(0), answer(0)].concat()), Ok(2));
        assert_eq!(answers(&[answer(0), answer(-1), answer(-2)].concat()), Err(Errno::PERM));
    }

    #[test]
    fn what_is_no_answer_is_refused() {
        let good = answer(0);
        for length in 1..good.len() {
            assert_eq!(answers(&good[..length]), Err(Errno::BADMSG), "{length} bytes");
        }
        let mut endless = good.clone();
        endless[..4].copy_from_slice(&0_u32.to_ne_bytes());
        assert_eq!(answers(&endless), Err(Errno::BADMSG));
        let mut other = good;
        other[4] = 3;
        assert_eq!(answers(&other), Err(Errno::BADMSG));
        assert!(answers(&answer(i32::MIN)).is_err());
    }

    #[test]
    fn messages_and_attributes_are_padded_and_counted() {
        let mut messages = Messages::default();
        messages.add_mark(16, &[1]);
        messages.add(24, 0x400, &text(4, "pyro"));
        assert_eq!((messages.answers(), messages.bytes().len()), (1, 20 + 28));
        assert_eq!(text(4, "pyro").len(), 12, "nine bytes and three of padding");
    }
}
