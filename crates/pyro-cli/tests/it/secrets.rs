//! Secrets that a guest uses and never sees.

use fs_err as fs;
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use crate::support::{Pyro, kill, parse, start, text};

/// Long and odd enough to be found nowhere by chance.
const VALUE: &str = "ghp-5f0c91-the-value-of-the-secret-27ab";

/// A server over TLS that remembers the heads of requests. It asks for a name and a password where there are none.
struct Site {
    port: u16,
    heads: Arc<Mutex<Vec<String>>>,
    /// The certificate of its authority.
    roots: tempfile::NamedTempFile,
}

impl Site {
    fn start(names: &[&str]) -> Self {
        let mut authority = CertificateParams::new(Vec::new()).expect("no names");
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let roots = tempfile::NamedTempFile::new().expect("a file");
        fs::write(roots.path(), authority.self_signed(&key).expect("signed").pem()).expect("written");
        let issuer = Issuer::new(authority, key);
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let own = KeyPair::generate().expect("a key");
        let leaf =
            CertificateParams::new(names).and_then(|leaf| leaf.signed_by(&own, &issuer)).expect("signed");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(vec![leaf.der().clone()], PrivatePkcs8KeyDer::from(own.serialize_der()).into())
            .expect("a certificate");
        let (config, heads) = (Arc::new(config), Arc::<Mutex<Vec<String>>>::default());
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let port = listener.local_addr().expect("bound").port();
        let remembered = Arc::clone(&heads);
        // It ends with the test.
        drop(std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (config, heads) = (Arc::clone(&config), Arc::clone(&remembered));
                drop(std::thread::spawn(move || answer(stream, config, &heads)));
            }
        }));
        Self { port, heads, roots }
    }

    /// What it has heard since it was last asked.
    fn heard(&self) -> Vec<String> {
        std::mem::take(&mut *self.heads.lock().expect("no panic"))
    }

    /// A policy that leads these names here.
    fn policy(&self, dir: &Path, names: &[&str], rest: &str) -> String {
        let mut policy = format!("allow = {:?}\n[hosts]\n", names);
        for name in names {
            policy.push_str(&format!("{name:?} = '127.0.0.1:{}'\n", self.port));
        }
        let path = dir.join("policy.toml");
        fs::write(&path, policy + rest).expect("written");
        path.to_string_lossy().into_owned()
    }
}

fn answer(stream: TcpStream, config: Arc<ServerConfig>, heads: &Mutex<Vec<String>>) {
    let mut stream = StreamOwned::new(ServerConnection::new(config).expect("a connection"), stream);
    let (mut head, mut byte) = (Vec::new(), [0]);
    while let Ok(1) = stream.read(&mut byte) {
        head.push(byte[0]);
        if head.ends_with(b"\r\n\r\n") {
            let head = text(&std::mem::take(&mut head));
            let status = if head.to_lowercase().contains("\r\nauthorization: ") {
                "404 Not Found\r\n"
            } else {
                "401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"test\"\r\n"
            };
            heads.lock().expect("no panic").push(head);
            if stream.write_all(format!("HTTP/1.1 {status}Content-Length: 0\r\n\r\n").as_bytes()).is_err() {
                return;
            }
        }
    }
}

/// Runs pyro as somebody who has the value in a variable, and trusts the site.
fn with_value(pyro: &Pyro, site: &Site, line: &[&str]) -> Output {
    let mut command = pyro.command(line);
    command.env("MY_TOKEN", VALUE).env("SSL_CERT_FILE", site.roots.path());
    start(&mut command).wait_with_output().expect("pyro ends")
}

fn created(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    text(&output.stdout).trim().to_owned()
}

/// Has git, the only https client of this guest, send a request with these words in its header or its address.
fn git(pyro: &Pyro, id: &str, words: &str) -> Output {
    let script = format!("GIT_TERMINAL_PROMPT=0 GIT_ASKPASS=true git {words}");
    pyro.run(&["task", "exec", id, "--timeout-seconds", "100", "--", "sh", "-c", &script])
}

/// Which of these texts are in the memory of a process.
fn remembered(pid: i32, texts: [&str; 2]) -> BTreeSet<String> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("it runs");
    let memory = fs::File::open(format!("/proc/{pid}/mem")).expect("root may read it").into_file();
    let grep = ["-a", "-o", "-F", "-e", texts[0], "-e", texts[1]];
    let mut grep = start(Command::new("grep").args(grep).stdin(Stdio::piped()).stdout(Stdio::piped()));
    let mut into = grep.stdin.take().expect("a pipe");
    let mut piece = vec![0; 4 << 20];
    for line in maps.lines().filter(|line| line.contains(" r")) {
        let (from, to) = line.split(' ').next().and_then(|range| range.split_once('-')).expect("a range");
        let number = |text| u64::from_str_radix(text, 16).expect("an address");
        let (mut at, to) = (number(from), number(to));
        while at < to {
            let length = usize::try_from(to - at).unwrap_or(usize::MAX).min(piece.len());
            // What cannot be read, such as the pages of a device, holds nothing of a guest's.
            let Ok(read @ 1..) = memory.read_at(&mut piece[..length], at) else { break };
            into.write_all(&piece[..read]).expect("grep reads all");
            at += read as u64;
        }
    }
    drop(into);
    let found = grep.wait_with_output().expect("it ends").stdout;
    text(&found).lines().map(str::to_owned).collect()
}

fn find(bytes: &[u8], wanted: &[u8]) -> bool {
    let first = wanted[0];
    let starts = bytes.iter().enumerate().filter(|(_, byte)| **byte == first);
    starts.into_iter().any(|(at, _)| bytes[at..].starts_with(wanted))
}

/// Which of these texts are in files below a directory, its disks among them.
fn held_below(dir: &Path, texts: [&str; 2]) -> BTreeSet<String> {
    let mut grep = Command::new("grep");
    grep.args(["-r", "-a", "-o", "-h", "-F", "-e", texts[0], "-e", texts[1]]).arg(dir).stdout(Stdio::piped());
    let found = start(&mut grep).wait_with_output().expect("it ends").stdout;
    text(&found).lines().map(str::to_owned).collect()
}

#[test]
fn a_secret_reaches_its_hosts_and_is_nowhere_else() {
    let (pyro, dir) = (Pyro::new(), tempfile::tempdir().expect("a directory"));
    let site = Site::start(&["api.test", "other.test"]);
    let policy = site.policy(dir.path(), &["api.test", "other.test"], "");
    let secret = "TOKEN=env:MY_TOKEN@api.test";
    let line = ["task", "create", "debian:12", "--mem-mib", "512", "--id-only", "--network-policy", &policy];
    let id = created(&with_value(&pyro, &site, &[&line[..], &["--secret", secret]].concat()));
    let placeholder = text(&pyro.exec(&id, "printf %s $TOKEN").stdout);
    assert!(placeholder.starts_with("pyro-secret-") && placeholder.len() == 44, "{placeholder}");

    let sends_it = |what: &str| {
        git(
            &pyro,
            &id,
            "-c http.extraHeader=\"Authorization: Bearer $TOKEN\" ls-remote https://api.test/bearer",
        );
        let heard = site.heard().concat();
        assert!(
            heard.contains("/bearer") && heard.contains(&format!("Bearer {VALUE}\r\n")),
            "{what}: {heard}"
        );
        assert!(!heard.contains(&placeholder), "{what}: {heard}");
    };
    sends_it("first start");
    git(&pyro, &id, "-c http.extraHeader=\"X-Key: a$TOKEN:$TOKEN\" ls-remote https://api.test/header");
    assert!(site.heard().concat().contains(&format!("a{VALUE}:{VALUE}\r\n")));
    git(&pyro, &id, "ls-remote https://user:$TOKEN@api.test/basic");
    let heard = site.heard().concat();
    assert!(heard.contains(&format!("Basic {}", STANDARD.encode(format!("user:{VALUE}")))), "{heard}");
    // Another name of the same server gets words that are worth nothing, and TLS that pyro does not end: its authority is not
    // the guest's, so the guest must be told to trust anything.
    git(
        &pyro,
        &id,
        "-c http.sslVerify=false -c http.extraHeader=\"X-Key: $TOKEN\" ls-remote https://other.test/x",
    );
    let heard = site.heard().concat();
    assert!(heard.contains(&placeholder) && !heard.contains(VALUE), "{heard}");

    let log = pyro.ok(&["task", "logs", &id, "--network"]);
    assert!(log.contains("with secret TOKEN") && log.contains("/bearer"), "{log}");
    let record = pyro.status(&id);
    assert_eq!(record["secrets"]["TOKEN"]["value_from"], "env:MY_TOKEN", "{record}");
    assert!(!record.to_string().contains(VALUE) && !log.contains(VALUE));
    for process in pyro.processes() {
        for file in ["cmdline", "environ"] {
            let bytes = fs::read(format!("/proc/{process}/{file}")).unwrap_or_default();
            assert!(!find(&bytes, VALUE.as_bytes()), "{file} of {process}");
        }
    }
    let vmm = pyro.vmm(&id).expect("it runs");
    let found = remembered(vmm, [&placeholder, VALUE]);
    assert_eq!(found, BTreeSet::from([placeholder.clone()]), "what a guest has in its memory");

    // After a stop, the same supervisor has it still, and the guest trusts the authority of the new start.
    pyro.ok(&["task", "stop", &id]);
    pyro.ok(&["task", "start", &id]);
    sends_it("after a stop");
    let blocks = pyro.exec(&id, "grep -c '^# pyro: the authority' /etc/ssl/certs/ca-certificates.crt");
    assert_eq!(text(&blocks.stdout).trim(), "1");
    // After the death of the supervisor, whoever starts the task must have it.
    kill(pyro.supervisor(&id).expect("it runs"), "KILL");
    pyro.until("the task is stopped", |pyro| pyro.status(&id)["state"] == "stopped");
    let refused = pyro.run(&["task", "start", &id]);
    let words = text(&refused.stderr);
    assert!(words.contains("the value of secret 'TOKEN' cannot be read from env:MY_TOKEN"), "{words}");
    assert!(words.contains("whoever starts the task again must have them"), "{words}");
    assert!(with_value(&pyro, &site, &["task", "start", &id]).status.success());
    sends_it("after a death");
    assert_eq!(
        text(&pyro.exec(&id, "printf %s $TOKEN").stdout),
        placeholder,
        "files of the guest may hold it"
    );
    // A crash leaves no picture of it.
    let supervisor = pyro.supervisor(&id).expect("it runs");
    let pid = rustix::process::Pid::from_raw(supervisor);
    let unlimited = rustix::process::Rlimit { current: None, maximum: None };
    if crate::support::is_root() {
        rustix::process::prlimit(pid, rustix::process::Resource::Core, unlimited).expect("root may set it");
    }
    kill(supervisor, "ABRT");
    pyro.until("the task is stopped", |pyro| pyro.status(&id)["state"] == "stopped");
    let found = held_below(pyro.state(), [&placeholder, VALUE]);
    assert_eq!(found, BTreeSet::from([placeholder]), "the search finds what is there, and nothing else is");
    assert!(!Path::new("/core").exists() && !Path::new(&format!("/core.{supervisor}")).exists());
    pyro.ok(&["task", "delete", &id]);
    pyro.assert_empty();
}

#[test]
fn a_secret_that_cannot_work_is_refused_before_anything_is_made() {
    let pyro = Pyro::new();
    let site = Site::start(&["api.test"]);
    let cases: [(&[&str], &str); 8] = [
        (
            &["--secret", "T=env:MY_TOKEN@api.test"],
            "secret 'T' is for api.test, which the network policy does not allow",
        ),
        (
            &["--network", "--deny", "api.test", "--secret", "T=env:MY_TOKEN@api.test"],
            "which the network policy does not allow",
        ),
        (
            &["--network", "--secret", "T=env:NO_SUCH@api.test"],
            "cannot be read from env:NO_SUCH: the variable is not set",
        ),
        (&["--network", "--secret", "T=file:/nowhere@api.test"], "cannot be read from file:/nowhere: "),
        (&["--network", "--secret", "T=hunter2"], "invalid secret 'T': write NAME=env:VARIABLE@HOST"),
        (&["--network", "--secret", "T=env:MY_TOKEN@api.test:443"], "without ports"),
        (&["--network", "--secret", "1T=env:MY_TOKEN@api.test"], "its name must be that of a variable"),
        (
            &["--network", "--secret", "T=env:MY_TOKEN@a.test", "--secret", "T=env:MY_TOKEN@b.test"],
            "secret 'T' is given twice",
        ),
    ];
    for (flags, expected) in cases {
        for verb in [&["run", "debian:12"][..], &["task", "create", "debian:12"]] {
            let end: &[&str] = if verb[0] == "run" { &["--", "true"] } else { &[] };
            let output = with_value(&pyro, &site, &[verb, flags, end].concat());
            let words = text(&output.stderr);
            assert!(!output.status.success() && words.contains(expected), "{flags:?}: {words}");
            assert!(!words.contains("hunter2") && !words.contains(VALUE), "{words}");
        }
    }
    pyro.assert_empty();
}

#[test]
fn requests_are_judged_one_by_one_where_a_policy_inspects_them() {
    let (pyro, dir) = (Pyro::new(), tempfile::tempdir().expect("a directory"));
    let site = Site::start(&["api.test"]);
    let rules = "[inspect]\n'api.test' = ['GET /open/*']\n";
    let policy = site.policy(dir.path(), &["api.test"], rules);
    let line =
        ["run", "debian:12", "--mem-mib", "512", "--json", "--network-policy", &policy, "--", "sh", "-c"];
    let script =
        "git ls-remote https://u:p@api.test/open/x; git ls-remote https://u:p@api.test/closed/x; true";
    let result = parse(&with_value(&pyro, &site, &[&line[..], &[script]].concat()));
    let heard = site.heard().concat();
    assert!(heard.contains("GET /open/x/") && !heard.contains("/closed/"), "{heard} {result}");
    assert!(result["stderr"].to_string().contains("403"), "{result}");
    let notes = result["notes"].to_string();
    assert!(notes.contains("api.test:443 denied by policy (no inspect rule allows it)"), "{notes}");
    pyro.assert_empty();
}
