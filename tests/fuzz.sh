#!/bin/sh
# Runs every fuzz target for a number of seconds. Without a nightly toolchain, RUSTC_BOOTSTRAP makes the stable one
# accept the flags of the fuzzer.
set -eu
# The fuzzer sets its own flags.
unset CARGO_ENCODED_RUSTFLAGS CARGO_BUILD_TARGET
seconds=${1:-10}
cd "$(dirname "$0")/.."
tools=$PWD/target/tools
[ -x "$tools/bin/cargo-fuzz" ] || cargo install --quiet --locked --root "$tools" cargo-fuzz@0.13.2
export RUSTC_BOOTSTRAP=1 PATH="$tools/bin:$PATH"
cd proxy
for target in fuzz/targets/*.rs; do
    name=$(basename "$target" .rs)
    echo "fuzzing $name for $seconds s"
    mkdir -p "fuzz/corpus/$name"
    [ "$name" != config ] || cp ../config/*.toml "fuzz/corpus/$name/"
    log=$(mktemp)
    cargo fuzz run --sanitizer none "$name" -- -max_total_time="$seconds" -max_len=4096 >"$log" 2>&1 || {
        cat "$log"
        exit 1
    }
    tail -n 1 "$log"
    rm -f "$log"
done
