//! `pyro env`: the environments.

use std::path::PathBuf;
use std::process::ExitCode;

use pyro_engine::{Engine, FIRECRACKER_VERSION, Observer, Phase, VERSION};
use serde_json::json;

use crate::cli::EnvVerb;
use crate::config;
use crate::failure::Failure;
use crate::printer::Printer;

pub(crate) async fn run(verb: EnvVerb, printer: &Printer) -> Result<ExitCode, Failure> {
    let engine = Engine::open(config::engine(None)?)?;
    match verb {
        EnvVerb::List(_) => list(&engine, printer)?,
        EnvVerb::Pull(args) => pull(&engine, &args.environment, printer).await?,
        EnvVerb::Inspect(args) => inspect(&engine, &args.environment, printer)?,
        EnvVerb::Prune(_) => prune(&engine, printer)?,
        EnvVerb::Firecracker(args) => firecracker(&engine, args.from, printer).await?,
    }
    Ok(ExitCode::SUCCESS)
}

fn list(engine: &Engine, printer: &Printer) -> Result<(), Failure> {
    let environments = engine.environments().list().map_err(pyro_engine::Error::from)?;
    if printer.json() {
        printer.object(&json!({ "catalog_version": VERSION, "environments": environments }));
        return Ok(());
    }
    printer.data(&format!("Catalog version: {VERSION}"));
    for entry in environments {
        let installed = if entry.installed { "installed" } else { "not installed" };
        printer.data(&format!("{} [{installed}] {}", entry.name, entry.description));
    }
    Ok(())
}

async fn pull(engine: &Engine, name: &str, printer: &Printer) -> Result<(), Failure> {
    let words = printer.clone();
    let observer = Observer::none().on_phase(move |phase| {
        if let Phase::Environment(step, detail) = phase {
            words.step(&step, &detail);
        }
    });
    let pulled = engine.pull(name, &observer).await?;
    printer.settle();
    if printer.json() {
        printer.object(&pulled);
    } else {
        let digest = pulled.entry.source_digest.as_deref().unwrap_or_default();
        printer.data(&format!("Pulled: {name} ({digest}) from {}", pulled.source));
    }
    Ok(())
}

fn inspect(engine: &Engine, name: &str, printer: &Printer) -> Result<(), Failure> {
    let inspection = engine.environments().inspect(name).map_err(pyro_engine::Error::from)?;
    // The object is the human form too: it is a list of facts.
    printer.object(&inspection);
    Ok(())
}

async fn firecracker(engine: &Engine, from: Option<PathBuf>, printer: &Printer) -> Result<(), Failure> {
    let found = engine.install_firecracker(from).await?;
    if printer.json() {
        printer.object(&json!({
            "firecracker": found.firecracker,
            "jailer": found.jailer,
            "version": FIRECRACKER_VERSION,
        }));
    } else {
        printer.data(&format!("Firecracker {FIRECRACKER_VERSION}: {}", found.firecracker.display()));
    }
    Ok(())
}

fn prune(engine: &Engine, printer: &Printer) -> Result<(), Failure> {
    let pruned = engine.prune()?;
    if printer.json() {
        printer.object(&pruned);
    } else {
        printer.data(&format!("Deleted {} cached environment entries.", pruned.count));
    }
    Ok(())
}
