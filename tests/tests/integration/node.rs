//! The image, and the chart's pods, run as a node runs them.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use dray_tests::chart::{Value, documents, of_kind, render};
use dray_tests::containerd::{Containerd, Version};
use dray_tests::dray::rule;
use dray_tests::eventually;
use dray_tests::image::Image;
use dray_tests::node::{self, Node, tree};
use dray_tests::process::{Process, free_port, output};
use dray_tests::registry::Registry;
use rustix::process::Signal;

/// containerd's hosts directories in the chart's values files.
const HOSTS_DIRS: [&str; 3] =
    ["/etc/containerd/certs.d", "/var/lib/rancher/k3s/agent/etc/containerd/certs.d", "/etc/cri/conf.d/hosts"];

const FOREIGN: &str = "server = \"https://x\"\n\n[host.\"https://a\"]\n";

#[test]
fn image_is_small_and_runs_as_non_root() {
    let (config, size) = node::image();
    assert!(size <= 20_000_000, "{size} bytes");
    assert_eq!(config["config"]["User"], "65532:65532");
    assert_eq!(config["config"]["Entrypoint"], serde_json::json!(["/dray"]));
    assert_eq!(config["os"], "linux");
    let node = Node::new();
    let pod: Value = serde_yaml_ng::from_str("{spec: {}}").unwrap();
    let container: Value =
        serde_yaml_ng::from_str("{args: [--version], securityContext: {runAsUser: 65532, runAsGroup: 65532}}").unwrap();
    let version = output(&mut node.command(&[], &pod, &container));
    assert!(version.stdout.starts_with(b"dray 0."), "{version:?}");
}

/// Each crate in its built version, with a licence.
#[test]
fn image_contains_its_bill_of_materials() {
    let text = std::fs::read(Node::new().in_image("/usr/share/sbom/dray.cdx.json")).unwrap();
    let bom: serde_json::Value = serde_json::from_slice(&text).unwrap();
    assert_eq!((&bom["bomFormat"], &bom["metadata"]["component"]["name"]), (&"CycloneDX".into(), &"dray".into()));
    let components = bom["components"].as_array().unwrap();
    let lock = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.lock")).unwrap();
    for component in components {
        let (name, version) = (component["name"].as_str().unwrap(), component["version"].as_str().unwrap());
        assert!(lock.contains(&format!("name = \"{name}\"\nversion = \"{version}\"\n")), "{name} {version}");
        assert!(component["licenses"][0].is_object(), "{name} without a licence");
    }
    for needed in ["pingora", "reqwest", "rustls", "foyer"] {
        assert!(components.iter().any(|component| component["name"] == needed), "{needed}");
    }
    assert!(
        !String::from_utf8(text).unwrap().contains(&std::env::temp_dir().display().to_string()),
        "the image contains no build paths"
    );
}

/// A rendered chart and the node that its pods run on.
struct Cluster {
    node: Node,
    documents: Vec<Value>,
    registry: u16,
}

impl Cluster {
    fn new(hosts_dir: &str, mode: &str, config: &str) -> Self {
        let ports = [free_port(), free_port(), free_port()];
        let values = serde_yaml_ng::to_string(&serde_json::json!({
            "mode": mode,
            "containerd": { "hostsDir": hosts_dir },
            "exposure": { "port": ports[0], "mirror": format!("http://127.0.0.1:{}", ports[0]) },
            "metrics": { "port": ports[1] },
            "peers": { "port": ports[2] },
            "cache": { "disk": "1GiB" },
            "extraConfig": config,
        }));
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("values.yaml");
        std::fs::write(&file, values.unwrap()).unwrap();
        let documents = documents(&render(&["--values", file.to_str().unwrap()]).unwrap());
        Self { node: Node::new(), documents, registry: ports[0] }
    }

    fn pod(&self, name: &str) -> &Value {
        let found = of_kind(&self.documents, "DaemonSet").into_iter().find(|set| set["metadata"]["name"] == name);
        &found.unwrap()["spec"]["template"]
    }

    fn command(&self, pod: &Value, container: &Value) -> Command {
        self.node.command(&self.documents, pod, container)
    }

    /// Runs a pod's init containers to their end, then its container.
    fn start(&self, name: &str) -> Process {
        let pod = self.pod(name);
        for container in pod["spec"]["initContainers"].as_sequence().into_iter().flatten() {
            let ended = output(&mut self.command(pod, container));
            assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
        }
        Process::spawn(&mut self.command(pod, &pod["spec"]["containers"][0]))
    }
}

fn names_mirror(file: &Path, port: u16) -> bool {
    std::fs::read_to_string(file).is_ok_and(|text| text.contains(&format!("[host.\"http://127.0.0.1:{port}\"]")))
}

#[tokio::test(flavor = "multi_thread")]
async fn daemonset_configures_mirror_and_restores_the_node() {
    let hub = Registry::open().await;
    hub.push("library/app", "1", &Image::new(1, &[3_000_000, 1_000])).await;
    for (nth, hosts_dir) in HOSTS_DIRS.into_iter().enumerate() {
        let cluster = Cluster::new(hosts_dir, "daemonset", &rule("docker.io", &hub.url()));
        let dir = cluster.node.path(hosts_dir);
        std::fs::create_dir_all(&dir).unwrap();
        // One node already has a `_default` directory.
        if nth == 1 {
            std::fs::create_dir(dir.join("_default")).unwrap();
            std::fs::write(dir.join("_default/hosts.toml"), FOREIGN).unwrap();
            // And the directory of a registry that only root can read, as k3s creates it.
            std::fs::create_dir(dir.join("ghcr.io")).unwrap();
            std::fs::write(dir.join("ghcr.io/hosts.toml"), FOREIGN).unwrap();
            std::fs::set_permissions(dir.join("ghcr.io"), PermissionsExt::from_mode(0o700)).unwrap();
        }
        let before = tree(&dir);
        let file = dir.join("_default/hosts.toml");
        let mut dray = cluster.start("dray");
        let port = cluster.registry;
        eventually("the mirror is configured", async || names_mirror(&file, port).then_some(())).await;
        if nth == 0 {
            let containerd = Containerd::start(Version::V2).await;
            std::fs::remove_dir(containerd.hosts_dir()).unwrap();
            std::os::unix::fs::symlink(&dir, containerd.hosts_dir()).unwrap();
            containerd.pull("docker.io/library/app:1").unwrap_or_else(|e| panic!("{e}\n{}", containerd.log()));
        }
        // A killed dray does not revert the file; the next one takes over.
        dray.kill();
        assert!(names_mirror(&file, port));
        let mut dray = cluster.start("dray");
        eventually("dray listens again", async || std::net::TcpStream::connect(("127.0.0.1", port)).ok()).await;
        if nth == 2 {
            dray.kill();
        } else {
            dray.signal(Signal::TERM);
            dray.wait();
            assert!(!names_mirror(&file, port), "the mirror is removed");
        }
        // The cleanup that helm runs on every node after the removal.
        let _cleanup = cluster.start("dray-cleanup");
        eventually("the node is restored", async || (tree(&dir) == before).then_some(())).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn deployment_mirror_is_configured_while_it_responds() {
    let cluster = Cluster::new("/etc/containerd/certs.d", "deployment", "");
    let dir = cluster.node.path("/etc/containerd/certs.d");
    std::fs::create_dir_all(&dir).unwrap();
    let before = tree(&dir);
    let file = dir.join("_default/hosts.toml");
    let port = cluster.registry;
    let mut keeper = cluster.start("dray-node");
    let start = dray_tests::dray::Start::new("");
    let mut shared = Command::new(dray_tests::dray::binary());
    shared.args(["--listen", &format!("127.0.0.1:{port}"), "--admin", "127.0.0.1:0", "--cache-dir"]);
    shared.arg(start.cache_dir()).env("DRAY_LOG", "error").stdout(std::process::Stdio::null());
    let mut dray = Process::spawn(&mut shared);
    eventually("the mirror is configured", async || names_mirror(&file, port).then_some(())).await;
    dray.kill();
    eventually("the dead mirror is removed", async || (!names_mirror(&file, port)).then_some(())).await;
    let _dray = Process::spawn(&mut shared);
    eventually("the mirror is configured again", async || names_mirror(&file, port).then_some(())).await;
    keeper.signal(Signal::TERM);
    keeper.wait();
    assert!(!names_mirror(&file, port));
    let _cleanup = cluster.start("dray-cleanup");
    eventually("the node is restored", async || (tree(&dir) == before).then_some(())).await;
}
