//! A guest's bytes on a connection of port 80: each request is answered or ends the connection, and none is passed on.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let heard = pyro_net::fuzzing::http(bytes);
    assert!(heard.is_empty() || heard.starts_with(b"HTTP/1."));
});
