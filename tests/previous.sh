#!/bin/sh
# Builds the program of the previous commit into a directory, with its chart, for the upgrade tests, which run both
# versions: tests/previous.sh OUT PROFILE
set -eu
out=$(mkdir -p "$1" && cd "$1" && pwd)
profile=$2
cd "$(dirname "$0")/.."
if ! commit=$(git rev-parse --verify --quiet HEAD~1); then
    echo "this repository has no previous commit: the upgrade test is skipped" >&2
    rm -rf "$out/dray" "$out/chart"
    exit 0
fi
[ "$(cat "$out/commit" 2>/dev/null)" != "$commit" ] || exit 0
sources=$out/src
rm -rf "$sources" && mkdir "$sources"
# Files get the current time, not that of the commit: cargo decides by it what to rebuild, and the target directory is
# shared with this commit.
git archive "$commit" | tar --extract --touch --directory "$sources"
# The same target directory and flags, so that shared dependencies are built once.
host=$(rustc -vV | sed -n 's/^host: //p')
flags=$(k8s/flags.sh)
CARGO_TARGET_DIR=$PWD/target CARGO_ENCODED_RUSTFLAGS=$flags cargo build --profile "$profile" --locked --package dray --bin dray \
    --target "$host" --manifest-path "$sources/Cargo.toml"
rm -f "$out/dray"
mv "target/$host/$profile/dray" "$out/dray"
rm -rf "$out/chart"
[ ! -d "$sources/k8s/dray" ] || mv "$sources/k8s/dray" "$out/chart"
rm -rf "$sources"
echo "$commit" >"$out/commit"
