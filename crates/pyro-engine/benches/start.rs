//! How soon a sandbox is there: `pyro run` and a task that go on from a template, against a bare QEMU that goes on from the
//! same one until its agent answers, and against a cold start. And what each further task takes of the host's memory.
//!
//! All take turns in one run. `scripts/bench.sh` sets the variables that name kernel, images and program.

#![expect(clippy::print_stdout, reason = "a bench prints its figures")]

#[allow(dead_code, reason = "each bench uses its own part of it")]
mod support;

use std::path::Path;
use std::time::{Duration, Instant};

use pyro_engine::{Engine, EngineConfig, Observer, VmSpec};
use pyro_proto::resync::{Host, NONCE_LEN, Step};
use pyro_vmm::{Qemu, Snapshot, Vmm};
use serde_json::Value;
use support::{CAP, bare_qemu, config, machine, median, memory, millis, processes, pyro};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const ROUNDS: usize = 15;
const ENVIRONMENT: &str = "debian:12";
/// Tasks that are made at once, three times.
const TASKS: usize = 8;
/// The phases of a run as its result tells them.
const PHASES: [&str; 5] = ["prepare", "start", "handshake", "execute", "cleanup"];

#[tokio::main]
async fn main() {
    let state = tempfile::tempdir().expect("a directory");
    let config = config(state.path(), CAP);
    let engine = Engine::open(config.clone()).expect("the engine opens");
    let spec = VmSpec::new(ENVIRONMENT);
    let template = engine.prepare_templates(&spec, &Observer::none()).await.expect("a template");
    let template = config.cache_dir.join("templates").join(&template[0].id);
    starts(&engine, &config, &template).await;
    together(&config);
    density(&config);
}

/// What one `pyro run` took, in all and by its own account.
struct Run {
    whole: Duration,
    phases: [f64; 5],
}

async fn starts(engine: &Engine, config: &EngineConfig, template: &Path) {
    let environment = engine.prepare(ENVIRONMENT, &Observer::none()).await.expect("installed");
    let rootfs = environment.rootfs.clone();
    let qemu = bare_qemu(config);
    let (mut bare, mut runs, mut git, mut cold, mut tasks) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        bare.push(restore_bare(&qemu, template, &rootfs).await);
        runs.push(run(config, &[], &["true"], "restored"));
        git.push(run(config, &[], &["git", "--version"], "restored").whole);
        cold.push(run(config, &["--cold"], &["true"], "cold").whole);
        let began = Instant::now();
        let id = pyro(config, &["task", "create", ENVIRONMENT, "--id-only"]);
        pyro(config, &["task", "exec", id.trim(), "--", "true"]);
        tasks.push(began.elapsed());
        pyro(config, &["task", "delete", id.trim()]);
    }
    let bare = median(bare);
    let told = |what: &str, time: Duration| {
        let ratio = time.as_secs_f64() / bare.as_secs_f64();
        println!("{what:48} {:8.1} ms   {ratio:5.2} x bare", millis(time));
    };
    told("bare QEMU, the template's agent has answered", bare);
    told("pyro run -- true, restored", median(runs.iter().map(|run| run.whole).collect()));
    told("pyro run -- git --version, restored", median(git));
    told("pyro task create, exec -- true, restored", median(tasks));
    told("pyro run --cold -- true", median(cold));
    println!("the phases of pyro run -- true, restored:");
    let rest: Vec<f64> = runs.iter().map(|run| millis(run.whole) - run.phases.iter().sum::<f64>()).collect();
    for (index, phase) in PHASES.iter().enumerate() {
        println!("  {phase:46} {:8.1} ms", median(runs.iter().map(|run| run.phases[index]).collect()));
    }
    println!("  {:46} {:8.1} ms", "the process itself: its start, its end, its words", median(rest));
}

/// A QEMU with nothing around it, from its start to the first answer of its agent.
async fn restore_bare(qemu: &Qemu, template: &Path, rootfs: &Path) -> Duration {
    let dir = tempfile::tempdir().expect("a directory");
    let began = Instant::now();
    let overlay = dir.path().join("overlay");
    pyro_image::copy_sparse(&template.join("overlay.ext4"), &overlay).expect("copied");
    // Kernel and initramfs are not used, and asked for.
    let spec = machine(dir.path(), [rootfs.to_owned(), rootfs.to_owned()], [rootfs.to_owned(), overlay]);
    let saved = Snapshot { state: template.join("state"), memory: template.join("memory") };
    let machine = qemu.restore(&spec, &saved).await.expect("restored");
    let mut stream = machine.connect().await.expect("a channel");
    let mut host = Host::new([7; NONCE_LEN]);
    stream.write_all(&host.syn()).await.expect("written");
    let mut buffer = [0; 4096];
    loop {
        let read = stream.read(&mut buffer).await.expect("read");
        assert_ne!(read, 0, "the guest is gone");
        if let (_, Step::Write(..)) = host.feed(&buffer[..read]).expect("little noise") {
            break;
        }
    }
    let time = began.elapsed();
    machine.kill().await;
    time
}

/// Tasks that are made at once by as many processes, until each has run a command.
fn together(config: &EngineConfig) {
    let mut times = Vec::new();
    for _ in 0..3 {
        let began = Instant::now();
        let ids: Vec<String> = std::thread::scope(|scope| {
            let one = || {
                let id = pyro(config, &["task", "create", ENVIRONMENT, "--id-only"]);
                pyro(config, &["task", "exec", id.trim(), "--", "true"]);
                id.trim().to_owned()
            };
            let threads: Vec<_> = (0..TASKS).map(|_| scope.spawn(one)).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });
        times.push(began.elapsed());
        for id in ids {
            pyro(config, &["task", "delete", &id]);
        }
    }
    println!("{TASKS} tasks at once, each has run a command           {:8.1} ms", millis(median(times)));
}

/// The memory of all processes of so many tasks, each after a command of some size.
fn density(config: &EngineConfig) {
    println!("memory of tasks, each after one git --version, all processes counted:");
    println!("  tasks   sum of PSS   for each   private dirty for each");
    let mut ids: Vec<String> = Vec::new();
    for count in [1, 4, 8] {
        while ids.len() < count {
            let id = pyro(config, &["task", "create", ENVIRONMENT, "--id-only"]).trim().to_owned();
            pyro(config, &["task", "exec", &id, "--", "git", "--version"]);
            ids.push(id);
        }
        let pids: Vec<u32> = ids.iter().flat_map(|id| processes(id)).collect();
        assert!(pids.len() >= 2 * count, "a supervisor, a VMM and what guards it each");
        let (mut shared, mut private) = (0.0, 0.0);
        for pid in pids {
            let [_, pss, dirty] = memory(pid);
            shared += pss;
            private += dirty;
        }
        #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
        let each = count as f64;
        println!("  {count:5}   {shared:7.1} MB   {:5.1} MB   {:5.1} MB", shared / each, private / each);
    }
    for id in ids {
        pyro(config, &["task", "delete", &id]);
    }
}

fn run(config: &EngineConfig, flags: &[&str], command: &[&str], expected: &str) -> Run {
    let words = [&["run", ENVIRONMENT, "--json"], flags, &["--"], command].concat();
    let began = Instant::now();
    let text = pyro(config, &words);
    let whole = began.elapsed();
    let result: Value = serde_json::from_str(&text).expect("an object");
    assert_eq!(result["start_mode"], expected, "{text}");
    let phases = PHASES.map(|phase| result["timings"][phase].as_f64().expect("a time"));
    Run { whole, phases }
}
