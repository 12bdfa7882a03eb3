//! What connections mean, and what a server hears of one whose TLS ends here.

use std::net::{TcpListener, UdpSocket};

use hyper::Request;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};

use super::*;
use crate::certificates::CertificateAuthority;
use crate::network::{Network, Settings};
use crate::outbound::Outbound;
use crate::policy::tests::policy;

/// What a dialled address means to a guest that knows a name by it, under this policy.
fn meaning(policy: &Policy, dialled: &str) -> (Target, bool) {
    let tcp = TcpListener::bind("127.0.0.1:0").expect("bound");
    let dns = UdpSocket::bind("127.0.0.1:0").expect("bound");
    let settings = Settings::new(policy.clone());
    let network = Network::start(tcp, dns, settings).expect("started");
    let shared = network.shared();
    shared.names().alias("real.test", &[Ipv4Addr::new(8, 8, 8, 8)]).expect("an alias");
    let dialled = dialled.parse().expect("an address");
    let destination = Destination::of(shared, policy, dialled).expect("it leads somewhere");
    let allowed = destination.decide(policy).allowed;
    (destination.target, allowed)
}

#[tokio::test]
async fn a_name_that_is_denied_is_not_reached_by_the_address_that_it_really_has() {
    let name = || Target::Name("real.test".to_owned());
    for denied in [policy(true, &[], &["real.test:25"]), policy(true, &["8.8.8.0/24"], &["*.test"])] {
        assert_eq!(meaning(&denied, "8.8.8.8:25"), (name(), false));
    }
    assert_eq!(meaning(&policy(true, &[], &["real.test:25"]), "8.8.8.8:26"), (name(), true));
    // Where no rule is about the name, one about the address holds.
    let by_address = policy(false, &["8.8.8.8:53"], &[]);
    assert_eq!(meaning(&by_address, "8.8.8.8:53"), (Target::Address(Ipv4Addr::new(8, 8, 8, 8)), true));
    assert_eq!(meaning(&by_address, "8.8.8.8:54"), (name(), false));
}

#[tokio::test]
async fn a_change_ends_what_was_not_held_against_its_name_or_leads_where_it_may_not_any_more() {
    let open = policy(true, &[], &[]);
    let destination = Destination {
        target: Target::Name("a.test".to_owned()),
        address: Ipv4Addr::new(8, 8, 8, 8),
        port: 443,
    };
    let opened = Opened { destination, is_checked: false, is_read: false, peer: Mutex::default() };
    assert!(opened.is_allowed(&open));
    assert!(!opened.is_allowed(&policy(true, &[], &["evil.test"])), "it may be for that name");
    *opened.peer.lock().expect("no panic") = Some("9.9.9.9".parse().expect("an address"));
    assert!(opened.is_allowed(&open));
    assert!(!opened.is_allowed(&policy(true, &[], &["9.9.9.0/24"])));
}

/// A server that speaks TLS, and remembers the requests that it hears.
struct Site {
    address: SocketAddr,
    heard: Arc<Mutex<Vec<String>>>,
    /// Where the certificate of its authority is.
    roots: tempfile::NamedTempFile,
}

impl Site {
    /// One of this name, whose certificate is for another name.
    async fn start(certified: &str, protocol: Protocol) -> Self {
        let authority = CertificateAuthority::new([certified.to_owned()]).expect("an authority");
        let roots = tempfile::NamedTempFile::new().expect("a file");
        fs_err::write(roots.path(), authority.pem()).expect("written");
        let config = authority.server(certified, protocol).expect("a certificate");
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("bound");
        let heard = Arc::<Mutex<Vec<String>>>::default();
        let hears = Arc::clone(&heard);
        drop(tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, hears) = (TlsAcceptor::from(Arc::clone(&config)), Arc::clone(&hears));
                drop(tokio::spawn(async move {
                    let Ok(stream) = acceptor.accept(stream).await else { return };
                    let service = hyper::service::service_fn(|request: Request<hyper::body::Incoming>| {
                        let head =
                            format!("{} {} {:?}", request.method(), request.uri().path(), request.headers());
                        hears.lock().expect("no panic").push(head);
                        let is_silent = request.uri().path() == "/never";
                        async move {
                            if is_silent {
                                std::future::pending::<()>().await;
                            }
                            Ok::<_, std::convert::Infallible>(hyper::Response::new("hello".to_owned()))
                        }
                    });
                    let stream = TokioIo::new(stream);
                    match protocol {
                        Protocol::Http1 => {
                            let server = hyper::server::conn::http1::Builder::new();
                            drop(server.serve_connection(stream, service).await);
                        }
                        Protocol::Http2 => {
                            let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                            drop(server.serve_connection(stream, service).await);
                        }
                    }
                }));
            }
        }));
        Self { address, heard, roots }
    }

    fn heard(&self) -> Vec<String> {
        self.heard.lock().expect("no panic").clone()
    }
}

/// A guest's network that leads to a site by the name `a.test`, with a secret for it.
struct Net {
    network: Network,
    log: tempfile::NamedTempFile,
    placeholder: String,
}

impl Net {
    fn new(site: &Site, requests: &[&str]) -> Self {
        let hosts = [("a.test".to_owned(), site.address.to_string().parse().expect("an address"))];
        let rules = requests.iter().map(|rule| rule.parse().expect("a rule")).collect();
        let policy = policy(false, &["a.test:443"], &[]).with_hosts(hosts.into()).expect("few");
        let policy = policy.with_inspect([("a.test".parse().expect("a name"), rules)].into()).expect("few");
        let log = tempfile::NamedTempFile::new().expect("a file");
        let held = secret::tests::held("TOKEN", "the-value", "a.test");
        let placeholder = held.secret.placeholder.clone();
        let outbound = Outbound { roots: Some(site.roots.path().to_owned()), ..Outbound::default() };
        let log_file = Some(log.path().to_owned());
        let settings = Settings { log: log_file, secrets: vec![held], outbound, ..Settings::new(policy) };
        let tcp = TcpListener::bind("127.0.0.1:0").expect("bound");
        let dns = UdpSocket::bind("127.0.0.1:0").expect("bound");
        Self { network: Network::start(tcp, dns, settings).expect("started"), log, placeholder }
    }

    /// A connection of the guest to port 443 of `a.test`, and what came of it at the end.
    async fn connect(&self) -> (TcpStream, tokio::task::JoinHandle<Result<(), String>>) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("bound");
        let (client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        let shared = self.network.shared_again();
        let destination = Destination {
            target: Target::Name("a.test".to_owned()),
            address: Ipv4Addr::new(198, 18, 1, 0),
            port: 443,
        };
        assert!(destination.is_read(&shared, &shared.policy()));
        let opened =
            Arc::new(Opened { destination, is_checked: true, is_read: true, peer: Mutex::default() });
        let guest = accepted.expect("accepted").0;
        let served = tokio::spawn(async move {
            let (_number, revoked) = shared.enlist(Arc::clone(&opened));
            let decision = opened.destination.decide(&shared.policy());
            let carried = Arc::<Carried>::default();
            let connection = Connection { shared: &shared, opened: &opened, carried: &carried };
            connection.serve_tls(guest, decision, revoked).await.map_err(|error| error_text(&error))
        });
        (client.expect("connected"), served)
    }

    /// How the guest speaks TLS: it trusts the network's authority and nothing else.
    fn client(&self, protocols: &[Protocol]) -> Arc<rustls::ClientConfig> {
        use rustls::pki_types::pem::PemObject;
        let pem = self.network.authority().expect("there is a secret").as_bytes();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(rustls::pki_types::CertificateDer::from_pem_slice(pem).expect("PEM")).expect("a root");
        let mut config = rustls::ClientConfig::builder_with_provider(crate::certificates::provider())
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.alpn().to_vec()).collect();
        Arc::new(config)
    }

    async fn handshake(
        &self,
        stream: TcpStream,
        protocols: &[Protocol],
    ) -> io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
        let name = "a.test".try_into().expect("a name");
        tokio_rustls::TlsConnector::from(self.client(protocols)).connect(name, stream).await
    }

    fn logged(&self) -> String {
        fs_err::read_to_string(self.log.path()).expect("a log")
    }
}

/// What one request of HTTP/1.1 over this stream is answered.
async fn ask(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), request: &str) -> String {
    stream.write_all(request.as_bytes()).await.expect("written");
    let mut answer = vec![0; 4096];
    let length = stream.read(&mut answer).await.expect("read");
    String::from_utf8_lossy(&answer[..length]).into_owned()
}

#[tokio::test]
async fn a_server_hears_the_secret_and_the_guest_has_its_placeholder_only() {
    let site = Site::start("a.test", Protocol::Http1).await;
    let net = Net::new(&site, &["GET /v1/*"]);
    let (stream, served) = net.connect().await;
    // The server has no HTTP/2: the guest is not offered it either.
    let mut stream = net.handshake(stream, &[Protocol::Http2, Protocol::Http1]).await.expect("TLS");
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
    let head = |path: &str| {
        format!("GET {path} HTTP/1.1\r\nHost: a.test\r\nAuthorization: Bearer {}\r\n\r\n", net.placeholder)
    };
    assert!(ask(&mut stream, &head("/v1/x?token=1")).await.starts_with("HTTP/1.1 200 OK"));
    let refused = ask(&mut stream, &head("/admin")).await;
    assert!(
        refused.starts_with("HTTP/1.1 403") && refused.contains("no inspect rule allows it"),
        "{refused}"
    );
    drop(stream);
    served.await.expect("no panic").expect("served");
    let heard = site.heard();
    assert_eq!(heard.len(), 1, "{heard:?}");
    assert!(heard[0].starts_with("GET /v1/x ") && heard[0].contains("Bearer the-value"), "{heard:?}");
    let logged = net.logged();
    assert!(logged.contains("with secret TOKEN") && !logged.contains("the-value"), "{logged}");
    assert!(!logged.contains("token=1"), "{logged}");
}

#[tokio::test]
async fn requests_of_http2_are_read_one_by_one() {
    let site = Site::start("a.test", Protocol::Http2).await;
    let net = Net::new(&site, &[]);
    let (stream, served) = net.connect().await;
    let stream = net.handshake(stream, &[Protocol::Http2, Protocol::Http1]).await.expect("TLS");
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .expect("HTTP/2");
    let carried = tokio::spawn(connection);
    let status = async |host: &str, method: &str| {
        let request = Request::builder()
            .method(method)
            .uri(format!("https://{host}/x"))
            .header("x-api-key", &net.placeholder)
            .body(String::new())
            .expect("a request");
        sender
            .clone()
            .send_request(request)
            .await
            .map(|response| response.status().as_u16())
            .unwrap_or_default()
    };
    let statuses =
        tokio::join!(status("a.test", "GET"), status("a.test:443", "POST"), status("b.test", "GET"));
    assert_eq!(statuses, (200, 200, 403));
    drop(sender);
    carried.await.expect("no panic").expect("ended");
    served.await.expect("no panic").expect("served");
    let heard = site.heard();
    assert_eq!(heard.len(), 2, "{heard:?}");
    assert!(heard.iter().all(|head| head.contains("the-value")), "{heard:?}");
}

#[tokio::test]
async fn a_server_that_cannot_prove_its_name_hears_nothing() {
    let site = Site::start("other.test", Protocol::Http1).await;
    let net = Net::new(&site, &[]);
    let (stream, served) = net.connect().await;
    net.handshake(stream, &[Protocol::Http1]).await.expect_err("reset");
    let error = served.await.expect("no panic").expect_err("refused");
    assert!(error.starts_with("TLS with the server failed: "), "{error}");
    assert!(site.heard().is_empty());
}

#[tokio::test]
async fn what_is_no_tls_gets_no_secret() {
    let site = Site::start("a.test", Protocol::Http1).await;
    let net = Net::new(&site, &[]);
    let (mut stream, served) = net.connect().await;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n").await.expect("written");
    stream.read_u8().await.expect_err("reset");
    let error = served.await.expect("no panic").expect_err("refused");
    assert!(error.starts_with("it is not TLS"), "{error}");
    assert!(site.heard().is_empty());
}

#[tokio::test]
async fn a_revoked_rule_ends_a_connection_whose_requests_are_read() {
    let site = Site::start("a.test", Protocol::Http1).await;
    let net = Net::new(&site, &[]);
    let (stream, served) = net.connect().await;
    let mut stream = net.handshake(stream, &[Protocol::Http1]).await.expect("TLS");
    assert!(ask(&mut stream, "GET / HTTP/1.1\r\nHost: a.test\r\n\r\n").await.contains("200 OK"));
    assert_eq!(net.network.set_policy(policy(false, &["b.test"], &[])).closed_connections, 1);
    stream.read_u8().await.expect_err("reset");
    let error = served.await.expect("no panic").expect_err("revoked");
    assert_eq!(error, "the policy does not allow it any more");
}

#[tokio::test]
async fn a_revoked_rule_ends_requests_of_http2_that_a_server_never_answers() {
    let site = Site::start("a.test", Protocol::Http2).await;
    let net = Net::new(&site, &[]);
    let (stream, served) = net.connect().await;
    let stream = net.handshake(stream, &[Protocol::Http2]).await.expect("TLS");
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .expect("HTTP/2");
    let carried = tokio::spawn(connection);
    let request = Request::builder().uri("https://a.test/never").body(String::new()).expect("a request");
    let asked = tokio::spawn(sender.send_request(request));
    while site.heard().is_empty() {
        tokio::task::yield_now().await;
    }
    let alive = tokio::runtime::Handle::current().metrics().num_alive_tasks();
    assert_eq!(net.network.set_policy(policy(false, &["b.test"], &[])).closed_connections, 1);
    assert_eq!(
        served.await.expect("no panic").expect_err("revoked"),
        "the policy does not allow it any more"
    );
    asked.await.expect("no panic").expect_err("reset");
    drop(carried.await);
    // The connection to the server, and what waited for its answer, are gone as well.
    let gone = async {
        while tokio::runtime::Handle::current().metrics().num_alive_tasks() > alive - 4 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), gone).await.expect("no task is left");
}
