#!/bin/sh
# Builds the Python wheel, optimised unless told `dev`, and prints its path. It takes its tools from target/venv.
set -eu
profile=${1:-release}
scripts/clients.sh > /dev/null
case $profile in
    dev) flags= dir=debug ;;
    *) flags=--release dir=release ;;
esac
# shellcheck disable=SC2086 # none or one
cargo build --quiet $flags -p pyro-cli
mkdir -p python/pyro_mcp/_bin
install -m 755 "target/$dir/pyro" python/pyro_mcp/_bin/pyro
[ "$profile" = release ] || strip python/pyro_mcp/_bin/pyro
rm -rf target/wheels
# shellcheck disable=SC2086
target/venv/bin/maturin build --quiet $flags --strip --manifest-path python/Cargo.toml --interpreter target/venv/bin/python --out target/wheels >&2
ls "$PWD"/target/wheels/*.whl
