#!/bin/sh
# Measures what SPECIFICATION.md promises: `bench.sh figures`, `bench.sh start`, `bench.sh network`, `bench.sh mcp`, `bench.sh python`.
set -eu
cargo build --quiet --release -p pyro-cli
export PYRO_PROGRAM="$PWD/target/release/pyro"
variables=$(scripts/environment.sh)
programs=$PWD/target/tmp/bench-guest
mkdir -p "$programs"
gcc -static -nostdlib -O2 -o "$programs/no-op" crates/pyro-engine/benches/guest/no_op.c
gcc -static -O2 -o "$programs/spawn" crates/pyro-engine/benches/guest/spawn.c
if [ "$1" = python ]; then
    wheel=$(scripts/wheel.sh)
    target/venv/bin/pip install --quiet --disable-pip-version-check --force-reinstall "$wheel"
    # shellcheck disable=SC2086 # one variable a word
    exec env $variables target/venv/bin/python python/benches/overhead.py
fi
case $1 in
    mcp) package=pyro-mcp bench=overhead ;;
    *) package=pyro-engine bench=$1 ;;
esac
# shellcheck disable=SC2086 # one variable a word
env $variables PYRO_TEST_PROGRAM="$PYRO_PROGRAM" PYRO_TEST_PROGRAMS="$programs" \
    cargo bench --quiet -p "$package" --bench "$bench"
