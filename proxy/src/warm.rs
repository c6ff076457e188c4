//! Pulls images through a dray, as a runtime would, so that they are there when one does: `dray warm` and `[[prefetch]]`.
//!
//! Everything is checked as it comes: an image is warm when each manifest and blob of each platform that was asked for
//! has come whole. oci-client would do, but hides where an answer came from.

mod fetch;
mod http;
mod in_process;
mod plan;
mod source;
mod yaml;

use futures_util::{StreamExt, stream};
use tokio::sync::Semaphore;

pub use self::fetch::WarmedBlob;
pub use self::http::HttpSource;
pub use self::in_process::InProcessSource;
pub use self::plan::{ImagePlan, PlannedBlob, Platforms};
pub use self::source::ImageSource;
pub use self::yaml::images_in;
use crate::oci::{Digest, ImageName};

/// Images that are looked up at a time.
const LOOKED_UP: usize = 4;

/// Somebody who watches.
pub trait WarmObserver: Send + Sync {
    /// An image was looked up: so much of it is to come that no other image brings.
    fn planned(&self, image: &ImageName, plan: &ImagePlan);
    /// A blob begins, goes on, and ends.
    fn began(&self, blob: &PlannedBlob);
    fn came(&self, blob: &PlannedBlob, bytes: u64);
    fn ended(&self, blob: &PlannedBlob, fetched: &Result<WarmedBlob, String>);
}

/// What became of it all.
#[derive(Debug, Default)]
pub struct Summary {
    pub images: usize,
    pub manifests: usize,
    pub blobs: usize,
    pub bytes: u64,
    /// Of these, that were there already.
    pub kept_bytes: u64,
    /// What the images consist of that could be looked up.
    pub digests: Vec<Digest>,
    /// Layers that runtimes have from elsewhere.
    pub foreign: usize,
    /// An image, and why it is not warm.
    pub failed: Vec<(ImageName, String)>,
}

/// Warms images, so many blobs at a time.
pub async fn warm(
    door: &dyn ImageSource,
    images: &[ImageName],
    platforms: &Platforms,
    parallel: usize,
    watcher: &dyn WarmObserver,
) -> Summary {
    let looked_up = stream::iter(images.iter().cloned()).map(|image| async move {
        let plan = plan::make(door, &image, platforms).await;
        (image, plan)
    });
    let looked_up: Vec<_> = looked_up.buffered(LOOKED_UP).collect().await;
    let mut summary = Summary { images: images.len(), ..Summary::default() };
    let mut known = std::collections::HashSet::new();
    let (mut wanted, mut plans) = (Vec::new(), Vec::new());
    for (image, plan) in looked_up {
        match plan {
            Ok(mut plan) => {
                summary.manifests += plan.manifests;
                summary.foreign += plan.foreign;
                plan.blobs.retain(|blob| door.wants(blob));
                let all: Vec<PlannedBlob> = plan.blobs.clone();
                // Layers are shared: each comes once.
                plan.blobs.retain(|blob| known.insert((blob.digest.clone(), blob.size)));
                summary.digests.extend(plan.blobs.iter().map(|blob| blob.digest.clone()));
                watcher.planned(&image, &plan);
                wanted.extend(plan.blobs.iter().cloned());
                plans.push((image, all));
            }
            Err(problem) => summary.failed.push((image, problem)),
        }
    }
    let permits = Semaphore::new(parallel);
    let fetching = stream::iter(wanted).map(|blob| {
        let permits = &permits;
        async move {
            let _permit = permits.acquire().await;
            watcher.began(&blob);
            let fetched = fetch::blob(door, &blob, |bytes| watcher.came(&blob, bytes)).await;
            watcher.ended(&blob, &fetched);
            ((blob.digest, blob.size), fetched)
        }
    });
    let fetched: Vec<_> = fetching.buffer_unordered(parallel).collect().await;
    let mut problems = std::collections::HashMap::new();
    for (blob, fetched) in fetched {
        match fetched {
            Ok(fetched) => {
                summary.blobs += 1;
                summary.bytes += fetched.bytes;
                summary.kept_bytes += if fetched.was_kept { fetched.bytes } else { 0 };
            }
            Err(problem) => drop(problems.insert(blob, problem)),
        }
    }
    for (image, blobs) in plans {
        let of = |blob: &PlannedBlob| problems.get_key_value(&(blob.digest.clone(), blob.size));
        if let Some(((digest, _), problem)) = blobs.iter().find_map(of) {
            summary.failed.push((image, format!("{digest}: {problem}")));
        }
    }
    summary
}
