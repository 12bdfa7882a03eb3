#!/bin/sh
# Builds the initramfs of tests/guest.rs from the modules of an installed environment's kernel:
#   build.sh KERNEL_DIRECTORY/modules OUTPUT.cpio
set -eu
modules=$(realpath "$1")
output=$(realpath "$2")
source=$(dirname "$(realpath "$0")")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/dev" "$work/proc"
for module in virtio_ring virtio virtio_mmio virtio_console virtio_blk; do
    strip --strip-debug -o "$work/$module.ko" "$modules"/*-"$module.ko"
    echo "/$module.ko" >> "$work/modules.list"
done
gcc -O2 -static -Wno-unused-result -o "$work/init" "$source/init.c"
cd "$work"
find . | cpio --quiet -o -H newc > "$output"
