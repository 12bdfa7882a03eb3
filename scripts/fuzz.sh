#!/bin/sh
# Feeds every decoder of foreign bytes for FOR seconds each (20 unless set). The flags are libFuzzer's own and need no
# other toolchain; dependencies of the host (macros, build scripts) are left alone by naming the target.
set -eu
cd fuzz
export RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table -Ccodegen-units=1"
target=x86_64-unknown-linux-gnu
cargo build --quiet --release --target "$target"
for name in resync messages layer kernel manifest dns_query tls_hello network_rule network_policy \
    netlink_answers http_head http2 secret; do
    mkdir -p "corpus/$name"
    echo "fuzz: $name" >&2
    "target/$target/release/$name" "corpus/$name" -max_total_time="${FOR:-20}" -rss_limit_mb=1024 \
        -timeout=20 -print_final_stats=0 -verbosity=0 -print_pcs=0 -print_funcs=0 -artifact_prefix="artifacts-$name-"
done
