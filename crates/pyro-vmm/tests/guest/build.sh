#!/bin/sh
# Builds the initramfs of tests/guest.rs from an unpacked Debian kernel package:
#   build.sh DIRECTORY_WITH_LIB_MODULES OUTPUT.cpio
set -eu
modules=$(echo "$1"/lib/modules/*)/kernel/drivers
output=$(realpath "$2")
source=$(dirname "$(realpath "$0")")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/dev" "$work/proc"
for module in virtio/virtio_ring virtio/virtio virtio/virtio_mmio char/virtio_console block/virtio_blk; do
    strip --strip-debug -o "$work/${module##*/}.ko" "$modules/$module.ko"
    echo "/${module##*/}.ko" >> "$work/modules.list"
done
gcc -O2 -static -Wno-unused-result -o "$work/init" "$source/init.c"
cd "$work"
find . | cpio --quiet -o -H newc > "$output"
