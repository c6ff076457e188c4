//! A host of its own for commands of operators: its own network, processes, `/etc`, `/usr` and `/var`, with a real
//! containerd and a registry that has the name of Docker Hub.

use std::path::Path;
use std::process::Command;

use crate::dray::binary;
use crate::image::Image;
use crate::process::output;
use crate::project;
use crate::registry::Registry;
use crate::tls::Authority;

/// Runs the script `run` of a directory. It can call the other files there by `step NAME`, and finds the directory in
/// `$STEPS`. Returns what it printed.
pub async fn run_on_host(steps: &Path) -> String {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let host = dir.path().join("host");
    std::fs::create_dir(&host).expect("a directory");
    let registry = Registry::open().await;
    registry.push("library/alpine", "latest", &Image::new(1, &[300_000, 2_000])).await;
    let authority = Authority::new(dir.path());
    let files = authority.files(&["registry-1.docker.io", "docker.io"]);
    let mut command = Command::new("unshare");
    command.args(["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "sh"]);
    command.arg(project().join("tests/src/host.sh"));
    command.env("HOST", &host).env("STEPS", steps).env("STORAGE", registry.storage());
    command.env("CA", &authority.ca_file).env("CERT", &files.cert).env("KEY", &files.key);
    command.env("DRAY", binary()).env("PROJECT", project());
    let done = output(&mut command);
    let printed = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(done.status.success(), "{printed}\n{}", String::from_utf8_lossy(&done.stderr));
    printed
}
