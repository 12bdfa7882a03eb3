#!/bin/sh
# Runs every test with real machines, then tells what was skipped, by name.
set -eu
log=$(mktemp)
trap 'rm -f "$log"' EXIT
variables="$(scripts/environment.sh) PYRO_CHAOS_SECONDS=${PYRO_CHAOS_SECONDS:-180}"
status=0
# shellcheck disable=SC2086 # one variable a word
{ env $variables cargo test --workspace -- --nocapture 2>&1 || echo "failed" > "$log.status"; } | tee "$log"
[ ! -e "$log.status" ] || { rm -f "$log.status"; status=1; }
echo "skipped: $(grep -c '^skipped: ' "$log" || true)"
grep '^skipped: ' "$log" || true
exit $status
