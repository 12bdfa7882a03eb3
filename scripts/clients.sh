#!/bin/sh
# Installs what tests of other languages need, below target, and prints the variables that name it.
set -eu
venv=$PWD/target/venv
requirements=tests/requirements.txt
if ! cmp -s "$requirements" "$venv/requirements.txt"; then
    rm -rf "$venv"
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$requirements" >&2
    cp "$requirements" "$venv/requirements.txt"
fi
node=$PWD/target/node
packages=tests/node-packages.txt
if ! cmp -s "$packages" "$node/packages.txt"; then
    rm -rf "$node"
    mkdir -p "$node"
    xargs npm install --silent --no-audit --no-fund --prefix "$node" < "$packages" >&2
    cp "$packages" "$node/packages.txt"
fi
echo "PYRO_TEST_PYTHON=$venv/bin/python PYRO_TEST_NODE_MODULES=$node/node_modules"
