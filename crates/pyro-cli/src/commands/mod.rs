//! One file for each command.

mod demo;
mod doctor;
mod env;
mod run;

use std::process::ExitCode;

use clap::CommandFactory;
use pyro_engine::Engine;

use crate::cli::{Cli, Verb};
use crate::config;
use crate::failure::Failure;
use crate::printer::Printer;

pub(crate) async fn dispatch(verb: Verb, printer: &Printer) -> Result<ExitCode, Failure> {
    match verb {
        Verb::Run(args) => run::run(args, printer).await,
        Verb::Env(verb) => env::run(verb, printer).await,
        Verb::Doctor(_) => doctor::run(printer),
        Verb::Demo(_) => demo::run(printer).await,
        Verb::Reap(_) => reap(printer),
        Verb::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "pyro", &mut script);
            printer.data(String::from_utf8_lossy(&script).trim_end());
            Ok(ExitCode::SUCCESS)
        }
        Verb::Man => {
            let mut page = Vec::new();
            let rendered = clap_mangen::Man::new(Cli::command()).render(&mut page);
            rendered.map_err(|error| Failure::host("the manual page", &error))?;
            printer.data(String::from_utf8_lossy(&page).trim_end());
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn reap(printer: &Printer) -> Result<ExitCode, Failure> {
    let engine = Engine::open(config::engine(None)?)?;
    let reaped = engine.reap_expired()?;
    if printer.json() {
        printer.object(&reaped);
    } else {
        printer.data(&format!("Reaped {} machines.", reaped.count));
    }
    Ok(ExitCode::SUCCESS)
}
