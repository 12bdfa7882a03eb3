#!/bin/sh
# Runs cases of the conformance suite on the QEMU that backports have for this release of Debian, beside the release's own:
# what one QEMU does by itself, another must be told. It is unpacked below target/tmp and not installed.
set -eu
variables=$(scripts/environment.sh)
root=$PWD/target/tmp/qemu-backports
skip() {
    echo "skipped: conformance_of_qemu on the QEMU of backports: $1"
    exit 0
}
if [ ! -x "$root/bin/qemu-system-x86_64" ]; then
    rm -rf "$root"
    mkdir -p "$root/lists/partial" "$root/debs/partial" "$root/bin"
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
    cat > "$root/program" << 'WORDS'
#!/bin/sh
root=$(dirname "$0")/..
export QEMU_MODULE_DIR="$root/usr/lib/x86_64-linux-gnu/qemu"
exec "$root/usr/bin/qemu-system-x86_64" -L "$root/usr/share/qemu" -L "$root/usr/share/seabios" "$@"
WORDS
    chmod +x "$root/program"
    mv "$root/program" "$root/bin/qemu-system-x86_64"
fi
version=$("$root/bin/qemu-system-x86_64" --version)
echo "$version" | head -n 1
cases=${PYRO_TEST_CASES:-exit_code,power_off,panic,goes_on}
# shellcheck disable=SC2086 # one variable a word
env $variables PATH="$root/bin:$PATH" PYRO_TEST_CASES="$cases" \
    cargo test --quiet --workspace --lib conformance::conformance_of_qemu -- --exact --nocapture > "$root/log" 2>&1 ||
    { cat "$root/log"; exit 1; }
# A suite that was skipped has shown nothing.
grep '^conformance: ' "$root/log"
grep -q '^conformance: qemu: [1-9][0-9]* cases passed' "$root/log"
