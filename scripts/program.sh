#!/bin/sh
# Prints the path of a pyro to prepare things with: PYRO_PROGRAM where it is set, else the one that tests run, built together
# with all of them, because another choice of packages would compile their dependencies once more.
set -eu
[ -z "${PYRO_PROGRAM:-}" ] || { echo "$PYRO_PROGRAM"; exit; }
cargo test --quiet --workspace --no-run >&2
echo "$PWD/target/debug/pyro"
