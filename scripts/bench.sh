#!/bin/sh
# Measures what SPECIFICATION.md promises.
set -eu
# shellcheck disable=SC2046 # one variable a word
env $(scripts/environment.sh) cargo bench --quiet -p pyro-engine
