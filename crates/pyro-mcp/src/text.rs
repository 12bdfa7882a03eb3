//! Output of a guest as text for a context window: bounded, and without what a terminal would act upon.

/// What a tool returns of each stream at the most, unless it is asked for another limit, in bytes.
pub(crate) const STREAM_BYTES: usize = 16 << 10;
/// The most that may be asked for, in bytes.
pub(crate) const MOST_STREAM_BYTES: usize = 256 << 10;
/// The least, in bytes.
pub(crate) const LEAST_STREAM_BYTES: usize = 1 << 10;
/// What is shown of a command that records name, in bytes.
pub(crate) const COMMAND_BYTES: usize = 2 << 10;

/// Text without control sequences; of the control characters, tabs and line ends stay.
pub(crate) fn plain(text: &str) -> String {
    let text = anstream::adapter::strip_str(text).to_string();
    let text = text.replace("\r\n", "\n").replace('\r', "\n");
    if text.chars().any(unwanted) { text.chars().filter(|c| !unwanted(*c)).collect() } else { text }
}

fn unwanted(c: char) -> bool {
    c.is_control() && c != '\n' && c != '\t'
}

/// A stream that fits whole, or its head and its tail with a line between them that says how much is missing and, in
/// `remedy`, how to read it: given are its first and its last bytes, and how many there are in all.
pub(crate) fn head_and_tail(
    head: &[u8],
    tail: &[u8],
    total: u64,
    remedy: impl FnOnce(usize) -> String,
) -> String {
    let head = &head[..whole_lines_before(head)];
    let tail = &tail[whole_lines_after(tail)..];
    let missing = total.saturating_sub((head.len() + tail.len()) as u64);
    let remedy = remedy(head.len());
    format!("{}\n[… {missing} bytes cut{remedy} …]\n{}", lossy(head), lossy(tail))
}

/// A stream of which all is at hand, within so many bytes.
pub(crate) fn fit(text: &str, most: usize, remedy: impl FnOnce(usize) -> String) -> String {
    let bytes = text.as_bytes();
    if bytes.len() <= most {
        return plain(text);
    }
    let half = most / 2;
    head_and_tail(&bytes[..half], &bytes[bytes.len() - half..], bytes.len() as u64, remedy)
}

/// A command as records show it, within what a reader can use.
pub(crate) fn shorten(command: &mut String) {
    if command.len() > COMMAND_BYTES {
        *command = fit(command, COMMAND_BYTES, |_| String::new());
    }
}

/// Bytes as text. Each byte becomes one character, or three bytes where it is none of UTF-8: that stays within twice
/// the length by leaving runs of such bytes as one mark.
pub(crate) fn lossy(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        if !chunk.invalid().is_empty() && !text.ends_with('\u{fffd}') {
            text.push('\u{fffd}');
        }
    }
    plain(&text)
}

/// Where the last whole line ends, if that is not far back; or the last whole character.
fn whole_lines_before(bytes: &[u8]) -> usize {
    let last = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    if last >= bytes.len() - bytes.len() / 4 {
        return last;
    }
    // A character of UTF-8 has no more than three bytes after its first.
    let cut = (0..bytes.len().min(4)).map(|back| bytes.len() - back).find(|at| {
        bytes.get(..*at).is_some_and(|part| match std::str::from_utf8(part) {
            Ok(_) => true,
            Err(error) => error.error_len().is_some(),
        })
    });
    cut.unwrap_or(bytes.len())
}

/// Where the first whole line begins, if that is not far on; or the first whole character.
fn whole_lines_after(bytes: &[u8]) -> usize {
    let near = &bytes[..bytes.len() / 4];
    if let Some(at) = near.iter().position(|byte| *byte == b'\n') {
        return at + 1;
    }
    bytes.iter().take(3).take_while(|byte| **byte & 0xc0 == 0x80).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_act_upon_is_left_out() {
        assert_eq!(plain("\u{1b}[31mred\u{1b}[0m\u{7}\r\nnext\rover\tx"), "red\nnext\nover\tx");
        assert_eq!(plain("\u{1b}]0;title\u{7}text\u{1b}[2J\u{1b}[H"), "text");
        assert_eq!(plain("plain \u{e4} text"), "plain \u{e4} text");
    }

    #[test]
    fn a_long_stream_keeps_whole_lines_at_both_ends_and_says_what_is_missing() {
        let text: String = (0..1000).map(|number| format!("line {number}\n")).collect();
        let cut = fit(&text, 1000, |at| format!("; go on at {at}"));
        assert!(cut.len() < 1100, "{}", cut.len());
        assert!(cut.starts_with("line 0\n") && cut.ends_with("line 999\n"));
        let (head, rest) = cut.split_once("\n[… ").expect("a mark");
        let (mark, tail) = rest.split_once(" …]\n").expect("its end");
        assert!(tail.starts_with("line "), "{tail}");
        let missing = text.len() - head.len() - tail.len();
        assert_eq!(mark, format!("{missing} bytes cut; go on at {}", head.len()));
    }

    #[test]
    fn characters_are_not_torn_and_garbage_does_not_swell() {
        let text = "ä".repeat(4000);
        let cut = fit(&text, 1001, |_| String::new());
        assert!(!cut.contains('\u{fffd}'), "{cut}");
        assert!(lossy(&[0xff; 9000]).len() <= 3);
        let mixed: Vec<u8> = (0..9000).map(|at| if at % 2 == 0 { 0xff } else { b'x' }).collect();
        assert!(lossy(&mixed).len() <= 2 * mixed.len());
    }

    #[test]
    fn a_command_in_a_record_is_short() {
        let mut command = "x".repeat(1 << 20);
        shorten(&mut command);
        assert!(command.len() < COMMAND_BYTES + 64);
    }
}
