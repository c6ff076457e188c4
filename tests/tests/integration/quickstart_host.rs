//! The commands of the README and of docs/quickstart-host.md, as written, from the installation to the removal, with a real
//! containerd.

use dray_tests::cluster::unavailable;
use dray_tests::documents::{Step, write_steps};
use dray_tests::host::run_on_host;
use dray_tests::packages::make_packages;

const STEPS: [Step; 7] = [
    ("install", "## Install from source", 0),
    ("verify", "## Verify", 0),
    ("containerd", "### containerd (nerdctl, Kubernetes)", 0),
    ("patch-config", "### containerd (nerdctl, Kubernetes)", 1),
    ("configure", "## Configuration", 0),
    ("bypass", "## Emergency bypass", 0),
    ("remove", "## Remove", 0),
];

/// The order of an operator, with what has to be true between the steps.
const RUN: &str = r#"
step install
step verify
if step containerd; then echo "check must fail: config_path is not set"; exit 1; fi
step patch-config
dray containerd check
pull one
dray status | grep "library/alpine" | grep -c "disk\|memory\|upstream"
kill "$(cat /run/registry.pid)"
pull two
echo "pulled without the registry"
step configure
curl --retry 5 --retry-connrefused -sSf http://127.0.0.1:5051/readyz
grep -q 'disk = "50GiB"' /etc/dray/dray.toml
pull three
step bypass
[ ! -e /etc/containerd/certs.d/_default/hosts.toml ]
if pull four; then echo "the pull must go to the registry, which is off"; exit 1; fi
step remove
cmp /etc/containerd/config.toml "$HOST/config.toml"
for gone in /usr/local/bin/dray /var/cache/dray /etc/dray /etc/systemd/system/dray.service; do [ ! -e $gone ]; done
if id dray 2>/dev/null; then exit 1; fi
echo "removed"
"#;

/// Runs blocks of a page in the order of a script, on a host of its own. Returns what they printed.
async fn run_as_written(page: &str, steps: &[Step], script: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    make_packages("0.1.0", folder.path());
    write_steps(page, steps, folder.path());
    std::fs::write(folder.path().join("run"), script).unwrap();
    run_on_host(folder.path()).await
}

/// The sources of the responses, as curl printed them.
fn sources(printed: &str) -> Vec<String> {
    let lines = printed.lines().map(str::to_lowercase);
    lines.filter_map(|line| Some(line.strip_prefix("x-dray-source: ")?.trim_end().to_owned())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn quick_start_on_one_host_works_as_written() {
    if let Some(reason) = unavailable() {
        return eprintln!("skipped: {reason}");
    }
    let printed = run_as_written("docs/quickstart-host.md", &STEPS, RUN).await;
    assert_eq!(sources(&printed), ["upstream", "memory"]);
    assert!(printed.contains("pulled without the registry") && printed.ends_with("removed\n"), "{printed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_of_the_readme_work_as_written() {
    if let Some(reason) = unavailable() {
        return eprintln!("skipped: {reason}");
    }
    let heading = "## Quick start on one host";
    let script = "cp \"$STEPS\"/*.deb .\nstep package\ndpkg --purge dray\nstep host\n";
    let printed = run_as_written("README.md", &[("package", heading, 0), ("host", heading, 1)], script).await;
    assert_eq!(sources(&printed), ["upstream", "upstream"]);
}
