//! The client against peers that behave, and against peers that do not.

use std::io::{IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}"#;

/// A monitor that greets, and then answers the requests in order with `script`.
async fn peer(mut stream: UnixStream, script: Vec<String>) -> Vec<String> {
    let mut requests = Vec::new();
    stream.write_all(format!("{GREETING}\r\n").as_bytes()).await.expect("sent");
    for answer in std::iter::once(r#"{"return": {}, "id": 1}"#.to_owned()).chain(script) {
        let mut line = Vec::new();
        while !line.ends_with(b"\n") {
            match stream.read_u8().await {
                Ok(byte) => line.push(byte),
                Err(_) => return requests,
            }
        }
        requests.push(String::from_utf8(line).expect("UTF-8"));
        if stream.write_all(format!("{answer}\r\n").as_bytes()).await.is_err() {
            return requests;
        }
    }
    requests
}

async fn connect(script: &[&str]) -> (Qmp, tokio::task::JoinHandle<Vec<String>>) {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    let peer = tokio::spawn(peer(theirs, script.iter().map(|line| (*line).to_owned()).collect()));
    (Qmp::connect(ours).await.expect("connected"), peer)
}

/// Connects to a peer that says `bytes`, ends its side, and listens on.
async fn connect_to(bytes: &[u8]) -> Result<Qmp, ControlError> {
    let (ours, mut theirs) = UnixStream::pair().expect("a pair");
    let bytes = bytes.to_vec();
    let peer = tokio::spawn(async move {
        // It may be hung up on in the middle.
        theirs.write_all(&bytes).await.ok();
        theirs.shutdown().await.ok();
        theirs
    });
    let result = tokio::time::timeout(Duration::from_secs(20), Qmp::connect(ours)).await.expect("no hang");
    drop(peer.await.expect("no panic"));
    result
}

#[tokio::test]
async fn answers_are_matched_by_id_and_events_are_passed_over() {
    let (mut qmp, peer) = connect(&[
        "{\"event\": \"STOP\", \"timestamp\": {\"seconds\": 1, \"microseconds\": 2}}\n{\"return\": {\"late\": 1}, \"id\": 1}\n{\"return\": {}, \"id\": 2}",
        r#"{"error": {"class": "GenericError", "desc": "no such thing"}, "id": 3}"#,
        r#"{"return": {}, "id": 4}"#,
    ])
    .await;
    qmp.execute(&qapi_qmp::stop {}).await.expect("stopped");
    let refused = qmp.execute(&qapi_qmp::cont {}).await.expect_err("refused");
    assert_eq!(refused.to_string(), "the VMM refused \"cont\": no such thing");
    qmp.execute(&qapi_qmp::cont {}).await.expect("a refusal does no harm");
    let requests = peer.await.expect("no panic");
    assert_eq!(requests[1], "{\"execute\":\"stop\",\"arguments\":{},\"id\":2}\n");
}

#[tokio::test]
async fn a_command_that_nobody_waits_for_does_no_harm() {
    let (mut qmp, _peer) = connect(&[
        // No answer to the first, then both.
        r#"{"event": "RESUME"}"#,
        "{\"return\": {\"stale\": true}, \"id\": 2}\n{\"return\": {}, \"id\": 3}",
    ])
    .await;
    let dropped = tokio::time::timeout(Duration::from_millis(100), qmp.execute(&qapi_qmp::stop {})).await;
    assert!(dropped.is_err(), "there was no answer to it");
    qmp.execute(&qapi_qmp::cont {}).await.expect("the right answer");
}

#[tokio::test]
async fn garbage_is_an_error() {
    let deep = [b"[".repeat(200_000), b"\n".to_vec()].concat();
    let samples: [(&[u8], &str); 6] = [
        (b"hello\n", "no message"),
        (b"\xff\xfe\n", "no message"),
        (b"\n", "no message"),
        (b"{\"return\": {}}\n", "no greeting"),
        (&deep, "no message"),
        (b"{\"QMP\": {}}\n{\"return\": 7, \"id\": 1}\n", "another shape"),
    ];
    for (bytes, text) in samples {
        let error = connect_to(bytes).await.expect_err("garbage");
        assert!(error.to_string().contains(text), "{error} does not say {text:?}");
    }
    assert!(matches!(connect_to(b"").await, Err(ControlError::Ended)));
    assert!(matches!(connect_to(GREETING.as_bytes()).await, Err(ControlError::Ended)));
}

#[tokio::test]
async fn a_line_without_end_costs_one_mebibyte_at_most() {
    let (ours, mut theirs) = UnixStream::pair().expect("a pair");
    let flood = tokio::spawn(async move {
        let mut sent = 0_usize;
        while theirs.write_all(&[b'x'; 64 << 10]).await.is_ok() {
            sent += 64 << 10;
        }
        sent
    });
    let error = Qmp::connect(ours).await.expect_err("too long");
    assert!(error.to_string().contains("1 MiB"), "{error}");
    assert!(flood.await.expect("no panic") < 4 << 20);
}

#[tokio::test]
async fn a_long_refusal_is_cut() {
    let long = format!(r#"{{"error": {{"class": "X", "desc": "{}"}}, "id": 2}}"#, "é".repeat(5000));
    let (mut qmp, _peer) = connect(&[&long]).await;
    match qmp.execute(&qapi_qmp::stop {}).await {
        Err(ControlError::Refused { description, .. }) => assert_eq!(description.chars().count(), 500),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn the_end_of_the_peer_is_told_apart() {
    let (mut qmp, peer) = connect(&[]).await;
    peer.await.expect("no panic");
    assert!(matches!(qmp.execute(&qapi_qmp::stop {}).await, Err(ControlError::Ended)));
    qmp.quit().await.expect("it has quit already");
}

#[tokio::test]
async fn a_descriptor_goes_with_the_first_byte_of_its_command() {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("a pair");
    ours.set_nonblocking(true).expect("non-blocking");
    let peer = std::thread::spawn(move || {
        let mut theirs = theirs;
        std::io::Write::write_all(&mut theirs, format!("{GREETING}\n").as_bytes()).expect("sent");
        let mut buffer = [0; 4096];
        let _count = theirs.read(&mut buffer).expect("the capabilities");
        std::io::Write::write_all(&mut theirs, b"{\"return\": {}, \"id\": 1}\n").expect("sent");
        let (text, fd) = receive_with_fd(&theirs);
        std::io::Write::write_all(&mut theirs, b"{\"return\": {}, \"id\": 2}\n").expect("sent");
        let mut content = String::new();
        std::fs::File::from(fd).read_to_string(&mut content).expect("read");
        (text, content)
    });
    let mut qmp = Qmp::connect(UnixStream::from_std(ours).expect("registered")).await.expect("connected");
    let (read, write) = rustix::pipe::pipe().expect("a pipe");
    rustix::io::write(&write, b"device state").expect("written");
    drop(write);
    let getfd = qapi_qmp::getfd { fdname: "state".to_owned() };
    qmp.execute_with_fd(&getfd, read.as_fd()).await.expect("taken");
    let (text, content) = peer.join().expect("no panic");
    assert!(text.contains(r#""execute":"getfd","arguments":{"fdname":"state"}"#), "{text}");
    assert_eq!(content, "device state");
}

fn receive_with_fd(stream: &std::os::unix::net::UnixStream) -> (String, OwnedFd) {
    let mut bytes = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [IoSliceMut::new(&mut bytes)];
    let message =
        rustix::net::recvmsg(stream, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC).expect("received");
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    (String::from_utf8_lossy(&bytes[..message.bytes]).into_owned(), fd.expect("a descriptor"))
}

/// Against the real thing, without a machine. Skipped where there is none.
#[tokio::test]
async fn qemu_takes_a_descriptor() {
    const QEMU: &str = "/usr/bin/qemu-system-x86_64";
    if !std::path::Path::new(QEMU).exists() {
        println!("skipped: qemu_takes_a_descriptor: no {QEMU}");
        return;
    }
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("a pair");
    ours.set_nonblocking(true).expect("non-blocking");
    let mut spawn = pyro_process::Spawn::new(QEMU, std::path::Path::new("/"));
    spawn.args(["-M", "none", "-nodefaults", "-display", "none", "-chardev", "socket,id=c,fd=4"]);
    spawn.args(["-mon", "chardev=c,mode=control"]).fd(theirs.into(), 4);
    let mut child = spawn.spawn().expect("started");
    let mut qmp = Qmp::connect(UnixStream::from_std(ours).expect("registered")).await.expect("connected");
    let (read, _write) = rustix::pipe::pipe().expect("a pipe");
    let getfd = qapi_qmp::getfd { fdname: "state".to_owned() };
    qmp.execute_with_fd(&getfd, read.as_fd()).await.expect("taken");
    let refused = qmp.execute(&getfd).await.expect_err("a getfd without a descriptor");
    assert!(matches!(refused, ControlError::Refused { command: "getfd", .. }), "{refused:?}");
    qmp.execute(&qapi_qmp::closefd { fdname: "state".to_owned() }).await.expect("it was there");
    qmp.quit().await.expect("told to quit");
    assert!(child.wait().expect("reaped").success());
}
