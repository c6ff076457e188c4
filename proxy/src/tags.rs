//! Cached tag resolutions: the digest of a tag, and when the upstream last confirmed it.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use moka::Entry;
use moka::ops::compute::Op;

use crate::blocking::on_thread;
use crate::confirmed_at::ConfirmedAt;
use crate::oci::{Digest, Registry, Tag};
use crate::registries::RepositoryRef;
use crate::store::{Store, TagRecord};
use crate::times::{DEFAULT_TTL, TOUCH_INTERVAL};

/// Tag resolutions in memory, backed by record files.
pub struct Tags {
    resolutions: moka::sync::Cache<(String, Tag), CachedTag>,
    store: Arc<Store>,
    recorded: Arc<ConfirmedAt<(String, Tag), SystemTime>>,
}

/// A tag that the upstream has just resolved.
pub struct Resolved<'a> {
    pub repo_ref: &'a RepositoryRef,
    pub tag: &'a Tag,
    pub digest: &'a Digest,
    pub checked_at: SystemTime,
    /// The client that requested it: the record counts against its share of records.
    pub client: Option<IpAddr>,
}

/// The digest of a tag at a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CachedTag {
    pub digest: Digest,
    checked_at: SystemTime,
    /// The time in the record on disk.
    recorded_at: SystemTime,
    /// When an operator has ended its TTL: what was checked before is not fresh. A restart forgets it.
    expired_at: Option<SystemTime>,
}

/// Tag resolutions in memory. More: more memory. Fewer: more look-ups read their record from the disk.
const MAX_CACHED_TAGS: u64 = 50_000;

impl Tags {
    pub fn new(store: Arc<Store>) -> Self {
        Self {
            resolutions: moka::sync::Cache::new(MAX_CACHED_TAGS),
            store,
            recorded: Arc::new(ConfirmedAt::new(DEFAULT_TTL)),
        }
    }

    /// The last resolution of a tag, fresh or stale. A time in the future comes from a wrong clock and is ignored.
    pub async fn resolution(&self, repo_ref: &RepositoryRef, tag: &Tag) -> Option<CachedTag> {
        self.known(repo_ref, tag).await.filter(CachedTag::is_plausible)
    }

    /// The same from memory alone.
    pub fn in_memory(&self, repo_ref: &RepositoryRef, tag: &Tag) -> Option<CachedTag> {
        self.resolutions.get(&(repo_ref.to_string(), tag.clone())).filter(CachedTag::is_plausible)
    }

    async fn known(&self, repo_ref: &RepositoryRef, tag: &Tag) -> Option<CachedTag> {
        let key = (repo_ref.to_string(), tag.clone());
        if let Some(cached) = self.resolutions.get(&key) {
            return Some(cached);
        }
        let (store, repo_ref, tag) = (self.store.clone(), repo_ref.clone(), tag.clone());
        let read = move || store.records.tag(&repo_ref.registry, &repo_ref.repository, &tag);
        let record = on_thread(read).await?;
        let checked_at = UNIX_EPOCH.checked_add(Duration::from_secs(record.checked_at))?;
        let digest = record.digest.parse().ok()?;
        let cached = CachedTag { digest, checked_at, recorded_at: checked_at, expired_at: None };
        // Another request may have resolved it meanwhile: its entry stays.
        Some(self.resolutions.entry(key).or_insert(cached).into_value())
    }

    /// Stores a resolution, unless a younger one is stored.
    pub async fn renew(&self, resolved: Resolved<'_>) {
        let Resolved { repo_ref, tag, digest, checked_at, client } = resolved;
        // Loads the record into memory, if there is one on disk.
        self.known(repo_ref, tag).await;
        let write_interval = TOUCH_INTERVAL.min(repo_ref.rule.stale_if_error / 8);
        let mut must_record = false;
        let renewed = |known: Option<Entry<(String, Tag), CachedTag>>| {
            let known = known.map(Entry::into_value).filter(CachedTag::is_plausible);
            if known.as_ref().is_some_and(|known| known.checked_at > checked_at) {
                return Op::Nop;
            }
            let expired_at = known.as_ref().and_then(|known| known.expired_at);
            let recorded_at = known
                .filter(|known| known.is_recorded(digest, checked_at, write_interval))
                .map(|known| known.recorded_at);
            must_record = recorded_at.is_none();
            let recorded_at = recorded_at.unwrap_or(checked_at);
            Op::Put(CachedTag { digest: digest.clone(), checked_at, recorded_at, expired_at })
        };
        // Compared and replaced in one step: two requests may renew a tag at the same time.
        self.resolutions.entry((repo_ref.to_string(), tag.clone())).and_compute_with(renewed);
        if !must_record {
            return;
        }
        let (store, recorded) = (self.store.clone(), self.recorded.clone());
        let (record, key) = (record(repo_ref, tag, digest, checked_at), (repo_ref.to_string(), tag.clone()));
        tokio::task::spawn_blocking(move || {
            recorded.record(key, checked_at, || store.records.put_tag(&record, client));
        });
    }

    /// Removes a tag, whatever the upstream says.
    pub async fn purge(&self, repo_ref: &RepositoryRef, tag: &Tag) {
        let (removal, key) = (self.removal(repo_ref, tag), (repo_ref.to_string(), tag.clone()));
        let recorded = self.recorded.clone();
        on_thread(move || recorded.record(key, removal.at, || removal.run())).await;
    }

    /// Removes the tags of a registry from memory. Its records are removed by the store.
    pub fn purge_registry(&self, registry: &Registry) {
        let prefix = format!("{registry}/");
        let keys = self.resolutions.iter().map(|(key, _)| key).filter(|key| key.0.starts_with(&prefix));
        keys.for_each(|key| self.resolutions.invalidate(&*key));
    }

    /// The TTL of a tag ends now, also if it is immutable. It can still be served stale. False: the tag is not cached.
    pub async fn expire(&self, repo_ref: &RepositoryRef, tag: &Tag) -> bool {
        if self.resolution(repo_ref, tag).await.is_none() {
            return false;
        }
        let key = (repo_ref.to_string(), tag.clone());
        self.resolutions.entry(key).and_compute_with(|known| match known.map(Entry::into_value) {
            Some(known) => Op::Put(CachedTag { expired_at: Some(SystemTime::now()), ..known }),
            None => Op::Nop,
        });
        true
    }

    /// Removes a tag that the upstream has just not found. For tags named after a digest the absence is recorded:
    /// whether an image has a signature must be known in an outage as well. Other tags are not recorded: clients can
    /// invent any.
    pub fn forget(&self, repo_ref: &RepositoryRef, tag: &Tag) {
        let (removal, key) = (self.removal(repo_ref, tag), (repo_ref.to_string(), tag.clone()));
        let (recorded, store) = (self.recorded.clone(), self.store.clone());
        let removed_at = removal.at;
        // With upstream authorization, "not found" may be about one principal's rights.
        let is_absent = tag.is_of_digest() && !repo_ref.rule.is_passthrough();
        let (repo_ref, tag) = (repo_ref.clone(), tag.clone());
        let forget = move || {
            removal.run();
            if is_absent {
                store.records.put_absent(&repo_ref.registry, &repo_ref.repository, &tag);
            }
        };
        tokio::task::spawn_blocking(move || recorded.record(key, removed_at, forget));
    }

    /// Removes a tag from memory, and prepares the removal of its record.
    fn removal(&self, repo_ref: &RepositoryRef, tag: &Tag) -> TagRemoval {
        self.resolutions.invalidate(&(repo_ref.to_string(), tag.clone()));
        TagRemoval {
            at: SystemTime::now(),
            resolutions: self.resolutions.clone(),
            store: self.store.clone(),
            repo_ref: repo_ref.clone(),
            tag: tag.clone(),
        }
    }

    /// Whether the upstream did not find the tag when it was last requested.
    pub async fn was_absent(&self, repo_ref: &RepositoryRef, tag: &Tag) -> bool {
        if !tag.is_of_digest() || repo_ref.rule.is_passthrough() {
            return false;
        }
        let (store, repo_ref, tag) = (self.store.clone(), repo_ref.clone(), tag.clone());
        let known = move || store.records.is_absent(&repo_ref.registry, &repo_ref.repository, &tag);
        tokio::task::spawn_blocking(known).await.unwrap_or(false)
    }
}

/// The removal of a tag's record.
struct TagRemoval {
    at: SystemTime,
    resolutions: moka::sync::Cache<(String, Tag), CachedTag>,
    store: Arc<Store>,
    repo_ref: RepositoryRef,
    tag: Tag,
}

impl TagRemoval {
    /// Blocks on the disk.
    fn run(&self) {
        let Self { at, resolutions, store, repo_ref, tag } = self;
        store.records.forget_tag(&repo_ref.registry, &repo_ref.repository, tag);
        // Another request may have read the record just before, or resolved the tag since.
        resolutions.entry((repo_ref.to_string(), tag.clone())).and_compute_with(|known| match known {
            Some(known) if known.value().checked_at <= *at => Op::Remove,
            _ => Op::Nop,
        });
    }
}

fn record(repo_ref: &RepositoryRef, tag: &Tag, digest: &Digest, checked_at: SystemTime) -> TagRecord {
    TagRecord {
        registry: repo_ref.registry.to_string(),
        repository: repo_ref.repository.to_string(),
        tag: tag.to_string(),
        digest: digest.to_string(),
        checked_at: checked_at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
    }
}

impl CachedTag {
    fn is_plausible(&self) -> bool {
        self.checked_at <= SystemTime::now()
    }

    /// Whether the record on disk has the same digest, and is young enough not to be written again.
    fn is_recorded(&self, digest: &Digest, checked_at: SystemTime, write_interval: Duration) -> bool {
        self.digest == *digest && checked_at.duration_since(self.recorded_at).is_ok_and(|since| since < write_interval)
    }

    pub fn age(&self, now: SystemTime) -> Duration {
        now.duration_since(self.checked_at).unwrap_or_default()
    }

    /// Whether the tag may be used without a request to its owner or upstream.
    pub fn is_fresh(&self, repo_ref: &RepositoryRef, tag: &Tag, now: SystemTime) -> bool {
        self.expired_at.is_none_or(|at| self.checked_at > at) && self.age(now) < repo_ref.rule.ttl_of(tag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, DiskShare, Size};
    use crate::metrics::Metrics;
    use crate::registries::Registries;

    #[test]
    fn unchanged_renewal_is_written_once_per_interval() {
        let (hour, at) = (Duration::from_secs(3600), |minutes: u64| UNIX_EPOCH + Duration::from_secs(minutes * 60));
        let [old, new] = [b"a", b"b"].map(|bytes| Digest::of(bytes));
        let cached = CachedTag { digest: old.clone(), checked_at: at(30), recorded_at: at(10), expired_at: None };
        let table = [(&old, 31, true), (&old, 69, true), (&old, 70, false), (&new, 31, false), (&old, 9, false)];
        for (digest, minutes, recorded) in table {
            assert_eq!(cached.is_recorded(digest, at(minutes), hour), recorded, "{digest} at {minutes}");
        }
    }

    #[tokio::test]
    async fn resolution_with_a_future_time_is_ignored() {
        let dir = tempfile::tempdir().unwrap();
        let store =
            Store::open(dir.path(), DiskShare::Size(Size(64 << 20)), DiskShare::Percent(0), 1 << 20, &Metrics::new())
                .await
                .unwrap();
        let tags = Tags::new(Arc::new(store));
        let registries = Registries::new(&Config::parse("", "test").unwrap());
        let registry: crate::oci::Registry = "docker.io".parse().unwrap();
        let rule = registries.rule(&registry, &"library/a".parse().unwrap());
        let repo_ref = RepositoryRef::new(rule, registry, "library/a".parse().unwrap());
        let (tag, now): (Tag, _) = ("1".parse().unwrap(), SystemTime::now());
        let [old, new] = [b"a", b"b"].map(|bytes| Digest::of(bytes));
        let renew = |digest, checked_at| {
            tags.renew(Resolved { repo_ref: &repo_ref, tag: &tag, digest, checked_at, client: None })
        };
        renew(&old, now + Duration::from_secs(3600)).await;
        assert_eq!(tags.resolution(&repo_ref, &tag).await, None);
        renew(&new, now - Duration::from_secs(1)).await;
        assert_eq!(tags.resolution(&repo_ref, &tag).await.unwrap().digest, new);
        renew(&old, now - Duration::from_secs(2)).await;
        assert_eq!(tags.resolution(&repo_ref, &tag).await.unwrap().digest, new, "the youngest resolution wins");
    }
}
