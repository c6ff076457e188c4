#!/bin/sh
# Builds the image into an OCI directory, for this machine's architecture or another that a cross linker is
# installed for: k8s/image.sh OUT [TARGET]
#
# PROGRAM  one that is built already with the flags of k8s/flags.sh; otherwise it is built
#
# The same sources, Rust and C library give the same bytes: no times, no paths, no build ids.
set -eu
out=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
target=${2:-$(rustc -vV | sed -n 's/^host: //p')}
program=$(realpath "${PROGRAM:-$(release/build.sh "$target")}")

context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
case $target in
aarch64*) architecture=arm64 ;;
*) architecture=amd64 ;;
esac
cp "$program" "$context/dray"
cp -L /etc/ssl/certs/ca-certificates.crt "$context/ca-certificates.crt"
k8s/sbom.sh "$out/dray.cdx.json" "$target"
cp "$out/dray.cdx.json" "$context/"
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
mkdir "$context/cache"
describe="--annotation org.opencontainers.image.title=dray --annotation org.opencontainers.image.version=$version
    --annotation org.opencontainers.image.licenses=Apache-2.0 --annotation org.opencontainers.image.revision=${DRAY_COMMIT:-unknown}"
store="--storage-driver vfs --root $context/storage --runroot $context/run"
rm -rf "$out/oci"
# shellcheck disable=SC2086 # a list of words
buildah $store build --quiet --isolation chroot --timestamp "${SOURCE_DATE_EPOCH:-0}" --arch "$architecture" \
    $describe --file k8s/Containerfile --tag "dray:$version" "$context" >/dev/null
# shellcheck disable=SC2086
buildah $store push --quiet "dray:$version" "oci:$out/oci:$version"
echo "$out/oci:$version"
