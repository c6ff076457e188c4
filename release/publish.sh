#!/bin/sh
# Pushes the image and the chart of a release: release/publish.sh DIR VERSION REGISTRY
#
# REGISTRY    such as ghcr.io/example: the image becomes REGISTRY/dray:VERSION, the chart REGISTRY/charts/dray:VERSION
# PLAIN_HTTP  not empty: the registry has no TLS
# HELM        the program; default: the one that `make tools` builds
set -eu
dir=$(cd "$1" && pwd) version=$2 registry=$3
cd "$(dirname "$0")/.."
(cd "$dir" && sha256sum --quiet --check SHA256SUMS)
skopeo copy --quiet --all ${PLAIN_HTTP:+--dest-tls-verify=false} \
    "oci-archive:$dir/dray-$version-image.tar:$version" "docker://$registry/dray:$version"
"${HELM:-target/tools/helm}" push ${PLAIN_HTTP:+--plain-http} "$dir/dray-chart-$version.tgz" "oci://$registry/charts"
