#!/bin/sh
# Runs every test with real machines, also after one has failed; then tells by name what was skipped and what failed.
set -eu
log=$(mktemp)
trap 'rm -f "$log" "$log.clients"' EXIT
# Each on its own: of several in one assignment only the last could fail.
scripts/clients.sh > "$log.clients" &
environment=$(scripts/environment.sh)
wait $!
clients=$(cat "$log.clients")
variables="$environment $clients PYRO_CHAOS_SECONDS=${PYRO_CHAOS_SECONDS:-60}"
status=0
# shellcheck disable=SC2086 # one variable a word
{
    env $variables cargo test --workspace --no-fail-fast -- --nocapture 2>&1 || echo "failed" > "$log.status"
    # As other languages see it.
    wheel=$(scripts/wheel.sh dev) && target/venv/bin/pip install --quiet --disable-pip-version-check --force-reinstall "$wheel" &&
        env $variables PYRO_TEST_PROGRAM="$PWD/target/debug/pyro" PYRO_TEST_WHEEL="$wheel" \
            target/venv/bin/python -m pytest -rsfE tests 2>&1 || echo "failed" > "$log.status"
} | tee "$log"
[ ! -e "$log.status" ] || { rm -f "$log.status"; status=1; }
echo "skipped: $(grep -cE '^(skipped: |SKIPPED )' "$log" || true)"
grep -E '^(skipped: |SKIPPED )' "$log" || true
if [ $status -ne 0 ]; then
    echo 'failed:'
    # Test programs that failed, as cargo names them, then tests.
    grep -E '^    `-p ' "$log" || true
    sed -n 's/^test \(.*\) \.\.\. FAILED$/\1/p; s/^FAILED \([^ ]*\).*/\1/p; s/^ERROR \([^ ]*\).*/\1/p' "$log" | sort -u
fi
exit $status
