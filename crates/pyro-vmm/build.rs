//! Builds the library that is loaded into older QEMUs (`preload/open.rs`).

use std::path::PathBuf;
use std::process::Command;

#[expect(clippy::disallowed_methods, reason = "a build script has no owner to outlive")]
fn main() {
    println!("cargo::rerun-if-changed=preload/open.rs");
    println!("cargo::rerun-if-changed=build.rs");
    let var = |name: &str| std::env::var_os(name).unwrap_or_else(|| panic!("cargo sets {name}"));
    let out = PathBuf::from(var("OUT_DIR")).join("open.so");
    let status = Command::new(var("RUSTC"))
        .args(["--edition", "2024", "--crate-type", "cdylib", "--crate-name", "open"])
        .args(["-C", "panic=abort", "-C", "opt-level=s", "-C", "strip=symbols"])
        // Nothing of the C library's own start-up: the QEMU that loads it has its own.
        .args(["-C", "link-arg=-nostartfiles", "-C", "link-arg=-nostdlib"])
        .arg("--target")
        .arg(var("TARGET"))
        .arg("-o")
        .arg(&out)
        .arg("preload/open.rs")
        .status()
        .expect("rustc runs");
    assert!(status.success(), "preload/open.rs does not build");
}
