//! Pulls an environment and shows where it is: `pull CACHE_DIR ENVIRONMENT [AGENT_FILE]`.

use std::time::Instant;

use pyro_image::{Progress, Store, StoreConfig};

struct Show(Instant);

#[expect(clippy::print_stderr, reason = "an example speaks for itself")]
impl Progress for Show {
    fn phase(&self, phase: &str, detail: &str) {
        if detail.is_empty() {
            eprintln!("{:7.2} {phase}", self.0.elapsed().as_secs_f64());
        }
    }

    fn cancelled(&self) -> bool {
        false
    }
}

#[expect(clippy::print_stdout, reason = "an example speaks for itself")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, cache, name, rest @ ..] = arguments.as_slice() else {
        return Err("usage: pull CACHE_DIR ENVIRONMENT [AGENT_FILE]".into());
    };
    let agent = match rest.first() {
        Some(path) => fs_err::read(path)?,
        None => b"#!/bin/false\n".to_vec(),
    };
    let store = Store::open(StoreConfig {
        cache_dir: cache.into(),
        apt_sources: None,
        tool_path: std::env::var_os("PATH").unwrap_or_default(),
        agent: agent.into(),
        catalog_version: "2.0.0".to_owned(),
    })?;
    let start = Instant::now();
    let environment = store.ensure(name, &Show(start))?;
    println!("{environment:#?}\nin {:.3} s", start.elapsed().as_secs_f64());
    let start = Instant::now();
    drop(store.ensure(name, &Show(start))?);
    println!("again in {:.6} s", start.elapsed().as_secs_f64());
    println!("{:?}", store.overlay_template(4096)?);
    Ok(())
}
