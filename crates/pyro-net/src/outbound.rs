//! How this host reaches the internet: through a proxy or not, and whose certificates it trusts.

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::Empty;
use hyper::client::conn::http1;
use hyper::header::{HOST, HeaderValue, PROXY_AUTHORIZATION};
use hyper::{Method, Request};
use hyper_util::client::proxy::matcher::Matcher;
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore};
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio::sync::OnceCell;
use tokio::task::JoinSet;

use crate::certificates::provider;

/// What a user has told programs about the way to the internet. Its text shows no proxy's password.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outbound {
    /// The proxy for connections to port 80.
    pub http_proxy: Option<String>,
    /// The proxy for all others.
    pub https_proxy: Option<String>,
    /// The proxy where the one of its kind is not set.
    pub all_proxy: Option<String>,
    /// Hosts that are reached without a proxy.
    pub no_proxy: Option<String>,
    /// A file with the certificates of authorities, in place of the host's own.
    pub roots: Option<PathBuf>,
}

impl fmt::Debug for Outbound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_set = |proxy: &Option<String>| proxy.is_some();
        f.debug_struct("Outbound")
            .field("http_proxy", &is_set(&self.http_proxy))
            .field("https_proxy", &is_set(&self.https_proxy))
            .field("all_proxy", &is_set(&self.all_proxy))
            .field("no_proxy", &self.no_proxy)
            .field("roots", &self.roots)
            .finish()
    }
}

impl Outbound {
    /// Reads the variables that programs agree upon: `HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY`, `NO_PROXY`, in capitals or
    /// not, and `SSL_CERT_FILE`. An empty one is as good as none.
    pub fn from_variables(get: impl Fn(&str) -> Option<OsString>) -> Self {
        let set = |name: &str| get(name).filter(|value| !value.is_empty());
        let either = |name: &str| {
            let value = set(&name.to_ascii_lowercase()).or_else(|| set(name));
            value.and_then(|value| value.into_string().ok())
        };
        Self {
            // In capitals, a web server would take it from a header of its visitor: as curl, only the other is heard.
            http_proxy: set("http_proxy").and_then(|value| value.into_string().ok()),
            https_proxy: either("HTTPS_PROXY"),
            all_proxy: either("ALL_PROXY"),
            no_proxy: either("NO_PROXY"),
            roots: set("SSL_CERT_FILE").map(PathBuf::from),
        }
    }

    /// The proxy for a connection to this host and port; none: it is reached directly.
    pub(crate) fn proxy_for(&self, host: &str, port: u16) -> io::Result<Option<Proxy>> {
        if (&self.http_proxy, &self.https_proxy, &self.all_proxy) == (&None, &None, &None) {
            return Ok(None);
        }
        let text = |value: &Option<String>| value.clone().unwrap_or_default();
        let matcher = Matcher::builder()
            .http(text(&self.http_proxy))
            .https(text(&self.https_proxy))
            .all(text(&self.all_proxy))
            .no(text(&self.no_proxy))
            .build();
        let scheme = if port == 80 { "http" } else { "https" };
        let uri = format!("{scheme}://{host}:{port}/").parse().map_err(io::Error::other)?;
        let Some(found) = matcher.intercept(&uri) else { return Ok(None) };
        let uri = found.uri();
        if uri.scheme_str() != Some("http") {
            let text = format!(
                "the host's proxy is reached by {}, only http is known; set HTTPS_PROXY to http://HOST:PORT",
                uri.scheme_str().unwrap_or("nothing")
            );
            return Err(io::Error::new(io::ErrorKind::Unsupported, text));
        }
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
        let port = uri.port_u16().unwrap_or(80);
        Ok(Some(Proxy { host, port, authorization: found.basic_auth().cloned() }))
    }
}

/// A proxy that connections are asked of.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Proxy {
    pub(crate) host: String,
    pub(crate) port: u16,
    authorization: Option<HeaderValue>,
}

impl Proxy {
    /// Asks a proxy that is connected for a connection to another host. What the other side has said already comes with it.
    pub(crate) async fn tunnel(
        &self,
        stream: TcpStream,
        host: &str,
        port: u16,
    ) -> io::Result<(TcpStream, Bytes)> {
        let to = match host.parse() {
            Ok(address) => std::net::SocketAddr::new(address, port).to_string(),
            Err(_) => format!("{host}:{port}"),
        };
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
        let mut task = JoinSet::new();
        task.spawn(async move { drop(connection.with_upgrades().await) });
        let mut request = Request::builder().method(Method::CONNECT).uri(&to).header(HOST, &to);
        if let Some(authorization) = &self.authorization {
            request = request.header(PROXY_AUTHORIZATION, authorization);
        }
        let request = request.body(Empty::<Bytes>::new()).map_err(io::Error::other)?;
        let response = sender.send_request(request).await.map_err(io::Error::other)?;
        if !response.status().is_success() {
            let text = format!("the proxy {}:{} answered {}", self.host, self.port, response.status());
            return Err(io::Error::other(text));
        }
        let upgraded = hyper::upgrade::on(response).await.map_err(io::Error::other)?;
        let parts = upgraded.downcast::<TokioIo<TcpStream>>();
        let parts = parts.map_err(|_| io::Error::other("the proxy's connection is of another kind"))?;
        Ok((parts.io.into_inner(), parts.read_buf))
    }
}

/// Whose certificates servers must have. Read when the first is needed.
#[derive(Debug, Default)]
pub(crate) struct Roots(OnceCell<Arc<ClientConfig>>);

impl Roots {
    /// How to speak TLS with servers.
    pub(crate) async fn client(&self, outbound: &Outbound) -> io::Result<Arc<ClientConfig>> {
        let load = || async {
            let file = outbound.roots.clone();
            let loaded = tokio::task::spawn_blocking(move || load(file)).await;
            loaded.map_err(io::Error::other).flatten().map(Arc::new)
        };
        self.0.get_or_try_init(load).await.cloned()
    }
}

fn load(file: Option<PathBuf>) -> io::Result<ClientConfig> {
    let found = match &file {
        Some(file) => rustls_native_certs::load_certs_from_paths(Some(file), None),
        None => rustls_native_certs::load_native_certs(),
    };
    let mut roots = RootCertStore::empty();
    let (added, _refused) = roots.add_parsable_certificates(found.certs);
    if added == 0 {
        let place = file.map_or_else(|| "on this host".to_owned(), |file| format!("in '{}'", file.display()));
        let cause = found.errors.first().map_or_else(String::new, |error| format!(": {error}"));
        let text = format!(
            "there are no certificates of authorities {place}{cause}; install ca-certificates, or set SSL_CERT_FILE"
        );
        return Err(io::Error::new(io::ErrorKind::NotFound, text));
    }
    let config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(config)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    fn outbound(variables: &[(&str, &str)]) -> Outbound {
        let find = |name: &str| variables.iter().find(|(own, _)| *own == name).map(|(_, value)| value.into());
        Outbound::from_variables(find)
    }

    #[test]
    fn the_usual_variables_name_the_proxy() {
        let proxy = |variables: &[(&str, &str)], port| {
            let found = outbound(variables).proxy_for("a.test", port).expect("good");
            found.map(|proxy| format!("{}:{}", proxy.host, proxy.port))
        };
        assert_eq!(proxy(&[], 443), None);
        assert_eq!(proxy(&[("HTTPS_PROXY", "")], 443), None);
        let https = [("https_proxy", "http://user:word@proxy.test:3128"), ("NO_PROXY", ".b.test, c.test")];
        assert_eq!(proxy(&https, 443).as_deref(), Some("proxy.test:3128"));
        assert_eq!(proxy(&https, 22).as_deref(), Some("proxy.test:3128"));
        assert_eq!(proxy(&https, 80), None, "only http_proxy is for it");
        assert_eq!(proxy(&[("HTTP_PROXY", "http://p.test")], 80), None, "in capitals it is not heard");
        assert_eq!(proxy(&[("ALL_PROXY", "p.test")], 80).as_deref(), Some("p.test:80"));
        let both = outbound(&https);
        for direct in ["x.b.test", "c.test"] {
            assert!(both.proxy_for(direct, 443).expect("good").is_none(), "{direct}");
        }
        assert!(!format!("{both:?}").contains("word"));
        let error = outbound(&[("HTTPS_PROXY", "socks5://p.test")]).proxy_for("a.test", 443).err();
        assert!(error.expect("not known").to_string().contains("set HTTPS_PROXY to http://HOST:PORT"));
    }

    #[tokio::test]
    async fn a_tunnel_is_asked_for_by_name_and_what_is_said_at_once_is_kept() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("bound");
        let outbound = outbound(&[("HTTPS_PROXY", &format!("http://user:word@{address}"))]);
        let proxy = outbound.proxy_for("a.test", 22).expect("good").expect("a proxy");
        let server = async {
            let mut heads = Vec::new();
            for answer in
                ["200 OK\r\n\r\nSSH-2.0", "407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n"]
            {
                let (mut stream, _) = listener.accept().await.expect("accepted");
                let mut head = vec![0; 4096];
                let length = stream.read(&mut head).await.expect("read");
                heads.push(String::from_utf8_lossy(&head[..length]).into_owned());
                stream.write_all(format!("HTTP/1.1 {answer}").as_bytes()).await.expect("written");
            }
            heads
        };
        let client = async {
            let connect = || async { TcpStream::connect(address).await.expect("connected") };
            let (mut stream, first) = proxy.tunnel(connect().await, "a.test", 22).await.expect("a tunnel");
            let mut said = first.to_vec();
            // What was said after the head may come with it, or a moment later.
            drop(stream.read_to_end(&mut said).await);
            assert_eq!(said, b"SSH-2.0");
            proxy.tunnel(connect().await, "2001:db8::1", 443).await.expect_err("refused").to_string()
        };
        let (heads, error) = tokio::join!(server, client);
        assert!(heads[0].starts_with("CONNECT a.test:22 HTTP/1.1\r\n"), "{}", heads[0]);
        assert!(heads[0].contains("proxy-authorization: Basic dXNlcjp3b3Jk\r\n"), "{}", heads[0]);
        assert!(heads[1].starts_with("CONNECT [2001:db8::1]:443 HTTP/1.1\r\n"), "{}", heads[1]);
        assert!(error.contains("answered 407"), "{error}");
    }
}
