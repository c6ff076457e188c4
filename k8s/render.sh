#!/bin/sh
# Writes the manifests for people without Helm, from the chart: k8s/render.sh HELM [OUT]
set -eu
helm=$1
out=${2:-$(dirname "$0")}
chart=$(dirname "$0")/dray
for mode in daemonset deployment; do
    {
        cat <<HEAD
# Made from the chart by \`make manifests\`: change that, or use Helm. These manifests have no clean-up after
# \`kubectl delete\`: pods that end take containerd's configuration back themselves, and
# \`dray containerd uninstall\` does so on a node where one was killed.
#
# Peers do not authenticate each other in these manifests: keep port 5052 inside the cluster, or use Helm, which generates a
# key.
#
# Build the image with \`make image\`, push it to where your nodes can pull it, and set it below.
#
#   kubectl apply -f k8s/$mode.yaml
apiVersion: v1
kind: Namespace
metadata:
  name: dray
---
HEAD
        "$helm" template dray "$chart" --namespace dray --kube-version 1.34.0 --no-hooks --set mode=$mode,peers.generateKey=false |
            grep -v -e '^# Source' -e 'helm.sh/chart' -e 'managed-by: Helm' | sed -e '1{/^---$/d}' -e 's/ *$//'
    } >"$out/$mode.yaml"
done
