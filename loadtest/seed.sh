#!/bin/sh
# Puts an image of random layers into a registry: loadtest/seed.sh http://127.0.0.1:5000 team/app 1 SIZE...
# Sizes in bytes. Prints nothing.
set -eu
registry=$1 repository=$2 tag=$3
shift 3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

push() { # FILE -> "digest size"
    digest=sha256:$(sha256sum "$1" | cut -d' ' -f1)
    location=$(curl -fsS -X POST -D - -o /dev/null "$registry/v2/$repository/blobs/uploads/" | tr -d '\r' | sed -n 's/^[Ll]ocation: //p')
    case $location in http*) ;; *) location=$registry$location ;; esac
    case $location in *\?*) location="$location&digest=$digest" ;; *) location="$location?digest=$digest" ;; esac
    curl -fsS -o /dev/null -X PUT -H 'Content-Type: application/octet-stream' --data-binary "@$1" "$location"
    echo "$digest $(wc -c <"$1")"
}

layers="" diffs=""
for size in "$@"; do
    head -c "$size" /dev/urandom >"$work/layer"
    set -- $(push "$work/layer")
    layers="$layers${layers:+,}{\"mediaType\":\"application/vnd.oci.image.layer.v1.tar\",\"digest\":\"$1\",\"size\":$2}"
    diffs="$diffs${diffs:+,}\"$1\""
done
printf '{"architecture":"amd64","os":"linux","config":{},"rootfs":{"type":"layers","diff_ids":[%s]}}' "$diffs" >"$work/config"
set -- $(push "$work/config")
printf '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"%s","size":%s},"layers":[%s]}' \
    "$1" "$2" "$layers" >"$work/manifest"
curl -fsS -o /dev/null -X PUT -H 'Content-Type: application/vnd.oci.image.manifest.v1+json' \
    --data-binary "@$work/manifest" "$registry/v2/$repository/manifests/$tag"
