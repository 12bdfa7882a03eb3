//! What a guest reaches on the network: what its policy names, and nothing else.

use fs_err as fs;
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::process::Output;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pyro_net::dns::{Kind, Query, Reply};
use serde_json::Value;

use crate::support::{Pyro, is_root, parse, peak_kib, text};

/// A server of this host that remembers who came.
struct Server {
    port: u16,
    connections: Arc<AtomicUsize>,
    /// What it has received, of all connections.
    heard: Arc<Mutex<Vec<u8>>>,
}

impl Server {
    /// One that answers each connection as `serve` does.
    fn start(serve: impl Fn(TcpStream, &Mutex<Vec<u8>>) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let port = listener.local_addr().expect("bound").port();
        let (connections, heard) = (Arc::<AtomicUsize>::default(), Arc::<Mutex<Vec<u8>>>::default());
        let (count, bytes, serve) = (Arc::clone(&connections), Arc::clone(&heard), Arc::new(serve));
        // It ends with the test.
        drop(std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                count.fetch_add(1, Ordering::SeqCst);
                let (bytes, serve) = (Arc::clone(&bytes), Arc::clone(&serve));
                drop(std::thread::spawn(move || serve(stream, &bytes)));
            }
        }));
        Self { port, connections, heard }
    }

    /// One that sends back what it hears.
    fn echo() -> Self {
        Self::start(|mut stream, heard| {
            let mut buffer = vec![0; 64 << 10];
            while let Ok(length @ 1..) = stream.read(&mut buffer) {
                heard.lock().expect("no panic").extend(&buffer[..length]);
                if stream.write_all(&buffer[..length]).is_err() {
                    return;
                }
            }
            drop(stream.shutdown(Shutdown::Write));
        })
    }

    /// One that answers each request with a page.
    fn web() -> Self {
        Self::start(|mut stream, heard| {
            let mut buffer = vec![0; 64 << 10];
            let mut head = Vec::new();
            while let Ok(length @ 1..) = stream.read(&mut buffer) {
                heard.lock().expect("no panic").extend(&buffer[..length]);
                head.extend(&buffer[..length]);
                if head.ends_with(b"\r\n\r\n") {
                    head.clear();
                    let page = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\npage\n";
                    if stream.write_all(page.as_bytes()).is_err() {
                        return;
                    }
                }
            }
        })
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    fn heard(&self) -> String {
        text(&self.heard.lock().expect("no panic"))
    }
}

/// A policy file of a test.
fn policy(dir: &tempfile::TempDir, contents: &str) -> String {
    let path = dir.path().join("policy.toml");
    fs::write(&path, contents).expect("written");
    path.to_string_lossy().into_owned()
}

fn create(pyro: &Pyro, network: &[&str]) -> String {
    let line = ["task", "create", "debian:12", "--mem-mib", "512", "--id-only"];
    pyro.ok(&[&line[..], network].concat())
}

/// Runs a script of bash in a task.
fn bash(pyro: &Pyro, id: &str, script: &str) -> Output {
    pyro.run(&["task", "exec", id, "--timeout-seconds", "100", "--", "bash", "-c", script])
}

fn says(pyro: &Pyro, id: &str, script: &str) -> String {
    let output = bash(pyro, id, script);
    assert!(output.status.success(), "{script}: {output:?}");
    text(&output.stdout).trim_end().to_owned()
}

/// A script that tells `open` of what it could read a byte from, or send to and not be reset.
const PROBE: &str = r#"
probe() {
    (exec 3<>/dev/tcp/$1/$2 && printf x >&3 && IFS= read -r -t 5 -n 1 -u 3 byte && [ -n "$byte" ]) 2>/dev/null &&
        echo "open $1:$2" || echo "closed $1:$2"
}
"#;

/// Sends a request and prints the answer.
const GET: &str = r#"
get() { exec 3<>/dev/tcp/$1/$2 && printf "$3" >&3 && cat <&3; }
"#;

#[test]
fn a_guest_reaches_what_its_policy_names_and_nothing_else() {
    let (pyro, dir) = (Pyro::new(), tempfile::tempdir().expect("a directory"));
    let (allowed, other) = (Server::echo(), Server::echo());
    let file = policy(
        &dir,
        &format!(
            "allow = ['up.test:7000', 'host.pyro.internal:{}']\n[hosts]\n'up.test' = '127.0.0.1:{}'\n\
             'other.test' = '127.0.0.1:{}'\n",
            allowed.port, allowed.port, other.port
        ),
    );
    let id = create(&pyro, &["--network-policy", &file]);
    let record = pyro.status(&id);
    assert_eq!(record["network_policy"]["mode"], "allow", "{record}");
    assert_eq!((&record["guest_ip"], &record["tap_name"]), (&"198.18.0.2".into(), &"tap0".into()));
    // Bytes arrive as they were sent, in both directions at once.
    let digest = "exec 3<>/dev/tcp/up.test/7000; head -c 3000000 /dev/urandom > /tmp/sent; \
                  cat /tmp/sent >&3 & head -c 3000000 <&3 | cmp - /tmp/sent && echo same";
    assert_eq!(says(&pyro, &id, digest), "same");
    let gateway_port = allowed.port;
    let script = format!(
        "{PROBE}\nprobe host.pyro.internal {gateway_port}\nprobe up.test 7001\nprobe other.test 7000\n\
         for port in 22 80 5000 {gateway_port} {}; do probe 198.18.0.1 $port; done\n\
         for port in {gateway_port} {}; do probe 127.0.0.1 $port; done\n\
         for address in 169.254.169.254 10.0.0.1 172.16.0.1 192.168.0.1 100.64.0.1 198.18.0.6 1.1.1.1; do\n\
         probe $address 80; done; probe 198.18.1.77 7000",
        other.port, other.port
    );
    let output = bash(&pyro, &id, &script);
    let found = text(&output.stdout);
    let open: Vec<&str> = found.lines().filter(|line| line.starts_with("open")).collect();
    assert_eq!(open, [format!("open host.pyro.internal:{gateway_port}")], "{found}");
    assert_eq!(found.lines().count(), 18, "{found}");
    assert_eq!(other.connections(), 0, "nobody came to what is not allowed");
    // The notes tell the caller, so that it does not try again.
    let notes = text(&output.stderr);
    assert!(notes.contains("note: resolve other.test denied by policy; allowed: up.test:7000, "), "{notes}");
    let entries = pyro.json(&["task", "logs", &id, "--network", "--json"]);
    let entries = entries["entries"].as_array().expect("a list").clone();
    let has = |kind: &str, name: &str, allowed: bool| {
        entries
            .iter()
            .any(|entry| entry["kind"] == kind && entry["name"] == name && entry["allowed"] == allowed)
    };
    assert!(has("dns", "up.test", true) && has("connect", "up.test", true), "{entries:?}");
    assert!(has("dns", "other.test", false) && has("connect", "up.test", false), "{entries:?}");
    let carried: u64 = entries.iter().filter_map(|entry| entry["bytes_in"].as_u64()).sum();
    assert!(carried >= 3_000_000, "{carried}");
    let network = pyro.json(&["task", "network", &id, "--json"]);
    assert!(network["counts"]["denied"].as_u64() > Some(10), "{network}");
    pyro.ok(&["task", "delete", &id]);
    pyro.assert_empty();
}

#[test]
fn other_protocols_addresses_and_resolvers_lead_nowhere() {
    let (pyro, dir) = (Pyro::new(), tempfile::tempdir().expect("a directory"));
    let server = Server::echo();
    let file =
        policy(&dir, &format!("allow = ['up.test']\n[hosts]\n'up.test' = '127.0.0.1:{}'\n", server.port));
    let id = create(&pyro, &["--network-policy", &file]);
    let script = r#"
        use strict; use Socket qw(:all); use IO::Socket::INET;
        sub query { my ($name, $type) = @_; pack('n6', 7, 0x100, 1, 0, 0, 0) . join('', map { chr(length) . $_ } split /\./, $name) . pack('Cnn', 0, $type, 1) }
        sub ask {
            my ($server, $name, $type) = @_;
            my $socket = IO::Socket::INET->new(Proto => 'udp', PeerAddr => $server, PeerPort => 53) or return 'none';
            send($socket, query($name, $type), 0); my $answer = '';
            my $set = ''; vec($set, fileno($socket), 1) = 1;
            return 'silent' unless select($set, undef, undef, 5);
            recv($socket, $answer, 512, 0);
            my (undef, $flags, undef, $answers) = unpack 'n4', $answer;
            return 'code ' . ($flags & 15) . " answers $answers";
        }
        # Every resolver is this one, and says the same.
        for my $server ('198.18.0.1', '9.9.9.9', '127.0.0.53' eq '' ? () : '10.1.1.1') {
            print "$server up.test A: ", ask($server, 'up.test', 1), "\n";
        }
        print "AAAA: ", ask('198.18.0.1', 'up.test', 28), "\n";
        print "TXT: ", ask('198.18.0.1', 'up.test', 16), "\n";
        print "HTTPS: ", ask('198.18.0.1', 'up.test', 65), "\n";
        print "unknown: ", ask('198.18.0.1', 'secret.other.test', 1), "\n";
        # Other datagrams are refused at once.
        my $udp = IO::Socket::INET->new(Proto => 'udp', PeerAddr => '1.1.1.1', PeerPort => 443) or die;
        send($udp, 'x', 0); my $set = ''; vec($set, fileno($udp), 1) = 1; select($set, undef, undef, 5);
        print "UDP: ", (defined recv($udp, my $got, 10, 0) ? 'answered' : "refused"), "\n";
        my $over = IO::Socket::INET->new(PeerAddr => '8.8.8.8', PeerPort => 53) or die;
        my $query = query('up.test', 1);
        print $over pack('n', length $query) . $query; $over->flush; sysread $over, my $answer, 600;
        print "TCP: ", length($answer) > 40 ? 'answered' : 'not', "\n";
    "#;
    let line = ["task", "exec", &id, "--timeout-seconds", "100", "--", "perl", "-e", script];
    assert_eq!(
        pyro.ok(&line),
        "198.18.0.1 up.test A: code 0 answers 1\n9.9.9.9 up.test A: code 0 answers 1\n\
         10.1.1.1 up.test A: code 0 answers 1\nAAAA: code 0 answers 0\nTXT: code 0 answers 0\n\
         HTTPS: code 0 answers 0\nunknown: code 5 answers 0\nUDP: refused\nTCP: answered"
    );
    // A second address, another hardware address and IPv6 help a guest's root nothing.
    let own =
        says(&pyro, &id, "cat /proc/sys/net/ipv6/conf/eth0/disable_ipv6; cat /sys/class/net/eth0/address");
    assert_eq!(own, "1\n02:70:79:72:6f:02");
    let ipv6 = "echo 0 > /proc/sys/net/ipv6/conf/eth0/disable_ipv6; exec 3<>/dev/tcp/2606:4700::1111/80";
    assert!(!bash(&pyro, &id, ipv6).status.success());
    assert_eq!(server.connections(), 0);
    pyro.ok(&["task", "delete", &id]);
}

#[test]
fn a_connection_on_a_web_port_must_be_for_its_name() {
    let (pyro, dir) = (Pyro::new(), tempfile::tempdir().expect("a directory"));
    let (plain, tls) = (Server::web(), Server::echo());
    let file = policy(
        &dir,
        &format!(
            "allow = ['web.test']\n[hosts]\n'web.test' = '127.0.0.1:{}'\n'tls.test' = '127.0.0.1:{}'\n",
            plain.port, tls.port
        ),
    );
    let id = create(&pyro, &["--network-policy", &file, "--allow", "tls.test:443"]);
    let get = |request: &str| says(&pyro, &id, &format!("{GET}\nget web.test 80 '{request}'"));
    let page = get(r"GET /a?token=1 HTTP/1.1\r\nHost: web.test\r\nConnection: close\r\n\r\n");
    assert!(page.ends_with("page"), "{page}");
    assert_eq!(plain.connections(), 1);
    for request in [
        r"GET / HTTP/1.1\r\nHost: other.test\r\n\r\n",
        r"GET http://other.test/ HTTP/1.1\r\nHost: web.test\r\n\r\n",
        r"CONNECT other.test:443 HTTP/1.1\r\nHost: web.test\r\n\r\n",
        r"GET / HTTP/1.1\r\n\r\n",
    ] {
        let refused = get(request);
        assert!(refused.starts_with("HTTP/1.1 403"), "{request}: {refused}");
    }
    // A request for another host behind a good one is not passed on either.
    let two = get(r"GET /b HTTP/1.1\r\nHost: web.test\r\n\r\nGET /c HTTP/1.1\r\nHost: other.test\r\n\r\n");
    assert!(!two.is_empty(), "{two}");
    assert_eq!(plain.connections(), 2);
    assert!(plain.heard().contains("GET /b") && !plain.heard().contains("/c"), "{}", plain.heard());
    // Without TLS, or with a hello for nobody, nothing reaches the server behind a TLS port.
    let script = format!("{PROBE}\nprobe tls.test 443\nprobe web.test 443");
    assert_eq!(says(&pyro, &id, &script), "closed tls.test:443\nclosed web.test:443");
    assert_eq!((tls.connections(), plain.connections()), (0, 2));
    let log = pyro.ok(&["task", "logs", &id, "--network"]);
    assert!(log.contains("http allowed web.test:80 GET /a "), "{log}");
    assert!(log.contains("http denied web.test:80 GET / (Host names another host)"), "{log}");
    assert!(!log.contains("token"), "what follows a path may be a secret: {log}");
    assert!(log.contains("it is not TLS"), "{log}");
    pyro.ok(&["task", "delete", &id]);
}

#[test]
fn a_tls_hello_must_name_the_host_that_was_allowed() {
    let (pyro, dir) = (Pyro::new(), tempfile::tempdir().expect("a directory"));
    let server = Server::echo();
    let hosts = format!("'tls.test' = '127.0.0.1:{0}'\n'wide.test' = '127.0.0.1:{0}'\n", server.port);
    let file = policy(&dir, &format!("allow = ['tls.test', 'wide.test']\n[hosts]\n{hosts}"));
    let line =
        ["task", "create", "debian:12-build", "--mem-mib", "512", "--id-only", "--network-policy", &file];
    let id = pyro.ok(&line);
    // The server is none of TLS, so each handshake fails in the end; what counts is whether the hello came to it.
    let script = r#"
import socket, ssl, sys
context = ssl.create_default_context(); context.check_hostname = False; context.verify_mode = ssl.CERT_NONE
for host, port, name in [("tls.test", 443, "tls.test"), ("tls.test", 443, "wide.test"), ("tls.test", 443, "evil.test"),
                         ("tls.test", 443, None), ("tls.test", 8443, "tls.test"), ("tls.test", 8443, "evil.test")]:
    connection = socket.create_connection((host, port), 20)
    try:
        context.wrap_socket(connection, server_hostname=name).close()
    except ConnectionResetError:
        print(host, port, name, "reset")
    except ssl.SSLError:
        print(host, port, name, "answered")
"#;
    let output = pyro.run(&["task", "exec", &id, "--timeout-seconds", "100", "--", "python3", "-c", script]);
    assert_eq!(
        text(&output.stdout),
        "tls.test 443 tls.test answered\ntls.test 443 wide.test reset\ntls.test 443 evil.test reset\n\
         tls.test 443 None reset\ntls.test 8443 tls.test answered\ntls.test 8443 evil.test reset\n",
        "{output:?}"
    );
    // On a port that need not speak TLS the connection is there before its first byte, and nothing more.
    assert_eq!(server.connections(), 3);
    assert!(!server.heard().contains("evil.test"), "no byte of a hello for another name arrives");
    pyro.ok(&["task", "delete", &id]);
}

#[test]
fn a_policy_changes_on_a_live_task_and_names_survive_a_restart() {
    let (pyro, dir) = (Pyro::new(), tempfile::tempdir().expect("a directory"));
    let server = Server::echo();
    let file = policy(
        &dir,
        &format!(
            "allow = ['up.test']\n[hosts]\n'up.test' = '127.0.0.1:{0}'\n'late.test' = '127.0.0.1:{0}'\n",
            server.port
        ),
    );
    let id = create(&pyro, &["--network-policy", &file]);
    // Two guests of one template have policies of their own.
    let other = create(&pyro, &["--deny", "up.test"]);
    let probe = format!("{PROBE}\nprobe up.test 9\nprobe late.test 9");
    assert_eq!(says(&pyro, &id, &probe), "open up.test:9\nclosed late.test:9");
    assert_eq!(says(&pyro, &other, &probe), "closed up.test:9\nclosed late.test:9");
    let alias = |pyro: &Pyro| says(pyro, &id, "getent ahostsv4 up.test | head -n 1 | cut -d ' ' -f 1");
    let before = alias(&pyro);
    let changed = pyro.json(&["task", "network", &id, "--allow", "late.test:9", "--json"]);
    assert_eq!(changed["closed_connections"], 0, "{changed}");
    assert_ne!(changed["old_digest"], changed["new_digest"]);
    assert_eq!(says(&pyro, &id, &probe), "open up.test:9\nopen late.test:9");
    // A connection that is open loses its rule, and is reset.
    let wait = "exec 3<>/dev/tcp/up.test/9; printf x >&3; read -n 1 -u 3; echo there; read -t 60 -n 1 -u 3; echo ended $?";
    let child =
        pyro.spawn(&["task", "exec", &id, "--timeout-seconds", "100", "--json", "--", "bash", "-c", wait]);
    pyro.until("it is connected", |pyro| {
        pyro.logs(&id).last().is_some_and(|entry| entry["stdout"] == "there\n")
    });
    let began = std::time::Instant::now();
    let changed = pyro.json(&["task", "network", &id, "--revoke", "up.test", "--json"]);
    assert_eq!(changed["closed_connections"], 1, "{changed}");
    let result = parse(&child.wait_with_output().expect("it ends"));
    assert_eq!(result["stdout"], "there\nended 1\n", "{result}");
    assert!(began.elapsed() < Duration::from_secs(20));
    pyro.ok(&["task", "stop", &id]);
    pyro.ok(&["task", "network", &id, "--allow", "up.test"]);
    pyro.ok(&["task", "start", &id]);
    assert_eq!(alias(&pyro), before, "a name keeps its address");
    assert_eq!(says(&pyro, &id, &probe), "open up.test:9\nopen late.test:9");
    let refused = pyro.run(&["task", "network", &id, "--revoke", "unknown.test", "--json"]);
    let refused: Value = parse(&refused);
    assert!(refused["error"].as_str().expect("text").contains("no rule 'unknown.test'"), "{refused}");
    for id in [&id, &other] {
        pyro.ok(&["task", "delete", id]);
    }
    pyro.assert_empty();
}

#[test]
fn without_a_network_a_guest_has_no_device_and_cannot_get_one_later() {
    let pyro = Pyro::new();
    let id = create(&pyro, &[]);
    assert_eq!(says(&pyro, &id, "ls /sys/class/net"), "lo");
    assert_eq!(pyro.status(&id)["network_policy"]["mode"], "none");
    let refused = parse(&pyro.run(&["task", "network", &id, "--allow", "a.test", "--json"]));
    assert_eq!(refused["code"], "wrong_state", "{refused}");
    pyro.ok(&["task", "delete", &id]);
}

#[test]
fn what_cannot_be_a_policy_is_refused_before_anything_is_made() {
    let (pyro, dir) = (Pyro::new(), tempfile::tempdir().expect("a directory"));
    let file = policy(&dir, "alow = ['a.test']\n");
    for (words, expected) in [
        (["--allow", "https://a.test/"], "invalid network rule 'https://a.test/': "),
        (["--deny", "a.test:0"], "invalid network rule 'a.test:0': "),
        (["--network-policy", "nobody"], "there is no network policy 'nobody'"),
        (["--network-policy", &file], "line 1: unknown field `alow`"),
    ] {
        let line = [&["run", "debian:12", "--json"][..], &words, &["--", "true"]].concat();
        let refused = parse(&pyro.run(&line));
        assert_eq!(refused["code"], "invalid_value", "{refused}");
        assert!(refused["error"].as_str().expect("text").contains(expected), "{refused}");
    }
    assert!(
        !pyro.state().join("vms").exists()
            || fs::read_dir(pyro.state().join("vms")).expect("read").next().is_none()
    );
}

#[test]
fn a_host_that_gives_no_tap_is_told_with_its_remedy_and_other_guests_run() {
    let hide = "mount -t tmpfs tmpfs /dev/net && exec \"$@\"";
    let flags = if crate::support::is_root() { "-m" } else { "-rm" };
    let pyro = Pyro::behind(&["unshare", flags, "sh", "-c", hide, "sh"]);
    let line = ["run", "debian:12", "--mem-mib", "512", "--cold", "--json"];
    let refused =
        parse(&pyro.run(&[&line[..], &["--network", "--allow-host-compat", "--", "true"]].concat()));
    assert_eq!(refused["code"], "network_unavailable", "{refused}");
    assert!(
        refused["error"]
            .as_str()
            .expect("text")
            .starts_with("network is unavailable: cannot open /dev/net/tun: "),
        "{refused}"
    );
    assert!(refused["hint"].as_str().expect("text").contains("modprobe tun"), "{refused}");
    let result = parse(&pyro.run(&[&line[..], &["--", "true"]].concat()));
    assert_eq!(result["exit_code"], 0, "{result}");
    let doctor = parse(&pyro.run(&["doctor", "--json"]));
    assert_eq!(doctor["capabilities"]["guest_network"], false, "{doctor}");
    pyro.assert_empty();
}

#[test]
fn floods_of_a_guest_cost_little_and_leave_its_network_usable() {
    let (pyro, dir) = (Pyro::new(), tempfile::tempdir().expect("a directory"));
    let server = Server::echo();
    let file =
        policy(&dir, &format!("allow = ['up.test']\n[hosts]\n'up.test' = '127.0.0.1:{}'\n", server.port));
    let id = create(&pyro, &["--network-policy", &file]);
    assert_eq!(says(&pyro, &id, &format!("{PROBE}\nprobe up.test 7")), "open up.test:7");
    let supervisor = pyro.supervisor(&id).expect("it lives");
    let before = peak_kib(supervisor).expect("it lives");
    let script = r#"
        use strict; use IO::Socket::INET; $SIG{PIPE} = 'IGNORE';
        # More connections than a guest may have, all open at the same time.
        my @children;
        for my $part (1 .. 2) {
            my $child = fork // die; push @children, $child; next if $child;
            my @open; for (1 .. 700) { my $to = IO::Socket::INET->new(PeerAddr => 'up.test', PeerPort => 7, Timeout => 5); push @open, $to if $to }
            sleep 2; exit 0;
        }
        my $resolver = IO::Socket::INET->new(Proto => 'udp', PeerAddr => '198.18.0.1', PeerPort => 53) or die;
        for my $number (1 .. 5000) {
            my $name = "n$number"; send $resolver, pack('n6', $number, 0x100, 1, 0, 0, 0) . chr(length $name) . $name . pack('Cnn', 0, 1, 1), 0;
        }
        for my $port (1 .. 600) { IO::Socket::INET->new(PeerAddr => '10.0.0.1', PeerPort => $port, Timeout => 1) }
        waitpid $_, 0 for @children;
        print "done\n";
    "#;
    let line = ["task", "exec", &id, "--timeout-seconds", "200", "--", "perl", "-e", script];
    assert_eq!(pyro.ok(&line), "done");
    let taken = peak_kib(supervisor).expect("it lives") - before;
    assert!(taken < 48 << 10, "the supervisor has taken {taken} KiB more");
    let log = fs::metadata(pyro.task_file(&id, "network.jsonl")).expect("there").len();
    assert!(log < 2 << 20, "{log} bytes of log");
    pyro.until("connections that have ended make room", |pyro| {
        says(pyro, &id, &format!("{PROBE}\nprobe up.test 7")) == "open up.test:7"
    });
    pyro.ok(&["task", "delete", &id]);
    pyro.assert_empty();
}

#[test]
fn a_name_that_is_not_allowed_is_asked_of_nobody() {
    if !is_root() {
        println!("skipped: a_name_that_is_not_allowed_is_asked_of_nobody: only root can serve port 53");
        return;
    }
    // An address of the loopback that no name server of this host has.
    let server = UdpSocket::bind("127.77.0.1:53").expect("bound");
    let asked = Arc::<Mutex<BTreeSet<String>>>::default();
    let remembered = Arc::clone(&asked);
    // It ends with the test.
    drop(std::thread::spawn(move || {
        let mut bytes = [0; 512];
        while let Ok((length, peer)) = server.recv_from(&mut bytes) {
            let Ok(query) = Query::read(&bytes[..length]) else { continue };
            remembered.lock().expect("no panic").insert(query.name().to_owned());
            let reply = if query.kind() == Kind::Address {
                Reply::Address("203.0.113.7".parse().expect("an address"))
            } else {
                Reply::Empty
            };
            drop(server.send_to(&query.reply(reply), peer));
        }
    }));
    let resolv = tempfile::NamedTempFile::new().expect("a file");
    fs::write(resolv.path(), "nameserver 127.77.0.1\noptions timeout:1 attempts:1\n").expect("written");
    let bind = format!("mount --bind {} /etc/resolv.conf && exec \"$@\"", resolv.path().display());
    let pyro = Pyro::behind(&["unshare", "-m", "sh", "-c", &bind, "sh"]);
    let id = create(&pyro, &["--allow", "up.test:443"]);
    let script = "for name in up.test x.up.test other.test a-secret-in-a-label.evil.test metadata.google.internal; do \
                  getent hosts $name > /dev/null; (exec 3<>/dev/tcp/$name/443) 2> /dev/null; done; echo asked";
    assert_eq!(says(&pyro, &id, script), "asked");
    let asked: Vec<String> = asked.lock().expect("no panic").iter().cloned().collect();
    assert_eq!(asked, ["up.test"]);
    pyro.ok(&["task", "delete", &id]);
    pyro.assert_empty();
}
