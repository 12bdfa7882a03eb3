//! The head and the tail of a stream, in bounded memory.

use std::collections::VecDeque;

/// How much of one stream a result carries, in bytes.
pub(crate) const LIMIT: usize = 1 << 20;
const HALF: usize = LIMIT / 2;

/// Takes a stream of any length, keeps its first and its last half MiB.
#[derive(Debug, Default)]
pub(crate) struct Capture {
    head: Vec<u8>,
    tail: VecDeque<u8>,
    total: u64,
}

impl Capture {
    pub(crate) fn push(&mut self, mut bytes: &[u8]) {
        self.total += bytes.len() as u64;
        let room = HALF.saturating_sub(self.head.len()).min(bytes.len());
        self.head.extend_from_slice(&bytes[..room]);
        bytes = &bytes[room..];
        bytes = &bytes[bytes.len().saturating_sub(HALF)..];
        let excess = (self.tail.len() + bytes.len()).saturating_sub(HALF);
        self.tail.drain(..excess);
        self.tail.extend(bytes);
    }

    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    pub(crate) fn truncated(&self) -> bool {
        self.total > (self.head.len() + self.tail.len()) as u64
    }

    /// The text of a result; where the middle is missing, a line says how much.
    pub(crate) fn text(&self) -> String {
        let (front, back) = self.tail.as_slices();
        let missing = self.total - (self.head.len() + self.tail.len()) as u64;
        if missing == 0 {
            let whole = [&self.head[..], front, back].concat();
            return String::from_utf8_lossy(&whole).into_owned();
        }
        joined(&self.head, missing, &[front, back].concat())
    }
}

/// Head and tail as one text, with a line between them that says how much is missing.
pub(crate) fn joined(head: &[u8], missing: u64, tail: &[u8]) -> String {
    let (head, tail) = (String::from_utf8_lossy(head), String::from_utf8_lossy(tail));
    format!("{head}\n[… {missing} bytes cut …]\n{tail}")
}

/// The beginning of a text, of at most so many bytes, with a word about how much is missing.
pub(crate) fn cut(mut text: String, most: usize) -> String {
    if text.len() > most {
        let end = text.floor_char_boundary(most);
        let missing = text.len() - end;
        text.truncate(end);
        text.push_str(&format!(" … ({missing} more bytes)"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_cut_between_two_characters() {
        assert_eq!(cut("naïve".to_owned(), 6), "naïve");
        assert_eq!(cut("naïve".to_owned(), 3), "na … (4 more bytes)");
    }

    #[test]
    fn a_short_stream_is_whole_and_invalid_utf8_is_replaced() {
        let mut capture = Capture::default();
        capture.push(b"caf\xc3");
        capture.push(b"\xa9 \xff");
        assert_eq!((capture.text().as_str(), capture.truncated()), ("café \u{fffd}", false));
    }

    #[test]
    fn a_long_stream_keeps_its_head_and_its_tail() {
        let mut capture = Capture::default();
        capture.push(b"first");
        for _ in 0..100 {
            capture.push(&[b'x'; 70_000]);
        }
        capture.push(b"last");
        let text = capture.text();
        assert!(text.starts_with("first") && text.ends_with("last") && capture.truncated());
        assert!(text.len() < LIMIT + 64 && capture.total() == 7_000_009);
    }
}
