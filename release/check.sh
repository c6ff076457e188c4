#!/bin/sh
# Runs the image of each architecture: a pull of a blob through it, with the digest compared: release/check.sh IMAGE VERSION
#
# IMAGE  an OCI directory with images for amd64 and arm64; the one of another machine runs under qemu-user
set -eu
image=$1 version=$2
work=$(mktemp -d)
registry= dray=
trap 'kill $registry $dray 2>/dev/null || true; rm -rf "$work"' EXIT

# A registry that has one blob of 4 MiB.
mkdir -p "$work/www/v2/library/app/blobs"
head -c 4194304 /dev/urandom >"$work/blob"
digest=sha256:$(sha256sum <"$work/blob" | cut -d " " -f 1)
mv "$work/blob" "$work/www/v2/library/app/blobs/$digest"
python3 -u -m http.server --bind 127.0.0.1 --directory "$work/www" 0 >"$work/registry.log" 2>&1 &
registry=$!
until port=$(sed -n 's/.* port \([0-9]*\) .*/\1/p' "$work/registry.log") && [ -n "$port" ]; do
    kill -0 $registry || { cat "$work/registry.log" >&2 && exit 1; }
    sleep 0.1
done
printf '[[registry]]\nmatch = "docker.io"\nupstreams = ["http://127.0.0.1:%s"]\n' "$port" >"$work/dray.toml"

for architecture in amd64 arm64; do
    root=$work/$architecture
    skopeo copy --quiet --override-arch "$architecture" "oci:$image:$version" "dir:$root.image"
    mkdir "$root"
    layer=$(sed -n 's/.*"layers":\[{[^]]*"digest":"sha256:\([0-9a-f]*\)".*/\1/p' "$root.image/manifest.json")
    tar --extract --gzip --file "$root.image/$layer" --directory "$root" dray
    case $architecture:$(uname -m) in
    amd64:x86_64 | arm64:aarch64) run= ;;
    amd64:*) run=qemu-x86_64-static ;;
    arm64:*) run=qemu-aarch64-static ;;
    esac
    $run "$root/dray" --version
    $run "$root/dray" --config "$work/dray.toml" --cache-dir "$root/cache" --listen 127.0.0.1:0 --admin 127.0.0.1:0 \
        >"$root.out" 2>"$root.log" &
    dray=$!
    until address=$(sed -n 's/.*registry=\([^ ]*\).*/\1/p' "$root.out") && [ -n "$address" ]; do
        kill -0 $dray || { cat "$root.log" && exit 1; }
        sleep 0.1
    done
    for source in upstream disk; do
        pulled=$(curl -sS --fail --noproxy "*" --dump-header "$root.headers" "http://$address/v2/library/app/blobs/$digest?ns=docker.io" |
            sha256sum | cut -d " " -f 1)
        [ "sha256:$pulled" = "$digest" ] || { echo "$architecture: wrong bytes from $source" >&2 && exit 1; }
        grep -qi "x-dray-source: $source" "$root.headers" || { cat "$root.headers" >&2 && exit 1; }
        sleep 1
    done
    kill $dray && wait $dray
    dray=
    echo "$architecture: the image serves a pull"
done
