#!/bin/sh
# Writes what the program is made of, each crate with its version, source and licence, as CycloneDX: k8s/sbom.sh FILE [TARGET]
set -eu
out=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
cd "$(dirname "$0")/.."
target=${2:-$(rustc -vV | sed -n 's/^host: //p')}
tools=$PWD/target/tools
[ -x "$tools/bin/cargo-cyclonedx" ] || cargo install --quiet --locked --root "$tools" cargo-cyclonedx@0.5.9

# It writes beside each Cargo.toml of a workspace, of which only one is wanted.
sources=$(mktemp -d)
trap 'rm -rf "$sources"' EXIT
cp -r Cargo.toml Cargo.lock "$sources"
for package in proxy tests; do
    mkdir -p "$sources/$package/src"
    cp "$package/Cargo.toml" "$sources/$package/"
    : >"$sources/$package/src/lib.rs"
done
sed -i '/^\[\[bin\]\]/,$d' "$sources/tests/Cargo.toml"
# Times and paths are no part of it.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-0} PATH=$tools/bin:$PATH \
    cargo cyclonedx --quiet --manifest-path "$sources/proxy/Cargo.toml" --format json --target "$target" --spec-version 1.5
sed "s#file://$sources#file:///dray#g" "$sources/proxy/dray.cdx.json" >"$out"
