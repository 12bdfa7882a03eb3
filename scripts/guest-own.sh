#!/bin/sh
# Makes target/tmp/guest-own of target/tmp/guest: the same guest with the kernel that `make kernel` has built, which is printed;
# nothing where there is none.
set -eu
kernel=$(find target/kernel -name vmlinux -newer kernel/config 2> /dev/null | head -n 1)
tmp=$PWD/target/tmp
rm -rf "$tmp/guest-own" "$tmp/environments-own"
[ -n "$kernel" ] || exit 0
cp -al "$tmp/environments" "$tmp/environments-own"
rm -rf "$tmp/environments-own/templates" "$tmp/environments-own/locks"
export PYRO_ENVIRONMENT_CACHE_DIR="$tmp/environments-own" PYRO_STATE_DIR="$tmp/state"
pyro=$(scripts/program.sh)
"$pyro" env kernel --from "$kernel" >&2
pulled=$("$pyro" env pull debian:12 --json)
of() { echo "$pulled" | sed -n "s/^ *\"$1\": \"\(.*\)\",*$/\1/p"; }
mkdir "$tmp/guest-own"
ln -s "$(of kernel_image)" "$tmp/guest-own/vmlinux"
ln -s "$(of initramfs_image)" "$tmp/guest-own/initramfs"
ln -s "$(of rootfs_image)" "$tmp/guest-own/rootfs"
ln -s "$tmp/guest/overlay" "$tmp/guest-own/overlay"
echo "$kernel"
