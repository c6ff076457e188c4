#!/bin/bash
# A Kubernetes cluster of one node, in the namespaces that it is started in: kubernetes.sh DIR TOOLS. Prints "ready" when the
# node is ready. All processes end with this script.
set -euo pipefail
dir=$1
PATH=$2:$PATH
mkdir -p "$dir"/{etcd,api,kubelet,log,pods,cni,cache,volumes} "$dir/containerd/certs.d"

ip link set lo up
# A node needs an address and a default route, even if it leads nowhere.
ip link add uplink type veth peer name nowhere
ip address add 192.0.2.2/24 dev uplink
ip link set uplink up
ip link set nowhere up
ip route add default via 192.0.2.1
# There is no name server on this address, so lookups of the node fail at once. Pods have that of the cluster.
echo nameserver 127.0.0.1 >"$dir/resolv.conf"
mount --bind "$dir/resolv.conf" /etc/resolv.conf
echo "127.0.0.1 localhost
192.0.2.2 node1 registry.corp" >"$dir/hosts"
mount --bind "$dir/hosts" /etc/hosts
# The paths that operators know.
mount --bind "$dir/containerd" /etc/containerd
mount --bind "$dir/cache" /var/cache
# The path of the device plugins' directory cannot be configured.
mkdir -p /var/lib/kubelet
mount -t tmpfs tmpfs /var/lib/kubelet

in_background() {
    local log=$dir/log/$1
    shift
    "$@" >"$log" 2>&1 &
}

# A registry with two names: registry.corp with TLS, and a port without.
openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=registry.corp -addext subjectAltName=DNS:registry.corp \
    -keyout "$dir/registry.key" -out "$dir/registry.pem" 2>/dev/null
export SSL_CERT_FILE=$dir/registry.pem
serve_registry() {
    cat >"$dir/$1.yml" <<END
version: 0.1
storage: { filesystem: { rootdirectory: $dir/registry } }
http: { addr: "$2"$3 }
END
    in_background "$1" docker-registry serve "$dir/$1.yml"
}
serve_registry registry :5000 ""
serve_registry registry.corp :443 ", tls: { certificate: $dir/registry.pem, key: $dir/registry.key }"

openssl genrsa -out "$dir/accounts.key" 2048 2>/dev/null
echo 'secret,admin,admin,"system:masters"' >"$dir/tokens"
cat >"$dir/kubeconfig" <<END
apiVersion: v1
kind: Config
clusters: [{ name: test, cluster: { server: "https://127.0.0.1:6443", insecure-skip-tls-verify: true } }]
users: [{ name: admin, user: { token: secret } }]
contexts: [{ name: test, context: { cluster: test, user: admin } }]
current-context: test
END
in_background etcd etcd --data-dir "$dir/etcd" --unsafe-no-fsync
in_background apiserver kube-apiserver --etcd-servers http://127.0.0.1:2379 --advertise-address 192.0.2.2 \
    --cert-dir "$dir/api" --service-account-key-file "$dir/accounts.key" \
    --service-account-signing-key-file "$dir/accounts.key" --service-account-issuer https://cluster.test \
    --token-auth-file "$dir/tokens" --authorization-mode Node,RBAC --service-cluster-ip-range 10.96.0.0/24
in_background controllers kube-controller-manager --kubeconfig "$dir/kubeconfig" --leader-elect=false --secure-port 0 \
    --service-account-private-key-file "$dir/accounts.key"
cat >"$dir/Corefile" <<END
cluster.local {
  bind 192.0.2.2
  errors
  kubernetes {
    kubeconfig $dir/kubeconfig
  }
}
END
in_background scheduler kube-scheduler --kubeconfig "$dir/kubeconfig" --leader-elect=false --secure-port 0
in_background proxy kube-proxy --kubeconfig "$dir/kubeconfig" --proxy-mode iptables --cluster-cidr 10.244.0.0/16 \
    --hostname-override node1 --conntrack-max-per-core 0

cat >"$dir/containerd/config.toml" <<END
version = 3
root = "$dir/root"
state = "$dir/state"
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.nri.v1.nri"]
[grpc]
  address = "$dir/containerd.sock"
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "127.0.0.1:5000/pause:1"
[plugins.'io.containerd.cri.v1.images'.registry]
  config_path = "/etc/containerd/certs.d"
[plugins.'io.containerd.cri.v1.runtime']
  # Without the privilege to lower oom_score_adj, containerd would not start any container.
  restrict_oom_score_adj = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ["/usr/lib/cni"]
  conf_dir = "$dir/cni"
END
cat >"$dir/cni/test.conflist" <<END
{ "cniVersion": "1.0.0", "name": "test", "plugins": [
  { "type": "ptp", "ipam": { "type": "host-local", "dataDir": "$dir/ipam",
    "ranges": [[{ "subnet": "10.244.0.0/24" }]], "routes": [{ "dst": "0.0.0.0/0" }] } },
  { "type": "portmap", "capabilities": { "portMappings": true } }] }
END
in_background containerd containerd

cat >"$dir/kubelet.yaml" <<END
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
containerRuntimeEndpoint: unix://$dir/containerd.sock
clusterDNS: [192.0.2.2]
clusterDomain: cluster.local
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
cgroupsPerQOS: false
enforceNodeAllocatable: []
makeIPTablesUtilChains: false
localStorageCapacityIsolation: false
authentication: { anonymous: { enabled: true }, webhook: { enabled: false } }
authorization: { mode: AlwaysAllow }
evictionHard: { memory.available: 1Mi }
podLogsDir: $dir/pods
END
until curl --silent --insecure --fail --header 'Authorization: Bearer secret' https://127.0.0.1:6443/readyz >/dev/null; do sleep 0.2; done
in_background names coredns -conf "$dir/Corefile"
in_background kubelet kubelet --config "$dir/kubelet.yaml" --kubeconfig "$dir/kubeconfig" --root-dir "$dir/kubelet" \
    --cert-dir "$dir/kubelet/pki" --hostname-override node1 --node-ip 192.0.2.2
# The node's network must be ready before pods are created.
until kubectl --kubeconfig "$dir/kubeconfig" wait --for condition=Ready node/node1 --timeout 60s >/dev/null 2>&1; do sleep 0.2; done
until ss --listening --udp --numeric | grep --quiet 192.0.2.2:53; do sleep 0.2; done
echo ready
wait
