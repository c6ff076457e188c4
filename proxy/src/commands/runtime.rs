//! `dray runtime-config NAME`.

use std::io::Write;

use clap::Args;
use dray::config::Mirror;
use dray::runtimes::{NamedRegistry, Runtime as RuntimeKind};

use super::Failure;

#[derive(Args)]
pub(crate) struct RuntimeConfig {
    /// docker, buildkit, podman (also for skopeo and buildah), crio, kind, k3s, rke2, talos, bottlerocket or gke;
    /// for containerd itself use `dray containerd install`
    name: RuntimeKind,
    /// The URL on which the runtime reaches dray
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:5050")]
    mirror: Mirror,
    /// Mirror only this registry, such as docker.io, or registry.corp:5000=corp if image paths use an alias; can be
    /// repeated. Without it: all registries, or the well-known public ones if the runtime needs a list
    #[arg(long, value_name = "HOST[=ALIAS]")]
    registry: Vec<NamedRegistry>,
}

impl RuntimeConfig {
    /// The document goes to standard output, the instructions to standard error: output can be redirected to a file.
    pub(crate) fn run(self) -> Result<(), Failure> {
        let document = self.name.document(&self.mirror, &super::deduplicated(self.registry));
        let document = document.map_err(|error| Failure::Usage(error.to_string()))?;
        let _ = write!(std::io::stdout(), "{}", document.text);
        document.instructions.iter().for_each(|line| drop(writeln!(std::io::stderr(), "# {line}")));
        Ok(())
    }
}
