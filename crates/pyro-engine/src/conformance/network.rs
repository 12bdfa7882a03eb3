//! Cases about a guest's network: the same on every VMM, booted and restored.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use pyro_net::Settings;
use pyro_net::policy::{Policy, Rule};
use pyro_vmm::{MachineSpec, Snapshot};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::bench::{Bench, DEADLINE, Guest};
use super::{confinement, machine};
use crate::live::{OVERLAY, lay_disk};
use crate::network::GuestLink;
use crate::ports::{self, Published};
use crate::template::save_machine;

/// Sends bytes to the host and back, and tells what is closed.
const SCRIPT: &str = r#"
use strict; use IO::Socket::INET; $| = 1;
my ($port) = @ARGV;
my $socket = IO::Socket::INET->new(PeerAddr => 'host.pyro.internal', PeerPort => $port) or die "no connection: $!";
my $sent = join '', map { pack 'N', $_ * 2654435761 & 0xffffffff } 1 .. 65536;
my $child = fork; die unless defined $child;
if (!$child) { my $at = 0; while ($at < length $sent) { my $done = syswrite $socket, $sent, 65536, $at; die unless $done; $at += $done } shutdown $socket, 1; exit 0 }
my $got = ''; while (sysread $socket, my $part, 65536) { $got .= $part } waitpid $child, 0;
print $got eq $sent ? "same" : "other: " . length $got;
for (['198.18.0.1', 22], ['198.18.0.1', $port], ['169.254.169.254', 80], ['10.0.0.1', 80], ['1.1.1.1', 443]) {
    my $to = IO::Socket::INET->new(PeerAddr => $$_[0], PeerPort => $$_[1], Timeout => 20);
    print " ", $to && syswrite($to, 'x') && sysread($to, my $byte, 1) ? "open" : "closed";
}
print " ", gethostbyname('other.test') ? "resolves" : "unknown", "\n";
"#;
/// Listens on the guest's loopback and sends back what it hears; what it is started with waits until it listens.
const SERVER: &str = r#"
use strict; use IO::Socket::INET;
my $listener = IO::Socket::INET->new(Listen => 16, LocalAddr => '127.0.0.1', LocalPort => 7000, ReuseAddr => 1) or die $!;
exit if fork; close STDOUT; close STDERR;
while (my $peer = $listener->accept) {
    while (my $got = sysread $peer, my $bytes, 65536) { my $at = 0; while ($at < $got) { $at += syswrite($peer, $bytes, $got - $at, $at) // last } }
    close $peer;
}
"#;
const EXPECTED: &str = "same closed closed closed closed closed unknown";

/// A server of the host that sends back what it gets.
struct Echo {
    port: u16,
    connections: Arc<AtomicUsize>,
}

impl Echo {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let port = listener.local_addr().expect("bound").port();
        let connections = Arc::<AtomicUsize>::default();
        let count = Arc::clone(&connections);
        drop(tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::SeqCst);
                drop(tokio::spawn(async move {
                    let mut buffer = vec![0; 64 << 10];
                    while let Ok(length @ 1..) = stream.read(&mut buffer).await {
                        stream.write_all(&buffer[..length]).await.ok();
                    }
                }));
            }
        }));
        Self { port, connections }
    }

    fn settings(&self, dir: &std::path::Path) -> Settings {
        let rule: Rule = format!("host.pyro.internal:{}", self.port).parse().expect("a rule");
        let policy = Policy::new(false, vec![rule], Vec::new()).expect("a policy");
        Settings {
            names: Some(dir.join("names")),
            log: Some(dir.join("network.jsonl")),
            ..Settings::new(policy)
        }
    }

    async fn is_reached_by(&self, guest: &Guest) {
        let script = format!("cat > /tmp/probe.pl <<'END'\n{SCRIPT}\nEND\nperl /tmp/probe.pl {}", self.port);
        assert_eq!(guest.text(&script).await, EXPECTED);
        assert_eq!(self.connections.swap(0, Ordering::SeqCst), 1);
        let network = guest.running.network.as_ref().expect("it has one");
        assert!(network.counts().denied >= 5, "{:?}", network.counts());
    }
}

/// A port of this host leads to a server on the guest's loopback, bytes go both ways at once, and ends are passed on.
async fn is_reached_by_a_port(guest: &Guest) {
    guest.text(&format!("cat > /tmp/server.pl <<'END'\n{SERVER}\nEND\nperl /tmp/server.pl")).await;
    let ports = &guest.running.ports;
    let wanted: Vec<Published> = ["0:7000", "0:7001"].map(|port| port.parse().expect("a port")).to_vec();
    ports.serve(ports::bind(&wanted).expect("bound")).expect("served");
    let [echo, nobody] = ports.list()[..] else { panic!("two ports") };
    let sent: Vec<u8> = (0..1_u32 << 18).flat_map(u32::to_le_bytes).collect();
    for _ in 0..2 {
        let mut stream = TcpStream::connect((echo.host_ip, echo.host_port)).await.expect("connected");
        let (mut reads, mut writes) = stream.split();
        let mut back = Vec::new();
        let send = async {
            writes.write_all(&sent).await?;
            writes.shutdown().await
        };
        let both = async { tokio::try_join!(send, reads.read_to_end(&mut back)) };
        tokio::time::timeout(DEADLINE, both).await.expect("in time").expect("carried");
        assert!(back == sent, "{} of {} bytes came back", back.len(), sent.len());
    }
    let mut stream = TcpStream::connect((nobody.host_ip, nobody.host_port)).await.expect("connected");
    let closed = tokio::time::timeout(DEADLINE, stream.read(&mut [0])).await.expect("in time");
    assert!(!matches!(closed, Ok(1..)), "nobody listens there");
}

/// Boots or restores a machine with a network of its own.
async fn machine_on(bench: &Bench, spec: MachineSpec, from: Option<&Snapshot>, echo: &Echo) -> Guest {
    let link = GuestLink::make(&bench.driver).await.expect("a namespace");
    let spec = MachineSpec { nic: Some(link.nic.clone()), ..spec };
    let network = link.serve(echo.settings(&spec.dir)).expect("served");
    let mut guest = match from {
        Some(from) => bench.restore(spec, from).await,
        None => bench.boot_from(spec).await,
    };
    Arc::get_mut(&mut guest.running).expect("nobody else has it").network = Some(network);
    guest
}

pub(super) async fn reaches_what_is_allowed(bench: &Bench) {
    let echo = Echo::start().await;
    let spec = bench.spec();
    let booted = machine_on(bench, spec.clone(), None, &echo).await;
    echo.is_reached_by(&booted).await;
    is_reached_by_a_port(&booted).await;
    confinement::is_there(&booted);
    confinement::holds(&booted, &spec).await;
    booted.running.machine.kill().await;

    let link = GuestLink::make(&bench.driver).await.expect("a namespace");
    let spec = MachineSpec { nic: Some(link.nic.clone()), ..bench.spec() };
    let dir = spec.dir.clone();
    let saved = save_machine(&bench.driver, spec, |_step| {}).await.expect("saved");
    drop(link);
    for _ in 0..2 {
        let spec = bench.spec();
        lay_disk(&dir.join(OVERLAY), &spec.dir.join(OVERLAY)).expect("copied");
        let restored = machine_on(bench, spec.clone(), Some(&saved), &echo).await;
        echo.is_reached_by(&restored).await;
        is_reached_by_a_port(&restored).await;
        confinement::is_there(&restored);
        confinement::holds(&restored, &spec).await;
        machine::is_gone(restored).await;
    }
}
