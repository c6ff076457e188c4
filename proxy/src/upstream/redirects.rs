//! Remembered redirect targets of upstreams, for the lifetime of their signed URLs.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, OwnedMutexGuard};
use url::Url;

use crate::lifetimes::{ByLifetime, Lifetime};
use crate::times::DEFAULT_TTL;

/// By the URL that redirected.
pub(super) struct RedirectCache {
    targets: moka::future::Cache<Url, Target>,
    /// Held by the request that looks up a new target; the others wait for its result.
    lookups: moka::sync::Cache<Url, Arc<Mutex<()>>>,
}

#[derive(Clone)]
struct Target {
    url: Url,
    life: Duration,
}

/// Largest target URL that is remembered, in bytes: signed URLs have 1 to 2 KiB. A larger one is followed but looked up
/// each time.
const MAX_TARGET_BYTES: usize = 8 * 1024;

/// A signed URL is not reused this shortly before it expires: the response must start in time. Longer: more lookups.
/// Shorter: more requests to expired URLs.
const EXPIRY_MARGIN: Duration = Duration::from_secs(15);

impl RedirectCache {
    pub(super) fn new() -> Self {
        Self {
            targets: moka::future::Cache::builder().max_capacity(10_000).expire_after(ByLifetime).build(),
            lookups: moka::sync::Cache::builder().max_capacity(10_000).time_to_idle(DEFAULT_TTL).build(),
        }
    }

    /// Waits until no other request looks up this URL's target. If a signed URL expires under several connections, it
    /// is looked up once.
    pub(super) async fn lock_lookup(&self, url: &Url) -> OwnedMutexGuard<()> {
        self.lookups.get_with_by_ref(url, Arc::default).lock_owned().await
    }

    pub(super) async fn target(&self, url: &Url) -> Option<Url> {
        self.targets.get(url).await.map(|target| target.url)
    }

    pub(super) async fn remember(&self, from: &Url, target: Url) {
        if target.as_str().len() > MAX_TARGET_BYTES {
            return;
        }
        let life = life(&target).saturating_sub(EXPIRY_MARGIN);
        self.lookups.get_with_by_ref(from, Arc::default);
        self.targets.insert(from.clone(), Target { url: target, life }).await;
    }

    pub(super) async fn forget(&self, url: &Url) {
        self.targets.invalidate(url).await;
    }

    /// Whether this URL has redirected recently.
    pub(super) fn is_redirector(&self, url: &Url) -> bool {
        self.lookups.contains_key(url)
    }

    /// Forgets a target that failed, unless a newer one is known.
    pub(super) async fn forget_expired(&self, url: &Url, target: &Url) {
        if self.target(url).await.as_ref() == Some(target) {
            self.forget(url).await;
        }
    }
}

/// The lifetime in the signature: `X-Amz-Expires` (S3, R2) or `X-Goog-Expires` (GCS), in seconds since the signing,
/// which has just happened.
fn life(url: &Url) -> Duration {
    let seconds = url.query_pairs().find_map(|(key, value)| {
        let key = key.to_ascii_lowercase();
        matches!(key.as_str(), "x-amz-expires" | "x-goog-expires").then(|| value.parse().ok()).flatten()
    });
    seconds.map_or(DEFAULT_TTL, |seconds: u64| Duration::from_secs(seconds.min(3600)))
}

impl Lifetime for Target {
    fn life(&self) -> Duration {
        self.life
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signed_url_sets_its_lifetime() {
        let of = |url: &str| life(&Url::parse(url).unwrap()).as_secs();
        assert_eq!(of("https://s3/x?X-Amz-Expires=1200&X-Amz-Signature=y"), 1200);
        assert_eq!(of("https://gcs/x?x-goog-expires=300"), 300);
        assert_eq!(of("https://cdn/x?sig=y"), 60);
        assert_eq!(of("https://cdn/x?X-Amz-Expires=99999999"), 3600);
    }
}
