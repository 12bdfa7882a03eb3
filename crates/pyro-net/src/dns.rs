//! Questions of the guest to its resolver, and replies to them.
//!
//! Nothing is forwarded. An allowed name has one address, its alias, and nothing else: without HTTPS records there are no
//! keys for a hidden TLS name, and without TXT records there is no channel for data.

use std::net::Ipv4Addr;

use hickory_proto::op::{Header, Message, MessageType, Metadata, OpCode, Query as Question, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder};

/// The longest question in a datagram. A caller who receives into one byte more sees that a question is longer.
pub const MAX_UDP: usize = 512;
/// The longest question over TCP, where a client may pad it.
pub const MAX_TCP: usize = 4 << 10;
/// How long a guest may keep an alias, in seconds. Short, so that a revoked name is soon asked for again.
const TTL: u32 = 30;

/// A well-formed question.
#[derive(Clone, Debug)]
pub struct Query {
    request: Metadata,
    question: Question,
    name: String,
}

/// What a question asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An IPv4 address.
    Address,
    /// The name of an address.
    Pointer,
    /// Anything else, by its number.
    Other(u16),
}

/// Bytes that are no question to answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Malformed {
    /// What is wrong.
    pub reason: &'static str,
    /// The reply that tells the client so; none where a reply could go to somebody who never asked.
    pub reply: Option<Vec<u8>>,
}

/// What to reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// The name has this address.
    Address(Ipv4Addr),
    /// The name exists, and has nothing of this kind.
    Empty,
    /// The name does not exist.
    NoSuchName,
    /// The policy does not answer the name.
    Refused,
    /// There is no alias left, or it could not be written down.
    Failure,
}

/// What a question needs: an alias, or a reply that is known already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Reply with the alias of the name.
    Alias,
    /// Reply with this.
    Reply(Reply),
}

/// Decides how to reply to a question for a name that the policy answers, or does not.
pub fn reply_for(kind: Kind, is_answered: bool) -> Plan {
    match kind {
        // The names of addresses are nobody's secret, and programs wait long for a refused one.
        Kind::Pointer => Plan::Reply(Reply::NoSuchName),
        _ if !is_answered => Plan::Reply(Reply::Refused),
        Kind::Address => Plan::Alias,
        Kind::Other(_) => Plan::Reply(Reply::Empty),
    }
}

impl Query {
    /// Reads a question. Only the header and the question are looked at: EDNS and other records are ignored.
    ///
    /// # Errors
    /// When it is no single question of class IN.
    pub fn read(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut decoder = BinDecoder::new(bytes);
        let header = Header::read(&mut decoder);
        let header = header.map_err(|_| Malformed { reason: "too short", reply: None })?;
        // Two servers that reply to replies would never stop.
        if header.metadata.message_type == MessageType::Response {
            return Err(Malformed { reason: "a reply, not a question", reply: None });
        }
        let malformed = |reason, code| {
            let mut message = reply_to(&header.metadata);
            message.metadata.response_code = code;
            Malformed { reason, reply: message.to_vec().ok() }
        };
        if bytes.len() > MAX_TCP {
            return Err(malformed("too long", ResponseCode::FormErr));
        }
        if header.metadata.op_code != OpCode::Query {
            return Err(malformed("not a query", ResponseCode::NotImp));
        }
        if header.counts.queries != 1 || header.metadata.truncation {
            return Err(malformed("not one question", ResponseCode::FormErr));
        }
        let question = Question::read(&mut decoder);
        let question = question.map_err(|_| malformed("not a question", ResponseCode::FormErr))?;
        if question.query_class() != DNSClass::IN {
            return Err(malformed("not of class IN", ResponseCode::NotImp));
        }
        let name = text_of(question.name());
        Ok(Self { request: header.metadata, question, name })
    }

    /// The name in lower case, without its last dot. Bytes that no name of a host has are escaped.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What is asked for.
    pub fn kind(&self) -> Kind {
        match self.question.query_type() {
            RecordType::A => Kind::Address,
            RecordType::PTR => Kind::Pointer,
            other => Kind::Other(other.into()),
        }
    }

    /// Encodes a reply, of at most 512 bytes. The question is repeated as it came: clients mix upper and lower case to
    /// recognise forged replies.
    pub fn reply(&self, reply: Reply) -> Vec<u8> {
        let mut message = reply_to(&self.request);
        message.add_query(self.question.clone());
        message.metadata.response_code = match reply {
            Reply::Address(_) | Reply::Empty => ResponseCode::NoError,
            Reply::NoSuchName => ResponseCode::NXDomain,
            Reply::Refused => ResponseCode::Refused,
            Reply::Failure => ResponseCode::ServFail,
        };
        if let Reply::Address(address) = reply {
            let name = self.question.name().clone();
            message.add_answer(Record::from_rdata(name, TTL, RData::A(A(address))));
        }
        message.to_vec().expect("a name that was decoded, and one address, can be encoded")
    }
}

fn reply_to(request: &Metadata) -> Message {
    let mut message = Message::response(request.id, request.op_code);
    message.metadata = Metadata::response_from_request(request);
    message.metadata.recursion_available = true;
    message
}

fn text_of(name: &Name) -> String {
    // A dot inside a label is escaped here, so that `a\.b` is not taken for `a.b`.
    let text = name.to_ascii().to_ascii_lowercase();
    text.strip_suffix('.').map(str::to_owned).unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::Edns;
    use proptest::prelude::*;

    use super::*;
    use crate::policy::is_normal;

    fn message(name: &str, kind: RecordType) -> Message {
        let mut message = Message::new(7, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.add_query(Question::query(Name::from_ascii(name).expect("a name"), kind));
        message
    }

    fn bytes(message: &Message) -> Vec<u8> {
        message.to_vec().expect("encoded")
    }

    fn query(name: &str, kind: RecordType) -> Query {
        Query::read(&bytes(&message(name, kind))).expect("a question")
    }

    #[test]
    fn a_question_is_read_and_answered() {
        let query = query("WwW.Example.com.", RecordType::A);
        assert_eq!((query.name(), query.kind()), ("www.example.com", Kind::Address));
        let reply = query.reply(Reply::Address(Ipv4Addr::new(8, 8, 8, 8)));
        let reply = Message::from_vec(&reply).expect("a message");
        assert_eq!((reply.id, reply.message_type), (7, MessageType::Response));
        assert!(reply.recursion_desired && reply.recursion_available && !reply.truncation);
        assert_eq!(reply.queries[0].name().to_string(), "WwW.Example.com.", "the case is kept");
        let [answer] = &reply.answers[..] else { panic!("{:?}", reply.answers) };
        assert_eq!(answer.ttl, 30);
        assert_eq!(answer.data, RData::A(A(Ipv4Addr::new(8, 8, 8, 8))));
    }

    #[test]
    fn every_reply_has_its_code_and_no_records() {
        let query = query("a.test.", RecordType::TXT);
        for (reply, code) in [
            (Reply::Empty, ResponseCode::NoError),
            (Reply::NoSuchName, ResponseCode::NXDomain),
            (Reply::Refused, ResponseCode::Refused),
            (Reply::Failure, ResponseCode::ServFail),
        ] {
            let message = Message::from_vec(&query.reply(reply)).expect("a message");
            assert_eq!(message.response_code, code);
            assert!(message.answers.is_empty() && message.edns.is_none());
        }
    }

    #[test]
    fn only_addresses_of_answered_names_need_an_alias() {
        assert_eq!(reply_for(Kind::Address, true), Plan::Alias);
        assert_eq!(reply_for(Kind::Address, false), Plan::Reply(Reply::Refused));
        for kind in [
            RecordType::AAAA,
            RecordType::HTTPS,
            RecordType::SVCB,
            RecordType::TXT,
            RecordType::MX,
            RecordType::ANY,
        ] {
            let kind = query("a.test.", kind).kind();
            assert_eq!(reply_for(kind, true), Plan::Reply(Reply::Empty));
            assert_eq!(reply_for(kind, false), Plan::Reply(Reply::Refused));
        }
        let pointer = query("4.4.8.8.in-addr.arpa.", RecordType::PTR).kind();
        assert_eq!(reply_for(pointer, false), Plan::Reply(Reply::NoSuchName));
        assert_eq!(reply_for(pointer, true), Plan::Reply(Reply::NoSuchName));
    }

    #[test]
    fn edns_is_ignored_and_never_answered() {
        let mut asked = message("a.test.", RecordType::A);
        asked.set_edns(Edns::new());
        let query = Query::read(&bytes(&asked)).expect("a question");
        assert!(Message::from_vec(&query.reply(Reply::Empty)).expect("a message").edns.is_none());
    }

    #[test]
    fn the_longest_name_fits_a_datagram() {
        let label = "x".repeat(63);
        let name = format!("{label}.{label}.{label}.{}.", "y".repeat(61));
        let reply = query(&name, RecordType::A).reply(Reply::Address(Ipv4Addr::LOCALHOST));
        assert!(reply.len() <= MAX_UDP, "{}", reply.len());
    }

    #[test]
    fn what_cannot_be_answered_is_told_or_dropped() {
        let code = |bytes: &[u8]| {
            let reply = Query::read(bytes).expect_err("malformed").reply;
            reply.map(|reply| Message::from_vec(&reply).expect("a message").response_code)
        };
        let good = bytes(&message("a.test.", RecordType::A));
        assert_eq!(code(&[]), None);
        assert_eq!(code(&good[..11]), None);
        assert_eq!(code(&good[..12]), Some(ResponseCode::FormErr));
        assert_eq!(code(&good[..good.len() - 1]), Some(ResponseCode::FormErr));
        let changed = |at: usize, value: u8| {
            let mut bytes = good.clone();
            bytes[at] = value;
            bytes
        };
        assert_eq!(code(&changed(2, 0x81)), None, "a reply");
        assert_eq!(code(&changed(2, 0x29)), Some(ResponseCode::NotImp), "an update");
        assert_eq!(code(&changed(2, 0x03)), Some(ResponseCode::FormErr), "truncated");
        assert_eq!(code(&changed(5, 0)), Some(ResponseCode::FormErr), "no question");
        assert_eq!(code(&changed(5, 2)), Some(ResponseCode::FormErr), "two questions");
        assert_eq!(code(&changed(good.len() - 1, 3)), Some(ResponseCode::NotImp), "class CH");
        assert_eq!(code(&changed(12, 0xc0)), Some(ResponseCode::FormErr), "a pointer to itself");
        let padded = [&good[..], &[0; MAX_TCP]].concat();
        assert_eq!(code(&padded), Some(ResponseCode::FormErr));
        let reply = Query::read(&padded).expect_err("too long").reply.expect("a reply");
        assert_eq!(reply.len(), 12, "no larger than what was asked");
    }

    #[test]
    fn bytes_that_no_name_has_do_not_make_one() {
        let with_label = |label: &[u8]| {
            let mut bytes = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
            bytes.push(u8::try_from(label.len()).expect("short"));
            bytes.extend_from_slice(label);
            bytes.extend_from_slice(b"\x04test\x00\x00\x01\x00\x01");
            Query::read(&bytes).expect("a question")
        };
        assert_eq!(with_label(b"AB").name(), "ab.test");
        for label in [&b"a.b"[..], b"a b", b"a\0b", b"\xff\xfe", "ü".as_bytes(), b"a\nb", b"*", b"a\\b"] {
            let query = with_label(label);
            assert!(!is_normal(query.name()), "{}", query.name());
            assert!(query.name().bytes().all(|byte| byte.is_ascii_graphic()), "{:?}", query.name());
            assert!(query.reply(Reply::Refused).len() <= MAX_UDP);
        }
        let root = [0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1];
        assert_eq!(Query::read(&root).expect("a question").name(), "");
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..600),
            is_query in any::<bool>(),
        ) {
            if is_query && bytes.len() > 12 {
                bytes[2..6].copy_from_slice(&[1, 0, 0, 1]);
            }
            match Query::read(&bytes) {
                Ok(query) => {
                    let reply = query.reply(Reply::Address(Ipv4Addr::LOCALHOST));
                    prop_assert!(reply.len() <= MAX_UDP);
                    prop_assert!(query.name().len() <= 4 * 255);
                }
                Err(malformed) => prop_assert!(malformed.reply.is_none_or(|reply| reply.len() == 12)),
            }
        }

        #[test]
        fn no_change_of_a_question_makes_the_reader_panic(at in 0..24_usize, value in any::<u8>()) {
            let mut bytes = bytes(&message("a.test.", RecordType::A));
            bytes[at] = value;
            if let Ok(query) = Query::read(&bytes) {
                prop_assert!(query.reply(Reply::Empty).len() <= MAX_UDP);
            }
        }
    }
}
