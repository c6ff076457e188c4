//! Real clients pull real images of several registries; the second time with every registry off.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use dray_tests::containerd::{Containerd, Version};
use dray_tests::dray::{Dray, Start, binary, rule};
use dray_tests::eventually;
use dray_tests::image::Image;
use dray_tests::process::{Process, output, run};
use dray_tests::registry::Registry;
use dray_tests::tool;
use dray_tests::upstream::{Fault, TestUpstream};

/// Two registries and a dray with a rule for each.
struct Rig {
    hub: Registry,
    quay: Registry,
    dray: Dray,
}

const LAYERS: [usize; 3] = [3_000_000, 300_000, 1_000];

impl Rig {
    async fn new() -> Self {
        let (hub, quay) = (Registry::open().await, Registry::open().await);
        hub.push("library/app", "1", &Image::new(1, &LAYERS)).await;
        quay.push("team/app", "1", &Image::new(2, &LAYERS)).await;
        let rules = [rule("docker.io", &hub.url()), rule("quay.io", &quay.url())].concat();
        let dray = Start::new(rules).run();
        Self { hub, quay, dray }
    }

    fn switch_registries_off(&mut self) {
        self.hub.stop();
        self.quay.stop();
    }

    /// A registries.conf with dray as the mirror of both registries, as dray prints it.
    fn registries_conf(&self, dir: &Path) -> PathBuf {
        self.file_of(&["podman", "--registry", "docker.io", "--registry", "quay.io"], dir)
    }

    /// Writes the output of `dray runtime-config` to a file.
    fn file_of(&self, arguments: &[&str], dir: &Path) -> PathBuf {
        let mut command = Command::new(binary());
        command.arg("runtime-config").args(arguments).args(["--mirror", &self.dray.url("")]);
        let file = dir.join(arguments[0]);
        std::fs::write(&file, run(&mut command)).expect("written");
        file
    }
}

async fn containerd_pulls(version: Version) {
    let mut rig = Rig::new().await;
    let containerd = Containerd::start(version).await;
    containerd.use_mirror(&rig.dray);
    let images = ["docker.io/library/app:1", "quay.io/team/app:1"];
    for image in images {
        containerd.pull(image).unwrap_or_else(|e| panic!("{image}: {e}\n{}", containerd.log()));
    }
    if version == Version::V2 {
        // Layers are requested in ranges, several at a time.
        let mut parts = 0;
        for source in ["upstream", "disk", "memory"] {
            let name = format!("dray_requests_total{{route=\"blob\",source=\"{source}\",status=\"206\"}}");
            parts += rig.dray.metric(&name).await;
        }
        assert!(parts > 8, "{parts} ranges");
    }
    rig.switch_registries_off();
    // A node without any image.
    let fresh = Containerd::start(version).await;
    fresh.use_mirror(&rig.dray);
    for image in images {
        fresh.pull(image).unwrap_or_else(|e| panic!("{image} with its registry off: {e}"));
    }
    run(Command::new(binary()).args(["containerd", "uninstall", "--hosts-dir"]).arg(containerd.hosts_dir()));
    assert_eq!(std::fs::read_dir(containerd.hosts_dir()).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn containerd_1_pulls_with_registries_off() {
    containerd_pulls(Version::V1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn containerd_2_parallel_fetch_pulls_with_registries_off() {
    containerd_pulls(Version::V2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn skopeo_pulls_by_mirror_and_by_url() {
    let mut rig = Rig::new().await;
    let dir = tempfile::tempdir().unwrap();
    let conf = rig.registries_conf(dir.path());
    for round in ["first", "off"] {
        for image in ["docker.io/library/app:1", "quay.io/team/app:1"] {
            let target = format!("dir:{}/{round}-{}", dir.path().display(), image.replace(['/', ':'], "-"));
            run(Command::new("skopeo").arg("--registries-conf").arg(&conf).args([
                "copy",
                "--all",
                "--insecure-policy",
                &format!("docker://{image}"),
                &target,
            ]));
        }
        rig.switch_registries_off();
    }
    // Docker's URL style, and images without `library/`.
    for name in ["docker.io/library/app:1", "docker.io/app:1", "library/app:1", "app:1"] {
        let image = format!("docker://{}/{name}", rig.dray.registry);
        let shown = run(Command::new("skopeo").args(["inspect", "--raw", "--tls-verify=false", &image]));
        assert_eq!(shown.as_bytes(), Image::new(1, &LAYERS).index(), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn buildah_pulls_by_mirror() {
    let mut rig = Rig::new().await;
    let dir = tempfile::tempdir().unwrap();
    let conf = rig.registries_conf(dir.path());
    for round in ["first", "off"] {
        let storage = dir.path().join(round);
        run(Command::new("buildah")
            .env("CONTAINERS_REGISTRIES_CONF", &conf)
            .args(["--storage-driver", "vfs", "--root"])
            .arg(storage.join("root"))
            .arg("--runroot")
            .arg(storage.join("run"))
            .args(["pull", "--policy", "always", "quay.io/team/app:1"]));
        rig.switch_registries_off();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn podman_pulls_by_mirror() {
    let mut rig = Rig::new().await;
    let dir = tempfile::tempdir().unwrap();
    let conf = rig.registries_conf(dir.path());
    for round in ["first", "off"] {
        let storage = dir.path().join(round);
        let mut podman = Command::new("podman");
        podman.env("CONTAINERS_REGISTRIES_CONF", &conf).args(["--storage-driver", "vfs", "--root"]);
        podman.arg(storage.join("root")).arg("--runroot").arg(storage.join("run"));
        run(podman.args(["pull", "--quiet", "docker.io/library/app:1"]));
        rig.switch_registries_off();
    }
}

/// A daemon whose child processes end with it.
fn daemon(program: &Path) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]).arg(program);
    command
}

#[tokio::test(flavor = "multi_thread")]
async fn docker_pulls_by_mirror() {
    let mut rig = Rig::new().await;
    let dir = tempfile::tempdir().unwrap();
    let config = rig.file_of(&["docker"], dir.path());
    let path = |name: &str| dir.path().join(name).display().to_string();
    let host = format!("unix://{}", path("socket"));
    let log = std::fs::File::create(path("log")).unwrap();
    let mut command = daemon("dockerd".as_ref());
    command.arg("--config-file").arg(&config).args(["--data-root", &path("data"), "--exec-root", &path("exec")]);
    command.args(["--pidfile", &path("pid"), "--host", &host, "--storage-driver", "vfs"]);
    let _daemon = Process::spawn(command.args(["--bridge", "none", "--iptables=false"]).stderr(log));
    let docker = |arguments: &[&str]| output(Command::new("docker").args(["--host", &host]).args(arguments));
    eventually("dockerd responds", async || docker(&["version"]).status.success().then_some(())).await;
    for _ in ["first", "off"] {
        let pulled = docker(&["pull", "library/app:1"]);
        assert!(pulled.status.success(), "{pulled:?}\n{}", std::fs::read_to_string(path("log")).unwrap());
        assert!(docker(&["rmi", "library/app:1"]).status.success());
        rig.switch_registries_off();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn buildkit_pulls_by_mirror() {
    let mut rig = Rig::new().await;
    let dir = tempfile::tempdir().unwrap();
    let config = rig.file_of(&["buildkit", "--registry", "docker.io", "--registry", "quay.io"], dir.path());
    let path = |name: &str| dir.path().join(name).display().to_string();
    std::fs::write(path("Dockerfile"), "FROM app:1 AS one\nFROM quay.io/team/app:1\nCOPY --from=one / /one/\n")
        .unwrap();
    for round in ["first", "off"] {
        let address = format!("unix://{}", path(&format!("{round}.socket")));
        let mut command = daemon(&tool("buildkitd"));
        command.arg("--config").arg(&config).args(["--root", &path(round), "--addr", &address]);
        let log = std::fs::File::create(path("log")).unwrap();
        command.args(["--oci-worker-snapshotter", "native", "--oci-worker-net", "host", "--containerd-worker=false"]);
        let _daemon = Process::spawn(command.stderr(log));
        let buildctl =
            |arguments: &[&str]| output(Command::new(tool("buildctl")).args(["--addr", &address]).args(arguments));
        eventually("buildkitd responds", async || buildctl(&["debug", "workers"]).status.success().then_some(())).await;
        let local = [format!("context={}", path("")), format!("dockerfile={}", path(""))];
        let to = format!("type=tar,dest={}", path(&format!("{round}.tar")));
        let built = buildctl(&[
            "build",
            "--frontend",
            "dockerfile.v0",
            "--local",
            &local[0],
            "--local",
            &local[1],
            "--output",
            &to,
        ]);
        let log = || std::fs::read_to_string(path("log")).unwrap();
        assert!(built.status.success(), "{}\n{}", String::from_utf8_lossy(&built.stderr), log());
        assert!(std::fs::metadata(path(&format!("{round}.tar"))).unwrap().len() > 3_000_000);
        rig.switch_registries_off();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn crane_validates_every_byte() {
    let mut rig = Rig::new().await;
    for _ in 0..2 {
        for name in ["docker.io/library/app:1", "quay.io/team/app:1"] {
            let image = format!("{}/{name}", rig.dray.registry);
            run(Command::new(tool("crane")).args(["validate", "--remote", &image]));
        }
        rig.switch_registries_off();
    }
}

/// A client that has a corrupt start must not get a correct end: it would keep the mixture. It gets errors until it
/// starts again.
#[tokio::test(flavor = "multi_thread")]
async fn containerd_pull_after_corrupt_bytes_succeeds() {
    let image = Image::new(7, &[2_000_000]);
    let is_corrupt = Arc::new(AtomicBool::new(true));
    let corrupts = is_corrupt.clone();
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], move |request, response| {
        if request.is_blob() && response.body.len() > 1_000_000 && corrupts.load(Ordering::SeqCst) {
            return response.flipped(1000).fault(Fault::GateAfter(1_500_000));
        }
        response
    })
    .await;
    let dray = Start::with_upstream("docker.io", &upstream.url()).run();
    let containerd = Containerd::start(Version::V1).await;
    containerd.use_mirror(&dray);
    let pull = std::thread::scope(|scope| {
        let pull = scope.spawn(|| containerd.pull("docker.io/library/app:1"));
        while containerd.ingested() < 1_000_000 {
            assert!(!pull.is_finished(), "the pull ended too early");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        upstream.open_gate();
        pull.join().unwrap()
    });
    let error = pull.unwrap_err();
    assert_eq!(dray.metric("dray_digest_mismatches_total").await, 1, "{error}");
    is_corrupt.store(false, Ordering::SeqCst);
    // Partial content of the failed pull is removed with its lease.
    containerd.collect_garbage();
    containerd.pull("docker.io/library/app:1").unwrap_or_else(|e| panic!("{e}"));
}
