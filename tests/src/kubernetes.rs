//! A real Kubernetes cluster of one node, in namespaces of its own: API server, controllers, scheduler, kube-proxy,
//! CoreDNS, kubelet and containerd, and a registry.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

use crate::node;
use crate::process::{Process, output, run};
use crate::tool;

/// A running cluster.
pub struct Kubernetes {
    dir: TempDir,
    process: Process,
}

/// The first process of a container that does nothing. By the name of `true` it ends at once.
const PAUSE: &str = "#include <signal.h>\n#include <string.h>\n#include <unistd.h>\n\
                     static void end(int sig) { (void)sig; _exit(0); }\n\
                     int main(int count, char **words) {\n\
                     if (count && strstr(words[0], \"true\")) return 0;\n\
                     signal(SIGTERM, end); for (;;) pause(); }\n";

impl Kubernetes {
    /// Starts a cluster whose registry has dray's image as 127.0.0.1:5000/dray:test.
    pub fn start() -> Self {
        assert!(rustix::process::geteuid().is_root(), "namespaces need root: run the tests as root");
        let dir = tempfile::tempdir().expect("a temporary directory");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/kubernetes.sh");
        let mut namespaces = Command::new("unshare");
        namespaces.args(["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]);
        namespaces.arg(script).arg(dir.path()).arg(tools()).stdout(Stdio::piped());
        let mut cluster = Self { dir, process: Process::spawn(&mut namespaces) };
        cluster.process.line("ready");
        cluster.push_pause();
        let image = node::image_directory();
        let to = "docker://127.0.0.1:5000/dray:test";
        run(cluster
            .inside("skopeo")
            .args(["copy", "--quiet", "--dest-tls-verify=false"])
            .args([&format!("oci:{}", image.display()), to]));
        cluster
    }

    /// A command on the node.
    fn inside(&self, program: impl AsRef<OsStr>) -> Command {
        let id = self.process.id();
        let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children")).expect("it runs");
        let mut command = Command::new("nsenter");
        command.args(["--target", children.trim(), "--mount", "--net", "--pid", "--"]).arg(program);
        command.env("KUBECONFIG", self.path("kubeconfig")).env("SSL_CERT_FILE", self.path("registry.pem"));
        let path = std::env::var_os("PATH").unwrap_or_default();
        let folders = std::iter::once(tools()).chain(std::env::split_paths(&path));
        command.env("PATH", std::env::join_paths(folders).expect("no colon in a path"));
        command
    }

    /// A shell on the node, which has the programs of an operator.
    pub fn shell(&self, script: &str) -> Command {
        let mut shell = self.inside("sh");
        shell.args(["-euc", script]);
        shell
    }

    fn push_pause(&self) {
        let source = self.path("pause.c");
        std::fs::write(&source, PAUSE).expect("written");
        run(Command::new("cc").args(["-static", "-o"]).arg(self.path("pause")).arg(&source));
        std::fs::create_dir(self.path("bin")).expect("a directory");
        std::fs::hard_link(self.path("pause"), self.path("bin/true")).expect("a link");
        let files = ["pause", "bin/true"];
        run(Command::new("tar").arg("-cf").arg(self.path("pause.tar")).arg("-C").arg(self.dir.path()).args(files));
        let image = "127.0.0.1:5000/pause:1";
        let crane = || self.inside("crane");
        run(crane().args(["append", "--insecure", "--new_tag", image, "--new_layer"]).arg(self.path("pause.tar")));
        run(crane()
            .args(["mutate", "--insecure", image, "--tag", image, "--entrypoint", "/pause"])
            .args(["--set-platform", "linux/amd64"]));
    }

    /// Pushes an image under this name to the cluster's registry. It does nothing, and its digest is unique.
    pub fn push(&self, name: &str) {
        let to = format!("127.0.0.1:5000/{name}");
        let label = format!("name={name}");
        let mut crane = self.inside("crane");
        run(crane.args(["mutate", "--insecure", "127.0.0.1:5000/pause:1", "--tag", &to, "--label", &label]));
    }

    /// Pushes an image with layers of these sizes. Their bytes are random.
    pub fn push_layers(&self, name: &str, sizes: &[usize]) {
        let layers: Vec<_> = (0..sizes.len()).map(|nth| self.path(&format!("layer-{nth}.tar"))).collect();
        for (layer, size) in layers.iter().zip(sizes) {
            let random = std::iter::repeat_with(|| fastrand::u8(..));
            std::fs::write(self.path("layer"), random.take(*size).collect::<Vec<_>>()).expect("written");
            run(Command::new("tar").arg("-cf").arg(layer).arg("-C").arg(self.dir.path()).arg("layer"));
        }
        let mut crane = self.inside("crane");
        crane.args(["append", "--insecure", "--new_tag", &format!("127.0.0.1:5000/{name}")]);
        let layers = layers.iter().flat_map(|layer| [OsStr::new("--new_layer"), layer.as_os_str()]);
        run(crane.args(layers));
    }

    /// The bytes that the registry has sent, by its log.
    pub fn sent_by_registry(&self) -> u64 {
        let log = std::fs::read_to_string(self.path("log/registry")).expect("a log");
        let lines = log.lines().filter(|line| line.contains("response completed"));
        let written = lines.filter_map(|line| line.split("http.response.written=").nth(1)?.split(' ').next());
        written.map(|bytes| bytes.parse::<u64>().expect("a count")).sum()
    }

    /// A file or directory of the cluster.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The directory in which its containerd looks for mirrors.
    pub fn hosts_dir(&self) -> PathBuf {
        self.path("containerd/certs.d")
    }

    pub fn helm(&self, arguments: &[&str]) -> String {
        run(self.inside("helm").args(["--namespace", "dray"]).args(arguments))
    }

    pub fn kubectl(&self, arguments: &[&str]) -> Output {
        output(self.inside("kubectl").args(arguments))
    }

    /// Runs an image in a pod and waits until the pod is ready.
    pub fn run_pod(&self, name: &str, image: &str) {
        let made = self.kubectl(&["run", name, "--image", image, "--grace-period", "1"]);
        assert!(made.status.success(), "{made:?}");
        let runs = self.kubectl(&["wait", "--for", "condition=Ready", &format!("pod/{name}"), "--timeout", "120s"]);
        assert!(runs.status.success(), "{runs:?}\n{}", self.events());
    }

    /// Events of the cluster and dray's log, to explain a failure.
    pub fn events(&self) -> String {
        let events = self.kubectl(&["get", "events", "--all-namespaces"]);
        let logs = self.kubectl(&["logs", "--namespace", "dray", "--selector", "app.kubernetes.io/name=dray"]);
        [events.stdout, logs.stdout].map(|text| String::from_utf8_lossy(&text).into_owned()).concat()
    }
}

impl Drop for Kubernetes {
    fn drop(&mut self) {
        self.process.kill();
        // The pods leave empty cgroups. Cgroups in use by other processes cannot be removed.
        let hierarchies = std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
        for pods in hierarchies.map(|hierarchy| hierarchy.path().join("k8s.io")) {
            let left = std::fs::read_dir(&pods).into_iter().flatten().flatten();
            left.for_each(|group| drop(std::fs::remove_dir(group.path())));
            let _ = std::fs::remove_dir(pods);
        }
    }
}

fn tools() -> PathBuf {
    tool("kubelet").parent().expect("it lies in a directory").to_owned()
}
