#!/bin/sh
# Packs a directory, the same bytes for the same files: release/archive.sh PARENT NAME FILE
set -eu
pack="tar --create --sort=name --format=ustar --mtime=@${SOURCE_DATE_EPOCH:-0} --owner=0 --group=0 --numeric-owner --mode=go=rX,u+rw"
case $3 in
*.tar) $pack --directory "$1" "$2" >"$3" ;;
*) $pack --directory "$1" "$2" | gzip -9 -n >"$3" ;;
esac
