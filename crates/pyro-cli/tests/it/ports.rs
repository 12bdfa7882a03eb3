//! Published ports: servers on a guest's loopback, reached by ports of this host.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::Duration;

use serde_json::Value;

use crate::support::{Pyro, kill, text};

/// A server that sends back what it hears, and ends its half when the other has ended. It listens on `$ARGV[0]`:`$ARGV[1]`.
const ECHO: &str = "use IO::Socket::IP; use Socket 'SHUT_WR'; $SIG{CHLD} = 'IGNORE';
my $listener = IO::Socket::IP->new(Listen => 128, LocalHost => $ARGV[0], LocalPort => $ARGV[1], ReuseAddr => 1) or die $!;
while (my $peer = $listener->accept) {
    next if fork; close $listener;
    while (my $got = sysread $peer, my $bytes, 65536) { my $at = 0; while ($at < $got) { $at += syswrite($peer, $bytes, $got - $at, $at) // exit } }
    shutdown $peer, SHUT_WR; exit
}";

/// A task with a server on port 7000 of its loopback.
fn create(pyro: &Pyro, flags: &[&str]) -> String {
    let line = ["task", "create", "debian:12", "--mem-mib", "512", "--id-only"];
    let id = pyro.ok(&[&line[..], flags].concat());
    echo(pyro, &id, "127.0.0.1", "7000");
    id
}

fn echo(pyro: &Pyro, id: &str, place: &str, port: &str) {
    pyro.ok(&[
        "task",
        "exec",
        id,
        "--detach",
        "--timeout-seconds",
        "500",
        "--",
        "perl",
        "-e",
        ECHO,
        place,
        port,
    ]);
    // In /proc/net the state of a socket that listens is 0A.
    let port = format!("{:04X}", port.parse::<u16>().expect("a port"));
    let listens = format!("until grep -q ':{port} .* 0A ' /proc/net/tcp /proc/net/tcp6; do :; done");
    assert!(pyro.exec(id, &listens).status.success());
}

fn ports(pyro: &Pyro, id: &str) -> Vec<Value> {
    pyro.status(id)["ports"].as_array().expect("a list").clone()
}

fn host_port(pyro: &Pyro, id: &str, at: usize) -> u16 {
    let port = ports(pyro, id)[at]["host_port"].as_u64().expect("a number");
    u16::try_from(port).expect("a port")
}

fn connect(port: u16) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port)).expect("pyro listens");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("set");
    stream
}

/// What comes back for these bytes, when the sender has ended its half.
fn echoed(port: u16, bytes: &[u8]) -> Vec<u8> {
    let stream = connect(port);
    let mut writer = stream.try_clone().expect("a clone");
    std::thread::scope(|scope| {
        scope.spawn(move || {
            writer.write_all(bytes).expect("written");
            writer.shutdown(Shutdown::Write).expect("ended");
        });
        let mut back = Vec::new();
        (&stream).read_to_end(&mut back).expect("read");
        back
    })
}

/// Ends a connection at once, as a client that was killed does.
fn reset(stream: TcpStream) {
    rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).expect("set");
    drop(stream);
}

/// Whether a connection is ended without an answer.
fn is_reset(port: u16) -> bool {
    let mut stream = connect(port);
    drop(stream.write_all(b"x"));
    !matches!(stream.read(&mut [0]), Ok(1..))
}

#[test]
fn a_server_of_a_guest_without_a_network_is_reached_by_a_port_of_this_host() {
    let pyro = Pyro::new();
    let id = create(&pyro, &["--publish", "0:7000", "-p", "0:7001"]);
    let record = pyro.status(&id);
    assert_eq!(record["network_enabled"], false, "{record}");
    let port = host_port(&pyro, &id, 0);
    assert_eq!(record["ports"][0]["host_ip"], "127.0.0.1", "{record}");
    assert_eq!(echoed(port, b"hello"), b"hello");
    // 20 MB both ways at once, whole.
    let many: Vec<u8> = (0..20_000_000_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    assert!(echoed(port, &many) == many, "bytes were lost or mixed up");
    // More at once than the channel has streams for: some wait, none fails.
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..80_u32)
            .map(|at| {
                scope.spawn(move || {
                    echoed(port, &at.to_be_bytes().repeat(1000)) == at.to_be_bytes().repeat(1000)
                })
            })
            .collect();
        assert!(all.into_iter().all(|one| one.join().expect("no panic")));
    });
    assert!(is_reset(host_port(&pyro, &id, 1)), "nobody listens in the guest");
    // Commands are served beside connections that carry nothing.
    let idle: Vec<TcpStream> = (0..64).map(|_| connect(port)).collect();
    assert_eq!(text(&pyro.exec(&id, "echo yes").stdout), "yes\n");
    // Clients that are killed end neither other connections nor the guest's whole channel.
    let mut open = connect(port);
    idle.into_iter().for_each(reset);
    (0..200).for_each(|_| reset(connect(port)));
    open.write_all(b"after").expect("written");
    let mut after = [0; 5];
    open.read_exact(&mut after).expect("answered");
    assert_eq!(&after, b"after");
    // A server on the other loopback, too.
    echo(&pyro, &id, "::1", "7001");
    assert_eq!(echoed(host_port(&pyro, &id, 1), b"six"), b"six");

    let listed = pyro.ok(&["task", "port", "list", &id]);
    assert!(listed.starts_with(&format!("127.0.0.1:{port}:7000\n")), "{listed}");
    let open = connect(port);
    let left = pyro.json(&["task", "port", "remove", &id, &port.to_string(), "--json"]);
    assert_eq!(left["ports"].as_array().map(Vec::len), Some(1), "{left}");
    assert!(!matches!((&open).read(&mut [0]), Ok(1..)), "an open connection goes on");
    TcpStream::connect(("127.0.0.1", port)).expect_err("it is closed");
    pyro.ok(&["task", "port", "add", &id, &format!("{port}:7000")]);
    assert_eq!(echoed(port, b"again"), b"again");

    // It has the same port after a stop, and nobody has it meanwhile.
    pyro.ok(&["task", "stop", &id]);
    TcpStream::connect(("127.0.0.1", port)).expect_err("it is stopped");
    pyro.ok(&["task", "start", &id]);
    echo(&pyro, &id, "127.0.0.1", "7000");
    assert_eq!(echoed(port, b"later"), b"later");
    // With its owner killed it is free at once.
    kill(pyro.supervisor(&id).expect("it runs"), "KILL");
    pyro.until("the port is free", |_| TcpListener::bind(("127.0.0.1", port)).is_ok());
    let taken = TcpListener::bind(("127.0.0.1", port)).expect("free");
    pyro.until("the task is stopped", |pyro| pyro.status(&id)["state"] == "stopped");
    let refused = text(&pyro.run(&["task", "start", &id]).stderr);
    assert!(refused.contains(&format!("port {port} is in use on 127.0.0.1")), "{refused}");
    drop(taken);
    pyro.ok(&["task", "delete", &id]);
    pyro.assert_empty();
}

#[test]
fn a_port_that_cannot_be_had_is_refused_before_anything_is_made() {
    let pyro = Pyro::new();
    let taken = TcpListener::bind("127.0.0.1:0").expect("bound");
    let number = taken.local_addr().expect("bound").port();
    let in_use = format!("{number}:80");
    let cases: [(&[&str], &str); 6] = [
        (&[&in_use], "is in use on 127.0.0.1"),
        (&["80"], "invalid port '80': it has no guest port"),
        (&["8080:0"], "the guest port must be 1 to 65535"),
        (&["8080:80", "8080:81"], "port 8080 of 127.0.0.1 is published twice"),
        (&["192.0.2.77:0:80"], "this host has no address 192.0.2.77"),
        (&["example.com:0:80"], "its address is not one"),
    ];
    for (ports, expected) in cases {
        let flags: Vec<&str> = ports.iter().flat_map(|port| ["--publish", port]).collect();
        let create = ["task", "create", "debian:12", "--mem-mib", "512"];
        let run = ["run", "debian:12", "--mem-mib", "512"];
        for line in [[&create[..], &flags].concat(), [&run[..], &flags, &["--", "true"]].concat()] {
            let words = text(&pyro.run(&line).stderr);
            assert!(words.contains(expected), "{line:?}: {words}");
        }
        pyro.assert_empty();
    }
    // A change is made whole or not at all.
    let id = create(&pyro, &["--publish", "0:7000"]);
    let before = ports(&pyro, &id);
    let refused = pyro.run(&["task", "port", "add", &id, "0:7001", &in_use]);
    assert!(text(&refused.stderr).contains("is in use"), "{refused:?}");
    let refused = pyro.run(&["task", "port", "remove", &id, "1"]);
    assert!(text(&refused.stderr).contains("port '1' is not published"), "{refused:?}");
    assert_eq!(ports(&pyro, &id), before);
    assert_eq!(echoed(host_port(&pyro, &id, 0), b"still"), b"still");
    pyro.ok(&["task", "delete", &id]);
    pyro.assert_empty();
}
