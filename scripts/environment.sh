#!/bin/sh
# Builds the environment and the bare guest that tests and benches share, once, below target/tmp, and prints
# the variables that name them.
set -eu
cache=$PWD/target/tmp/environments
export PYRO_ENVIRONMENT_CACHE_DIR="$cache" PYRO_STATE_DIR="$PWD/target/tmp/state"
cargo run --quiet -p pyro-cli -- env pull debian:12 >&2
kernel=$(dirname "$(find "$cache/kernels" -name vmlinux | head -n 1)")
guest=$PWD/target/tmp/bare-guest.cpio
[ -s "$guest" ] || sh crates/pyro-vmm/tests/guest/build.sh "$kernel/modules" "$guest"
echo "PYRO_TEST_KERNEL=$kernel/vmlinux PYRO_TEST_VMM_INITRAMFS=$guest PYRO_TEST_ENVIRONMENTS=$cache"
