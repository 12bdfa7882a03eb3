//! What a guest's network costs: its set-up, bytes both ways, round trips, a restored start, memory.
//!
//! The guest's other end is a server of this process, which the guest reaches as `host.pyro.internal`. What can be compared
//! takes turns in one run. `scripts/bench.sh` sets the variables that name images and program.

#![expect(clippy::print_stdout, reason = "a bench prints its figures")]

#[allow(dead_code, reason = "each bench uses its own part of it")]
mod support;

use std::ffi::OsString;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Instant;

use pyro_engine::EngineConfig;
use pyro_net::{Attach, Namespace};
use pyro_vmm::host::find_qemu;
use support::{CAP, config, median, memory, millis, processes, pyro};

const ROUNDS: usize = 15;
const SET_UPS: usize = 100;
const TASKS: usize = 4;
const MIB: usize = 256;

/// Measures from inside of the guest, against the host and against the guest's own loopback.
const GUEST: &str = r#"
use strict; use IO::Socket::INET; use Time::HiRes 'time'; $| = 1;
my ($host, $port, $mib) = @ARGV; my $piece = 'y' x (1 << 18);
sub dial { my $socket = IO::Socket::INET->new(PeerAddr => $_[0], PeerPort => $_[1]) or die "$!"; $socket->autoflush(1); $socket }
sub middle { my @sorted = sort { $a <=> $b } @_; $sorted[@sorted / 2] }
for (1 .. 5) {
    my $socket = dial($host, $port); my $got = 0; syswrite $socket, 'd'; my $began = time;
    while (my $read = sysread $socket, my $part, 1 << 18) { $got += $read }
    printf "down %.1f\n", $got / (time - $began) / 1e6; die "cut at $got" if $got != $mib << 20;
    $socket = dial($host, $port); syswrite $socket, 'u'; $began = time;
    for (1 .. 4 * $mib) { my $at = 0; while ($at < length $piece) { $at += syswrite($socket, $piece, length($piece) - $at, $at) // die } }
    shutdown $socket, 1; sysread $socket, my $total, 20;
    printf "up %.1f\n", $total / (time - $began) / 1e6; die "cut at $total" if $total != $mib << 20;
}
my $socket = dial($host, $port); syswrite $socket, 'e'; my @trips;
for (1 .. 500) { my $began = time; syswrite $socket, 'x'; sysread $socket, my $byte, 1; push @trips, (time - $began) * 1e3 }
printf "trip %.3f\n", middle(@trips);
my $listener = IO::Socket::INET->new(Listen => 64, LocalAddr => '127.0.0.1') or die; my $own = $listener->sockport;
if (!fork) { while (my $peer = $listener->accept) { sysread $peer, my $word, 2; syswrite $peer, 'x' } }
my (@near, @far);
for (1 .. 100) {
    for my $case ([\@near, '127.0.0.1', $own], [\@far, $host, $port]) {
        my $began = time; my $socket = dial($$case[1], $$case[2]); syswrite $socket, 'ex'; sysread $socket, my $byte, 1;
        push @{$$case[0]}, (time - $began) * 1e3;
    }
}
printf "near %.3f\nfar %.3f\n", middle(@near), middle(@far);
"#;

fn main() {
    let state = tempfile::tempdir().expect("a directory");
    let config = config(state.path(), CAP);
    set_up();
    let port = serve();
    inside(&config, port);
    starts(&config, port);
    density(&config, port);
}

/// The namespace alone, as each start makes it.
fn set_up() {
    for attach in [Attach::Descriptor, Attach::Name] {
        let times = (0..SET_UPS).map(|_| {
            let began = Instant::now();
            let made = Namespace::make(attach, Path::new("/dev/net/tun")).expect("a namespace");
            let time = began.elapsed();
            drop(made);
            millis(time)
        });
        println!("{:48} {:8.2} ms", format!("set-up, tap by {attach:?}"), median(times.collect::<Vec<_>>()));
    }
}

/// A server that sends, takes or returns bytes, by the first one that it gets.
fn serve() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
    let port = listener.local_addr().expect("bound").port();
    drop(std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            drop(std::thread::spawn(move || answer(stream)));
        }
    }));
    port
}

fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut word = [0];
    stream.read_exact(&mut word)?;
    let mut buffer = vec![b'x'; 1 << 20];
    match word[0] {
        b'd' => (0..MIB).try_for_each(|_| stream.write_all(&buffer)),
        b'u' => {
            let mut total = 0;
            loop {
                match stream.read(&mut buffer)? {
                    0 => return stream.write_all(total.to_string().as_bytes()),
                    read => total += read,
                }
            }
        }
        _ => loop {
            match stream.read(&mut buffer)? {
                0 => return Ok(()),
                read => stream.write_all(&buffer[..read])?,
            }
        },
    }
}

/// Figures of one way to the outside, as the guest measures them.
struct Figures {
    down: f64,
    up: f64,
    trip: f64,
    near: f64,
    far: f64,
}

/// Has a guest measure; `host` is how it calls this process.
fn measure(config: &EngineConfig, flags: &[&str], host: &str, port: u16) -> Figures {
    let id = pyro(config, &[&["task", "create", "debian:12", "--id-only", "--cold"], flags].concat());
    let (id, mib, port) = (id.trim(), MIB.to_string(), port.to_string());
    let line = ["task", "exec", id, "--timeout-seconds", "300", "--", "perl", "-e", GUEST, host, &port, &mib];
    let told = pyro(config, &line);
    pyro(config, &["task", "delete", id]);
    let of = |name: &str| {
        let lines = told.lines().filter_map(|line| line.strip_prefix(name));
        median(lines.map(|value| value.trim().parse::<f64>().expect("a number")).collect::<Vec<_>>())
    };
    Figures { down: of("down "), up: of("up "), trip: of("trip "), near: of("near "), far: of("far ") }
}

fn inside(config: &EngineConfig, port: u16) {
    let allow = format!("host.pyro.internal:{port}");
    let own = measure(config, &["--allow", &allow], "host.pyro.internal", port);
    println!("{:48} {:8.0} MB/s", "to the guest", own.down);
    println!("{:48} {:8.0} MB/s", "from the guest", own.up);
    println!("{:48} {:8.2} ms", "round trip of a byte", own.trip);
    println!(
        "{:48} {:8.2} ms   {:5.2} ms over the guest's own loopback",
        "connect to the first byte",
        own.far,
        own.far - own.near
    );
    let Some(passt) = find("passt") else {
        println!("{:48}  it is not installed", "passt, for comparison");
        return;
    };
    let dir = tempfile::tempdir().expect("a directory");
    let through = EngineConfig {
        tool_path: through_passt(dir.path(), &passt, config),
        state_dir: dir.path().join("state"),
        unconfined_vmm: true,
        ..config.clone()
    };
    // It leads what is sent to the gateway to the host's loopback.
    let flags = ["--allow", allow.as_str(), "--unconfined-vmm"];
    let passt = measure(&through, &flags, "198.18.0.1", port);
    for (what, own, its) in [("to", own.down, passt.down), ("from", own.up, passt.up)] {
        println!("{:48} {its:8.0} MB/s   {:5.1} x is pyro", format!("{what} the guest, passt"), own / its);
    }
}

fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|file| file.is_file())
}

/// A directory with a QEMU that has passt in the place of a tap, before the others.
fn through_passt(dir: &Path, passt: &Path, config: &EngineConfig) -> OsString {
    use std::os::unix::fs::PermissionsExt;
    let qemu = find_qemu(&config.tool_path).expect("QEMU is installed");
    let (passt, qemu, shown) = (passt.display(), qemu.display(), dir.display());
    let script = format!(
        r#"#!/bin/bash
words=()
for word; do
    case $word in
    tap,id=net,fd=*)
        socket={shown}/passt.$$
        {passt} --quiet --one-off --runas 0 --socket $socket --address 198.18.0.2 --netmask 30 --gateway 198.18.0.1 \
            --no-dhcp --no-ra < /dev/null > /dev/null 2>&1
        word=stream,id=net,server=off,addr.type=unix,addr.path=$socket
        ;;
    esac
    words+=("$word")
done
exec {qemu} "${{words[@]}}"
"#
    );
    let wrapper = dir.join("qemu-system-x86_64");
    fs_err::write(&wrapper, script).expect("written");
    fs_err::set_permissions(&wrapper, PermissionsExt::from_mode(0o755)).expect("set");
    std::env::join_paths(
        [dir]
            .into_iter()
            .chain(std::env::split_paths(&config.tool_path).collect::<Vec<_>>().iter().map(PathBuf::as_path)),
    )
    .expect("paths")
}

fn starts(config: &EngineConfig, port: u16) {
    let allow = format!("host.pyro.internal:{port}");
    let timed = |flags: &[&str]| {
        let began = Instant::now();
        pyro(config, &[&["run", "debian:12"], flags, &["--", "true"]].concat());
        millis(began.elapsed())
    };
    let with = ["--allow", allow.as_str()];
    for flags in [&[][..], &with] {
        timed(flags);
    }
    let (mut without, mut within) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        without.push(timed(&[]));
        within.push(timed(&with));
    }
    let (without, within) = (median(without), median(within));
    println!("{:48} {without:8.1} ms", "pyro run -- true, restored, no network");
    println!("{:48} {within:8.1} ms   {:5.1} ms more", "the same with one", within - without);
}

/// What a task takes of the host's memory, all processes counted.
fn density(config: &EngineConfig, port: u16) {
    let allow = format!("host.pyro.internal:{port}");
    let mut figures = Vec::new();
    for flags in [&[][..], &["--allow", allow.as_str()]] {
        let ids: Vec<String> = (0..TASKS)
            .map(|_| {
                let line = [&["task", "create", "debian:12", "--id-only"], flags].concat();
                let id = pyro(config, &line).trim().to_owned();
                pyro(config, &["task", "exec", &id, "--", "git", "--version"]);
                id
            })
            .collect();
        let pids = ids.iter().flat_map(|id| processes(id));
        let shared: f64 = pids.map(|pid| memory(pid)[1]).sum();
        #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
        figures.push(shared / TASKS as f64);
        for id in ids {
            pyro(config, &["task", "delete", &id]);
        }
    }
    println!("{:48} {:8.1} MB", "memory of each of 4 tasks, no network", figures[0]);
    println!("{:48} {:8.1} MB   {:5.1} MB more", "the same with one", figures[1], figures[1] - figures[0]);
}
