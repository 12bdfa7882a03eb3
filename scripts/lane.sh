#!/bin/sh
# Runs a program in a helper machine that has a working KVM, with the libraries that it needs, and returns its exit code:
#   lane.sh USER PROGRAM ARGUMENT...
# The helper is a QEMU that emulates a processor with virtualisation, so that Firecracker runs real guests in it whatever
# this host can do. LANE_SECONDS is the program's time limit (900, so that it ends only what hangs); PYRO_TEST_CASES and
# PYRO_TEST_CYCLES are passed on.
# LANE_GUEST is `guest-own` for guests with the kernel of kernel/config.
# scripts/lane-build.sh makes what it boots from.
set -eu
user=$1
program=$(realpath "$2")
shift 2
cd "$(dirname "$0")/.."
limit=${LANE_SECONDS:-900}
lane=$PWD/target/tmp/lane
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root
mkdir -p "$root"
for file in "$program" $(ldd "$program" | grep -o '/[^ ]*'); do
    mkdir -p "$root$(dirname "$file")"
    cp -L "$file" "$root$file"
done
strip -g "$root$program"
{
    echo 'export HOME=/tmp RUST_BACKTRACE=0 PYRO_TEST_GUEST=/lane/'"${LANE_GUEST:-guest}"' PYRO_FIRECRACKER=/lane/firecracker'
    echo "export PYRO_TEST_KVM=1 PYRO_TEST_CASES='${PYRO_TEST_CASES:-}' PYRO_TEST_CYCLES='${PYRO_TEST_CYCLES:-}'"
    printf "exec '%s'" "$program"
    printf " '%s'" "$@"
    echo
} > "$root/program.sh"
printf '#!/bin/sh\nexec timeout %s su -s /bin/sh %s -c ". /program.sh"\n' "$limit" "$user" > "$root/run.sh"
chmod +x "$root/run.sh"
(cd "$root" && find . -mindepth 1 | cpio --quiet -o -H newc) > "$work/program.cpio"
cat "$lane/base.cpio" "$work/program.cpio" > "$work/initramfs"
# 16-byte compare-and-exchange is emulated wrongly by QEMU 7.2; the host timer of q35 keeps busy hosts from hanging it. The
# clock ticks all the time: an interrupt that the emulated virtualisation loses would end a clock that is set anew each time.
timeout $((limit + 120)) qemu-system-x86_64 -nodefaults -no-user-config -display none -no-reboot \
    -M q35 -accel tcg,thread=multi -cpu EPYC,-cx16 -smp 1 -m 2048 \
    -kernel "$lane/vmlinux" -initrd "$work/initramfs" \
    -append 'console=ttyS0 quiet loglevel=0 reboot=t panic=-1 mitigations=off tsc=nowatchdog nohz=off highres=off' \
    -drive "if=none,id=lane,format=raw,readonly=on,file=$lane/lane.erofs" -device virtio-blk-pci,drive=lane \
    -serial stdio < /dev/null 2> "$work/errors" |
    tr -d '\r' | awk -v status="$work/status" '/^LANE-EXIT /{print $2 > status; next} {print; fflush()}'
[ -s "$work/status" ] || { cat "$work/errors" >&2; echo 'the helper machine ended early' >&2; exit 125; }
exit "$(cat "$work/status")"
