#!/bin/sh
# Kills everything at random for FOR seconds (600 unless set), from SEED (unless set, one of its own).
set -eu
variables=$(scripts/environment.sh)
seed=${SEED:-$(date +%s)}
# shellcheck disable=SC2086 # one variable a word
env $variables PYRO_CHAOS_SECONDS="${FOR:-600}" PYRO_CHAOS_SEED="$seed" \
    cargo test --quiet --workspace --test it -- chaos --nocapture
