//! Pulls images through a dray before a client pulls them: `dray warm`, `[[prefetch]]` and `[[pin]]`.
//!
//! An image is warm if each manifest and blob of each requested platform was downloaded, verified and cached. The crate
//! oci-client is not used because it hides response headers, which tell where dray served a response from.

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

/// Images whose manifests are requested at the same time. Larger: more load on one registry. Smaller: a long list takes
/// longer.
const MAX_PARALLEL_LOOKUPS: usize = 4;

/// Receives the progress.
pub trait WarmObserver: Send + Sync {
    /// An image was looked up; the plan has the blobs that no earlier image has.
    fn planned(&self, image: &ImageName, plan: &ImagePlan);
    fn blob_started(&self, blob: &PlannedBlob);
    /// More bytes of the blob were received.
    fn blob_progressed(&self, blob: &PlannedBlob, bytes: u64);
    fn blob_finished(&self, blob: &PlannedBlob, result: &Result<WarmedBlob, String>);
}

/// The result for all images.
#[derive(Debug, Default)]
pub struct Summary {
    pub images: usize,
    pub manifests: usize,
    pub blobs: usize,
    pub bytes: u64,
    /// The part of `bytes` that was cached before.
    pub cached_bytes: u64,
    /// The blobs of the images that could be looked up.
    pub digests: Vec<Digest>,
    /// Layers that the registry does not distribute: runtimes get them elsewhere.
    pub foreign: usize,
    /// Images that are not warm, with the error.
    pub failed: Vec<(ImageName, String)>,
}

/// Warms images; `parallel` bounds the blobs that are downloaded at the same time.
pub async fn warm(
    source: &dyn ImageSource,
    images: &[ImageName],
    platforms: &Platforms,
    parallel: usize,
    observer: &dyn WarmObserver,
) -> Summary {
    let looked_up = stream::iter(images.iter().cloned()).map(|image| async move {
        let plan = plan::make(source, &image, platforms).await;
        (image, plan)
    });
    let looked_up: Vec<_> = looked_up.buffered(MAX_PARALLEL_LOOKUPS).collect().await;
    let mut summary = Summary { images: images.len(), ..Summary::default() };
    let mut known = std::collections::HashSet::new();
    let (mut wanted, mut plans) = (Vec::new(), Vec::new());
    for (image, plan) in looked_up {
        match plan {
            Ok(mut plan) => {
                summary.manifests += plan.manifests;
                summary.foreign += plan.foreign;
                plan.blobs.retain(|blob| source.is_responsible_for(blob));
                let all: Vec<PlannedBlob> = plan.blobs.clone();
                // Images share layers; each is downloaded once.
                plan.blobs.retain(|blob| known.insert((blob.digest.clone(), blob.size)));
                summary.digests.extend(plan.blobs.iter().map(|blob| blob.digest.clone()));
                observer.planned(&image, &plan);
                wanted.extend(plan.blobs.iter().cloned());
                plans.push((image, all));
            }
            Err(problem) => summary.failed.push((image, problem)),
        }
    }
    let permits = Semaphore::new(parallel);
    let downloads = stream::iter(wanted).map(|blob| {
        let permits = &permits;
        async move {
            let _permit = permits.acquire().await;
            observer.blob_started(&blob);
            let result = fetch::blob(source, &blob, |bytes| observer.blob_progressed(&blob, bytes)).await;
            observer.blob_finished(&blob, &result);
            ((blob.digest, blob.size), result)
        }
    });
    let results: Vec<_> = downloads.buffer_unordered(parallel).collect().await;
    let mut problems = std::collections::HashMap::new();
    for (blob, result) in results {
        match result {
            Ok(warmed) => {
                summary.blobs += 1;
                summary.bytes += warmed.bytes;
                summary.cached_bytes += if warmed.was_cached { warmed.bytes } else { 0 };
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
