#!/bin/sh
# dpkg: remove or upgrade; rpm: the number of versions that stay
set -e
case $1 in
remove | 0) ;;
*) exit 0 ;;
esac
# A service that cannot be stopped must not keep the package.
if command -v systemctl >/dev/null; then
    [ ! -d /run/systemd/system ] || systemctl stop dray || echo "dray is still running" >&2
    systemctl disable dray || true
fi
[ "$1" != remove ] || touch /etc/dray/.removed
# Runtimes fall back to the registries, but each pull would first try this host.
if [ -e /etc/containerd/certs.d/_default/hosts.toml ]; then
    dray containerd uninstall --hosts-dir /etc/containerd/certs.d ||
        echo "containerd may still use dray as its mirror: see /etc/containerd/certs.d" >&2
fi
