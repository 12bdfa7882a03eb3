//! A question to the guest's resolver: what is read is answered in one datagram, and what is not is dropped or refused
//! in no more bytes than a header has.

#![no_main]

use std::net::Ipv4Addr;

use libfuzzer_sys::fuzz_target;
use pyro_net::dns::{MAX_UDP, Plan, Query, Reply, reply_for};

fuzz_target!(|bytes: &[u8]| {
    match Query::read(bytes) {
        Ok(query) => {
            for is_answered in [false, true] {
                let reply = match reply_for(query.kind(), is_answered) {
                    Plan::Alias => Reply::Address(Ipv4Addr::LOCALHOST),
                    Plan::Reply(reply) => reply,
                };
                let reply = query.reply(reply);
                assert!((12..=MAX_UDP).contains(&reply.len()));
                assert_eq!(reply[..2], bytes[..2], "the same number");
            }
        }
        Err(malformed) => assert!(malformed.reply.is_none_or(|reply| reply.len() == 12)),
    }
});
