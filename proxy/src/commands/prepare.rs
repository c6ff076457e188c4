//! `dray containerd prepare`.

use std::path::PathBuf;

use clap::Args;
use dray::containerd::hosts_dir::{HostsDir, Mode};
use dray::store::ownership;

use super::{Failure, print};

#[derive(Args)]
pub(crate) struct Prepare {
    /// The numeric user and group that dray runs as
    #[arg(long, value_name = "UID:GID", value_parser = ids)]
    to: (u32, u32),
    /// dray's cache directory: it and everything in it is given to the user
    #[arg(long, value_name = "DIR", required_unless_present = "hosts_dir")]
    cache_dir: Option<PathBuf>,
    /// containerd's hosts directory, such as /etc/containerd/certs.d. Only its subdirectory _default is given to the
    /// user, and `dray containerd uninstall` restores its owner. If the user cannot read the hosts directory itself,
    /// its group is changed to the user's group
    #[arg(long, value_name = "DIR")]
    hosts_dir: Option<PathBuf>,
}

impl Prepare {
    pub(crate) fn run(self) -> Result<(), Failure> {
        if let Some(dir) = self.cache_dir {
            let is_changed =
                ownership::own(&dir, self.to).map_err(|e| Failure::Failed(format!("{}: {e}", dir.display())))?;
            if is_changed {
                print(&format!("{}: owner changed to {}:{}", dir.display(), self.to.0, self.to.1));
            }
        }
        if let Some(dir) = self.hosts_dir {
            let done = HostsDir::new(dir).prepare(self.to, Mode::Apply);
            done.map_err(|e| Failure::Failed(e.to_string()))?
                .changes
                .iter()
                .for_each(|change| print(&change.to_string()));
        }
        Ok(())
    }
}

fn ids(text: &str) -> Result<(u32, u32), String> {
    let parsed = text.split_once(':').and_then(|(uid, gid)| Some((uid.parse().ok()?, gid.parse().ok()?)));
    parsed.ok_or_else(|| format!("\"{text}\" is not a valid UID:GID: expected two numbers, such as 65532:65532"))
}
