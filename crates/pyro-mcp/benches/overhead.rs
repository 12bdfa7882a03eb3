//! What the MCP server adds to the engine's own time: the same command through the engine and through a server of it, in
//! turns, in one process. Of each call that is counted which is not in the engine's account of it, so that the noise of
//! the machines themselves stays out.
//!
//! `scripts/bench.sh mcp` sets the variables that name environments and program.

#![expect(clippy::print_stdout, reason = "a bench prints its figures")]

use std::path::PathBuf;
use std::time::Instant;

use pyro_engine::{Command, Engine, EngineConfig, ExecResult, ExecSpec, Observer, VmSpec};
use pyro_mcp::{Profile, Server};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, DuplexStream, ReadHalf, WriteHalf};
use tokio_util::sync::CancellationToken;

const ROUNDS: usize = 40;

#[tokio::main]
async fn main() {
    let state = tempfile::tempdir().expect("a directory");
    let config = EngineConfig::from_environment(Some(variable("PYRO_TEST_PROGRAM"))).expect("an environment");
    let config = EngineConfig {
        state_dir: state.path().to_owned(),
        cache_dir: variable("PYRO_TEST_ENVIRONMENTS"),
        ..config
    };
    let engine = Engine::open(config.clone()).expect("the engine opens");
    let mut client =
        Client::connect(Server::new(config, Profile::Full, pyro_engine::network::Policy::none(), Vec::new()))
            .await;
    let task = engine.create_task(VmSpec::new("debian:12"), Observer::none()).await.expect("a task").task_id;

    let (mut direct, mut served) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let began = Instant::now();
        let exec = ExecSpec::new(Command::argv(["true"]));
        let result = engine.exec_task(&task, exec, Observer::none()).await.expect("it runs");
        direct.push(millis(began) - result.duration_ms);
        let began = Instant::now();
        let result = client.call("task_exec", json!({ "task_id": task, "command": ["true"] })).await;
        served.push(millis(began) - number(&result, "/duration_ms"));
    }
    told("task_exec of true", direct, served);
    engine.delete_task(&task).await.expect("deleted");

    let (mut direct, mut served) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let began = Instant::now();
        let exec = ExecSpec::new(Command::argv(["true"]));
        let result = engine.run(VmSpec::new("debian:12"), exec, Observer::none()).await.expect("it runs");
        direct.push(millis(began) - account(&result));
        let began = Instant::now();
        let result = client.call("vm_run", json!({ "environment": "debian:12", "command": ["true"] })).await;
        let phases = ["prepare", "start", "handshake", "execute", "cleanup"];
        let account: f64 = phases.iter().map(|phase| number(&result, &format!("/timings/{phase}"))).sum();
        served.push(millis(began) - account);
    }
    told("vm_run of true, restored", direct, served);
}

fn told(what: &str, direct: Vec<f64>, served: Vec<f64>) {
    let (direct, served) = (median(direct), median(served));
    println!(
        "{what:<26} beside the command: engine {direct:6.2} ms, server {served:6.2} ms; added {:5.2} ms",
        served - direct
    );
}

/// A client that speaks the protocol as it stands on the wire.
struct Client {
    lines: tokio::io::Lines<BufReader<ReadHalf<DuplexStream>>>,
    writer: WriteHalf<DuplexStream>,
    id: u64,
}

impl Client {
    async fn connect(server: Server) -> Self {
        let (ours, theirs) = tokio::io::duplex(1 << 20);
        let (reader, writer) = tokio::io::split(theirs);
        drop(tokio::spawn(async move { server.serve(reader, writer, CancellationToken::new()).await }));
        let (reader, writer) = tokio::io::split(ours);
        let mut client = Self { lines: BufReader::new(reader).lines(), writer, id: 0 };
        let hello = json!({
            "protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": { "name": "bench", "version": "1" }
        });
        client.ask("initialize", hello).await;
        client.send(json!({ "jsonrpc": "2.0", "method": "notifications/initialized" })).await;
        client
    }

    async fn call(&mut self, tool: &str, arguments: Value) -> Value {
        let mut answer = self.ask("tools/call", json!({ "name": tool, "arguments": arguments })).await;
        answer["result"]["structuredContent"].take()
    }

    async fn ask(&mut self, method: &str, params: Value) -> Value {
        self.id += 1;
        self.send(json!({ "jsonrpc": "2.0", "id": self.id, "method": method, "params": params })).await;
        loop {
            let line = self.lines.next_line().await.expect("read").expect("an answer");
            let message: Value = serde_json::from_str(&line).expect("JSON");
            if message["id"] == self.id {
                return message;
            }
        }
    }

    async fn send(&mut self, message: Value) {
        self.writer.write_all(format!("{message}\n").as_bytes()).await.expect("sent");
    }
}

fn account(result: &ExecResult) -> f64 {
    let timings = &result.timings;
    timings.prepare + timings.start + timings.handshake + timings.execute + timings.cleanup
}

fn number(value: &Value, path: &str) -> f64 {
    value.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("no {path} in {value}"))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn millis(began: Instant) -> f64 {
    began.elapsed().as_secs_f64() * 1e3
}

fn variable(name: &str) -> PathBuf {
    std::env::var_os(name)
        .map(PathBuf::from)
        .unwrap_or_else(|| panic!("{name} is not set; use `make bench-mcp`"))
}
