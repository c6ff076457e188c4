#!/bin/sh
# Builds the static program of a release and prints where it is: release/build.sh TARGET
#
# DRAY_COMMIT  what `dray --version` tells
set -eu
target=$1
cd "$(dirname "$0")/.."
if [ "$target" != "$(rustc -vV | sed -n 's/^host: //p')" ]; then
    # The names of Debian's cross compilers have no vendor.
    prefix=$(echo "$target" | sed 's/-unknown//')
    name=$(echo "$target" | tr 'a-z-' 'A-Z_')
    export "CARGO_TARGET_${name}_LINKER=$prefix-gcc"
    installed=$(rustc --print target-libdir --target "$target")
    [ -d "$installed" ] || rustup target add "$target" >&2
fi
CARGO_ENCODED_RUSTFLAGS=$(k8s/flags.sh "$target")
export CARGO_ENCODED_RUSTFLAGS
cargo build --release --locked --package dray --target "$target" >&2
echo "$PWD/target/$target/release/dray"
