//! The commands of the README and of docs/quickstart-kubernetes.md, as written, from the image to the removal, on a real cluster.

use std::process::Command;

use dray_tests::documents::{Step, write_steps};
use dray_tests::kubernetes::Kubernetes;
use dray_tests::node::image_directory;
use dray_tests::process::output;
use dray_tests::project;

const STEPS: [Step; 9] = [
    ("image", "## Install", 0),
    ("namespace", "## Install", 1),
    ("values", "## Install", 2),
    ("install", "## Install", 3),
    ("test", "## Verify with two pods", 0),
    ("problems", "## Verify with two pods", 1),
    ("pods", "## Verify with two pods", 2),
    ("status", "## Verify with two pods", 3),
    ("remove", "## Remove", 0),
];

const README_STEPS: [Step; 2] =
    [("readme-install", "## Quick start on Kubernetes", 0), ("readme-verify", "## Quick start on Kubernetes", 1)];

/// The order of an operator, with what has to be true between the steps. Only dray can reach the registry of the image.
const RUN: &str = r#"
step() { echo "== $1"; timeout 150 sh -eu "$DIR/steps/$1" || { echo "step $1: status $?" >&2; return 1; }; }
until_true() { for _ in $(seq 600); do ! eval "$1" || return 0; sleep 0.1; done; echo "still false: $1" >&2; return 1; }
cd "$DIR/source"
PATH=$DIR/shims:$PATH

step image
step namespace
step values
printf '%s\n' 'extraConfig: |' '  [[registry]]' '  match = "docker.io"' '  upstreams = ["http://192.0.2.2:5000"]' >> dray-values.yaml
mirror=/etc/containerd/certs.d/_default/hosts.toml
step install
until_true '[ -e $mirror ]'
step test
if step problems 2>/dev/null; then exit 1; fi
step pods
kubectl wait --for jsonpath='{.status.phase}=Succeeded' pods --selector app=dray-check --timeout 60s
step status
kubectl delete pods --selector app=dray-check
kubectl label node node1 dray=off
until_true '[ ! -e $mirror ]'
kubectl label node node1 dray-
until_true '[ -e $mirror ]'
step remove
[ -z "$(ls /etc/containerd/certs.d)" ]
[ -z "$(ls /var/cache/dray)" ]
rm -r target
step readme-install
step readme-verify
helm uninstall dray --namespace dray
[ -z "$(ls /etc/containerd/certs.d)" ]
echo removed
"#;

/// Builds nothing: the image is there.
const MAKE: &str = "#!/bin/sh\n[ \"$*\" = image ] && mkdir -p target/image && cp -r \"$IMAGE\" target/image/oci\n";

#[tokio::test(flavor = "multi_thread")]
async fn quick_start_on_kubernetes_works_as_written() {
    let cluster = Kubernetes::start();
    for folder in ["steps", "source", "shims"] {
        std::fs::create_dir(cluster.path(folder)).unwrap();
    }
    write_steps("docs/quickstart-kubernetes.md", &STEPS, &cluster.path("steps"));
    write_steps("README.md", &README_STEPS, &cluster.path("steps"));
    std::os::unix::fs::symlink(project().join("k8s"), cluster.path("source/k8s")).unwrap();
    let make = cluster.path("shims/make");
    std::fs::write(&make, MAKE).unwrap();
    dray_tests::process::run(Command::new("chmod").arg("+x").arg(make));
    cluster.push("library/busybox:musl");
    let done = output(cluster.shell(RUN).env("DIR", cluster.path("")).env("IMAGE", image_directory()));
    let [printed, errors] = [done.stdout, done.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(done.status.success(), "{printed}\n{errors}\n{}", cluster.events());
    assert!(printed.ends_with("removed\n"), "{printed}");
    let status = printed.split("== status\n").nth(1).unwrap();
    let blobs = status.lines().filter(|line| line.contains("library/busybox") && line.contains("upstream"));
    assert!(blobs.count() > 0, "{status}");
}
