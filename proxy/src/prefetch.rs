//! `[[prefetch]]`: images that are kept fresh, by the clock. `[[pin]]`: images that stay.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use chrono::Utc;
use tokio::time::sleep;

use crate::config::{Pin, Prefetch};
use crate::oci::{Digest, ImageName};
use crate::pull::Pull;
use crate::times::{DEFAULT_TTL, HOUR, OBSERVATION_TTL};
use crate::warm::{self, ImagePlan, InProcessSource, PlannedBlob, Platforms, WarmObserver, WarmedBlob};

/// Nodes with the same clock do not all ask at once.
const JITTER_MILLIS: u64 = 60_000;

/// After the start peers are found and runtimes served first.
const AFTER_START: Duration = Duration::from_secs(10);

/// They are missed more than fresh ones.
const PINNED_AFTER_START: Duration = Duration::from_secs(1);

/// Blobs at a time: what clients want comes first.
const PARALLEL: usize = 2;

/// Warms images after the start and then by their schedule, for as long as it is polled.
pub async fn keep_warm(pull: Arc<Pull>, prefetch: Prefetch) {
    let platforms = wanted(&prefetch.platforms);
    let door = InProcessSource(pull);
    let put_off = |pause| if prefetch.schedule.is_by_the_second() { Duration::ZERO } else { pause };
    sleep(put_off(AFTER_START)).await;
    loop {
        let mut is_complete = true;
        for image in &prefetch.images {
            is_complete &= warm(&door, image, &platforms).await.is_some();
        }
        let Some(next) = prefetch.schedule.next(Utc::now()) else { return };
        let jitter = Duration::from_millis(fastrand::u64(..JITTER_MILLIS));
        let next = if is_complete { next } else { next.min(OBSERVATION_TTL) };
        sleep(next + put_off(jitter)).await;
    }
}

/// Keeps pinned images here, and tells the store which blobs they consist of, for as long as it is polled.
pub async fn keep_pinned(pull: Arc<Pull>, pins: Vec<Pin>) {
    let door = InProcessSource(pull.clone());
    sleep(PINNED_AFTER_START).await;
    // What cannot be looked up now is still pinned as it was.
    let mut known: HashMap<(usize, &ImageName), Vec<Digest>> = HashMap::new();
    loop {
        let mut complete = true;
        for (nth, pin) in pins.iter().enumerate() {
            let platforms = wanted(&pin.platforms);
            for image in &pin.images {
                match warm(&door, image, &platforms).await {
                    Some(digests) => drop(known.insert((nth, image), digests)),
                    None => complete = false,
                }
                pull.pin(known.values().flatten().cloned().collect());
            }
        }
        sleep(if complete { HOUR } else { DEFAULT_TTL }).await;
    }
}

/// Fetches an image, unless its registry allows few more pulls: these belong to clients. Returns what it consists of; None: it
/// is not whole here.
async fn warm(door: &InProcessSource, image: &ImageName, platforms: &Platforms) -> Option<Vec<Digest>> {
    if door.0.is_scarce(&door.place(image)) {
        tracing::info!(%image, "not fetched ahead: the registry allows few more pulls");
        return None;
    }
    let summary = warm::warm(door, std::slice::from_ref(image), platforms, PARALLEL, &NoProgress).await;
    if let Some((_, problem)) = summary.failed.first() {
        tracing::warn!(%image, problem, "not fetched ahead");
        return None;
    }
    let (blobs, bytes, kept) = (summary.blobs, summary.bytes, summary.kept_bytes);
    tracing::info!(%image, blobs, bytes, kept, "fetched ahead");
    Some(summary.digests)
}

fn wanted(platforms: &[String]) -> Platforms {
    if platforms.is_empty() { Platforms::of_this_machine() } else { Platforms::These(platforms.to_vec()) }
}

/// The log tells of the whole.
struct NoProgress;

impl WarmObserver for NoProgress {
    fn planned(&self, _: &ImageName, _: &ImagePlan) {}
    fn began(&self, _: &PlannedBlob) {}
    fn came(&self, _: &PlannedBlob, _: u64) {}
    fn ended(&self, _: &PlannedBlob, _: &Result<WarmedBlob, String>) {}
}
