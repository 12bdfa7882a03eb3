#!/bin/sh
# What must hold before a change lands, beside the tests.
set -eu
cargo fmt --all --check
cargo clippy --workspace --all-targets --quiet -- -D warnings
RUSTDOCFLAGS='-D warnings' cargo doc --workspace --no-deps --quiet
command -v cargo-deny >/dev/null 2>&1 || cargo install --quiet --debug --locked cargo-deny
cargo deny --offline --log-level error check bans licenses sources
