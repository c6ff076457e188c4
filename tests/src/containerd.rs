//! Real containerd daemons, each with its own root directory.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

use crate::dray::{Dray, binary};
use crate::eventually;
use crate::process::{Process, output, run};

/// A running containerd and the `ctr` of the same version.
pub struct Containerd {
    dir: TempDir,
    socket: PathBuf,
    ctr: PathBuf,
    _process: Process,
}

/// Which containerd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// Debian's 1.6.
    V1,
    /// 2.x built from its Go module, with parallel layer fetch.
    V2,
}

impl Containerd {
    pub async fn start(version: Version) -> Self {
        Self::start_in(version, &std::env::temp_dir()).await
    }

    /// With all its files in a directory below this one.
    pub async fn start_in(version: Version, parent: &Path) -> Self {
        assert!(rustix::process::geteuid().is_root(), "containerd needs root: run the tests as root");
        let dir = tempfile::tempdir_in(parent).expect("a temporary directory");
        let (daemon, ctr) = match version {
            Version::V1 => (PathBuf::from("containerd"), PathBuf::from("ctr")),
            Version::V2 => (crate::tool("containerd"), crate::tool("ctr")),
        };
        let socket = dir.path().join("containerd.sock");
        let config = dir.path().join("config.toml");
        std::fs::create_dir_all(dir.path().join("certs.d")).expect("a hosts directory");
        let head = format!(
            "root = \"{root}/root\"\nstate = \"{root}/state\"\n[grpc]\n  address = \"{root}/containerd.sock\"\n",
            root = dir.path().display()
        );
        let hosts = dir.path().join("certs.d");
        let plugins = match version {
            Version::V1 => format!(
                "version = 2\ndisabled_plugins = [\"io.containerd.internal.v1.opt\"]\n{head}\
                 [plugins.\"io.containerd.grpc.v1.cri\".registry]\n  config_path = \"{}\"\n",
                hosts.display()
            ),
            Version::V2 => format!(
                "version = 3\ndisabled_plugins = [\"io.containerd.internal.v1.opt\", \"io.containerd.nri.v1.nri\"]\n{head}\
                 [plugins.'io.containerd.transfer.v1.local']\n  config_path = \"{hosts}\"\n  max_concurrent_downloads = 4\n  \
                 concurrent_layer_fetch_buffer = 1048576\n\
                 [[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n  platform = \"linux/amd64\"\n  snapshotter = \"native\"\n\
                 [plugins.'io.containerd.cri.v1.images']\n  snapshotter = \"native\"\n\
                 [plugins.'io.containerd.cri.v1.images'.registry]\n  config_path = \"{hosts}\"\n",
                hosts = hosts.display()
            ),
        };
        std::fs::write(&config, plugins).expect("the configuration is written");
        let log = std::fs::File::create(dir.path().join("log")).expect("a log file");
        let process = Process::spawn(
            Command::new(daemon)
                .arg("--config")
                .arg(&config)
                .arg("--log-level")
                .arg("debug")
                .stdout(Stdio::null())
                .stderr(log),
        );
        let containerd = Self { dir, socket, ctr, _process: process };
        eventually("containerd responds", async || containerd.ctr(&["version"]).status.success().then_some(())).await;
        containerd
    }

    /// Configures dray as its mirror by `dray containerd install`.
    pub fn use_mirror(&self, dray: &Dray) {
        run(Command::new(binary())
            .args(["containerd", "install", "--mirror", &dray.url(""), "--hosts-dir"])
            .arg(self.hosts_dir()));
    }

    /// Where hosts.toml files go.
    pub fn hosts_dir(&self) -> PathBuf {
        self.dir.path().join("certs.d")
    }

    /// Its configuration.
    pub fn config(&self) -> PathBuf {
        self.dir.path().join("config.toml")
    }

    pub fn ctr(&self, args: &[&str]) -> Output {
        output(Command::new(&self.ctr).arg("--address").arg(&self.socket).args(["--namespace", "k8s.io"]).args(args))
    }

    /// Pulls and unpacks an image, with mirrors from the hosts directory.
    pub fn pull(&self, image: &str) -> Result<(), String> {
        self.pull_by("native", image)
    }

    /// The same with another snapshotter.
    pub fn pull_by(&self, snapshotter: &str, image: &str) -> Result<(), String> {
        let hosts = self.hosts_dir();
        let hosts = hosts.to_str().expect("a UTF-8 path");
        let pulled = self.ctr(&["images", "pull", "--snapshotter", snapshotter, "--hosts-dir", hosts, image]);
        if pulled.status.success() {
            return Ok(());
        }
        Err(format!("{}{}", String::from_utf8_lossy(&pulled.stdout), String::from_utf8_lossy(&pulled.stderr)))
    }

    /// Bytes of the blobs that are being downloaded.
    pub fn ingested(&self) -> u64 {
        let ingests = self.dir.path().join("root/io.containerd.content.v1.content/ingest");
        let sizes = std::fs::read_dir(ingests).into_iter().flatten().flatten();
        sizes.filter_map(|dir| Some(std::fs::metadata(dir.path().join("data")).ok()?.len())).sum()
    }

    /// Collects garbage now. The daemon itself does so after some changes.
    pub fn collect_garbage(&self) {
        let pruned = self.ctr(&["content", "prune", "references"]);
        assert!(pruned.status.success(), "{}", String::from_utf8_lossy(&pruned.stderr));
    }

    /// The log so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }
}
