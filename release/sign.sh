#!/bin/sh
# Signs the checksums of a release: release/sign.sh DIR VERSION
#
# DRAY_SIGNING_KEY  a secret key of minisign without a password
set -eu
minisign=$(dirname "$0")/../target/tools/minisign
"$minisign" -S -s "$DRAY_SIGNING_KEY" -m "$1/SHA256SUMS" -t "dray $2" >/dev/null
