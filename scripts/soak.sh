#!/bin/sh
# Runs the long forms of tests whose short ones are in `make test`: KILLS of guests with a network (1000), CYCLES of kills of a
# machine's owner (200), chaos for FOR seconds (180), real tools on stand-ins, each as it is and with a secret. All are run, also
# after one has failed.
set -eu
environment=$(scripts/environment.sh)
clients=$(scripts/clients.sh)
status=0
# part NAME COMMAND...: runs a part, and tells how it ended.
part() {
    name=$1
    shift
    echo "soak: $name" >&2
    # shellcheck disable=SC2086 # one variable a word
    if env $environment $clients "$@"; then echo "soak: $name: passed"; else
        echo "soak: $name: FAILED"
        status=1
    fi
}
part kills PYRO_TEST_KILLS="${KILLS:-1000}" cargo test --workspace --test network_kills -- --nocapture
part cycles PYRO_TEST_CYCLES="${CYCLES:-200}" PYRO_TEST_CASES=owner \
    cargo test --workspace --lib -- conformance::conformance_of_qemu --exact --nocapture
part chaos PYRO_CHAOS_SECONDS="${FOR:-180}" cargo test --workspace --test it -- chaos --nocapture
part tools PYRO_TEST_TOOLS=all PYRO_TEST_PROGRAM="$PWD/target/debug/pyro" target/venv/bin/python -m pytest tests/network
exit $status
