#!/bin/sh
# Runs the conformance suite on real Firecracker guests: on this host where its KVM works, else in helper machines of
# scripts/lane.sh, two at a time.
set -eu
variables=$(scripts/environment.sh)
pyro=$(scripts/program.sh)
tmp=$PWD/target/tmp
store=$tmp/environments/firecracker/1.12.1
PYRO_ENVIRONMENT_CACHE_DIR=$tmp/environments PYRO_STATE_DIR=$tmp/state \
    "$pyro" env firecracker --from "$(scripts/firecracker.sh)" >&2
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
cargo test --workspace --lib --no-run --color never 2> "$logs/build" || { cat "$logs/build" >&2; exit 1; }
tests=$(sed -n 's/.*Executable .*(\(.*pyro_engine-.*\))/\1/p' "$logs/build")
status=0
# run LOG WHERE...: the suite, whose output goes to a file; one that was skipped has shown nothing.
run() {
    log=$logs/$1
    shift
    # shellcheck disable=SC2086 # one variable a word
    env $variables PYRO_FIRECRACKER="$store" "$@" "$tests" conformance::conformance_of_firecracker --exact --nocapture \
        > "$log" 2>&1 || return
    grep -q 'conformance: firecracker.* [1-9][0-9]* cases passed' "$log"
}
show() { cat "$logs/$1"; }
if PYRO_STATE_DIR=$tmp/state "$pyro" doctor --json | grep -q '"usable": true'; then
    run here || status=$?
    show here
    exit $status
fi
own=$(scripts/guest-own.sh)
scripts/lane-build.sh "$tmp/guest" "$store"
if [ -n "${PYRO_TEST_CASES:-}" ]; then
    run root scripts/lane.sh root || status=$?
    show root
    exit $status
fi
# The longest cases go beside the others. Who is not root gets another confinement: what differs by it is run again.
long=template,outlives,panic,allows
{
    run nobody PYRO_TEST_CASES=exit_code,confined,missing_element,owner,goes_on,allows scripts/lane.sh nobody &&
        run long PYRO_TEST_CASES=$long scripts/lane.sh root
} &
# A control group of the guest is the agent's affair, on any VMM: QEMU's suite has that case.
run root PYRO_TEST_CASES="-group,-$(echo $long | sed 's/,/,-/g')" scripts/lane.sh root || status=$?
show root
wait $! || status=$?
for log in nobody long; do [ ! -e "$logs/$log" ] || show $log; done
if [ -n "$own" ]; then
    # The same on guests with the kernel of kernel/config.
    run own LANE_GUEST=guest-own PYRO_TEST_CASES=exit_code,memory,panic,goes_on,template scripts/lane.sh root || status=$?
    show own
else
    echo 'skipped: firecracker with the kernel of kernel/config: it is not built (make kernel)'
fi
exit $status
