//! The chart on a real cluster: installed, upgraded, rolled back and uninstalled.

use std::path::Path;

use dray_tests::chart::{Value, k8s_dir};
use dray_tests::documents::{blocks, text};
use dray_tests::dray::previous_chart;
use dray_tests::eventually;
use dray_tests::kubernetes::Kubernetes;
use dray_tests::node::tree;

/// Writes values for this cluster to a file.
fn values(cluster: &Kubernetes, more: &str) -> String {
    let file = cluster.path(&format!("values-{}.yaml", fastrand::u32(..)));
    let dir = cluster.path("");
    let text = format!(
        "image: {{ repository: 127.0.0.1:5000/dray, tag: test }}\n\
         containerd: {{ hostsDir: {dir}certs.d, configFile: {dir}containerd.toml, cleanupSeconds: 15 }}\n\
         cache: {{ hostPath: {dir}cache, disk: 1GiB }}\n\
         extraConfig: |\n  [[registry]]\n  match = \"docker.io\"\n  upstreams = [\"http://192.0.2.2:5000\"]\n{more}",
        dir = dir.display(),
    );
    std::fs::write(&file, text).unwrap();
    file.to_str().unwrap().to_owned()
}

fn has_mirror(hosts_dir: &Path, mirror: &str) -> bool {
    let file = std::fs::read_to_string(hosts_dir.join("_default/hosts.toml"));
    file.is_ok_and(|text| text.contains(&format!("[host.\"{mirror}\"]")))
}

/// Runs a pod with a new image of Docker Hub, which only dray can reach.
fn pull_new_image(cluster: &Kubernetes) {
    let name = format!("app-{}", fastrand::u32(..));
    cluster.push(&format!("library/{name}:1"));
    cluster.run_pod(&name, &format!("docker.io/library/{name}:1"));
}

/// Runs the example of docs/kubernetes/ci-runners.md, which has a dray beside its builder. The builder does nothing in
/// this test.
fn run_ci_runner_example(cluster: &Kubernetes) {
    let page = text("docs/kubernetes/ci-runners.md");
    let example = blocks(page.split("## A dray beside the builder").nth(1).unwrap(), "yaml").swap_remove(0);
    let example = example.replace("registry.corp/dray:0.1.0", "127.0.0.1:5000/dray:test");
    let mut pod: Value =
        serde_yaml_ng::from_str(&example.replace("moby/buildkit:rootless", "127.0.0.1:5000/pause:1")).unwrap();
    pod["apiVersion"] = "v1".into();
    pod["kind"] = "Pod".into();
    pod["metadata"] = serde_yaml_ng::from_str("{ name: runner }").unwrap();
    pod["spec"]["terminationGracePeriodSeconds"] = 1.into();
    let file = cluster.path("runner.json");
    std::fs::write(&file, serde_json::to_string(&pod).unwrap()).unwrap();
    for arguments in [
        &["create", "configmap", "buildkitd", "--from-literal", "buildkitd.toml="][..],
        &["apply", "--filename", file.to_str().unwrap()],
        &["wait", "--for", "condition=Ready", "pod/runner", "--timeout", "60s"],
        &["delete", "pod", "runner"],
    ] {
        let done = cluster.kubectl(arguments);
        assert!(done.status.success(), "{done:?}\n{}", cluster.events());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cluster_is_configured_by_helm_and_left_as_it_was() {
    let cluster = Kubernetes::start();
    let hosts_dir = cluster.hosts_dir();
    std::fs::create_dir(hosts_dir.join("example.com")).unwrap();
    std::fs::write(hosts_dir.join("example.com/hosts.toml"), "server = \"https://example.com\"\n").unwrap();
    let before = tree(&hosts_dir);
    let chart = k8s_dir().join("dray");
    let chart = chart.to_str().unwrap();

    // A dray on each node: installed from the previous commit's chart, upgraded to this one, and rolled back.
    let file = values(&cluster, "");
    let first = previous_chart().unwrap_or_else(|| chart.into());
    cluster.helm(&["install", "dray", first.to_str().unwrap(), "--create-namespace", "--values", &file, "--wait"]);
    let is_configured = async || has_mirror(&hosts_dir, "http://127.0.0.1:5050").then_some(());
    let rolled_out = || {
        let status =
            cluster.kubectl(&["rollout", "status", "daemonset/dray", "--namespace", "dray", "--timeout", "90s"]);
        assert!(status.status.success(), "{status:?}\n{}", cluster.events());
    };
    rolled_out();
    eventually("the dray on the node is configured as mirror", is_configured).await;
    pull_new_image(&cluster);
    for change in [&["upgrade", "dray", chart, "--values", &file, "--wait"][..], &["rollback", "dray", "1", "--wait"]] {
        cluster.helm(change);
        // During the rollout too, pulls succeed: while dray is down, containerd uses the registry.
        rolled_out();
        eventually("the dray on the node is configured as mirror", is_configured).await;
        pull_new_image(&cluster);
    }
    cluster.helm(&["uninstall", "dray", "--wait", "--timeout", "3m"]);
    assert_eq!(tree(&hosts_dir), before, "{}", cluster.events());

    run_ci_runner_example(&cluster);

    // Shared drays for all nodes, reached by a node port.
    let file = values(&cluster, "mode: deployment\nreplicaCount: 2\n");
    cluster.helm(&["install", "dray", chart, "--values", &file, "--wait"]);
    let is_configured = async || has_mirror(&hosts_dir, "http://127.0.0.1:30050").then_some(());
    eventually("the drays of the cluster are configured as mirror", is_configured).await;
    pull_new_image(&cluster);
    cluster.helm(&["uninstall", "dray", "--wait", "--timeout", "3m"]);
    assert_eq!(tree(&hosts_dir), before, "{}", cluster.events());
}
