#!/bin/sh
# Builds the guest kernel of kernel/config from Debian's source package, below target/kernel, and gives it to pyro, which uses
# it from then on. Nothing is built again that was built from the same source, configuration and recipe.
set -eu
package=linux-source-6.1
scripts/setup.sh kernel
source=/usr/src/$package.tar.xz
digest=$({ dpkg-query -W -f '${Version}\n' "$package"; cat kernel/config "$0"; } | sha256sum | cut -c 1-16)
built=$PWD/target/kernel/$digest/vmlinux
if [ ! -s "$built" ]; then
    tree=$PWD/target/kernel/tree
    rm -rf "$tree"
    mkdir -p "$tree" "$(dirname "$built")"
    tar -xf "$source" -C "$tree" --strip-components=1
    # Who built it, when and where is no part of it: the same input gives the same bytes.
    export KBUILD_BUILD_TIMESTAMP=@1770000000 KBUILD_BUILD_USER=pyro KBUILD_BUILD_HOST=pyro KCONFIG_NOTIMESTAMP=1
    # What they say is not for whoever reads the path.
    make -s -C "$tree" tinyconfig > /dev/null
    (cd "$tree" && scripts/kconfig/merge_config.sh -m .config "$OLDPWD/kernel/config" > /dev/null)
    make -s -C "$tree" olddefconfig > /dev/null
    # What the configuration asks for and the kernel does not know is a mistake in it.
    grep '^CONFIG_.*=y$' kernel/config | while read -r line; do
        grep -qx "$line" "$tree/.config" || { echo "kernel/config: not taken: $line" >&2; exit 1; }
    done
    make -s -C "$tree" -j "$(nproc)" vmlinux >&2
    strip -o "$built.new" "$tree/vmlinux"
    mv "$built.new" "$built"
    rm -rf "$tree"
fi
echo "$built"
