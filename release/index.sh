#!/bin/sh
# Joins images of several architectures into one OCI directory: release/index.sh OUT VERSION IMAGE...
set -eu
out=$1 version=$2
shift 2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
store="--storage-driver vfs --root $work/storage --runroot $work/run"
# shellcheck disable=SC2086 # a list of words
buildah $store manifest create release >/dev/null
for image in "$@"; do
    # shellcheck disable=SC2086
    buildah $store manifest add --all release "oci:$image:$version" >/dev/null
done
# shellcheck disable=SC2086
buildah $store manifest push --quiet --all --format oci release "oci:$out:$version" >/dev/null
