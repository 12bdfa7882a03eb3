//! The name in the first message of a TLS client, read from what passes by. TLS is not ended here.

use std::io;

use rustls::server::Acceptor;

/// The longest hello that is waited for, in bytes.
pub const MAX_HELLO: usize = 64 << 10;
/// The first byte of a TLS record with a handshake message.
const HANDSHAKE: u8 = 0x16;

/// Reads the hello of one connection, in pieces of any length.
#[derive(Debug)]
pub struct Hello {
    state: State,
    taken: usize,
    offers_http2: bool,
}

/// What is known after some bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HelloStep {
    /// The hello goes on.
    NeedMore,
    /// The hello is whole. It has this name in lower case, or none, as for a server that is named by its address.
    Name(Option<String>),
    /// This is no TLS hello, for this reason.
    NotTls(String),
}

enum State {
    Reading(Box<Acceptor>),
    Done(HelloStep),
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Reading(_) => f.write_str("Reading"),
            Self::Done(step) => write!(f, "Done({step:?})"),
        }
    }
}

impl Default for Hello {
    fn default() -> Self {
        Self::new()
    }
}

impl Hello {
    /// A reader that has seen nothing.
    pub fn new() -> Self {
        Self { state: State::Reading(Box::default()), taken: 0, offers_http2: false }
    }

    /// Whether the client can speak HTTP/2, once its hello is whole.
    pub fn offers_http2(&self) -> bool {
        self.offers_http2
    }

    /// Takes the next bytes; returns what is known now. After the end it returns the same again.
    pub fn feed(&mut self, bytes: &[u8]) -> HelloStep {
        let mut rest = bytes;
        while let State::Reading(acceptor) = &mut self.state {
            match rest.first() {
                None => return HelloStep::NeedMore,
                Some(&first) if self.taken == 0 && first != HANDSHAKE => {
                    let reason = format!("the first byte is {first:#04x}, not {HANDSHAKE:#04x}");
                    self.state = State::Done(HelloStep::NotTls(reason));
                    break;
                }
                Some(_) => {}
            }
            let room = MAX_HELLO - self.taken;
            if room == 0 {
                let reason = format!("the hello is longer than {MAX_HELLO} bytes");
                self.state = State::Done(HelloStep::NotTls(reason));
                break;
            }
            match step(acceptor, &rest[..rest.len().min(room)], &mut self.offers_http2) {
                Ok((taken, None)) => {
                    self.taken += taken;
                    rest = &rest[taken..];
                }
                Ok((_, Some(step))) => self.state = State::Done(step),
                Err(reason) => self.state = State::Done(HelloStep::NotTls(reason)),
            }
        }
        match &self.state {
            State::Done(step) => step.clone(),
            State::Reading(_) => HelloStep::NeedMore,
        }
    }
}

/// Gives the acceptor some bytes, of which it takes at least one.
fn step(
    acceptor: &mut Acceptor,
    mut bytes: &[u8],
    offers_http2: &mut bool,
) -> Result<(usize, Option<HelloStep>), String> {
    let reader: &mut dyn io::Read = &mut bytes;
    let taken = acceptor.read_tls(reader).map_err(|error| error.to_string())?;
    if taken == 0 {
        return Err("the hello is not taken".to_owned());
    }
    match acceptor.accept() {
        Ok(None) => Ok((taken, None)),
        Ok(Some(accepted)) => {
            let mut protocols = accepted.client_hello().alpn().into_iter().flatten();
            *offers_http2 = protocols.any(|protocol| protocol == b"h2");
            let name = accepted.client_hello().server_name().map(str::to_ascii_lowercase);
            let name = name.map(|name| name.strip_suffix('.').map(str::to_owned).unwrap_or(name));
            Ok((taken, Some(HelloStep::Name(name))))
        }
        Err((error, _alert)) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use rustls::pki_types::ServerName;
    use rustls::{ClientConfig, ClientConnection, RootCertStore};

    use super::*;

    /// What a real client says first.
    fn hello_to(server: &str, versions: &[&'static rustls::SupportedProtocolVersion]) -> Vec<u8> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .expect("versions")
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        let server = ServerName::try_from(server.to_owned()).expect("a name");
        let mut client = ClientConnection::new(Arc::new(config), server).expect("a client");
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).expect("written");
        bytes
    }

    fn name(name: &str) -> HelloStep {
        HelloStep::Name(Some(name.to_owned()))
    }

    #[test]
    fn the_name_of_a_real_hello_is_read() {
        for versions in [&[&rustls::version::TLS13][..], &[&rustls::version::TLS12], rustls::ALL_VERSIONS] {
            let bytes = hello_to("WWW.Example.com", versions);
            let mut hello = Hello::new();
            assert_eq!(hello.feed(&bytes), name("www.example.com"));
            assert_eq!(hello.feed(b"more"), name("www.example.com"), "the end stays");
        }
    }

    #[test]
    fn a_hello_to_an_address_has_no_name() {
        let bytes = hello_to("192.0.2.1", rustls::ALL_VERSIONS);
        assert_eq!(Hello::default().feed(&bytes), HelloStep::Name(None));
    }

    #[test]
    fn pieces_of_any_length_make_one_hello() {
        let bytes = hello_to("example.com", rustls::ALL_VERSIONS);
        for len in [1, 2, 5, 100] {
            let mut hello = Hello::new();
            let mut steps: Vec<_> = bytes.chunks(len).map(|piece| hello.feed(piece)).collect();
            assert_eq!(steps.pop(), Some(name("example.com")));
            assert!(steps.iter().all(|step| *step == HelloStep::NeedMore));
        }
        assert_eq!(Hello::new().feed(&[]), HelloStep::NeedMore);
    }

    #[test]
    fn a_hello_in_several_records_is_read() {
        let bytes = hello_to("example.com", rustls::ALL_VERSIONS);
        let (header, body) = bytes.split_at(5);
        let mut split = Vec::new();
        for part in body.chunks(20) {
            split.extend_from_slice(&header[..3]);
            split.extend_from_slice(&u16::try_from(part.len()).expect("short").to_be_bytes());
            split.extend_from_slice(part);
        }
        assert_eq!(Hello::new().feed(&split), name("example.com"));
    }

    #[test]
    fn other_protocols_are_known_by_their_first_byte() {
        for bytes in [&b"GET / HTTP/1.1\r\n"[..], b"SSH-2.0", b"\x00", b"\x15\x03\x01"] {
            assert!(
                matches!(Hello::new().feed(bytes), HelloStep::NotTls(reason) if reason.contains("first byte"))
            );
        }
        let mut hello = Hello::new();
        assert!(matches!(hello.feed(b"\x16GET"), HelloStep::NeedMore | HelloStep::NotTls(_)));
        assert!(matches!(hello.feed(&[b'x'; 100]), HelloStep::NotTls(_)));
    }

    #[test]
    fn a_hello_has_an_end() {
        // A handshake message that says it is 16 MiB long, in full records.
        let mut first = vec![0x16, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff];
        first.resize(5 + 0x4000, 0);
        let mut next = vec![0x16, 3, 1, 0x40, 0];
        next.resize(5 + 0x4000, 0);
        let mut hello = Hello::new();
        let mut step = hello.feed(&first);
        let mut fed = first.len();
        while step == HelloStep::NeedMore {
            assert!(fed <= MAX_HELLO, "{fed}");
            step = hello.feed(&next);
            fed += next.len();
        }
        assert!(matches!(step, HelloStep::NotTls(_)), "{step:?}");
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..300),
            looks_right in any::<bool>(),
            piece in 1..50_usize,
        ) {
            let start: &[u8] = if looks_right { &[0x16, 3, 1, 1, 0, 1, 0, 0, 252, 3, 3] } else { &[] };
            let mut hello = Hello::new();
            for part in [start, &bytes].concat().chunks(piece) {
                hello.feed(part);
            }
        }

        #[test]
        fn no_change_of_a_hello_makes_the_reader_panic(at in any::<prop::sample::Index>(), value in any::<u8>()) {
            let mut bytes = hello_to("example.com", rustls::ALL_VERSIONS);
            let at = at.index(bytes.len());
            bytes[at] = value;
            let mut hello = Hello::new();
            for part in bytes.chunks(64) {
                hello.feed(part);
            }
        }
    }
}
