//! The paths of containerd's configuration, hosts directory and socket in each distribution.

#![allow(clippy::disallowed_methods, reason = "runs in commands, and on threads for blocking work")]

use std::path::Path;

/// One distribution.
#[derive(Debug, Clone, Copy)]
pub struct Distribution {
    pub name: &'static str,
    pub config: &'static str,
    /// Its hosts directory, or the recommended one if it does not configure any.
    pub hosts_dir: &'static str,
    pub socket: &'static str,
    /// A note for operators, if a program of the distribution writes these files.
    pub note: Option<&'static str>,
}

/// containerd from packages: kubeadm, kind, EKS, AKS and most others.
pub const DEFAULT: Distribution = Distribution {
    name: "containerd",
    config: "/etc/containerd/config.toml",
    hosts_dir: "/etc/containerd/certs.d",
    socket: "/run/containerd/containerd.sock",
    note: None,
};

/// Sources of the paths: docs/kubernetes/distributions.md.
pub const ALL: [Distribution; 6] = [
    Distribution {
        name: "k3s",
        config: "/var/lib/rancher/k3s/agent/etc/containerd/config.toml",
        hosts_dir: "/var/lib/rancher/k3s/agent/etc/containerd/certs.d",
        socket: "/run/k3s/containerd/containerd.sock",
        note: Some(
            "k3s writes this configuration at every start, and a directory for each registry in \
             /etc/rancher/k3s/registries.yaml; it does not change other directories",
        ),
    },
    Distribution {
        name: "RKE2",
        config: "/var/lib/rancher/rke2/agent/etc/containerd/config.toml",
        hosts_dir: "/var/lib/rancher/rke2/agent/etc/containerd/certs.d",
        socket: "/run/k3s/containerd/containerd.sock",
        note: Some(
            "RKE2 writes this configuration at every start, and a directory for each registry in \
             /etc/rancher/rke2/registries.yaml; it does not change other directories",
        ),
    },
    Distribution {
        name: "k0s",
        config: "/etc/k0s/containerd.toml",
        hosts_dir: "/etc/k0s/containerd.d/certs.d",
        socket: "/run/k0s/containerd.sock",
        note: Some("add the settings in a separate file in /etc/k0s/containerd.d, which k0s imports"),
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
             `dray runtime-config talos` instead",
        ),
    },
    DEFAULT,
];

/// The first distribution whose configuration exists on this node, otherwise the default one.
pub fn detect() -> Distribution {
    ALL.into_iter().find(|distribution| Path::new(distribution.config).exists()).unwrap_or(DEFAULT)
}

/// The distribution of a configuration file.
pub fn of(config: &Path) -> Option<Distribution> {
    ALL.into_iter().find(|distribution| Path::new(distribution.config) == config)
}
