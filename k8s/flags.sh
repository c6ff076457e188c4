#!/bin/sh
# Prints the flags of the program that is shipped, as CARGO_ENCODED_RUSTFLAGS takes them: paths may have spaces. Static, so
# that an image needs no C library; the paths of the machine that builds it are none of the program's business, and another
# machine gives the same bytes. They apply to the target only, so cargo has to be told one, also where that is the host.
set -eu
cd "$(dirname "$0")/.."
printf '%s\037%s\037%s\037%s\n' -C target-feature=+crt-static \
    "--remap-path-prefix=$PWD=/dray" "--remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=/cargo"
