//! The last bytes of a stream that nobody may be able to fill memory with.

use std::collections::VecDeque;

/// Keeps the last `limit` bytes of all that is pushed.
#[derive(Debug)]
pub(crate) struct Tail {
    bytes: VecDeque<u8>,
    limit: usize,
}

impl Tail {
    pub(crate) fn new(limit: usize) -> Self {
        Self { bytes: VecDeque::new(), limit }
    }

    pub(crate) fn push(&mut self, bytes: &[u8]) {
        let bytes = &bytes[bytes.len().saturating_sub(self.limit)..];
        let excess = (self.bytes.len() + bytes.len()).saturating_sub(self.limit);
        self.bytes.drain(..excess);
        self.bytes.extend(bytes);
    }

    /// The last `lines` lines as text that is safe to show: terminal sequences and control characters are
    /// gone, and what is no UTF-8 is replaced.
    pub(crate) fn text(&self, lines: usize) -> String {
        let (front, back) = self.bytes.as_slices();
        let text = printable(&String::from_utf8_lossy(&[front, back].concat()));
        let text = text.trim_end_matches('\n');
        let start = text.rmatch_indices('\n').nth(lines.saturating_sub(1)).map_or(0, |(at, _)| at + 1);
        text[start..].to_owned()
    }
}

/// Removes terminal escape sequences and all control characters but newline and tab.
fn printable(text: &str) -> String {
    let mut result = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\x1b' => skip_escape(&mut chars),
            '\n' | '\t' => result.push(c),
            c if c.is_control() => {}
            c => result.push(c),
        }
    }
    result
}

/// Skips what follows an ESC: a CSI sequence to its final byte, else one character.
fn skip_escape(chars: &mut std::iter::Peekable<std::str::Chars<'_>>) {
    if chars.next_if_eq(&'[').is_none() {
        chars.next_if(|c| !c.is_control());
        return;
    }
    while chars.next_if(|c| ('\x20'..='\x3f').contains(c)).is_some() {}
    chars.next_if(|c| ('\x40'..='\x7e').contains(c));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_bytes_are_kept() {
        let mut tail = Tail::new(8);
        tail.push(b"0123456789");
        assert_eq!(tail.text(40), "23456789");
        tail.push(b"ab");
        assert_eq!(tail.text(40), "456789ab");
        for _ in 0..1000 {
            tail.push(&[b'x'; 4096]);
        }
        assert_eq!(tail.text(40), "xxxxxxxx");
        assert!(tail.bytes.capacity() <= 4096, "memory follows the limit, not the input");
    }

    #[test]
    fn only_the_last_lines_are_shown() {
        let mut tail = Tail::new(64);
        tail.push(b"one\ntwo\nthree\n\n");
        assert_eq!(tail.text(1), "three");
        assert_eq!(tail.text(2), "two\nthree");
        assert_eq!(tail.text(9), "one\ntwo\nthree");
        assert_eq!(Tail::new(4).text(3), "");
    }

    #[test]
    fn text_is_safe_to_show() {
        let mut tail = Tail::new(256);
        tail.push(b"\x1bc\x1b[2J\x1b[1;31mred\x1b[0m\r\n\x07bell\xff \xc2\x9b31mc1\tend\x1b");
        assert_eq!(tail.text(9), "red\nbell\u{fffd} 31mc1\tend");
        tail.push(b"[");
        assert_eq!(tail.text(1), "bell\u{fffd} 31mc1\tend");
    }
}
