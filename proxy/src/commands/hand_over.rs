//! `dray hand-over`.

use std::path::PathBuf;

use clap::Args;
use dray::containerd::hosts_dir::{HostsDir, Mode};
use dray::store::ownership;

use super::{Failure, say};

#[derive(Args)]
pub(crate) struct HandOver {
    /// The user and group that dray runs as, by number
    #[arg(long, value_name = "UID:GID", value_parser = ids)]
    to: (u32, u32),
    /// The cache directory, with all that is in it
    #[arg(long, value_name = "DIR", required_unless_present = "hosts_dir")]
    cache_dir: Option<PathBuf>,
    /// containerd's hosts directory, such as /etc/containerd/certs.d: of it only _default, which `dray containerd
    /// uninstall` gives back
    #[arg(long, value_name = "DIR")]
    hosts_dir: Option<PathBuf>,
}

impl HandOver {
    pub(crate) fn run(self) -> Result<(), Failure> {
        if let Some(dir) = self.cache_dir {
            let owned =
                ownership::own(&dir, self.to).map_err(|e| Failure::Failed(format!("{}: {e}", dir.display())))?;
            if owned {
                say(&format!("{}: belongs to {}:{} now", dir.display(), self.to.0, self.to.1));
            }
        }
        if let Some(dir) = self.hosts_dir {
            let done = HostsDir::new(dir).hand_over(self.to, Mode::Apply);
            done.map_err(|e| Failure::Failed(e.to_string()))?
                .changes
                .iter()
                .for_each(|change| say(&change.to_string()));
        }
        Ok(())
    }
}

fn ids(text: &str) -> Result<(u32, u32), String> {
    let parsed = text.split_once(':').and_then(|(uid, gid)| Some((uid.parse().ok()?, gid.parse().ok()?)));
    parsed.ok_or_else(|| format!("\"{text}\" is not two numbers such as 65532:65532"))
}
