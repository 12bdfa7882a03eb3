//! Generates the supervisor's protocol, and builds the guest agent, static and small, for the engine to carry.
//!
//! The agent is another target of the same workspace: it links the C library statically, which must not be
//! asked of build scripts and macros, so it is built by a cargo of its own into a directory of its own.

use std::path::PathBuf;
use std::process::Command;

use sha2::{Digest, Sha256};

const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto/supervisor.proto");
    let files = protox::compile(["supervisor.proto"], ["proto"])?;
    tonic_prost_build::configure().build_transport(false).bytes(".pyro.supervisor").compile_fds(files)?;
    build_agent();
    Ok(())
}

#[expect(
    clippy::disallowed_methods,
    reason = "a build script has no owner to outlive, and fails by panicking"
)]
fn build_agent() {
    let var = |name| std::env::var(name).unwrap_or_else(|error| panic!("{name}: {error}"));
    let root = PathBuf::from(var("CARGO_MANIFEST_DIR")).join("../..");
    for path in ["crates/pyro-agent", "crates/pyro-proto", "Cargo.toml", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={}", root.join(path).display());
    }
    // OUT_DIR is TARGET_DIR/PROFILE/build/NAME/out: one agent build serves all profiles.
    let out = PathBuf::from(var("OUT_DIR"));
    let target_dir = out.ancestors().nth(4).unwrap_or(&out).join("agent");
    let status = Command::new(var("CARGO"))
        .current_dir(&root)
        .args(["build", "--quiet", "--locked", "--package=pyro-agent", "--profile=agent"])
        .arg(format!("--target={TARGET}"))
        .arg("--target-dir")
        .arg(&target_dir)
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env_remove("CLIPPY_ARGS")
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .status();
    assert!(status.is_ok_and(|status| status.success()), "the guest agent could not be built");
    let agent = target_dir.join(TARGET).join("agent/pyro-agent");
    println!("cargo::rustc-env=PYRO_AGENT={}", agent.display());
    // Known in advance, it need not be computed by every process that opens an engine.
    let bytes = std::fs::read(&agent).unwrap_or_else(|error| panic!("{}: {error}", agent.display()));
    let digest: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    println!("cargo::rustc-env=PYRO_AGENT_DIGEST={digest}");
}
