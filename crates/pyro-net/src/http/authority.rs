//! The host that the requests of a connection must be for.

use hyper::header::HOST;
use hyper::{Method, Request, Version};

/// The host that requests must name, and the port of the connection.
#[derive(Clone, Debug)]
pub(crate) struct Authority {
    pub(crate) name: String,
    pub(crate) port: u16,
    /// The port that need not be named.
    pub(crate) usual_port: u16,
}

impl Authority {
    /// Why a request is not for this host.
    pub(super) fn refuses<B>(&self, request: &Request<B>) -> Option<&'static str> {
        if request.method() == Method::CONNECT {
            return Some("CONNECT asks for another connection");
        }
        let is_http2 = request.version() == Version::HTTP_2;
        // In HTTP/2 the host has a field of its own, and Host is not needed.
        match request.uri().authority() {
            Some(_) if !is_http2 => return Some("the request line names a host of its own"),
            Some(named) if !self.is(named.as_str()) => return Some("the request names another host"),
            None if is_http2 => return Some("the request names no host"),
            _ => {}
        }
        let mut hosts = request.headers().get_all(HOST).iter();
        match (hosts.next(), hosts.next()) {
            (Some(host), None) if host.to_str().is_ok_and(|host| self.is(host)) => None,
            (Some(_), None) => Some("Host names another host"),
            (Some(_), Some(_)) => Some("there are two Hosts"),
            (None, _) if is_http2 => None,
            (None, _) => Some("there is no Host"),
        }
    }

    fn is(&self, text: &str) -> bool {
        let (name, port) = match text.rsplit_once(':') {
            Some((name, port)) => (name, port.parse().ok()),
            None => (text, Some(self.usual_port)),
        };
        let name = name.strip_suffix('.').unwrap_or(name);
        name.eq_ignore_ascii_case(&self.name) && port == Some(self.port)
    }
}
