#!/bin/sh
# Installs the Debian packages that building and running pyro needs and that this machine lacks; with the word `kernel`, those
# that building a guest kernel needs as well.
set -eu
missing=
need() { command -v "$1" >/dev/null 2>&1 || missing="$missing $2"; }
need cc gcc
need c++ g++
need make make
need qemu-system-x86_64 qemu-system-x86
need mmdebstrap mmdebstrap
need newuidmap uidmap
need mke2fs e2fsprogs
need fsck.erofs erofs-utils
need cpio cpio
need strip binutils
need busybox busybox-static
need python3 python3
python3 -m pip --version >/dev/null 2>&1 || missing="$missing python3-pip"
python3 -c 'import ensurepip' 2>/dev/null || missing="$missing python3-venv"
need npm npm
[ -e /usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1 ] || missing="$missing libfaketime"
if [ "${1:-}" = kernel ]; then
    need flex flex
    need bison bison
    need bc bc
    need xz xz-utils
    [ -e /usr/include/gelf.h ] || missing="$missing libelf-dev"
    [ -e /usr/src/linux-source-6.1.tar.xz ] || missing="$missing linux-source-6.1"
fi
[ -n "$missing" ] || exit 0
echo "installing:$missing" >&2
run=
[ "$(id -u)" = 0 ] || run=sudo
$run apt-get -qq update
# shellcheck disable=SC2086 # the list is words on purpose
DEBIAN_FRONTEND=noninteractive $run apt-get -qq install -y --no-install-recommends $missing >&2
