//! `dray runtime NAME`.

use std::io::Write;

use clap::Args;
use dray::config::Mirror;
use dray::runtimes::{NamedRegistry, Runtime as RuntimeKind};

use super::Failure;

#[derive(Args)]
pub(crate) struct RuntimeCommand {
    /// docker, buildkit, podman (skopeo and buildah as well), crio, kind, k3s, rke2, talos, bottlerocket or gke;
    /// for containerd itself: dray containerd
    name: RuntimeKind,
    /// Where the runtime reaches dray
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:5050")]
    mirror: Mirror,
    /// Only for these registries, such as docker.io; registry.corp:5000=corp where paths call it by an alias.
    /// Without it for all, or for the usual ones where each has to be named
    #[arg(long, value_name = "HOST[=ALIAS]")]
    registry: Vec<NamedRegistry>,
}

impl RuntimeCommand {
    /// The document on standard output, what to do with it on standard error.
    pub(crate) fn run(self) -> Result<(), Failure> {
        let document = self.name.document(&self.mirror, &super::once(self.registry));
        let document = document.map_err(|unsuited| Failure::Usage(unsuited.to_string()))?;
        let _ = write!(std::io::stdout(), "{}", document.text);
        document.instructions.iter().for_each(|line| drop(writeln!(std::io::stderr(), "# {line}")));
        Ok(())
    }
}
