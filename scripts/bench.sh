#!/bin/sh
# Measures what SPECIFICATION.md promises: `bench.sh figures`, `bench.sh start`, `bench.sh mcp`, `bench.sh python`.
set -eu
cargo build --quiet --release -p pyro-cli
export PYRO_PROGRAM="$PWD/target/release/pyro"
variables=$(scripts/environment.sh)
no_op=$PWD/target/tmp/no-op
[ -x "$no_op" ] || echo 'int main(void) { return 0; }' | gcc -static -O2 -x c -o "$no_op" -
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
env $variables PYRO_TEST_PROGRAM="$PYRO_PROGRAM" PYRO_TEST_NO_OP="$no_op" \
    cargo bench --quiet -p "$package" --bench "$bench"
