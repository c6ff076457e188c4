#!/bin/sh
# A host of its own for the commands of operators: its own network, processes, /etc, /usr and /var. In the network is a
# registry that has the name of Docker Hub, and nothing else. The variables come from host.rs.
set -eu
mount -t tmpfs tmpfs "$HOST"
for folder in etc usr var; do
    mkdir "$HOST/$folder" "$HOST/$folder.work"
    mount -t overlay overlay -o "lowerdir=/$folder,upperdir=$HOST/$folder,workdir=$HOST/$folder.work" "/$folder"
done
mount -t tmpfs -o mode=755 tmpfs /var/cache
mount -t tmpfs -o mode=755 tmpfs /run
# Scripts of packages look for it.
mkdir -p /run/systemd/system
rm -rf /etc/containerd /etc/dray /etc/systemd/system
mkdir -p /etc/containerd /etc/systemd/system /usr/local/bin "$HOST/bin" "$HOST/source"

ip link set lo up
ip address add 34.99.0.1/32 dev lo
echo "nameserver 127.0.0.1" > /etc/resolv.conf
echo "127.0.0.1 localhost" > /etc/hosts
dnsmasq --no-resolv --no-hosts --listen-address=127.0.0.1 --bind-interfaces --user=root --pid-file=/run/dnsmasq.pid \
    --address=/docker.io/34.99.0.1
cat "$CA" >> /etc/ssl/certs/ca-certificates.crt
cat > "$HOST/registry.yml" <<END
version: 0.1
log: { level: error, accesslog: { disabled: true } }
storage: { filesystem: { rootdirectory: $STORAGE }, redirect: { disable: true } }
http: { addr: "34.99.0.1:443", tls: { certificate: $CERT, key: $KEY } }
END
docker-registry serve "$HOST/registry.yml" >/dev/null 2>&1 &
echo $! > /run/registry.pid

# The programs that this host does not have: sudo, systemd, and the build of dray, which has happened.
cat > "$HOST/bin/sudo" <<'END'
#!/bin/sh
exec "$@"
END
cat > "$HOST/bin/make" <<END
#!/bin/sh
[ "\$*" = build ] && mkdir -p target/release && cp "$DRAY" target/release/dray
END
cat > "$HOST/bin/systemctl" <<'END'
#!/bin/sh
# Runs a service by the command line of its unit.
set -eu
unit() { find /etc/systemd/system /usr/lib/systemd/system -name "$1.service" 2>/dev/null | head -n 1; }
stop() {
    [ -e "/run/$1.pid" ] || return 0
    pid=$(cat "/run/$1.pid")
    kill "$pid"
    while [ -d "/proc/$pid" ] && ! grep -q "^State:.Z" "/proc/$pid/status"; do sleep 0.05; done
    rm "/run/$1.pid"
}
start() {
    case $1 in
        containerd) set -- containerd containerd --root "$HOST/containerd" --log-level error ;;
        dray)
            files=$(unit dray)
            [ ! -d $files.d ] || files="$files $(echo $files.d/*.conf)"
            environment=$(sed -n 's/^Environment=//p' $files | sed 's|%C|/var/cache|')
            command=$(sed -n 's/^ExecStart=//p' $files)
            install -d -o dray -g dray /var/cache/dray
            # shellcheck disable=SC2086 # lists of words
            set -- dray env $environment setpriv --reuid=dray --regid=dray --clear-groups --no-new-privs $command
            ;;
    esac
    name=$1
    shift
    "$@" >> "/run/$name.log" 2>&1 &
    echo $! > "/run/$name.pid"
}
[ "$1" != --quiet ] || shift
now=
[ "${2:-}" != --now ] || { now=yes && set -- "$1" "$3"; }
[ $# -lt 2 ] || set -- "$1" "${2%.service}"
case $1 in
    daemon-reload) ;;
    enable) [ -n "$(unit "$2")" ] && [ -z "$now" ] || start "$2" ;;
    disable) [ -z "$now" ] || stop "$2" ;;
    is-active) [ -e "/run/$2.pid" ] ;;
    restart) stop "$2" && start "$2" ;;
    preset) ;;
    reload) kill -HUP "$(cat "/run/$2.pid")" ;;
    start | stop) "$1" "$2" ;;
    *) exit 1 ;;
esac
END
chmod +x "$HOST"/bin/*
# Scripts of RPM packages have a PATH of their own. This host has no policy about services.
cp "$HOST/bin/systemctl" /usr/bin/systemctl
printf '#!/bin/sh\nexec systemctl "$@"\n' > /usr/bin/deb-systemd-invoke
chmod +x /usr/bin/deb-systemd-invoke
export HOST HOME="$HOST" PATH="$HOST/bin:$PATH"
ln -s "$PROJECT/config" "$HOST/source/config"
cd "$HOST/source"

# As the package of Debian has it.
cat > /etc/containerd/config.toml <<'END'
version = 2

[plugins]
  [plugins."io.containerd.grpc.v1.cri"]
    [plugins."io.containerd.grpc.v1.cri".cni]
      bin_dir = "/usr/lib/cni"
      conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.internal.v1.opt"]
    path = "/run/containerd-opt"
END
cp /etc/containerd/config.toml "$HOST/config.toml"
systemctl start containerd

# Pulls the image into a namespace of containerd that does not have it.
pull() {
    ctr --namespace "$1" images pull --snapshotter native --hosts-dir /etc/containerd/certs.d docker.io/library/alpine:latest
}
step() {
    echo "== $1"
    sh -eu "$STEPS/$1"
}
. "$STEPS/run"
