#!/bin/sh
# Installs the system packages that building ("build"), a release ("release") or testing (no argument) needs, or says
# which are missing where it may not install.
set -eu

# program:package
build="cc:gcc cmake:cmake make:make update-ca-certificates:ca-certificates"
all="$build curl:curl openssl:openssl docker-registry:docker-registry htpasswd:apache2-utils skopeo:skopeo \
buildah:buildah podman:podman dockerd:docker.io containerd:containerd nginx:nginx-light dnsmasq:dnsmasq-base ip:iproute2 tc:iproute2 unshare:util-linux mount:mount valgrind:valgrind \
g++:g++ go:golang-go strace:strace pip3:python3-pip etcd:etcd-server chromium:chromium promtool:prometheus iptables:iptables ptp:containernetworking-plugins \
rpm:rpm systemd-analyze:systemd"
release="$build git:git curl:curl go:golang-go skopeo:skopeo buildah:buildah python3:python3 aarch64-linux-gnu-gcc:gcc-aarch64-linux-gnu \
aarch64-linux-gnu-g++:g++-aarch64-linux-gnu qemu-aarch64-static:qemu-user-static"

case ${1:-} in
build) wanted=$build ;;
release) wanted=$release ;;
*) wanted=$all ;;
esac
missing=""
for pair in $wanted; do
    PATH=$PATH:/usr/sbin:/sbin:/usr/lib/cni command -v "${pair%%:*}" >/dev/null 2>&1 || missing="$missing ${pair##*:}"
done
# shellcheck disable=SC2086 # a list of words
set -- $missing
if [ $# -eq 0 ]; then exit 0; fi

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing: $*"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    # The tests start their own services, so those of the packages must not start.
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d.dray && chmod +x /usr/sbin/policy-rc.d.dray
    [ -e /usr/sbin/policy-rc.d ] || { mv /usr/sbin/policy-rc.d.dray /usr/sbin/policy-rc.d; ours=1; }
    apt-get install -y -qq --no-install-recommends "$@" >/dev/null
    rm -f /usr/sbin/policy-rc.d.dray
    [ -z "${ours:-}" ] || rm -f /usr/sbin/policy-rc.d
else
    echo "missing packages: $*" >&2
    echo "install them with: sudo apt-get install $*" >&2
    exit 1
fi
