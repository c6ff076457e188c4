//! The chart on a real cluster: installed, upgraded, rolled back, updated under load and uninstalled.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use dray_tests::chart::{Value, k8s_dir};
use dray_tests::documents::{blocks, text};
use dray_tests::dray::previous_chart;
use dray_tests::eventually;
use dray_tests::kubernetes::Kubernetes;
use dray_tests::node::tree;

/// Writes values for this cluster to a file.
fn values(cluster: &Kubernetes, more: &str) -> String {
    let file = cluster.path(&format!("values-{}.yaml", fastrand::u32(..)));
    let text = format!(
        "image: {{ repository: 127.0.0.1:5000/dray, tag: test }}\n\
         containerd: {{ configFile: /etc/containerd/config.toml, cleanupSeconds: 15 }}\n\
         extraConfig: |\n  [[registry]]\n  match = \"docker.io\"\n  upstreams = [\"http://192.0.2.2:5000\"]\n{more}"
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
        succeeds(cluster, arguments);
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
    let file = values(&cluster, "cache: { disk: 1GiB }\n");
    let first = previous_chart().unwrap_or_else(|| chart.into());
    cluster.helm(&["install", "dray", first.to_str().unwrap(), "--create-namespace", "--values", &file, "--wait"]);
    let is_configured = async || has_mirror(&hosts_dir, "http://127.0.0.1:5050").then_some(());
    let rolled_out = || {
        succeeds(&cluster, &["rollout", "status", "daemonset/dray", "--namespace", "dray", "--timeout", "90s"]);
    };
    for change in [
        &["upgrade", "dray", chart, "--values", &file, "--wait"][..],
        &["test", "dray"],
        &["rollback", "dray", "1", "--wait"],
    ] {
        rolled_out();
        eventually("the dray on the node is configured as mirror", is_configured).await;
        pull_new_image(&cluster);
        cluster.helm(change);
    }
    rolled_out();
    eventually("the dray on the node is configured as mirror", is_configured).await;
    pull_new_image(&cluster);
    cluster.helm(&["uninstall", "dray", "--wait", "--timeout", "3m"]);
    assert_eq!(tree(&hosts_dir), before, "{}", cluster.events());

    run_ci_runner_example(&cluster);

    // Shared drays for all nodes, reached by a node port.
    let file = values(&cluster, "mode: deployment\nreplicaCount: 2\ncache: { disk: 1GiB }\n");
    cluster.helm(&["install", "dray", chart, "--values", &file, "--wait"]);
    let is_configured = async || has_mirror(&hosts_dir, "http://127.0.0.1:30050").then_some(());
    eventually("the drays of the cluster are configured as mirror", is_configured).await;
    pull_new_image(&cluster);
    cluster.helm(&["test", "dray"]);
    cluster.helm(&["uninstall", "dray", "--wait", "--timeout", "3m"]);
    assert_eq!(tree(&hosts_dir), before, "{}", cluster.events());
}

/// Volumes for the pods of a StatefulSet, on the node's disk.
fn add_volumes(cluster: &Kubernetes, count: usize) {
    let mut manifest = String::from(
        "apiVersion: storage.k8s.io/v1\nkind: StorageClass\nmetadata: { name: local }\n\
         provisioner: kubernetes.io/no-provisioner\nvolumeBindingMode: WaitForFirstConsumer\n",
    );
    for nth in 0..count {
        let path = cluster.path(&format!("volumes/{nth}"));
        std::fs::create_dir(&path).unwrap();
        manifest += &format!(
            "---\napiVersion: v1\nkind: PersistentVolume\nmetadata: {{ name: volume-{nth} }}\n\
             spec:\n  capacity: {{ storage: 2Gi }}\n  accessModes: [ReadWriteOnce]\n  storageClassName: local\n  \
             local: {{ path: {path} }}\n  nodeAffinity: {{ required: {{ nodeSelectorTerms: [{{ matchExpressions: [\
             {{ key: kubernetes.io/hostname, operator: In, values: [node1] }}] }}] }} }}\n",
            path = path.display()
        );
    }
    let file = cluster.path("volumes.yaml");
    std::fs::write(&file, manifest).unwrap();
    succeeds(cluster, &["apply", "--filename", file.to_str().unwrap()]);
}

/// What kubectl prints.
fn succeeds(cluster: &Kubernetes, arguments: &[&str]) -> String {
    let done = cluster.kubectl(arguments);
    assert!(done.status.success(), "{done:?}\n{}", cluster.events());
    String::from_utf8(done.stdout).unwrap()
}

fn knows_three_peers(cluster: &Kubernetes, pod: &str) -> bool {
    let status = ["--namespace", "dray", "exec", pod, "--container", "dray", "--", "/dray", "status", "--json"];
    let status: serde_json::Value = serde_json::from_str(&succeeds(cluster, &status)).unwrap();
    status["peers"].as_array().unwrap().len() == 3
}

/// Requests every layer of an image through the node port, again and again, as runtimes on many nodes do. It ends when the
/// file `stop` exists, and then prints how many requests it sent. Those that failed are in the file `failed`.
const LOAD: &str = r#"
mirror=http://127.0.0.1:30050/v2/library/app count=0
accept="Accept: application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"
digests=$(curl -sSf -H "$accept" "$mirror/manifests/1?ns=docker.io" | grep -o 'sha256:[0-9a-f]*' | sort -u)
while [ ! -e "$DIR/stop" ]; do
    for digest in $digests; do
        curl -sSf -o /dev/null "$mirror/blobs/$digest?ns=docker.io" 2>> "$DIR/failed" || true
        count=$((count + 1))
    done
done
echo $count
"#;

#[tokio::test(flavor = "multi_thread")]
async fn rolling_update_of_a_statefulset_keeps_its_cache_and_fails_no_pull() {
    let cluster = Kubernetes::start();
    add_volumes(&cluster, 3);
    let chart = k8s_dir().join("dray");
    let file = values(
        &cluster,
        "mode: statefulset\ncache: { disk: 1GiB, volume: { storage: 2Gi, storageClassName: local } }\n",
    );
    let install = ["install", "dray", chart.to_str().unwrap(), "--create-namespace", "--values", &file, "--wait"];
    cluster.helm(&install);
    eventually("the pods know each other", async || {
        (0..3).all(|nth| knows_three_peers(&cluster, &format!("dray-{nth}"))).then_some(())
    })
    .await;
    let sizes: Vec<_> = (1..=10).map(|nth| nth * 500_000).collect();
    cluster.push_layers("library/app:1", &sizes);
    let whole = sizes.iter().sum::<usize>() as u64;
    let load = || cluster.shell(LOAD).env("DIR", cluster.path("")).stdout(Stdio::piped()).spawn().unwrap();
    let pods = || {
        let addresses = "jsonpath={.items[*].status.podIP}";
        let selector = "app.kubernetes.io/component=proxy";
        succeeds(&cluster, &["--namespace", "dray", "get", "pods", "--selector", selector, "--output", addresses])
    };
    let (before, empty) = (pods(), cluster.sent_by_registry());
    let loads = [load(), load(), load()];
    let is_cached = || (cluster.sent_by_registry() - empty >= whole).then_some(());
    eventually("every layer is downloaded", async || is_cached()).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let cached = cluster.sent_by_registry();
    assert!(cached - empty < whole * 11 / 10, "{} of {whole} bytes: each layer once", cached - empty);

    succeeds(&cluster, &["--namespace", "dray", "rollout", "restart", "statefulset/dray"]);
    succeeds(&cluster, &["--namespace", "dray", "rollout", "status", "statefulset/dray", "--timeout", "240s"]);
    tokio::time::sleep(Duration::from_secs(2)).await;
    std::fs::write(cluster.path("stop"), "").unwrap();
    let sent = loads.map(|load| String::from_utf8(load.wait_with_output().unwrap().stdout).unwrap());
    let requests: u32 = sent.iter().map(|count| count.trim().parse::<u32>().unwrap()).sum();
    let failed = std::fs::read_to_string(cluster.path("failed")).unwrap();
    eprintln!("{requests} requests, {} bytes again", cluster.sent_by_registry() - cached);
    assert_eq!(failed, "", "of {requests} requests");
    let again = cluster.sent_by_registry() - cached;
    assert!(again * 50 <= whole, "{again} of {whole} bytes were downloaded again");
    let after = pods();
    let kept: Vec<_> = before.split(' ').filter(|address| after.split(' ').any(|other| other == *address)).collect();
    assert!(kept.is_empty() && after.split(' ').count() == 3, "the pods are others: {before}, {after}");

    cluster.helm(&["test", "dray"]);
    cluster.helm(&["uninstall", "dray", "--wait", "--timeout", "3m"]);
    let claims = || succeeds(&cluster, &["--namespace", "dray", "get", "persistentvolumeclaims", "--output", "name"]);
    eventually("the volumes are released", async || claims().is_empty().then_some(())).await;
}
