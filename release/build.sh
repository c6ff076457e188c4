#!/bin/sh
# Builds the static program of a release and prints where it is: release/build.sh TARGET
#
# DRAY_COMMIT  what `dray --version` tells
set -eu
target=$1
cd "$(dirname "$0")/.."
strip=strip
if [ "$target" != "$(rustc -vV | sed -n 's/^host: //p')" ]; then
    # The names of Debian's cross compilers have no vendor.
    prefix=$(echo "$target" | sed 's/-unknown//')
    strip=$prefix-strip
    name=$(echo "$target" | tr 'a-z-' 'A-Z_')
    export "CARGO_TARGET_${name}_LINKER=$prefix-gcc"
    installed=$(rustc --print target-libdir --target "$target")
    [ -d "$installed" ] || rustup target add "$target" >&2
fi
CARGO_ENCODED_RUSTFLAGS=$(k8s/flags.sh "$target")
export CARGO_ENCODED_RUSTFLAGS
cargo build --release --locked --package dray --target "$target" >&2
out=target/release-programs/$target
mkdir -p "$out"
"$strip" --remove-section=.note.gnu.build-id -o "$out/dray" "target/$target/release/dray"
echo "$PWD/$out/dray"
