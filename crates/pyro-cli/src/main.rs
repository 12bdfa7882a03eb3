//! The `pyro` command: arguments in, words and exit codes out. All that it does is done by the engine.

mod cli;
mod commands;
mod config;
mod failure;
mod printer;

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

use crate::cli::{Cli, Verb};
use crate::failure::Failure;
use crate::printer::Printer;

/// How long the runtime may take to end the machines that a signal cut short.
const WIND_UP: Duration = Duration::from_millis(500);

fn main() -> ExitCode {
    let cli = Cli::parse();
    let printer = Printer::new(cli.verb.json());
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return printer.failure(&Failure::host("no threads", &error), 125),
    };
    let failed = if matches!(cli.verb, Verb::Run(_)) { 125 } else { 1 };
    let code = runtime.block_on(async {
        tokio::select! {
            code = commands::dispatch(cli.verb, &printer) => code.unwrap_or_else(|error| printer.failure(&error, failed)),
            code = interrupted() => ExitCode::from(code),
        }
    });
    // A thread that still reads stdin must not hold the exit up.
    runtime.shutdown_timeout(WIND_UP);
    code
}

/// Resolves at Ctrl-C or SIGTERM, to the exit code for it. Dropping the command's future then ends its machine.
async fn interrupted() -> u8 {
    use tokio::signal::unix::{SignalKind, signal};

    let (Ok(mut interrupt), Ok(mut terminate)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => 130,
        _ = terminate.recv() => 143,
    }
}
