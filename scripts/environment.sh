#!/bin/sh
# Builds the environment and the bare guest that tests and benches share, once, below target/tmp, and prints
# the variables that name them.
set -eu
cache=$PWD/target/tmp/environments
export PYRO_ENVIRONMENT_CACHE_DIR="$cache" PYRO_STATE_DIR="$PWD/target/tmp/state"
pyro=$(scripts/program.sh)
# What an agent builds programs in: beside the other, as dpkg keeps one processor busy.
"$pyro" env pull debian:12-build --json > /dev/null &
pulled=$("$pyro" env pull debian:12 --json)
wait $!
of() { echo "$pulled" | sed -n "s/^ *\"$1\": \"\(.*\)\",*$/\1/p"; }
kernel=$(of kernel_image)
bare=$PWD/target/tmp/bare-guest.cpio
[ -s "$bare" ] || sh crates/pyro-vmm/tests/guest/build.sh "$(dirname "$kernel")/modules" "$bare"
guest=$PWD/target/tmp/guest
mkdir -p "$guest"
ln -sf "$kernel" "$guest/vmlinux"
ln -sf "$(of initramfs_image)" "$guest/initramfs"
ln -sf "$(of rootfs_image)" "$guest/rootfs"
if [ ! -s "$guest/overlay" ]; then
    mke2fs -q -F -t ext4 -m 0 -J size=8 "$guest/.overlay.$$" 192M >&2
    mv "$guest/.overlay.$$" "$guest/overlay"
fi
archive=$(scripts/firecracker.sh)
echo "PYRO_TEST_FIRECRACKER=$archive"
echo "PYRO_TEST_KERNEL=$kernel PYRO_TEST_VMM_INITRAMFS=$bare PYRO_TEST_ENVIRONMENTS=$cache PYRO_TEST_GUEST=$guest"
