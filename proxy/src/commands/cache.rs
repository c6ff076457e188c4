//! `dray cache`: what a running dray has cached, and its removal.

use clap::{Args, Subcommand, ValueEnum};
use dray::oci::ImageName;
use dray::peers::NodeResult;
use dray::pull::{CacheList, Purged};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::json;

use super::operator::AdminApi;
use super::table::{Paint, Table, bytes, printable, seconds};
use super::{Failure, block_on, print};

#[derive(Subcommand)]
pub(crate) enum CacheCommand {
    /// List the cached blobs of more than 256 KiB, and where they came from
    List(List),
    /// Remove content from the cache: an image with all its layers, a digest, or everything of a registry
    ///
    /// Layers that other images share are removed as well; the next pull downloads them again. A download in progress
    /// is not stopped, and caches its blob again.
    Purge(Purge),
    /// End the TTL of a tag, so that the next pull asks the registry what it resolves to
    ///
    /// On this node, and on all others if peers authenticate each other.
    Revalidate(Revalidate),
}

#[derive(Args)]
pub(crate) struct List {
    /// Only blobs that were first downloaded from this registry
    #[arg(long)]
    registry: Option<String>,
    /// Largest first, or most recently used first
    #[arg(long, value_enum, default_value_t = Sort::Size)]
    sort: Sort,
    /// How many to list
    #[arg(long, default_value_t = 50)]
    limit: usize,
    /// Print the JSON of /api/v1/cache
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    admin: AdminApi,
}

#[derive(Clone, Copy, ValueEnum)]
enum Sort {
    Size,
    Used,
}

#[derive(Args)]
pub(crate) struct Purge {
    /// An image, such as ghcr.io/team/app:1, or a digest, sha256:...
    #[arg(required_unless_present = "registry", conflicts_with = "registry")]
    content: Option<String>,
    /// Everything that was downloaded from this registry
    #[arg(long)]
    registry: Option<String>,
    /// Also on all other nodes, which need peers.key_file or peers.mtls
    #[arg(long)]
    cluster: bool,
    #[command(flatten)]
    admin: AdminApi,
}

#[derive(Args)]
pub(crate) struct Revalidate {
    /// The image with its tag, such as ghcr.io/team/app:latest
    image: String,
    #[command(flatten)]
    admin: AdminApi,
}

impl CacheCommand {
    pub(crate) fn run(self) -> Result<(), Failure> {
        match self {
            Self::List(list) => list.run(),
            Self::Purge(purge) => purge.run(),
            Self::Revalidate(revalidate) => revalidate.run(),
        }
    }
}

impl List {
    fn run(self) -> Result<(), Failure> {
        let sort = match self.sort {
            Sort::Size => "size",
            Sort::Used => "used",
        };
        let mut path = format!("/api/v1/cache?sort={sort}&limit={}", self.limit);
        if let Some(registry) = &self.registry {
            path += &format!("&registry={}", utf8_percent_encode(registry, NON_ALPHANUMERIC));
        }
        let (json, list) = block_on(self.admin.get::<CacheList>(&path))??;
        print(if self.json { json } else { listed(&list, Paint::of_stdout()) }.as_str());
        Ok(())
    }
}

fn listed(list: &CacheList, paint: Paint) -> String {
    let mut table = Table::new(&["digest", ">size", ">used", "first downloaded from", ""]);
    for blob in &list.blobs {
        let from = match (&blob.registry, &blob.repository) {
            (Some(registry), Some(repository)) => format!("{registry}/{repository}"),
            _ => "unknown".to_owned(),
        };
        let used = format!("{} ago", seconds(blob.idle_seconds));
        table.row(&[&blob.digest, &bytes(blob.bytes), &used, &from, if blob.pinned { "pinned" } else { "" }]);
    }
    let total = format!("{} blobs, {}", list.total_blobs, bytes(list.total_bytes));
    if table.is_empty() { total } else { format!("{}\n{total}", table.lines(paint)) }
}

impl Purge {
    fn run(self) -> Result<(), Failure> {
        let (key, value) = match (self.content, self.registry) {
            (_, Some(registry)) => ("registry", registry),
            (Some(content), None) if is_digest(&content) => ("digest", content),
            (content, None) => ("image", content.unwrap_or_default()),
        };
        let body = json!({ key: value, "cluster": self.cluster });
        let mut unreached = 0;
        block_on(self.admin.post("/api/v1/cache/purge", &body, |line: NodeResult<Purged>| {
            unreached += usize::from(line.result.is_none());
            print(&format!(
                "{}: {}",
                node(&line),
                line.result.map_or_else(|| failure(&line), |purged| summary(&purged))
            ));
        }))??;
        match unreached {
            0 => Ok(()),
            1 => Err(Failure::Failed("1 node may still have it: repeat the command later".to_owned())),
            _ => Err(Failure::Failed(format!("{unreached} nodes may still have it: repeat the command later"))),
        }
    }
}

/// Also a mistyped digest, which would otherwise be the tag of an image `sha256`.
fn is_digest(content: &str) -> bool {
    ["sha256:", "sha512:"].iter().any(|algorithm| content.starts_with(algorithm))
}

fn summary(purged: &Purged) -> String {
    if *purged == Purged::default() {
        return "nothing of it was cached".to_owned();
    }
    let mut text = format!(
        "purged {} objects, {}, and {} records of tags and lists",
        purged.objects,
        bytes(purged.bytes),
        purged.records
    );
    if purged.downloads > 0 {
        text += &format!("; {} downloads in progress will cache their blobs again: repeat it later", purged.downloads);
    }
    text
}

impl Revalidate {
    fn run(self) -> Result<(), Failure> {
        let image: ImageName = self.image.parse().map_err(Failure::Usage)?;
        if matches!(image.reference, dray::oci::Reference::Digest(_)) {
            return Err(Failure::Usage(format!("{}: a digest never changes; name a tag", self.image)));
        }
        let body = json!({ "image": self.image });
        let mut unreached = 0;
        block_on(self.admin.post("/api/v1/cache/revalidate", &body, |line: NodeResult<bool>| {
            unreached += usize::from(line.result.is_none());
            let text = match line.result {
                Some(true) => "the next pull revalidates it".to_owned(),
                Some(false) => "not cached".to_owned(),
                None => failure(&line),
            };
            print(&format!("{}: {text}", node(&line)));
        }))??;
        if unreached == 0 {
            return Ok(());
        }
        Err(Failure::Failed("some nodes were not reached: they use the tag until its TTL ends".to_owned()))
    }
}

fn node<T>(result: &NodeResult<T>) -> String {
    result.node.map_or_else(|| "this node".to_owned(), |node| node.to_string())
}

fn failure<T>(result: &NodeResult<T>) -> String {
    format!("failed: {}", printable(result.error.as_deref().unwrap_or("no result")))
}
