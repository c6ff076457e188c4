#!/bin/sh
# Makes everything of a release, the same bytes on each machine with the same Rust, C library and certificate authorities:
# release/make.sh VERSION OUT
#
# DRAY_SIGNING_KEY  a secret key of minisign without a password: signs SHA256SUMS
set -eu
version=$1
out=$(mkdir -p "$2" && cd "$2" && pwd)
cd "$(dirname "$0")/.."
fail() { echo "release: $*" >&2 && exit 1; }
[ "$version" = "$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)" ] || fail "Cargo.toml has another version than $version"
grep -q "^## $version\$" CHANGELOG.md || fail "CHANGELOG.md has no section '## $version'"
for key in version appVersion; do
    grep -q "^$key: $version\$" k8s/dray/Chart.yaml || fail "k8s/dray/Chart.yaml has another $key than $version"
done
[ -z "$(git status --porcelain)" ] || fail "the working tree has changes that are not committed"
[ -z "$(ls "$out")" ] || fail "$out is not empty"

SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
DRAY_COMMIT=$(git rev-parse --short=12 HEAD)
export SOURCE_DATE_EPOCH DRAY_COMMIT
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

host=$(rustc -vV | sed -n 's/^host: //p')
HOST_PROGRAM=$(release/build.sh "$host")
export HOST_PROGRAM
for pair in amd64:x86_64 arm64:aarch64; do
    architecture=${pair%:*} target=${pair#*:}-unknown-linux-gnu
    program=$(release/build.sh "$target")
    release/packages.sh "$program" "$architecture" "$version" "$out"
    PROGRAM=$program k8s/image.sh "$work/$architecture" "$target" >/dev/null
done
release/index.sh "$work/image" "$version" "$work/amd64/oci" "$work/arm64/oci"
release/archive.sh "$work/image" . "$out/dray-$version-image.tar"
release/archive.sh k8s dray "$out/dray-chart-$version.tgz"

release/check.sh "$work/image" "$version"

cd "$out"
sha256sum -- * >SHA256SUMS
cd "$OLDPWD"
[ -z "${DRAY_SIGNING_KEY:-}" ] || release/sign.sh "$out" "$version"
cat "$out/SHA256SUMS"
