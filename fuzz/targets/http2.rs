//! A guest's bytes on a connection whose TLS ended here and that speaks HTTP/2: whatever they are, the connection ends.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    // Most of what begins otherwise ends at once.
    let begun = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], bytes].concat();
    pyro_net::fuzzing::http2(&begun);
});
