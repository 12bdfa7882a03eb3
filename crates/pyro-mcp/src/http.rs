//! Streamable HTTP: several clients at once, on this machine, each with the token.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use rmcp::transport::streamable_http_server::session::local::LocalSessionManager;
use rmcp::transport::streamable_http_server::{StreamableHttpServerConfig, StreamableHttpService};
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::server::Server;

/// Where clients find the server.
const PATH: &str = "/mcp";

/// How long a session is kept after the longest command that it may have begun.
const IDLE: Duration = Duration::from_secs(3600);

/// How the server is reached over HTTP.
#[derive(Clone, Debug)]
pub struct HttpOptions {
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// What each request must carry: `Authorization: Bearer TOKEN`.
    pub token: String,
}

/// Serves clients over HTTP until `stop` is cancelled. `ready` is told the address once it is bound.
///
/// A server on a loopback address also refuses requests that name another host, which a web page could make by
/// having its own name resolve to this machine.
///
/// # Errors
/// When the address cannot be bound.
pub async fn serve_http(
    server: &Server,
    options: HttpOptions,
    stop: CancellationToken,
    ready: impl FnOnce(String),
) -> std::io::Result<()> {
    let listener = TcpListener::bind(options.listen).await?;
    let address = listener.local_addr()?;
    // Web pages of other machines are told no here; those of this one cannot read an answer either, for none allows it.
    let mut config = StreamableHttpServerConfig::default()
        .with_allowed_origins(["http://localhost:*", "http://127.0.0.1:*", "http://[::1]:*"])
        .enforce_origin_validation()
        .with_cancellation_token(stop.child_token());
    if !address.ip().is_loopback() {
        config = config.disable_allowed_hosts();
    }
    let service = {
        let server = server.clone();
        let mut sessions = LocalSessionManager::default();
        // A session whose client says nothing may be waiting for a long command.
        sessions.session_config.keep_alive = Some(server.longest_life() + IDLE);
        StreamableHttpService::new(move || Ok(server.for_one_client()), Arc::new(sessions), config)
    };
    let token = Arc::new(Sha256::digest(options.token.as_bytes()).to_vec());
    let router =
        Router::new().route_service(PATH, service).layer(middleware::from_fn_with_state(token, with_token));
    let _watch = server.end_with(&stop);
    ready(format!("http://{address}{PATH}"));
    axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned()).await
}

/// Lets a request pass that carries the token. Digests are compared, so that the time it takes says nothing about the
/// token.
async fn with_token(State(token): State<Arc<Vec<u8>>>, request: Request, next: Next) -> Response {
    let given = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let given = given.and_then(|value| {
        let (scheme, token) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
    });
    if given.is_some_and(|given| Sha256::digest(given.as_bytes()).to_vec() == *token) {
        return next.run(request).await;
    }
    let words =
        "this server needs the header `Authorization: Bearer TOKEN`; it printed the token when it started\n";
    (StatusCode::UNAUTHORIZED, [(header::WWW_AUTHENTICATE, "Bearer realm=\"pyro\"")], words).into_response()
}
