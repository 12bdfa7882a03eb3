//! `pyro run`: one command in a fresh microVM.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use pyro_engine::{Chunk, Command, Engine, ExecSpec, Isolation, Observer, Phase, Stream, VmSpec};
use tokio::sync::mpsc;

use crate::cli::RunArgs;
use crate::config;
use crate::failure::Failure;
use crate::printer::Printer;

/// Pieces of output that may wait for a slow reader of stdout.
const QUEUE: usize = 8;

pub(crate) async fn run(args: RunArgs, printer: &Printer) -> Result<ExitCode, Failure> {
    let engine = Engine::open(config::engine(args.backend)?)?;
    let mut exec = ExecSpec::new(command(args.command));
    exec.timeout_seconds = args.timeout_seconds;
    // A terminal is never given: the command would wait for keys that nobody knows to press.
    if !std::io::stdin().is_terminal() {
        exec.stdin = Some(Box::new(tokio::io::stdin()));
    }
    let vm = VmSpec {
        vcpu_count: args.vcpu_count,
        mem_mib: args.mem_mib,
        ttl_seconds: args.ttl_seconds,
        network: args.network,
        allow_host_compat: args.allow_host_compat,
        require_isolation: args.require_isolation.map(Isolation::from),
        ..VmSpec::new(args.environment)
    };
    let json = printer.json();
    let words = Printer::new(json);
    let mut observer = Observer::none().on_phase(move |phase| tell(&words, phase));
    let mut writer = None;
    if !json {
        let (sender, receiver) = mpsc::channel(QUEUE);
        observer = observer.output(sender);
        writer = Some(std::thread::spawn(move || write_out(receiver)));
    }
    let result = engine.run(vm, exec, observer).await;
    if let Some(writer) = writer {
        drop(writer.join());
    }
    let result = result?;
    if json {
        printer.object(&result);
    }
    if result.execution_mode == "host_compat" {
        printer.say("warning: no guest could be had; the command ran on this host, without isolation");
    }
    printer.say(&format!(
        "[run] environment={} execution_mode={} isolation={} exit_code={} duration_ms={:.0}",
        result.environment, result.execution_mode, result.isolation, result.exit_code, result.duration_ms
    ));
    Ok(ExitCode::from(u8::try_from(result.exit_code).unwrap_or(255)))
}

/// One word with white space in it is a shell string; anything else is run as it is.
fn command(words: Vec<std::ffi::OsString>) -> Command {
    if let [word] = words.as_slice()
        && let Some(text) = word.to_str()
        && text.contains(char::is_whitespace)
    {
        return Command::Shell(text.to_owned());
    }
    Command::argv(words)
}

fn tell(printer: &Printer, phase: Phase) {
    match phase {
        Phase::Environment(step, detail) => printer.step(&step, &detail),
        Phase::Create(environment) => printer.say(&format!("[run] phase=create environment={environment}")),
        Phase::Start(vm_id) => printer.say(&format!("[run] phase=start vm_id={vm_id}")),
        Phase::Execute(vm_id) => printer.say(&format!("[run] phase=execute vm_id={vm_id}")),
    }
}

/// Writes output as it arrives; ends when the command ends, or when nobody reads any more.
fn write_out(mut chunks: mpsc::Receiver<Chunk>) {
    while let Some(chunk) = chunks.blocking_recv() {
        let written = match chunk.stream {
            Stream::Stdout => {
                let mut stdout = std::io::stdout().lock();
                stdout.write_all(&chunk.bytes).and_then(|()| stdout.flush())
            }
            Stream::Stderr => std::io::stderr().write_all(&chunk.bytes),
        };
        if written.is_err() {
            return;
        }
    }
}
