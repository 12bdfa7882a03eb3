//! Every message of the protocol between host and guest, in both directions: what decodes, encodes to what decodes
//! to the same.

#![no_main]

use libfuzzer_sys::fuzz_target;
use prost::Message;
use pyro_proto::{
    ExecEvent, ExecInput, HelloReply, HelloRequest, IdentifyReply, IdentifyRequest, PowerOffReply,
    PowerOffRequest, SignalReply, SignalRequest,
};

fn decode<M: Message + Default + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
    if let Ok(message) = M::decode(bytes) {
        let again = M::decode(message.encode_to_vec().as_slice()).expect("what was encoded decodes");
        assert!(message == again, "{message:?} became {again:?}");
    }
}

fuzz_target!(|bytes: &[u8]| {
    decode::<HelloRequest>(bytes);
    decode::<HelloReply>(bytes);
    decode::<IdentifyRequest>(bytes);
    decode::<IdentifyReply>(bytes);
    decode::<ExecInput>(bytes);
    decode::<ExecEvent>(bytes);
    decode::<SignalRequest>(bytes);
    decode::<SignalReply>(bytes);
    decode::<PowerOffRequest>(bytes);
    decode::<PowerOffReply>(bytes);
});
