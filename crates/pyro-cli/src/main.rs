//! The `pyro` command: arguments in, words and exit codes out. All that it does is done by the engine.

mod cli;
mod commands;
mod config;
mod failure;
mod printer;
mod streams;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use crate::cli::{Cli, Verb};
use crate::failure::Failure;
use crate::printer::Printer;

/// How long what a signal has cut short may take to clean up. What it cannot do by then the next command does: VMMs and tools
/// die with this process, and whatever they leave has no owner.
const WIND_UP: Duration = Duration::from_millis(1500);
/// How long threads may still work after a command that has ended by itself.
const LAST_WORK: Duration = Duration::from_secs(1);
/// How long a supervisor's threads may still work, as on a disk that does not answer.
const SUPERVISOR_LAST_WORK: Duration = Duration::from_millis(300);

fn main() -> ExitCode {
    pyro_engine::make_file_limits_errors();
    pyro_engine::raise_file_limit();
    let cli = Cli::parse();
    if let Verb::Supervise { .. } = cli.verb {
        return supervise();
    }
    let printer = Printer::new(cli.verb.json());
    let failed = if cli.verb.runs_a_command() { 125 } else { 1 };
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return printer.failure(&Failure::host("no threads", &error), failed),
    };
    let (code, time_left) = runtime.block_on(until_done_or_told(cli.verb, printer.clone(), failed));
    runtime.shutdown_timeout(time_left);
    code
}

/// Runs the command in a task of its own, so that a signal is heard whatever the command does. Returns also how long the
/// threads of the command may still work.
async fn until_done_or_told(verb: Verb, printer: Printer, failed: u8) -> (ExitCode, Duration) {
    let mut signals = match Signals::register() {
        Ok(signals) => signals,
        Err(error) => return (printer.failure(&Failure::host("signals", &error), failed), LAST_WORK),
    };
    let (interrupt, interrupted) = watch::channel(None);
    let ends_by_itself = verb.ends_by_itself();
    let mut command = tokio::spawn({
        let printer = printer.clone();
        async move { commands::dispatch(verb, &printer, interrupted).await }
    });
    let code = tokio::select! {
        ended = &mut command => return (outcome(ended, &printer, failed), LAST_WORK),
        code = signals.next() => code,
    };
    let until = Instant::now() + WIND_UP;
    exit_at(until, code);
    printer.settle();
    if ends_by_itself {
        // It has something to tell elsewhere first.
        interrupt.send_replace(Some(code));
    } else {
        // Dropping the command's future ends its machine.
        command.abort();
    }
    tokio::select! {
        // Whatever it says of its own end, it was told to end.
        _ = &mut command => {}
        // A second signal does not wait: the VMM dies with this process, and the next command removes its files.
        _ = signals.next() => return (ExitCode::from(code), Duration::ZERO),
        () = tokio::time::sleep_until(until.into()) => {}
    }
    (ExitCode::from(code), until.saturating_duration_since(Instant::now()))
}

/// Ends this process at that time, whatever its threads do then: one may wait for a lock, for a disk, or for somebody who
/// does not read its output.
fn exit_at(until: Instant, code: u8) {
    let watchdog = std::thread::Builder::new().name("pyro-exit".to_owned()).spawn(move || {
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
        #[expect(clippy::exit, reason = "a thread that hangs must not keep the process")]
        std::process::exit(i32::from(code));
    });
    // Without a thread, only what hangs for ever keeps the process.
    drop(watchdog);
}

fn outcome(
    ended: Result<Result<ExitCode, Failure>, tokio::task::JoinError>,
    printer: &Printer,
    failed: u8,
) -> ExitCode {
    let lost = printer.lost();
    match (ended, lost) {
        (Ok(Ok(_)), Some(lost)) => {
            printer.warn(&format!("error: {}", lost.error));
            ExitCode::from(failed)
        }
        (Ok(Ok(code)), None) => code,
        (Ok(Err(failure)), _) => printer.failure(&failure, failed),
        (Err(panic), _) => printer.failure(&Failure::host("pyro has a defect", &panic), failed),
    }
}

/// The signals that end a command, each with the exit code for it.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Signals {
    fn register() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> u8 {
        tokio::select! {
            _ = self.interrupt.recv() => 130,
            _ = self.terminate.recv() => 143,
            _ = self.hangup.recv() => commands::HANGUP,
        }
    }
}

/// The supervisor of a task is small: one thread, and a few more for what waits on a disk.
fn supervise() -> ExitCode {
    const DISK_THREADS: usize = 8;
    const IDLE: Duration = Duration::from_secs(1);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(DISK_THREADS)
        .thread_keep_alive(IDLE)
        .thread_stack_size(512 << 10)
        .build();
    let served = runtime.and_then(|runtime| {
        let served = runtime.block_on(pyro_engine::supervise());
        runtime.shutdown_timeout(SUPERVISOR_LAST_WORK);
        served
    });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => Printer::new(false).failure(&Failure::host("the supervisor", &error), 1),
    }
}
