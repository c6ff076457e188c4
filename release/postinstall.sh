#!/bin/sh
# dpkg: configure [PREVIOUS VERSION]; rpm: the number of installed versions
set -e
getent passwd dray >/dev/null ||
    useradd --system --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin dray
# In containers and chroots no systemd runs.
[ -d /run/systemd/system ] || exit 0
systemctl daemon-reload
case $1:${2:-} in
configure:) systemctl enable --now dray ;;
configure:* | 2:) systemctl try-restart dray ;;
# RPM distributions start services only if a preset says so.
1:) systemctl preset dray ;;
esac
