//! Where an upstream's redirects led, for as long as the signed URLs live.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, OwnedMutexGuard};
use url::Url;

use crate::lifetimes::{ByLifetime, Lifetime};
use crate::times::DEFAULT_TTL;

/// Targets by the URL that redirected.
pub(super) struct RedirectCache {
    targets: moka::future::Cache<Url, Target>,
    /// Who asks for a new target; the others wait for what it finds.
    turns: moka::sync::Cache<Url, Arc<Mutex<()>>>,
}

#[derive(Clone)]
struct Target {
    url: Url,
    life: Duration,
}

/// Longer ones are followed, and asked for anew each time, in bytes: signed URLs have one or two KiB.
const LONGEST: usize = 8 * 1024;

/// Not reused this shortly before its end: the answer has to begin before that.
const MARGIN: Duration = Duration::from_secs(15);

impl RedirectCache {
    pub(super) fn new() -> Self {
        Self {
            targets: moka::future::Cache::builder().max_capacity(10_000).expire_after(ByLifetime).build(),
            turns: moka::sync::Cache::builder().max_capacity(10_000).time_to_idle(DEFAULT_TTL).build(),
        }
    }

    /// Waits until nobody else asks where this URL leads. A signed URL that expires under several
    /// connections is so asked for once.
    pub(super) async fn turn(&self, url: &Url) -> OwnedMutexGuard<()> {
        self.turns.get_with_by_ref(url, Arc::default).lock_owned().await
    }

    pub(super) async fn target(&self, url: &Url) -> Option<Url> {
        self.targets.get(url).await.map(|target| target.url)
    }

    pub(super) async fn remember(&self, from: &Url, target: Url) {
        if target.as_str().len() > LONGEST {
            return;
        }
        let life = life(&target).saturating_sub(MARGIN);
        self.turns.get_with_by_ref(from, Arc::default);
        self.targets.insert(from.clone(), Target { url: target, life }).await;
    }

    pub(super) async fn forget(&self, url: &Url) {
        self.targets.invalidate(url).await;
    }

    /// Whether it lately led somewhere.
    pub(super) fn is_redirector(&self, url: &Url) -> bool {
        self.turns.contains_key(url)
    }

    /// Forgets a target that no longer works, unless a newer one is known.
    pub(super) async fn expired(&self, url: &Url, target: &Url) {
        if self.target(url).await.as_ref() == Some(target) {
            self.forget(url).await;
        }
    }
}

/// What the signature says: `X-Amz-Expires` (S3, R2) and `X-Goog-Expires` (GCS), in seconds from
/// the signing, which has just happened.
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
    fn signed_urls_say_how_long_they_live() {
        let of = |url: &str| life(&Url::parse(url).unwrap()).as_secs();
        assert_eq!(of("https://s3/x?X-Amz-Expires=1200&X-Amz-Signature=y"), 1200);
        assert_eq!(of("https://gcs/x?x-goog-expires=300"), 300);
        assert_eq!(of("https://cdn/x?sig=y"), 60);
        assert_eq!(of("https://cdn/x?X-Amz-Expires=99999999"), 3600);
    }
}
