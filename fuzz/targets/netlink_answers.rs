//! What the kernel says to messages of netlink: answers are counted, and all else is refused.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    pyro_net::fuzzing::netlink_answers(bytes);
});
