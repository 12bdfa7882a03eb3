//! The figures of SPECIFICATION.md that a machine gives: cold start against a bare guest on the same VMM, commands in
//! a running task through the library and through the command, throughput, journals, memory and rest.
//!
//! Sides of a ratio take turns in one run. The bare guest is the same kernel with an init that loads the modules of
//! the channel and writes one byte. `scripts/bench.sh` sets the variables that name kernel, images and program.

#![expect(clippy::print_stdout, reason = "a bench prints its figures")]

#[allow(dead_code, reason = "each bench uses its own part of it")]
mod support;

use std::path::Path;
use std::time::{Duration, Instant};

use pyro_engine::{Command, Engine, EngineConfig, ExecSpec, LogQuery, Observer, VmSpec};
use pyro_process::Spawn;
use pyro_vmm::{Qemu, Vmm};
use tokio::io::AsyncReadExt;

use support::{bare_qemu, machine, median, memory, millis, processes, variable};

const ROUNDS: usize = 15;
const COMMANDS: usize = 200;
const SPAWN_EVERY: usize = 10;
/// Rounds of each warm program.
const WARM_ROUNDS: usize = 50;
/// Programs with shared libraries, as agents run them over and over.
const WARM: [&[&str]; 3] = [&["true"], &["git", "--version"], &["sh", "-c", "ls / | wc -l"]];
const ENTRIES: u64 = 10_000;
const STREAM_BYTES: usize = 256 << 20;
const REST: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() {
    let state = tempfile::tempdir().expect("a directory");
    // Its starts are cold ones: the others have a bench of their own.
    let config = EngineConfig { template_limit_mib: 0, ..support::config(state.path(), 4) };
    let engine = Engine::open(config.clone()).expect("the engine opens");
    starts(&engine, &config).await;
    tasks(&engine, &config).await;
}

async fn starts(engine: &Engine, config: &EngineConfig) {
    let qemu = bare_qemu(config);
    let bare_dir = tempfile::tempdir().expect("a directory");
    let (mut bare, mut whole, mut guest) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        bare.push(boot_bare(&qemu, bare_dir.path()).await);
        let began = Instant::now();
        let exec = ExecSpec::new(Command::argv(["true"]));
        let result = engine.run(VmSpec::new("debian:12"), exec, Observer::none()).await.expect("it runs");
        whole.push(began.elapsed());
        guest.push(Duration::from_secs_f64((result.timings.start + result.timings.handshake) / 1e3));
    }
    let (bare, whole, guest) = (median(bare), median(whole), median(guest));
    let ratio = |time: Duration| time.as_secs_f64() / bare.as_secs_f64();
    println!("cold start: bare guest, first byte           {:8.1} ms", millis(bare));
    println!(
        "cold start: pyro, ready for a command        {:8.1} ms   {:.2} x bare",
        millis(guest),
        ratio(guest)
    );
    println!(
        "cold start: pyro, `true` ended, cleaned up   {:8.1} ms   {:.2} x bare",
        millis(whole),
        ratio(whole)
    );
}

async fn tasks(engine: &Engine, config: &EngineConfig) {
    let began = Instant::now();
    let task = engine.create_task(VmSpec::new("debian:12"), Observer::none()).await.expect("a task");
    let id = task.task_id;
    exec(engine, &id, &["true"]).await;
    println!("task: create to the end of its first command {:8.1} ms", millis(began.elapsed()));

    for name in ["no-op", "spawn"] {
        let program = fs_err::read(variable("PYRO_TEST_PROGRAMS").join(name)).expect("a program");
        let mut install = ExecSpec::new(Command::Shell(format!("cat > /{name} && chmod +x /{name}")));
        install.stdin = Some(Box::new(std::io::Cursor::new(program)));
        engine.exec_task(&id, install, Observer::none()).await.expect("installed");
    }
    let program = config.supervisor.as_deref().expect("set above");
    let (mut library, mut with_c, mut command) = (Vec::new(), Vec::new(), Vec::new());
    // What the guest itself needs to start these programs and to see their ends, without anybody outside.
    let (mut guest, mut guest_with_c) = (Vec::new(), Vec::new());
    for round in 0..COMMANDS {
        let began = Instant::now();
        exec(engine, &id, &["/no-op"]).await;
        library.push(began.elapsed());
        let began = Instant::now();
        exec(engine, &id, &["/spawn"]).await;
        with_c.push(began.elapsed());
        if round % SPAWN_EVERY == 0 {
            guest.push(spawn(engine, &id, "/no-op").await);
            guest_with_c.push(spawn(engine, &id, "/spawn").await);
        }
        let began = Instant::now();
        let mut spawn = Spawn::new(program, Path::new("/"));
        spawn.args(["task", "exec", &id, "--", "/no-op"]).env("HOME", "/").env("PATH", &config.tool_path);
        spawn.env("PYRO_STATE_DIR", &config.state_dir).env("PYRO_ENVIRONMENT_CACHE_DIR", &config.cache_dir);
        assert!(pyro_process::output(spawn).expect("it runs").status.success());
        command.push(began.elapsed());
    }
    for (program, library, guest) in
        [("a static no-op", library, guest), ("the same with a C library", with_c, guest_with_c)]
    {
        let (least, library) = (library.iter().min().copied().unwrap_or_default(), median(library));
        println!(
            "exec of {program:26} through the library {:7.2} ms   least {:.2}; the guest alone {:.2}",
            millis(library),
            millis(least),
            millis(median(guest))
        );
    }
    println!("exec of a static no-op             through the command {:7.2} ms", millis(median(command)));

    warm(engine, &id).await;

    let began = Instant::now();
    let size = STREAM_BYTES.to_string();
    let result = exec(engine, &id, &["head", "-c", &size, "/dev/zero"]).await;
    assert_eq!(result.stdout_bytes, STREAM_BYTES as u64);
    #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
    let rate = STREAM_BYTES as f64 / began.elapsed().as_secs_f64() / 1e6;
    println!("output of a guest, into journal and caller    {rate:7.1} MB/s");

    let supervisor = supervisor(&id);
    let [resident, own, private] = memory(supervisor);
    println!("memory of a supervisor: resident              {resident:7.1} MB");
    println!("memory of a supervisor: its share             {own:7.1} MB   {private:.1} MB private");
    let before = processor(supervisor);
    tokio::time::sleep(REST).await;
    let used = (processor(supervisor) - before).as_secs_f64() / REST.as_secs_f64() * 100.0;
    println!("processor time of an idle supervisor          {used:7.2} %");
    engine.delete_task(&id).await.expect("deleted");

    journal(engine, config).await;
}

/// Dynamic programs that the guest has run before, taking turns.
async fn warm(engine: &Engine, id: &str) {
    for words in WARM {
        exec(engine, id, words).await;
    }
    let mut times = WARM.map(|_| Vec::with_capacity(WARM_ROUNDS));
    for _ in 0..WARM_ROUNDS {
        for (words, times) in WARM.iter().zip(&mut times) {
            let began = Instant::now();
            exec(engine, id, words).await;
            times.push(began.elapsed());
        }
    }
    for (words, times) in WARM.iter().zip(times) {
        let least = times.iter().min().copied().unwrap_or_default();
        println!(
            "exec, warm: {:29}             {:7.2} ms   least {:.2}",
            words.join(" "),
            millis(median(times)),
            millis(least)
        );
    }
}

/// A journal of many entries, as a supervisor would have written it.
async fn journal(engine: &Engine, config: &EngineConfig) {
    let task = engine.create_task(VmSpec::new("debian:12"), Observer::none()).await.expect("a task");
    let id = task.task_id;
    exec(engine, &id, &["echo", "one line"]).await;
    let commands = config.state_dir.join("tasks").join(&id).join("commands");
    let entry = fs_err::read_to_string(commands.join("000001.json")).expect("an entry");
    for sequence in 2..=ENTRIES {
        let text = entry
            .replace("\"sequence\": 1,", &format!("\"sequence\": {sequence},"))
            .replace("000001.", &format!("{sequence:06}."));
        fs_err::write(commands.join(format!("{sequence:06}.json")), text).expect("written");
        fs_err::write(commands.join(format!("{sequence:06}.stdout")), "one line\n").expect("written");
        fs_err::write(commands.join(format!("{sequence:06}.stderr")), "").expect("written");
    }
    for (what, query) in
        [("all", LogQuery::default()), ("the newest 20", LogQuery { limit: Some(20), ..LogQuery::default() })]
    {
        let began = Instant::now();
        let logs = engine.logs_task(&id, query).await.expect("read");
        println!(
            "logs of {ENTRIES} entries: {what:14}          {:7.1} ms   {} read",
            millis(began.elapsed()),
            logs.count
        );
    }
    engine.delete_task(&id).await.expect("deleted");
}

async fn exec(engine: &Engine, id: &str, words: &[&str]) -> pyro_engine::ExecResult {
    let mut spec = ExecSpec::new(Command::argv(words));
    spec.timeout_seconds = 300.0;
    let result = engine.exec_task(id, spec, Observer::none()).await.expect("it runs");
    assert_eq!(result.exit_code, 0, "{result:?}");
    result
}

/// How long one start and end of a program takes within the guest.
async fn spawn(engine: &Engine, id: &str, program: &str) -> Duration {
    let result = exec(engine, id, &["/spawn", "20", program]).await;
    Duration::from_secs_f64(result.stdout.trim().parse::<f64>().expect("milliseconds") / 1e3)
}

async fn boot_bare(qemu: &Qemu, dir: &Path) -> Duration {
    let [rootfs, overlay] = ["bare-rootfs", "bare-overlay"].map(|name| {
        let disk = dir.join(name);
        fs_err::File::create(&disk).and_then(|file| file.set_len(1 << 20)).expect("a disk");
        disk
    });
    let boot = ["PYRO_TEST_KERNEL", "PYRO_TEST_VMM_INITRAMFS"].map(variable);
    let spec = machine(dir, boot, [rootfs, overlay]);
    let began = Instant::now();
    let machine = qemu.launch(&spec).await.expect("launched");
    let mut stream = machine.connect().await.expect("a channel");
    stream.read_exact(&mut [0]).await.expect("a byte");
    let time = began.elapsed();
    machine.kill().await;
    time
}

fn supervisor(id: &str) -> u32 {
    // What guards its VMM are copies of it, and younger.
    *processes(&format!("supervise\0{id}")).iter().min().expect("the supervisor lives")
}

/// The processor time that a process has used.
fn processor(pid: u32) -> Duration {
    const TICKS_PER_SECOND: u64 = 100;
    let stat = fs_err::read_to_string(format!("/proc/{pid}/stat")).expect("it lives");
    let (_, rest) = stat.rsplit_once(") ").expect("a name");
    let ticks: u64 = rest.split(' ').skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND)
}
