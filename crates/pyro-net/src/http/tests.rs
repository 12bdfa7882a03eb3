//! Requests of a guest, as a server would see them.

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::*;
use std::sync::Mutex as StdMutex;

/// A server that answers each request with its bytes, and remembers that it was called.
#[derive(Clone, Default)]
struct Server(Arc<StdMutex<Vec<DuplexStream>>>);

impl Upstream for Server {
    type Stream = DuplexStream;

    async fn connect(&self) -> io::Result<DuplexStream> {
        let (own, other) = tokio::io::duplex(64 << 10);
        self.0.lock().expect("no panic").push(other);
        Ok(own)
    }

    fn decide<B>(&self, _: &mut Request<B>, refused: Option<&'static str>) -> Result<(), String> {
        refused.map_or(Ok(()), |why| Err(why.to_owned()))
    }
}

fn authority() -> Authority {
    Authority { name: "example.test".to_owned(), port: 80, usual_port: 80 }
}

/// What comes back for these bytes, and whether the server saw anything.
async fn talk(request: &str) -> (String, bool) {
    let server = Server::default();
    let (mut guest, own) = tokio::io::duplex(64 << 10);
    let task = tokio::spawn(serve(own, authority(), server.clone(), Protocol::Http1));
    guest.write_all(request.as_bytes()).await.expect("written");
    let mut answer = vec![0; 4096];
    let read = async {
        let length = guest.read(&mut answer).await.expect("read");
        String::from_utf8_lossy(&answer[..length]).into_owned()
    };
    let text = tokio::time::timeout(Duration::from_millis(200), read).await.unwrap_or_default();
    task.abort();
    let reached = !server.0.lock().expect("no panic").is_empty();
    (text, reached)
}

#[tokio::test]
async fn a_request_for_another_host_reaches_nobody() {
    for request in [
        "GET / HTTP/1.1\r\nHost: other.test\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: example.test.other.test\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: example.test:81\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: example.test\r\nHost: other.test\r\n\r\n",
        "GET / HTTP/1.1\r\n\r\n",
        "GET http://other.test/ HTTP/1.1\r\nHost: example.test\r\n\r\n",
        "CONNECT other.test:443 HTTP/1.1\r\nHost: example.test\r\n\r\n",
        "no HTTP at all\r\n\r\n",
    ] {
        let (answer, reached) = talk(request).await;
        assert!(answer.starts_with("HTTP/1.1 4"), "{request:?}: {answer:?}");
        assert!(!reached, "{request:?}");
    }
}

#[tokio::test]
async fn a_request_for_the_host_is_passed_on_and_a_second_one_for_another_is_not() {
    let server = Server::default();
    let (mut guest, own) = tokio::io::duplex(64 << 10);
    drop(tokio::spawn(serve(own, authority(), server.clone(), Protocol::Http1)));
    let requests = "GET /a HTTP/1.1\r\nHost: EXAMPLE.test\r\nX-Odd-Case: 1\r\n\r\n\
                    GET /b HTTP/1.1\r\nHost: other.test\r\n\r\n";
    guest.write_all(requests.as_bytes()).await.expect("written");
    let mut upstream = loop {
        if let Some(upstream) = server.0.lock().expect("no panic").pop() {
            break upstream;
        }
        tokio::task::yield_now().await;
    };
    let mut seen = vec![0; 4096];
    let length = upstream.read(&mut seen).await.expect("read");
    let seen = String::from_utf8_lossy(&seen[..length]).into_owned();
    assert!(seen.starts_with("GET /a HTTP/1.1\r\n") && seen.contains("X-Odd-Case: 1"), "{seen}");
    upstream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.expect("written");
    let mut answers = String::new();
    guest.read_to_string(&mut answers).await.expect("read");
    assert!(answers.contains("\r\n\r\nok") && answers.contains("403 Forbidden"), "{answers}");
    let more = tokio::time::timeout(Duration::from_millis(100), upstream.read_u8()).await;
    assert!(!matches!(more, Ok(Ok(_))), "the second request reached the server");
}

#[test]
fn only_a_websocket_may_take_over_a_connection() {
    let request = |upgrade: &str| {
        let mut request = Request::new(());
        let headers = request.headers_mut();
        headers.insert(UPGRADE, HeaderValue::from_str(upgrade).expect("a value"));
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade, HTTP2-Settings"));
        headers.insert("http2-settings", HeaderValue::from_static("AAMAAABkAAQAAP__"));
        request
    };
    assert!(keep_websocket_only(&mut request("WebSocket")));
    for other in ["h2c", "websocket, h2c", "tls/1.2"] {
        let mut request = request(other);
        assert!(!keep_websocket_only(&mut request), "{other}");
        assert!(request.headers().is_empty(), "{other}");
    }
}

#[tokio::test]
async fn a_protocol_that_takes_over_the_connection_does() {
    let server = Server::default();
    let (mut guest, own) = tokio::io::duplex(64 << 10);
    drop(tokio::spawn(serve(own, authority(), server.clone(), Protocol::Http1)));
    let request =
        "GET /chat HTTP/1.1\r\nHost: example.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
    guest.write_all(request.as_bytes()).await.expect("written");
    let mut upstream = loop {
        if let Some(upstream) = server.0.lock().expect("no panic").pop() {
            break upstream;
        }
        tokio::task::yield_now().await;
    };
    let mut buffer = vec![0; 4096];
    let length = upstream.read(&mut buffer).await.expect("read");
    assert!(String::from_utf8_lossy(&buffer[..length]).to_lowercase().contains("upgrade: websocket"));
    let switch =
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nhello";
    upstream.write_all(switch).await.expect("written");
    let mut text = String::new();
    while !text.contains("hello") {
        let length = guest.read(&mut buffer).await.expect("read");
        assert_ne!(length, 0, "{text}");
        text.push_str(&String::from_utf8_lossy(&buffer[..length]));
    }
    guest.write_all(b"from the guest").await.expect("written");
    let length = upstream.read(&mut buffer).await.expect("read");
    assert_eq!(&buffer[..length], b"from the guest");
}

#[tokio::test]
async fn a_server_that_has_closed_an_idle_connection_is_dialled_again() {
    let server = Server::default();
    let (mut guest, own) = tokio::io::duplex(64 << 10);
    drop(tokio::spawn(serve(own, authority(), server.clone(), Protocol::Http1)));
    let mut buffer = vec![0; 4096];
    for path in ["/a", "/b"] {
        let request = format!("POST {path} HTTP/1.1\r\nHost: example.test\r\nContent-Length: 2\r\n\r\nhi");
        guest.write_all(request.as_bytes()).await.expect("written");
        let mut upstream = loop {
            if let Some(upstream) = server.0.lock().expect("no panic").pop() {
                break upstream;
            }
            tokio::task::yield_now().await;
        };
        let mut heard = String::new();
        while !heard.ends_with("hi") {
            let length = upstream.read(&mut buffer).await.expect("read");
            assert_ne!(length, 0, "{heard}");
            heard.push_str(&String::from_utf8_lossy(&buffer[..length]));
        }
        assert!(heard.starts_with(&format!("POST {path} ")), "{heard}");
        upstream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await.expect("written");
        let length = guest.read(&mut buffer).await.expect("read");
        assert!(buffer[..length].starts_with(b"HTTP/1.1 200 OK"));
        // It keeps nothing open.
        drop(upstream);
    }
}
