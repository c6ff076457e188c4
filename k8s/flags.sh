#!/bin/sh
# Prints the flags of the program that is shipped, as CARGO_ENCODED_RUSTFLAGS takes them: paths may have spaces. Static, so
# that an image needs no C library. The paths of the machine that builds it are none of the program's business. Another machine
# gives the same bytes, without the id that a linker makes of them. The flags apply to the target only, so cargo has to be told
# one, also where that is the host: k8s/flags.sh [TARGET]
set -eu
cd "$(dirname "$0")/.."
target=${1:-$(rustc -vV | sed -n 's/^host: //p')}
set -- -C target-feature=+crt-static -C link-arg=-Wl,--build-id=none \
    "--remap-path-prefix=$PWD=/dray" "--remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=/cargo"
# Rust brings its own linker for this target: equal functions become one, and relocations are packed.
case $target in
x86_64-unknown-linux-gnu) set -- "$@" -C link-arg=-Wl,--icf=all -C link-arg=-Wl,-z,pack-relative-relocs ;;
esac
printf '%s\037' "$@" | sed 's/\x1f$//'
