//! The packages of a release: their content, and an operator's way from the installation to the removal.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use dray_tests::cluster::unavailable;
use dray_tests::dray::binary;
use dray_tests::host::run_on_host;
use dray_tests::http::get;
use dray_tests::packages::make_packages;
use dray_tests::process::{output, run};
use dray_tests::registry::Registry;
use dray_tests::{project, tool};

const RUN: &str = r#"
ready() { curl --retry 20 --retry-connrefused --retry-delay 1 -sSf http://127.0.0.1:5051/readyz; }
work() {
    ready
    [ "$(stat --format %U /var/cache/dray)" = dray ]
    dray containerd install --patch-config --mirror http://127.0.0.1:5050
    systemctl restart containerd
    pull "$1"
    dray status | grep -q library/alpine
}
gone() { for path in "$@"; do [ ! -e "$path" ] || { echo "$path is left"; exit 1; }; done; }

dpkg --install "$STEPS"/dray-0.1.0-linux-amd64.deb
work one
[ -s /usr/share/man/man1/dray-warm.1.gz ] && [ -s /usr/share/bash-completion/completions/dray ]
echo '# edited' >> /etc/dray/dray.toml
before=$(cat /run/dray.pid)
dpkg --install "$STEPS"/dray-0.1.1-linux-amd64.deb
[ "$(cat /run/dray.pid)" != "$before" ]
ready
tail -n 1 /etc/dray/dray.toml
dpkg --remove dray
gone /usr/bin/dray /run/dray.pid /etc/containerd/certs.d/_default/hosts.toml
dpkg --install "$STEPS"/dray-0.1.1-linux-amd64.deb
ready
tail -n 1 /etc/dray/dray.toml
dpkg --purge dray
gone /etc/dray /var/cache/dray
if id dray 2>/dev/null; then exit 1; fi
cmp /etc/containerd/config.toml "$HOST/config.toml"
echo "deb: done"

rpm --install --nodeps "$STEPS"/dray-0.1.0-linux-amd64.rpm
gone /run/dray.pid
systemctl enable --now dray
work two
echo '# edited' >> /etc/dray/dray.toml
rpm --upgrade --nodeps "$STEPS"/dray-0.1.1-linux-amd64.rpm
ready
tail -n 1 /etc/dray/dray.toml
rpm --erase dray
gone /usr/bin/dray /run/dray.pid /etc/containerd/certs.d/_default/hosts.toml
echo "rpm: done"
"#;

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(dir).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    files
}

#[tokio::test(flavor = "multi_thread")]
async fn packages_are_installed_upgraded_and_removed() {
    if let Some(reason) = unavailable() {
        return eprintln!("skipped: {reason}");
    }
    let dir = tempfile::tempdir().unwrap();
    make_packages("0.1.0", dir.path());
    make_packages("0.1.1", dir.path());
    fs::write(dir.path().join("run"), RUN).unwrap();
    let printed = run_on_host(dir.path()).await;
    assert_eq!(printed.matches("# edited\n").count(), 3, "{printed}");
    assert!(printed.contains("deb: done") && printed.ends_with("rpm: done\n"), "{printed}");
}

#[test]
fn same_sources_make_the_same_packages() {
    let [first, second] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    make_packages("0.1.0", first.path());
    make_packages("0.1.0", second.path());
    let names = ["deb", "rpm", "tar.gz"].map(|kind| first.path().join(format!("dray-0.1.0-linux-amd64.{kind}")));
    assert_eq!(files(first.path()), names);
    for (first, second) in files(first.path()).iter().zip(files(second.path())) {
        assert!(fs::read(first).unwrap() == fs::read(second).unwrap(), "{} differs", first.display());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn image_and_chart_are_pushed_to_a_registry() {
    let (registry, dir) = (Registry::open().await, tempfile::tempdir().unwrap());
    let archive = |parent: &str, name: &str, file: &str| {
        let mut command = Command::new(project().join("release/archive.sh"));
        run(command.arg(project().join(parent)).arg(name).arg(dir.path().join(file)));
    };
    archive("target/tests/image/oci", ".", "dray-0.1.0-image.tar");
    archive("k8s", "dray", "dray-chart-0.1.0.tgz");
    let sums = run(Command::new("sh").args(["-c", "sha256sum -- *"]).current_dir(dir.path()));
    fs::write(dir.path().join("SHA256SUMS"), sums).unwrap();
    let host = registry.url().replace("http://", "");
    let publish = || {
        let mut command = Command::new(project().join("release/publish.sh"));
        command.arg(dir.path()).args(["0.1.0", &format!("{host}/team")]).env("PLAIN_HTTP", "1");
        command
    };
    run(&mut publish());
    for name in ["dray", "charts/dray"] {
        let tags = get(&format!("{}/v2/team/{name}/tags/list", registry.url()), &[]).await;
        assert!(tags.text().contains("\"0.1.0\""), "{name}: {}", tags.text());
    }
    fs::write(dir.path().join("dray-chart-0.1.0.tgz"), "changed").unwrap();
    assert!(!output(&mut publish()).status.success(), "a file does not have its checksum");
}

#[test]
fn checksums_are_signed() {
    let dir = tempfile::tempdir().unwrap();
    let [secret, public] = ["secret", "public"].map(|name| dir.path().join(name));
    fs::write(dir.path().join("SHA256SUMS"), "0  file\n").unwrap();
    let minisign = || {
        let mut command = Command::new(tool("minisign"));
        command.current_dir(dir.path());
        command
    };
    run(minisign().args(["-G", "-W", "-s"]).arg(&secret).arg("-p").arg(&public));
    run(Command::new(project().join("release/sign.sh")).arg(dir.path()).arg("0.1.0").env("DRAY_SIGNING_KEY", &secret));
    let verified = || output(minisign().args(["-V", "-m", "SHA256SUMS", "-p"]).arg(&public)).status.success();
    assert!(verified());
    fs::write(dir.path().join("SHA256SUMS"), "1  file\n").unwrap();
    assert!(!verified(), "another file");
}

#[test]
fn service_is_hardened() {
    let unit = project().join("config/dray.service");
    let checked = output(
        Command::new("systemd-analyze").args(["security", "--offline=true", "--no-pager", "--threshold=25"]).arg(unit),
    );
    let printed = String::from_utf8_lossy(&checked.stdout);
    assert!(checked.status.success() && printed.contains("Overall exposure level"), "{printed}");
}

#[test]
fn version_tells_how_the_program_was_built() {
    let printed = run(Command::new(binary()).arg("--version"));
    let names: Vec<&str> = printed.lines().filter_map(|line| Some(line.split_once(": ")?.0)).collect();
    assert!(printed.starts_with("dray 0.1.0\n"), "{printed}");
    assert_eq!(names, ["commit", "architecture", "features"]);
}

#[test]
fn release_refuses_other_versions() {
    let dir = tempfile::tempdir().unwrap();
    let refused = output(Command::new(project().join("release/make.sh")).arg("9.9.9").arg(dir.path()));
    let printed = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && printed.contains("Cargo.toml has another version than 9.9.9"), "{printed}");
}
