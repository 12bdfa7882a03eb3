//! Both ends of the handshake, fed anything in pieces of any length: they take every byte once, hold at most one
//! mark, and the result does not depend on where the pieces end.

#![no_main]

use libfuzzer_sys::fuzz_target;
use pyro_proto::resync::{Guest, Host, NONCE_LEN, Scanner, Step};

fuzz_target!(|input: (u8, &[u8])| {
    let (piece, bytes) = (usize::from(input.0).max(1), input.1);
    let marks = |piece: usize| {
        let (mut scanner, mut found) = (Scanner::default(), Vec::new());
        for part in bytes.chunks(piece) {
            let mut part = part;
            while !part.is_empty() {
                let (taken, mark) = scanner.feed(part);
                assert!((1..=part.len()).contains(&taken));
                found.extend(mark);
                part = &part[taken..];
            }
        }
        found
    };
    assert_eq!(marks(piece), marks(bytes.len().max(1)));

    let (mut guest, mut host) = (Guest::default(), Host::new([7; NONCE_LEN]));
    let mut rest = bytes;
    while !rest.is_empty() {
        let (taken, step) = guest.feed(rest);
        rest = &rest[taken..];
        if matches!(step, Step::WriteAndBegin(..) | Step::Begin) {
            break;
        }
    }
    let mut rest = bytes;
    while !rest.is_empty() {
        let Ok((taken, step)) = host.feed(rest) else { break };
        rest = &rest[taken..];
        if step == Step::Begin {
            break;
        }
    }
});
