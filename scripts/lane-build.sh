#!/bin/sh
# Builds what the helper machine of scripts/lane.sh boots from, below target/tmp/lane, and only what has changed:
#   lane-build.sh TEST_GUEST_DIRECTORY FIRECRACKER_DIRECTORY
set -eu
guest=$(realpath "$1")
firecracker=$(realpath "$2")
lane=$PWD/target/tmp/lane
mkdir -p "$lane"
# The kernel of the test guest has no modules for KVM beside it, so its package is fetched once more.
release=$(strings "$guest/vmlinux" | sed -n 's/^Linux version \([^ ]*\) .*/\1/p' | head -n 1)
[ -n "$release" ] || { echo 'the kernel of the test guest does not tell its version' >&2; exit 1; }
if [ "$(cat "$lane/release" 2> /dev/null)" != "$release" ]; then
    rm -rf "$lane"
    mkdir -p "$lane/kernel"
    (cd "$lane" && apt-get -qq download "linux-image-$release" && dpkg-deb -x linux-image-*.deb kernel && rm linux-image-*.deb)
    echo "$release" > "$lane/release"
fi
cp -L "$guest/vmlinux" "$lane/vmlinux"
if [ ! -s "$lane/base.cpio" ] || [ "$0" -nt "$lane/base.cpio" ]; then
    root=$(mktemp -d)
    trap 'rm -rf "$root"' EXIT
    chmod 755 "$root"
    mkdir -p "$root/bin" "$root/dev" "$root/proc" "$root/sys" "$root/tmp" "$root/lane" "$root/modules" "$root/root.new" "$root/etc"
    cp /bin/busybox "$root/bin/"
    for name in $(/bin/busybox --list); do ln -s busybox "$root/bin/$name" 2> /dev/null || true; done
    modules='virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk libcrc32c erofs irqbypass kvm kvm-amd tun'
    # For the networks of guests, each after what it needs.
    modules="$modules nfnetlink nf_tables nf_reject_ipv4 nf_reject_ipv6 nft_reject nft_reject_inet nf_defrag_ipv4 nf_defrag_ipv6"
    modules="$modules nf_tproxy_ipv4 nf_tproxy_ipv6 nft_tproxy nft_limit"
    for module in $modules; do
        strip -g -o "$root/modules/$module.ko" "$(find "$lane/kernel" -name "$module.ko")"
    done
    printf 'root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n' > "$root/etc/passwd"
    printf 'root:x:0:\nnogroup:x:65534:\n' > "$root/etc/group"
    cat > "$root/init" << INIT
#!/bin/sh
export PATH=/bin
if [ ! -e /.moved ]; then
    # A root that was unpacked from an initramfs cannot be pivoted away from, which jails do: it is bound over itself.
    : > /.moved
    mount -t proc proc /proc
    mount -t sysfs sys /sys
    mount -t devtmpfs dev /dev
    mount --bind / /root.new
    for each in proc sys dev; do mount --move /\$each /root.new/\$each; done
    cd /root.new
    mount --move . /
    exec chroot . /init
fi
stty -onlcr 2> /dev/null
for module in $modules; do insmod /modules/\$module.ko || echo "no module \$module"; done
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t erofs -o ro /dev/vda /lane
chmod 1777 /tmp
chmod 666 /dev/kvm /dev/net/tun
ip link set lo up
# A guest whose wake-up was lost goes on when the helper's processor has something else to do.
while :; do usleep 20000; done &
/run.sh
echo "LANE-EXIT \$?"
poweroff -f
INIT
    chmod +x "$root/init"
    (cd "$root" && find . | cpio --quiet -o -H newc) > "$lane/base.cpio.new"
    mv "$lane/base.cpio.new" "$lane/base.cpio"
fi
image=$(mktemp -d)
trap 'rm -rf "$image" "${root:-$image}"' EXIT
mkdir "$image/guest" "$image/firecracker"
cp -L --sparse=always "$guest"/* "$image/guest/"
if [ -d "$guest-own" ]; then
    mkdir "$image/guest-own"
    cp -L --sparse=always "$guest-own"/* "$image/guest-own/"
fi
cp "$firecracker/firecracker" "$image/firecracker/"
chmod -R a+rX "$image"
rm -f "$lane/lane.erofs"
mkfs.erofs "$lane/lane.erofs" "$image" > /dev/null
