//! Where distributions keep containerd's configuration, its hosts directory and its socket.

#![allow(clippy::disallowed_methods, reason = "runs in commands, and on threads for blocking work")]

use std::path::Path;

/// One distribution.
#[derive(Debug, Clone, Copy)]
pub struct Distribution {
    pub name: &'static str,
    pub config: &'static str,
    /// Where its hosts directory is, or had better be.
    pub hosts_dir: &'static str,
    pub socket: &'static str,
    /// What else one has to know, if its configuration or hosts directory is written by a program of its own.
    pub note: Option<&'static str>,
}

/// containerd as it comes from packages: kubeadm, kind, EKS, AKS and most others.
pub const USUAL: Distribution = Distribution {
    name: "containerd",
    config: "/etc/containerd/config.toml",
    hosts_dir: "/etc/containerd/certs.d",
    socket: "/run/containerd/containerd.sock",
    note: None,
};

/// Sources of the paths: k8s/README.md.
pub const PLACES: [Distribution; 6] = [
    Distribution {
        name: "k3s",
        config: "/var/lib/rancher/k3s/agent/etc/containerd/config.toml",
        hosts_dir: "/var/lib/rancher/k3s/agent/etc/containerd/certs.d",
        socket: "/run/k3s/containerd/containerd.sock",
        note: Some(
            "k3s writes this configuration at every start, and a directory for each registry in \
             /etc/rancher/k3s/registries.yaml; other directories it leaves alone",
        ),
    },
    Distribution {
        name: "RKE2",
        config: "/var/lib/rancher/rke2/agent/etc/containerd/config.toml",
        hosts_dir: "/var/lib/rancher/rke2/agent/etc/containerd/certs.d",
        socket: "/run/k3s/containerd/containerd.sock",
        note: Some(
            "RKE2 writes this configuration at every start, and a directory for each registry in \
             /etc/rancher/rke2/registries.yaml; other directories it leaves alone",
        ),
    },
    Distribution {
        name: "k0s",
        config: "/etc/k0s/containerd.toml",
        hosts_dir: "/etc/k0s/containerd.d/certs.d",
        socket: "/run/k0s/containerd.sock",
        note: Some("put the lines into a file of their own below /etc/k0s/containerd.d, which k0s imports"),
    },
    Distribution {
        name: "MicroK8s",
        config: "/var/snap/microk8s/current/args/containerd.toml",
        hosts_dir: "/var/snap/microk8s/current/args/certs.d",
        socket: "/var/snap/microk8s/common/run/containerd.sock",
        note: Some("MicroK8s comes with a directory for docker.io, which hides _default: use --extend"),
    },
    Distribution {
        name: "Talos",
        config: "/etc/cri/containerd.toml",
        hosts_dir: "/etc/cri/conf.d/hosts",
        socket: "/run/containerd/containerd.sock",
        note: Some(
            "Talos removes from the hosts directory what its machine configuration does not name: use \
             `dray runtime talos` instead",
        ),
    },
    USUAL,
];

/// The first whose configuration is here; the usual one where none is.
pub fn here() -> Distribution {
    PLACES.into_iter().find(|place| Path::new(place.config).exists()).unwrap_or(USUAL)
}

/// The one that a configuration belongs to.
pub fn of(config: &Path) -> Option<Distribution> {
    PLACES.into_iter().find(|place| Path::new(place.config) == config)
}
