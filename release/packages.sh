#!/bin/sh
# Makes the archive and the packages of one architecture: release/packages.sh PROGRAM ARCHITECTURE VERSION OUT
#
# ARCHITECTURE       amd64 or arm64
# SOURCE_DATE_EPOCH  the time of all files
# HOST_PROGRAM       a dray that runs on this machine, for manual pages and completions; default: PROGRAM
# NFPM               the packager; default: the one that `make tools` builds
set -eu
program=$(realpath "$1") architecture=$2 version=$3
out=$(mkdir -p "$4" && cd "$4" && pwd)
cd "$(dirname "$0")/.."
case $architecture in
amd64) target=x86_64-unknown-linux-gnu ;;
arm64) target=aarch64-unknown-linux-gnu ;;
*) echo "unknown architecture $architecture: amd64 or arm64" >&2 && exit 2 ;;
esac
export SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-0}"
host=${HOST_PROGRAM:-$program}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

name=dray-$version-linux-$architecture
files=$work/$name
mkdir -p "$files/man" "$files/completions"
install -m 755 "$program" "$files/dray"
"$host" man "$files/man"
for shell in bash zsh fish; do "$host" completions $shell >"$files/completions/dray.$shell"; done
cp LICENSE README.md CHANGELOG.md config/dray.toml config/dray.service "$files/"
release/notices.py "$files/THIRD-PARTY-NOTICES" "$target"
k8s/sbom.sh "$files/dray.cdx.json" "$target"
release/archive.sh "$work" "$name" "$out/$name.tar.gz"

# The packages put the program where distributions do, and have a configuration file from the start.
sed -e '1,/^\[Unit\]/{/^#/d}' -e 's#/usr/local/bin/dray#/usr/bin/dray#' -e 's/^#Environment=DRAY_CONFIG/Environment=DRAY_CONFIG/' \
    config/dray.service >"$files/packaged.service"
cp release/dray.toml "$files/packaged.toml"
gzip -9 -n "$files"/man/*.1
chmod -R u=rwX,go=rX "$files"
export VERSION="$version" ARCHITECTURE="$architecture"
nfpm=$(realpath "${NFPM:-target/tools/nfpm}")
mtime=$(date --utc --date "@$SOURCE_DATE_EPOCH" +%Y-%m-%dT%H:%M:%SZ)
# Its fields for paths and times take no variables.
sed -e "s#\${FILES}#$files#" -e "s#\${RELEASE}#$PWD/release#" -e "s#\${MTIME}#$mtime#" release/nfpm.yaml >"$work/nfpm.yaml"
for format in deb rpm; do
    "$nfpm" package --config "$work/nfpm.yaml" --packager $format --target "$out/$name.$format" >/dev/null
done
