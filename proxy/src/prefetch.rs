//! `[[prefetch]]`: images that are refreshed by a schedule. `[[pin]]`: images that are evicted last.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use chrono::Utc;
use tokio::time::sleep;

use crate::config::{Pin, Prefetch};
use crate::oci::{Digest, ImageName};
use crate::pull::Pull;
use crate::times::{DEFAULT_TTL, HOUR, OBSERVATION_TTL};
use crate::warm::{self, ImagePlan, InProcessSource, PlannedBlob, Platforms, WarmObserver, WarmedBlob};

/// Random delay of a scheduled prefetch. Smaller: all nodes of a cluster send their requests to a registry at the same
/// moment.
const JITTER_MILLIS: u64 = 60_000;

/// Delay of the first prefetch. Shorter: it competes with the pulls of clients at a node's start, and peers are not
/// found yet.
const PREFETCH_START_DELAY: Duration = Duration::from_secs(10);

/// Delay of the first pass over pinned images. Shorter than that of a prefetch: pins protect blobs from eviction only
/// after it.
const PIN_START_DELAY: Duration = Duration::from_secs(1);

/// Blobs that are downloaded at the same time. More: prefetches take bandwidth from the pulls of clients.
const MAX_PARALLEL_BLOBS: usize = 2;

/// Warms images after the start, and then by their schedule, until it is dropped.
pub async fn keep_warm(pull: Arc<Pull>, prefetch: Prefetch) {
    let platforms = platforms_or_default(&prefetch.platforms);
    let source = InProcessSource(pull);
    let delayed = |pause| if prefetch.schedule.is_by_the_second() { Duration::ZERO } else { pause };
    sleep(delayed(PREFETCH_START_DELAY)).await;
    loop {
        let mut is_complete = true;
        for image in &prefetch.images {
            is_complete &= warm(&source, image, &platforms).await.is_some();
        }
        let Some(next) = prefetch.schedule.next(Utc::now()) else { return };
        let jitter = Duration::from_millis(fastrand::u64(..JITTER_MILLIS));
        let next = if is_complete { next } else { next.min(OBSERVATION_TTL) };
        sleep(next + delayed(jitter)).await;
    }
}

/// Keeps pinned images cached, and passes their blobs to the store, until it is dropped.
pub async fn keep_pinned(pull: Arc<Pull>, pins: Vec<Pin>) {
    if pins.is_empty() {
        // A previous configuration may have had some.
        return pull.pin(HashSet::new());
    }
    let source = InProcessSource(pull.clone());
    sleep(PIN_START_DELAY).await;
    // An image whose lookup fails stays pinned with its previous blobs.
    let mut known: HashMap<(usize, &ImageName), Vec<Digest>> = HashMap::new();
    loop {
        let mut is_complete = true;
        for (nth, pin) in pins.iter().enumerate() {
            let platforms = platforms_or_default(&pin.platforms);
            for image in &pin.images {
                match warm(&source, image, &platforms).await {
                    Some(digests) => drop(known.insert((nth, image), digests)),
                    None => is_complete = false,
                }
                pull.pin(known.values().flatten().cloned().collect());
            }
        }
        sleep(if is_complete { HOUR } else { DEFAULT_TTL }).await;
    }
}

/// Downloads an image and returns its blobs; None if that failed. Does nothing if the registry's rate limit is almost
/// used up: the remaining pulls are for clients.
async fn warm(source: &InProcessSource, image: &ImageName, platforms: &Platforms) -> Option<Vec<Digest>> {
    if source.0.is_rate_limit_low(&source.repository(image)) {
        tracing::info!(%image, "prefetch skipped: rate limit remaining is low");
        return None;
    }
    let summary = warm::warm(source, std::slice::from_ref(image), platforms, MAX_PARALLEL_BLOBS, &NoProgress).await;
    if let Some((_, error)) = summary.failed.first() {
        tracing::warn!(%image, error, "prefetch failed");
        return None;
    }
    let (blobs, bytes, cached_bytes) = (summary.blobs, summary.bytes, summary.cached_bytes);
    tracing::info!(%image, blobs, bytes, cached_bytes, "prefetch finished");
    Some(summary.digests)
}

fn platforms_or_default(platforms: &[String]) -> Platforms {
    if platforms.is_empty() { Platforms::of_this_machine() } else { Platforms::These(platforms.to_vec()) }
}

/// Ignores progress: the log has one line for each image.
struct NoProgress;

impl WarmObserver for NoProgress {
    fn planned(&self, _: &ImageName, _: &ImagePlan) {}
    fn blob_started(&self, _: &PlannedBlob) {}
    fn blob_progressed(&self, _: &PlannedBlob, _: u64) {}
    fn blob_finished(&self, _: &PlannedBlob, _: &Result<WarmedBlob, String>) {}
}
