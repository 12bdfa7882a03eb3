//! One file for each command.

mod demo;
mod doctor;
mod env;
mod follow;
mod mcp;
mod network;
mod run;
mod task;

use std::process::ExitCode;

use clap::CommandFactory;
use pyro_engine::Engine;

use self::task::Interrupt;
use crate::cli::{Cli, Verb};
use crate::config;
use crate::failure::Failure;
use crate::printer::Printer;

/// The exit code at SIGHUP.
pub(crate) const HANGUP: u8 = 129;

pub(crate) async fn dispatch(
    verb: Verb,
    printer: &Printer,
    interrupt: Interrupt,
) -> Result<ExitCode, Failure> {
    match verb {
        Verb::Run(args) => run::run(args, printer).await,
        Verb::Task(verb) => task::run(verb, printer, interrupt).await,
        Verb::Env(verb) => env::run(verb, printer).await,
        Verb::Mcp(verb) => mcp::run(verb, printer, interrupt).await,
        Verb::Doctor(_) => doctor::run(printer),
        Verb::Demo(_) => demo::run(printer).await,
        Verb::Reap(_) => reap(printer),
        Verb::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "pyro", &mut script);
            printer.bytes(&script);
            Ok(ExitCode::SUCCESS)
        }
        Verb::Man { command } => manual(&command, printer),
        Verb::Supervise { .. } => {
            Err(Failure::new("wrong_state", "pyro supervise is started by pyro itself"))
        }
    }
}

fn reap(printer: &Printer) -> Result<ExitCode, Failure> {
    let engine = Engine::open(config::engine(None)?)?;
    let reaped = engine.reap_expired();
    if printer.json() {
        printer.object(&reaped);
    } else {
        let (vms, tasks) = (reaped.deleted_vm_ids.len(), reaped.deleted_task_ids.len());
        printer.data(&format!("Reaped {vms} machines and {tasks} tasks."));
        for problem in &reaped.problems {
            printer.say(&format!("warning: {problem}"));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The manual page of a command, by its path of names.
fn manual(path: &[String], printer: &Printer) -> Result<ExitCode, Failure> {
    let mut command = Cli::command();
    command.build();
    for name in path {
        command = command.find_subcommand(name).cloned().ok_or_else(|| {
            Failure::new("invalid_value", format!("there is no command '{}'", path.join(" ")))
                .hint("see: pyro --help")
        })?;
    }
    let mut page = Vec::new();
    let rendered = clap_mangen::Man::new(command).render(&mut page);
    rendered.map_err(|error| Failure::host("the manual page", &error))?;
    printer.bytes(&page);
    Ok(ExitCode::SUCCESS)
}
