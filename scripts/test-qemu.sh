#!/bin/sh
# Runs cases of the conformance suite on two more QEMUs: the installed one as an ordinary user, whose VMMs get another
# confinement; and the one that backports have for this release of Debian, because what one QEMU does by itself, another
# must be told. The latter is unpacked below target/tmp and not installed.
set -eu
variables=$(scripts/environment.sh)
# An ordinary user reads copies.
tests=$(cargo test --workspace --lib --no-run --color never 2>&1 | sed -n 's/.*Executable .*(\(.*pyro_engine-.*\))/\1/p')
own=$(mktemp -d)
trap 'rm -rf "$own"' EXIT
mkdir "$own/guest" "$own/tmp"
cp -L --sparse=always "$PWD"/target/tmp/guest/* "$own/guest/"
cp "$tests" "$own/tests"
chmod -R a+rX "$own"
chown nobody "$own/tmp"
# Most distributions open the tap device to all users; where this one does not, its user sees one that is.
as_nobody() {
    # shellcheck disable=SC2016 # the inner shell expands them
    unshare --mount sh -c '
        [ -c "$0/tun" ] || { mknod "$0/tun" c 10 200 && chmod 666 "$0/tun"; }
        mount --bind "$0/tun" /dev/net/tun
        exec setpriv --reuid=nobody --regid=nogroup --clear-groups "$@"' "$own" "$@"
}
as_nobody env TMPDIR="$own/tmp" PYRO_TEST_GUEST="$own/guest" PYRO_TEST_CASES=exit_code,confined,reach_the_host,missing_element,goes_on,allows \
    "$own/tests" conformance::conformance_of_qemu --exact --nocapture > "$own/log" 2>&1 || { cat "$own/log"; exit 1; }
sed -n 's/^conformance: qemu/conformance: qemu as an ordinary user/p' "$own/log"
grep -q '^conformance: qemu: [1-9][0-9]* cases passed' "$own/log"
# The whole program: it makes templates of its own, and restores from them, with a network and with a secret.
mkdir "$own/cache" "$own/home"
cp -a --sparse=always target/tmp/environments/envs target/tmp/environments/kernels "$own/cache"
cp "$(scripts/program.sh)" "$own/pyro"
chown -R nobody "$own/cache" "$own/home"
for _ in 1 2; do
    as_nobody env HOME="$own/home" PYRO_STATE_DIR="$own/home/state" PYRO_RUNTIME_DIR="$own/home/runtime" WORD=secret \
        PYRO_ENVIRONMENT_CACHE_DIR="$own/cache" "$own/pyro" run debian:12 --mem-mib 256 --network --secret T=env:WORD@example.com \
        --json -- sh -c 'echo $T' > "$own/log" || { cat "$own/log"; exit 1; }
done
grep -q '"stdout": "pyro-secret-' "$own/log" && grep -q '"start_mode": "restored"' "$own/log" || { cat "$own/log"; exit 1; }
echo 'pyro as an ordinary user: restored, with a network and a secret'

root=$PWD/target/tmp/qemu-backports
skip() {
    echo "skipped: conformance_of_qemu on the QEMU of backports: $1"
    exit 0
}
if [ ! -e "$root/whole" ]; then
    rm -rf "$root"
    mkdir -p "$root/lists/partial" "$root/debs/partial"
    # shellcheck source=/dev/null
    release=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    mirror=$(apt-get indextargets --format '$(ORIGIN) $(SUITE) $(CODENAME) $(REPO_URI)' 'Created-By: Packages' |
        sed -n "s/^Debian [a-z]* $release //p" | head -n 1)
    [ -n "$mirror" ] || skip 'apt knows no source of this release'
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $release-backports main" > "$root/list"
    set -- -qq -o Dir::Etc::SourceList="$root/list" -o Dir::Etc::SourceParts=/dev/null -o Dir::State::Lists="$root/lists" \
        -o Dir::Cache="$root" -o Dir::Cache::Archives="$root/debs" -o APT::Sandbox::User="$(id -un)"
    apt-get "$@" update >&2 || skip "$mirror has none"
    (cd "$root/debs" && apt-get "$@" download -t "$release-backports" qemu-system-x86 qemu-system-common qemu-system-data seabios >&2) ||
        skip 'it has no such packages'
    for package in "$root"/debs/*.deb; do dpkg -x "$package" "$root"; done
    rm -rf "$root/debs" "$root/lists"
    missing=$(ldd "$root/usr/bin/qemu-system-x86_64" | sed -n 's/ => not found//p' | tr '\t\n' '  ')
    [ -z "$missing" ] || skip "it lacks $missing"
    touch "$root/whole"
fi
version=$("$root/usr/bin/qemu-system-x86_64" --version)
echo "$version" | head -n 1
cases=${PYRO_TEST_CASES:-exit_code,panic,goes_on}
# shellcheck disable=SC2086 # one variable a word
env $variables PATH="$root/usr/bin:$PATH" PYRO_TEST_CASES="$cases" \
    cargo test --quiet --workspace --lib conformance::conformance_of_qemu -- --exact --nocapture > "$root/log" 2>&1 ||
    { cat "$root/log"; exit 1; }
# A suite that was skipped has shown nothing.
grep '^conformance: ' "$root/log"
grep -q '^conformance: qemu: [1-9][0-9]* cases passed' "$root/log"
