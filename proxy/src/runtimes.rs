//! The mirror configuration of each container runtime other than containerd, which has the module `containerd`.

use std::fmt::Write as _;
use std::str::FromStr;

use serde_json::json;

use crate::config::Mirror;

/// A runtime, or a distribution that writes the runtime's configuration itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runtime {
    Docker,
    Buildkit,
    Podman,
    Crio,
    Kind,
    K3s,
    Rke2,
    Talos,
    Bottlerocket,
    Gke,
}

/// A registry, and its alias for image paths, which cannot contain a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedRegistry {
    host: String,
    alias: Option<String>,
}

/// A configuration document, and the instructions to install it.
#[derive(Debug, PartialEq, Eq)]
pub struct Document {
    pub text: String,
    /// Where to save it, and further steps; one line each.
    pub instructions: Vec<String>,
}

/// Why a runtime cannot use the mirror for a registry.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum UnsupportedRuntime {
    #[error(
        "{runtime} cannot use the port of {host} in an image path: set an alias for the registry in dray's configuration, and pass --registry {host}=ALIAS"
    )]
    Port { runtime: &'static str, host: String },
    #[error("{runtime} supports mirrors for {only} only, not for {host}: pull the image as {mirror}/{host}/...")]
    Only { runtime: &'static str, only: &'static str, host: String, mirror: String },
}

/// Public registries, for runtimes without a wildcard for all registries.
pub const PUBLIC_REGISTRIES: [&str; 7] =
    ["docker.io", "ghcr.io", "quay.io", "registry.k8s.io", "gcr.io", "public.ecr.aws", "mcr.microsoft.com"];

pub const ALL: [Runtime; 10] = [
    Runtime::Docker,
    Runtime::Buildkit,
    Runtime::Podman,
    Runtime::Crio,
    Runtime::Kind,
    Runtime::K3s,
    Runtime::Rke2,
    Runtime::Talos,
    Runtime::Bottlerocket,
    Runtime::Gke,
];

const DOCKER_HUB: &str = "docker.io";

impl FromStr for NamedRegistry {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (host, alias) = text.split_once('=').map_or((text, None), |(host, alias)| (host, Some(alias)));
        let is_host = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':');
        let is_alias = |alias: &str| {
            !alias.is_empty() && alias.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
        };
        if host.is_empty() || !host.chars().all(is_host) || !alias.is_none_or(is_alias) {
            return Err(format!(
                "\"{text}\" is not a valid registry: expected HOST[=ALIAS], such as docker.io or registry.corp:5000=corp"
            ));
        }
        Ok(Self { host: host.to_owned(), alias: alias.map(str::to_owned) })
    }
}

impl NamedRegistry {
    /// The name of the registry in an image path.
    fn path_name(&self, runtime: Runtime) -> Result<&str, UnsupportedRuntime> {
        match &self.alias {
            Some(alias) => Ok(alias),
            None if self.host.contains(':') => {
                Err(UnsupportedRuntime::Port { runtime: runtime.as_str(), host: self.host.clone() })
            }
            None => Ok(&self.host),
        }
    }
}

impl Runtime {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Docker => "docker",
            Self::Buildkit => "buildkit",
            Self::Podman => "podman",
            Self::Crio => "crio",
            Self::Kind => "kind",
            Self::K3s => "k3s",
            Self::Rke2 => "rke2",
            Self::Talos => "talos",
            Self::Bottlerocket => "bottlerocket",
            Self::Gke => "gke",
        }
    }

    /// The document that configures a mirror for these registries. For an empty list: for all registries, or for the
    /// public ones if the runtime needs a list.
    pub fn document(self, mirror: &Mirror, registries: &[NamedRegistry]) -> Result<Document, UnsupportedRuntime> {
        let public: Vec<_> =
            PUBLIC_REGISTRIES.iter().map(|host| NamedRegistry { host: (*host).to_owned(), alias: None }).collect();
        let each = if registries.is_empty() { &public } else { registries };
        // The wildcard of runtimes that have one.
        let all = NamedRegistry { host: "*".into(), alias: None };
        let or_all = if registries.is_empty() { std::slice::from_ref(&all) } else { registries };
        let text = match self {
            Self::Docker => docker(mirror, registries)?,
            Self::Buildkit => buildkit(mirror, each),
            Self::Podman | Self::Crio => containers_image(self, mirror, each)?,
            Self::Kind => kind(),
            Self::K3s | Self::Rke2 => rancher(mirror, or_all),
            Self::Talos => talos(mirror, or_all),
            Self::Bottlerocket => bottlerocket(mirror, or_all),
            Self::Gke => gke(mirror, each),
        };
        Ok(Document { text, instructions: self.instructions(mirror, registries) })
    }

    fn instructions(self, mirror: &Mirror, registries: &[NamedRegistry]) -> Vec<String> {
        let named: String = registries.iter().map(|registry| format!(" --registry {}", registry.host)).collect();
        let lines: &[&str] = match self {
            Self::Docker => &[
                "Merge this into /etc/docker/daemon.json, then restart Docker: systemctl restart docker",
                "This mirrors Docker Hub only. With the containerd image store (new installations since Engine 29), mirror all registries instead with:",
                "  mkdir -p /etc/docker/certs.d && dray containerd install --hosts-dir /etc/docker/certs.d --mirror MIRROR",
            ],
            Self::Buildkit => &[
                "Save it as /etc/buildkit/buildkitd.toml (rootless: ~/.config/buildkit/buildkitd.toml), or pass it: docker buildx create --driver docker-container --buildkitd-config FILE",
                "With the docker-container driver, 127.0.0.1 is BuildKit's own container: use an address of the host.",
            ],
            Self::Podman => &[
                "Save it as /etc/containers/registries.conf.d/50-dray.conf; podman, buildah and skopeo do not need a restart.",
            ],
            Self::Crio => &[
                "Save it as /etc/containers/registries.conf.d/50-dray.conf, then: systemctl reload crio",
                "On OpenShift, install the file with a MachineConfig: see docs/kubernetes/distributions.md.",
            ],
            Self::Kind => &[
                "Pass it to: kind create cluster --config FILE",
                "Before that, run on the host: mkdir -p certs.d && dray containerd install --hosts-dir certs.d --mirror MIRRORREGISTRIES",
                "In kind's nodes, 127.0.0.1 is the node itself: use an address of the host, such as that of Docker's bridge.",
                "Docker pulls the node image; configure it with: dray runtime-config docker",
            ],
            Self::K3s => &[
                "Save it as /etc/rancher/k3s/registries.yaml on each node, or merge it into the existing file, then restart k3s. Not needed if dray's chart writes into the hosts directory.",
            ],
            Self::Rke2 => &[
                "Save it as /etc/rancher/rke2/registries.yaml on each node, or merge it into the existing file, then restart rke2-server or rke2-agent. Not needed if dray's chart writes into the hosts directory.",
            ],
            Self::Talos => &[
                "Apply it as a patch to each machine; this does not need a reboot: talosctl patch machineconfig --patch @FILE",
            ],
            Self::Bottlerocket => &[
                "Add it to the user data of the instances, or apply it on a running instance: apiclient apply < FILE",
                "The wildcard \"*\" needs Bottlerocket 1.56 or newer. For older versions, list each registry with --registry.",
            ],
            Self::Gke => &[
                "Pass it to: gcloud container node-pools update POOL --cluster CLUSTER --containerd-config-from-file FILE",
                "GKE recreates the nodes of the pool. It does not support the wildcard \"*\", and accepts at most 25 registries.",
            ],
        };
        let filled = |line: &&str| line.replace("MIRROR", mirror.as_str()).replace("REGISTRIES", &named);
        lines.iter().map(filled).collect()
    }
}

impl FromStr for Runtime {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        if name == "containerd" {
            return Err("containerd has its own command: dray containerd install".to_owned());
        }
        let names = || ALL.map(Self::as_str).join(", ");
        let found = ALL.into_iter().find(|runtime| runtime.as_str() == name);
        found.ok_or_else(|| format!("\"{name}\" is not a valid runtime: expected one of {}", names()))
    }
}

/// docs.docker.com, "Mirror the Docker Hub library".
fn docker(mirror: &Mirror, registries: &[NamedRegistry]) -> Result<String, UnsupportedRuntime> {
    if let Some(other) = registries.iter().find(|registry| registry.host != DOCKER_HUB) {
        let (host, mirror) = (other.host.clone(), mirror.host().to_owned());
        return Err(UnsupportedRuntime::Only { runtime: "docker", only: DOCKER_HUB, host, mirror });
    }
    Ok(format!("{:#}\n", json!({ "registry-mirrors": [mirror.as_str()] })))
}

/// moby/buildkit, docs/buildkitd.toml.md.
fn buildkit(mirror: &Mirror, registries: &[NamedRegistry]) -> String {
    let mut text = String::new();
    for registry in registries {
        let _ = writeln!(text, "[registry.\"{}\"]\n  mirrors = [\"{}\"]", registry.host, mirror.host());
    }
    if mirror.is_plain() {
        let _ = writeln!(text, "[registry.\"{}\"]\n  http = true", mirror.host());
    }
    text
}

/// containers-registries.conf(5).
fn containers_image(
    runtime: Runtime,
    mirror: &Mirror,
    registries: &[NamedRegistry],
) -> Result<String, UnsupportedRuntime> {
    let mut text = String::new();
    for registry in registries {
        let (host, path) = (&registry.host, registry.path_name(runtime)?);
        let _ = writeln!(text, "[[registry]]\nprefix = \"{host}\"\nlocation = \"{host}\"");
        let _ = writeln!(text, "[[registry.mirror]]\nlocation = \"{}/{path}\"", mirror.host());
        if mirror.is_plain() {
            let _ = writeln!(text, "insecure = true");
        }
    }
    Ok(text)
}

/// kind.sigs.k8s.io, "Configuration": patches of containerd's configuration, and a directory of the host mounted in the
/// nodes.
fn kind() -> String {
    "kind: Cluster
apiVersion: kind.x-k8s.io/v1alpha4
containerdConfigPatches:
  - |-
    [plugins.\"io.containerd.grpc.v1.cri\".registry]
      config_path = \"/etc/containerd/certs.d\"
nodes:
  - role: control-plane
    extraMounts:
      - hostPath: certs.d
        containerPath: /etc/containerd/certs.d
"
    .to_owned()
}

/// docs.k3s.io and docs.rke2.io, "Private Registry Configuration".
fn rancher(mirror: &Mirror, registries: &[NamedRegistry]) -> String {
    let mut text = "mirrors:\n".to_owned();
    for registry in registries {
        let _ = writeln!(text, "  \"{}\":\n    endpoint:\n      - \"{mirror}\"", registry.host);
    }
    text
}

/// docs.siderolabs.com, "machine.registries.mirrors".
fn talos(mirror: &Mirror, registries: &[NamedRegistry]) -> String {
    let mut text = "machine:\n  registries:\n    mirrors:\n".to_owned();
    for registry in registries {
        let _ = writeln!(text, "      \"{}\":\n        endpoints:\n          - {mirror}", registry.host);
    }
    text
}

/// bottlerocket.dev, "settings.container-registry.mirrors".
fn bottlerocket(mirror: &Mirror, registries: &[NamedRegistry]) -> String {
    let mut text = String::new();
    for registry in registries {
        let host = &registry.host;
        let _ =
            writeln!(text, "[[settings.container-registry.mirrors]]\nregistry = \"{host}\"\nendpoint = [\"{mirror}\"]");
    }
    text
}

/// docs.cloud.google.com, "Customize containerd configuration in GKE nodes".
fn gke(mirror: &Mirror, registries: &[NamedRegistry]) -> String {
    let mut text = "registryHosts:\n".to_owned();
    for registry in registries {
        let _ = writeln!(
            text,
            "  - server: \"{}\"\n    hosts:\n      - host: \"{mirror}\"\n        capabilities:\n          \
             - HOST_CAPABILITY_PULL\n          - HOST_CAPABILITY_RESOLVE\n        dialTimeout: \"1s\"",
            registry.host
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mirror() -> Mirror {
        "http://127.0.0.1:5050".parse().unwrap()
    }

    fn named(texts: &[&str]) -> Vec<NamedRegistry> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn document_of_each_runtime_has_mirror_and_instructions() {
        for runtime in ALL {
            assert_eq!(runtime.as_str().parse(), Ok(runtime));
            let document = runtime.document(&mirror(), &[]).unwrap();
            assert!(document.text.ends_with('\n') && !document.instructions.is_empty());
            let output = document.text + &document.instructions.concat();
            assert!(output.contains(mirror().host()), "{output}");
            assert!(!output.contains("MIRROR") && !output.contains("REGISTRIES"), "{output}");
        }
        assert!("dockr".parse::<Runtime>().unwrap_err().contains("docker, buildkit"));
        assert!("containerd".parse::<Runtime>().unwrap_err().contains("dray containerd install"));
    }

    #[test]
    fn wildcard_is_used_by_runtimes_that_support_it() {
        for runtime in [Runtime::K3s, Runtime::Rke2, Runtime::Talos, Runtime::Bottlerocket] {
            assert!(runtime.document(&mirror(), &[]).unwrap().text.contains("\"*\""), "{runtime:?}");
        }
        for runtime in [Runtime::Buildkit, Runtime::Podman, Runtime::Gke] {
            let text = runtime.document(&mirror(), &[]).unwrap().text;
            assert!(PUBLIC_REGISTRIES.iter().all(|host| text.contains(host)) && !text.contains('*'), "{text}");
        }
    }

    #[test]
    fn registry_with_port_needs_alias_in_paths() {
        let ported = named(&["reg.corp:5000"]);
        let error = Runtime::Podman.document(&mirror(), &ported).unwrap_err().to_string();
        assert!(error.contains("--registry reg.corp:5000=ALIAS"), "{error}");
        let text = Runtime::Crio.document(&mirror(), &named(&["reg.corp:5000=corp"])).unwrap().text;
        assert!(text.contains("prefix = \"reg.corp:5000\"") && text.contains("127.0.0.1:5050/corp\""), "{text}");
        assert!(Runtime::K3s.document(&mirror(), &ported).unwrap().text.contains("\"reg.corp:5000\":"));
        let error = Runtime::Docker.document(&mirror(), &named(&["ghcr.io"])).unwrap_err().to_string();
        assert!(error.contains("127.0.0.1:5050/ghcr.io"), "{error}");
        let kind = Runtime::Kind.document(&mirror(), &ported).unwrap().instructions.concat();
        assert!(kind.contains("--mirror http://127.0.0.1:5050 --registry reg.corp:5000"), "{kind}");
        for wrong in ["", "a b", "\"x\"", "a.io=", "a.io=x/y", "a.io=X"] {
            assert!(wrong.parse::<NamedRegistry>().unwrap_err().contains("not a valid registry"));
        }
    }

    #[test]
    fn https_mirror_is_not_marked_insecure() {
        let mirror = "https://dray.corp".parse().unwrap();
        for runtime in [Runtime::Buildkit, Runtime::Podman] {
            let text = runtime.document(&mirror, &[]).unwrap().text;
            assert!(!text.contains("insecure") && !text.contains("http = true"), "{text}");
        }
    }
}
