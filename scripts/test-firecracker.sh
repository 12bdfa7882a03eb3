#!/bin/sh
# Runs the conformance suite on real Firecracker guests: on this host where its KVM works, else in the helper machine of
# scripts/lane.sh.
set -eu
variables=$(scripts/environment.sh)
tmp=$PWD/target/tmp
store=$tmp/environments/firecracker/1.12.1
PYRO_ENVIRONMENT_CACHE_DIR=$tmp/environments PYRO_STATE_DIR=$tmp/state \
    cargo run --quiet -p pyro-cli -- env firecracker --from "$(scripts/firecracker.sh)" >&2
suite=conformance::conformance_of_firecracker
run() {
    # shellcheck disable=SC2086 # one variable a word
    env $variables PYRO_FIRECRACKER="$store" "$@" \
        cargo test --quiet -p pyro-engine --lib -- "$suite" --exact --nocapture
}
# A suite that was skipped has shown nothing.
passed() { grep -q 'conformance: firecracker.* [1-9][0-9]* cases passed' "$1"; }
log=$(mktemp)
trap 'rm -f "$log" "$log.nobody"' EXIT
if PYRO_STATE_DIR=$tmp/state cargo run --quiet -p pyro-cli -- doctor --json | grep -q '"usable": true'; then
    run env | tee "$log"
    passed "$log"
    exit
fi
own=$(scripts/guest-own.sh)
scripts/lane-build.sh "$tmp/guest" "$store"
runner=CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER
# Who is not root gets another confinement; what differs by it is run again, beside the other, and told after it.
cargo test --quiet -p pyro-engine --lib --no-run
run "$runner=$PWD/scripts/lane.sh nobody" PYRO_TEST_CASES=exit_code,confined,missing_element,owner,goes_on \
    > "$log.nobody" 2>&1 &
run "$runner=$PWD/scripts/lane.sh root" 2>&1 | tee "$log"
status=0
wait $! || status=$?
cat "$log.nobody"
passed "$log" && passed "$log.nobody" && ! grep -q FAILED "$log" || status=1
if [ -n "$own" ]; then
    # The same on guests with the kernel of kernel/config.
    run "$runner=$PWD/scripts/lane.sh root" LANE_GUEST=guest-own PYRO_TEST_CASES=exit_code,memory,panic,goes_on,template \
        2>&1 | tee "$log"
    passed "$log" && ! grep -q FAILED "$log" || status=1
else
    echo 'skipped: firecracker with the kernel of kernel/config: it is not built (make kernel)'
fi
exit $status
