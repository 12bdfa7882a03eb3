//! `pyro demo`: a short tour.

use std::process::ExitCode;

use pyro_engine::{Command, Engine, ExecSpec, Observer, VmSpec};

use crate::config;
use crate::failure::Failure;
use crate::printer::Printer;

const TOUR: &str = "echo \"I am $(hostname), Linux $(uname -r), root of a machine of my own:\" && id && \
                    echo \"and here is git:\" && git --version";

pub(crate) async fn run(printer: &Printer) -> Result<ExitCode, Failure> {
    let engine = Engine::open(config::engine(None)?)?;
    printer.say(&format!("$ pyro run debian:12 -- '{TOUR}'"));
    let exec = ExecSpec::new(Command::Shell(TOUR.to_owned()));
    let words = printer.clone();
    let observer = Observer::none().on_phase(move |phase| {
        if let pyro_engine::Phase::Environment(step, detail) = phase {
            words.step(&step, &detail);
        }
    });
    printer.turn("booting".to_owned());
    let result = engine.run(VmSpec::new("debian:12"), exec, observer).await?;
    printer.settle();
    if printer.json() {
        printer.object(&result);
    } else {
        printer.data(result.stdout.trim_end());
        let timings = result.timings;
        printer.say(&format!(
            "isolation {}: started in {:.0} ms, ran in {:.0} ms; nothing of the machine is left",
            result.isolation,
            timings.start + timings.handshake,
            timings.execute
        ));
    }
    Ok(ExitCode::from(u8::try_from(result.exit_code).unwrap_or(255)))
}
