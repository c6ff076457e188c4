#!/bin/sh
# dpkg: configure [PREVIOUS VERSION] or abort-...; rpm: the number of installed versions
set -e
if ! getent passwd dray >/dev/null; then
    getent group dray >/dev/null && group="--gid dray" || group=--user-group
    # shellcheck disable=SC2086 # a list of words
    useradd --system $group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin dray
fi
command -v systemctl >/dev/null || exit 0
# Also in a chroot, for the first start of the system.
removed=/etc/dray/.removed
case $1:${2:-} in
configure: | abort-remove:*) first=yes ;;
configure:*) [ ! -e $removed ] || first=yes ;;
# RPM distributions start services only if a preset says so.
1:) systemctl preset dray || true ;;
esac
rm -f $removed
[ -z "${first:-}" ] || systemctl enable dray
[ -d /run/systemd/system ] || exit 0
systemctl daemon-reload
invoke=systemctl
# It respects policy-rc.d.
! command -v deb-systemd-invoke >/dev/null || invoke=deb-systemd-invoke
if [ -n "${first:-}" ]; then
    $invoke start dray.service
else
    systemctl --quiet is-active dray && $invoke restart dray.service || true
fi
