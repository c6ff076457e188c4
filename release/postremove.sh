#!/bin/sh
# dpkg: remove, upgrade or purge; rpm: the number of versions that stay
set -e
[ ! -d /run/systemd/system ] || systemctl daemon-reload || true
[ "$1" = purge ] || exit 0
rm -rf /var/cache/dray /etc/dray
! getent passwd dray >/dev/null || userdel dray || echo "the user dray is still there" >&2
