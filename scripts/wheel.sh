#!/bin/sh
# Builds the Python wheel, optimised unless told `dev`, and prints its path. It takes its tools from target/venv.
set -eu
profile=${1:-release}
scripts/clients.sh > /dev/null
case $profile in
    dev) flags= pyro=$(scripts/program.sh) ;;
    *)
        flags=--release pyro=target/release/pyro
        cargo build --quiet --release -p pyro-cli
        ;;
esac
mkdir -p python/pyro_mcp/_bin
install -m 755 "$pyro" python/pyro_mcp/_bin/pyro
[ "$profile" = release ] || strip python/pyro_mcp/_bin/pyro
rm -rf target/wheels
# shellcheck disable=SC2086
target/venv/bin/maturin build --quiet $flags --strip --manifest-path python/Cargo.toml --interpreter target/venv/bin/python --out target/wheels >&2
ls "$PWD"/target/wheels/*.whl
