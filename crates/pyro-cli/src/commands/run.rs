//! `pyro run`: one command in a fresh microVM.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use pyro_engine::network::{HeldSecret, NetworkRequest, Policy, PolicySource, SecretText};
use pyro_engine::{Command, Engine, ExecResult, ExecSpec, Isolation, Observer, Phase, VmSpec, published};

use crate::cli::{ExecFlags, MachineArgs, NetworkArgs, RunArgs};
use crate::config;
use crate::failure::Failure;
use crate::printer::Printer;
use crate::streams::{self, Forwarder, Written};

/// As a shell tells the end of a program whose output nobody reads: 128 and SIGPIPE.
const UNREAD: u8 = 141;

pub(crate) async fn run(args: RunArgs, printer: &Printer) -> Result<ExitCode, Failure> {
    let config = config::engine_for(&args.machine)?;
    let policies = config.policies_dir.clone();
    let keep = args.keep_ready.unwrap_or(config.keep_ready_seconds);
    let engine = Engine::open(config)?;
    let exec = exec_spec(args.exec)?;
    let spec = machine(args.machine, policies.as_deref())?;
    let mut observer = Observer::none().on_phase(telling(printer, &engine, "run"));
    let mut forwarder = None;
    if !printer.json() {
        let (sender, started) = Forwarder::start();
        observer = observer.output(sender);
        forwarder = Some(started);
    }
    let result = match keep {
        0 => engine.run(spec, exec, observer).await,
        keep => engine.run_keeping_ready(spec, exec, observer, Duration::from_secs(keep.into())).await,
    };
    if let Some(code) = written(forwarder).await? {
        return Ok(code);
    }
    let result = result?;
    if printer.json() {
        printer.object(&result);
    }
    if result.execution_mode == "host_compat" {
        printer.warn("warning: no guest could be had; the command ran on this host, without isolation");
    }
    note(&result, printer);
    printer.say(&format!(
        "[run] environment={} execution_mode={} isolation={} exit_code={} duration_ms={:.0} start_mode={}",
        result.environment,
        result.execution_mode,
        result.isolation,
        result.exit_code,
        result.duration_ms,
        result.start_mode
    ));
    Ok(exit(result.exit_code))
}

/// Tells what the caller should know besides the output.
pub(super) fn note(result: &ExecResult, printer: &Printer) {
    for note in &result.notes {
        printer.warn(&format!("note: {note}"));
    }
}

/// Waits until all output is written; a code where the command's own does not count any more.
pub(super) async fn written(forwarder: Option<Forwarder>) -> Result<Option<ExitCode>, Failure> {
    let Some(forwarder) = forwarder else { return Ok(None) };
    match forwarder.finish().await {
        Written::All => Ok(None),
        Written::Unread => Ok(Some(ExitCode::from(UNREAD))),
        Written::Failed(error) => Err(Failure::host("the output could not be written", &error)
            .hint("make room where stdout goes, then run it again")),
    }
}

pub(super) fn exit(code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(code).unwrap_or(255))
}

/// The command that is asked for, with our stdin as its own.
pub(super) fn exec_spec(args: ExecFlags) -> Result<ExecSpec, Failure> {
    let mut exec = ExecSpec::new(command(args.command));
    exec.timeout_seconds = args.timeout_seconds;
    exec.user = args.user;
    if let Some(cwd) = args.cwd {
        exec.cwd = cwd;
    }
    for text in args.env {
        let Some((name, value)) = text.split_once('=') else {
            let shown: String = text.chars().take(64).flat_map(char::escape_debug).collect();
            let error = Failure::new("invalid_value", format!("env: '{shown}' is no variable"));
            return Err(error.hint("write NAME=VALUE"));
        };
        exec.env.push((name.to_owned(), value.to_owned()));
    }
    exec.stdin = if args.no_stdin { None } else { streams::stdin() };
    Ok(exec)
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

/// The machine that is asked for.
pub(super) fn machine(args: MachineArgs, policies: Option<&Path>) -> Result<VmSpec, Failure> {
    let (network, secrets) = network_of(args.network, policies)?;
    let spec = VmSpec {
        network,
        secrets,
        publish: published(&args.publish)?,
        allow_host_compat: args.allow_host_compat,
        require_isolation: args.require_isolation.map(Isolation::from),
        cold: args.cold,
        ..VmSpec::new(args.environment)
    };
    Ok(spec.sized(args.vcpu_count, args.mem_mib, args.disk_mib, args.ttl_seconds))
}

/// The network that is asked for, and the secrets that the guest uses there.
pub(super) fn network_of(
    args: NetworkArgs,
    policies: Option<&Path>,
) -> Result<(Policy, Vec<HeldSecret>), Failure> {
    let NetworkArgs { network, allow, deny, network_policy, secret } = args;
    let network_policy = network_policy.map(PolicySource::File);
    let mut secrets = BTreeMap::new();
    for text in secret {
        let refused = |error: String| Failure::new("invalid_value", error);
        let (name, secret) = SecretText::parse(&text).map_err(|error| refused(error.to_string()))?;
        if secrets.insert(name.clone(), secret).is_some() {
            return Err(refused(format!("secret '{name}' is given twice")));
        }
    }
    let request = NetworkRequest { network, allow, deny, network_policy, secrets };
    Ok((request.policy(policies)?, request.hold_secrets()?))
}

/// Tells the phases of a command as they come.
pub(super) fn telling(
    printer: &Printer,
    engine: &Engine,
    prefix: &'static str,
) -> impl Fn(Phase) + Send + Sync + 'static {
    let (printer, engine) = (printer.clone(), engine.clone());
    move |phase| match phase {
        Phase::Environment(step, detail) => printer.step(&step, &detail),
        Phase::Create(environment) => {
            warn_of_emulation(&printer, &engine);
            printer.phase(prefix, &format!("phase=create environment={environment}"));
        }
        Phase::Start(id) => {
            printer.phase(prefix, &format!("phase=start {}={id}", noun(prefix)));
            printer.turn("booting".to_owned());
        }
        Phase::Execute(id) => printer.phase(prefix, &format!("phase=execute {}={id}", noun(prefix))),
        Phase::Warning(warning) => printer.warn(&format!("warning: {warning}")),
        Phase::Sequence(_) => {}
    }
}

fn noun(prefix: &str) -> &'static str {
    if prefix == "run" { "vm_id" } else { "task_id" }
}

/// Once for each state directory: what software emulation does not promise.
fn warn_of_emulation(printer: &Printer, engine: &Engine) {
    if !printer.json()
        && engine.isolation().is_ok_and(|tier| tier == Isolation::QemuTcg)
        && engine.tells_first("emulation")
    {
        printer.settle();
        printer.say(
            "note: without a usable KVM, guests run in software emulation (qemu-tcg), which QEMU's own policy does \
             not count as a hardened boundary; `pyro doctor` tells why (said once)",
        );
    }
}
