//! `pyro env`: the environments.

use std::path::PathBuf;
use std::process::ExitCode;

use pyro_engine::{Engine, FIRECRACKER_VERSION, Observer, Phase, VERSION, VmSpec};
use serde_json::json;

use crate::cli::{EnvVerb, KernelArgs, PullArgs};
use crate::config;
use crate::failure::Failure;
use crate::printer::Printer;

pub(crate) async fn run(verb: EnvVerb, printer: &Printer) -> Result<ExitCode, Failure> {
    let engine = Engine::open(config::engine(None)?)?;
    match verb {
        EnvVerb::List(_) => list(&engine, printer)?,
        EnvVerb::Pull(args) => pull(&engine, args, printer).await?,
        EnvVerb::Inspect(args) => inspect(&engine, &args.environment, printer)?,
        EnvVerb::Prune(_) => prune(&engine, printer)?,
        EnvVerb::Kernel(args) => kernel(&engine, &args, printer).await?,
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

async fn pull(engine: &Engine, args: PullArgs, printer: &Printer) -> Result<(), Failure> {
    let observer = steps(printer);
    let name = args.environment.environment;
    let pulled = engine.pull(&name, &observer).await?;
    let mut templates = None;
    if args.prepare {
        let spec = VmSpec {
            vcpu_count: u8::try_from(args.vcpu_count).unwrap_or(0),
            mem_mib: u32::try_from(args.mem_mib).unwrap_or(0),
            disk_mib: u32::try_from(args.disk_mib).unwrap_or(0),
            ..VmSpec::new(&name)
        };
        templates = Some(engine.prepare_templates(&spec, &observer).await?);
    }
    printer.settle();
    if printer.json() {
        let mut object =
            serde_json::to_value(&pulled).map_err(|error| Failure::host("the result", &error))?;
        if let Some(templates) = templates {
            object["templates"] = json!(templates);
        }
        printer.object(&object);
        return Ok(());
    }
    let digest = pulled.entry.source_digest.as_deref().unwrap_or_default();
    printer.data(&format!("Pulled: {name} ({digest}) from {}", pulled.source));
    for template in templates.into_iter().flatten() {
        let made = if template.made { "made" } else { "there already" };
        printer.data(&format!("Template: {} ({made})", template.id));
    }
    Ok(())
}

/// Tells the steps of long work.
fn steps(printer: &Printer) -> Observer {
    let words = printer.clone();
    Observer::none().on_phase(move |phase| {
        if let Phase::Environment(step, detail) = phase {
            words.step(&step, &detail);
        }
    })
}

fn inspect(engine: &Engine, name: &str, printer: &Printer) -> Result<(), Failure> {
    let inspection = engine.environments().inspect(name).map_err(pyro_engine::Error::from)?;
    // The object is the human form too: it is a list of facts.
    printer.object(&inspection);
    Ok(())
}

async fn kernel(engine: &Engine, args: &KernelArgs, printer: &Printer) -> Result<(), Failure> {
    let store = engine.environments();
    if let Some(image) = &args.from {
        engine.use_kernel(image, &steps(printer)).await?;
        printer.settle();
    } else if args.remove {
        store.forget_kernel().map_err(pyro_engine::Error::from)?;
    }
    let used = store.kernel_in_use().map_err(pyro_engine::Error::from)?;
    if printer.json() {
        let (digest, release) = used.unzip();
        printer.object(&json!({ "own_kernel_digest": digest, "own_kernel_release": release }));
        return Ok(());
    }
    printer.data(&match used {
        Some((digest, release)) => format!("Kernel: {release} (sha256:{digest}), for all environments"),
        None => "Kernel: each environment's own".to_owned(),
    });
    Ok(())
}

async fn firecracker(engine: &Engine, from: Option<PathBuf>, printer: &Printer) -> Result<(), Failure> {
    let found = engine.install_firecracker(from).await?;
    if printer.json() {
        printer.object(&json!({
            "firecracker": found.firecracker,
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
