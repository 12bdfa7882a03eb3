//! The hello of a TLS client, in pieces of any length: it ends in bounded bytes, and what is known then stays.

#![no_main]

use libfuzzer_sys::fuzz_target;
use pyro_net::hello::{Hello, HelloStep, MAX_HELLO};

fuzz_target!(|input: (u8, &[u8])| {
    let (piece, bytes) = (usize::from(input.0).max(1), input.1);
    let mut hello = Hello::new();
    let mut ended = None;
    for part in bytes.chunks(piece) {
        let step = hello.feed(part);
        if let Some(ended) = &ended {
            assert_eq!(*ended, step);
        } else if step != HelloStep::NeedMore {
            ended = Some(step);
        }
    }
    assert!(ended.is_some() || bytes.len() <= MAX_HELLO);
    if let Some(HelloStep::Name(Some(name))) = ended {
        assert!(!name.bytes().any(|byte| byte.is_ascii_uppercase()));
    }
});
