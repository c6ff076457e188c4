//! `[[prefetch]]`: images that are kept fresh, by the clock.

use std::sync::Arc;
use std::time::Duration;

use chrono::Utc;
use tokio::time::sleep;

use crate::config::Prefetch;
use crate::oci::ImageName;
use crate::pull::Pull;
use crate::warm::{self, Blob, Fetched, Inside, Plan, Platforms, Watcher};

/// Nodes with the same clock do not all ask at once.
const JITTER_MILLIS: u64 = 60_000;

/// After the start peers are found and runtimes served first.
const AFTER_START: Duration = Duration::from_secs(10);

/// Blobs at a time: what clients want comes first.
const PARALLEL: usize = 2;

/// Warms images after the start and then by their schedule, for as long as it is polled.
pub async fn keep_warm(pull: Arc<Pull>, prefetch: Prefetch) {
    let platforms = match prefetch.platforms.as_slice() {
        [] => Platforms::of_this_machine(),
        some => Platforms::These(some.to_vec()),
    };
    let door = Inside(pull);
    let put_off = |pause| if prefetch.schedule.is_by_the_second() { Duration::ZERO } else { pause };
    sleep(put_off(AFTER_START)).await;
    loop {
        let summary = warm::warm(&door, &prefetch.images, &platforms, PARALLEL, &Silent).await;
        for (image, problem) in &summary.failed {
            tracing::warn!(%image, problem, "not prefetched");
        }
        let (images, blobs, bytes, kept) = (summary.images, summary.blobs, summary.bytes, summary.kept_bytes);
        tracing::info!(images, failed = summary.failed.len(), blobs, bytes, kept, "prefetched");
        let Some(next) = prefetch.schedule.next(Utc::now()) else { return };
        let jitter = Duration::from_millis(fastrand::u64(..JITTER_MILLIS));
        sleep(next + put_off(jitter)).await;
    }
}

/// The log tells of the whole.
struct Silent;

impl Watcher for Silent {
    fn planned(&self, _: &ImageName, _: &Plan) {}
    fn began(&self, _: &Blob) {}
    fn came(&self, _: &Blob, _: u64) {}
    fn ended(&self, _: &Blob, _: &Result<Fetched, String>) {}
}
