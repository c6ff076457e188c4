//! Tags are leases: what a tag meant, and when that was last known to be true.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use moka::Entry;
use moka::ops::compute::Op;

use crate::blocking::on_thread;
use crate::confirmed_at::ConfirmedAt;
use crate::oci::{Digest, Tag};
use crate::registries::RepositoryRef;
use crate::store::{Store, TagRecord};
use crate::times::{DEFAULT_TTL, TOUCH_INTERVAL};

/// Leases in memory, backed by record files.
pub struct Tags {
    leases: moka::sync::Cache<(String, Tag), CachedTag>,
    store: Arc<Store>,
    recorded: Arc<ConfirmedAt<(String, Tag), SystemTime>>,
}

/// What the upstream has just said a tag means.
pub struct Resolved<'a> {
    pub place: &'a RepositoryRef,
    pub tag: &'a Tag,
    pub digest: &'a Digest,
    pub checked_at: SystemTime,
    /// The client that wanted to know, of whose records the oldest go first.
    pub client: Option<IpAddr>,
}

/// The digest that a tag meant at a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CachedTag {
    pub digest: Digest,
    checked_at: SystemTime,
    /// The time in the record on disk.
    recorded_at: SystemTime,
}

const MAX_LEASES: u64 = 50_000;

impl Tags {
    pub fn new(store: Arc<Store>) -> Self {
        Self { leases: moka::sync::Cache::new(MAX_LEASES), store, recorded: Arc::new(ConfirmedAt::new(DEFAULT_TTL)) }
    }

    /// What a tag meant. A date in the future comes from a wrong clock and says nothing.
    pub async fn lease(&self, place: &RepositoryRef, tag: &Tag) -> Option<CachedTag> {
        self.known(place, tag).await.filter(CachedTag::is_dated)
    }

    /// The same, as far as it needs no disk.
    pub fn in_memory(&self, place: &RepositoryRef, tag: &Tag) -> Option<CachedTag> {
        self.leases.get(&(place.to_string(), tag.clone())).filter(CachedTag::is_dated)
    }

    async fn known(&self, place: &RepositoryRef, tag: &Tag) -> Option<CachedTag> {
        let key = (place.to_string(), tag.clone());
        if let Some(lease) = self.leases.get(&key) {
            return Some(lease);
        }
        let (store, place, tag) = (self.store.clone(), place.clone(), tag.clone());
        let read = move || store.records.tag(&place.registry, &place.repository, &tag);
        let record = on_thread(read).await?;
        let checked_at = UNIX_EPOCH.checked_add(Duration::from_secs(record.checked_at))?;
        let lease = CachedTag { digest: record.digest.parse().ok()?, checked_at, recorded_at: checked_at };
        // Another request may have resolved it anew since.
        Some(self.leases.entry(key).or_insert(lease).into_value())
    }

    /// The origin said at that time what the tag means. The youngest word wins.
    pub async fn renew(&self, resolved: Resolved<'_>) {
        let Resolved { place, tag, digest, checked_at, client } = resolved;
        // Into memory, if it is on disk.
        self.known(place, tag).await;
        let every = TOUCH_INTERVAL.min(place.rule.stale_for / 8);
        let mut is_to_be_recorded = false;
        let renewed = |known: Option<Entry<(String, Tag), CachedTag>>| {
            let known = known.map(Entry::into_value).filter(CachedTag::is_dated);
            if known.as_ref().is_some_and(|known| known.checked_at > checked_at) {
                return Op::Nop;
            }
            let recorded_at =
                known.filter(|known| known.is_recorded(digest, checked_at, every)).map(|known| known.recorded_at);
            is_to_be_recorded = recorded_at.is_none();
            Op::Put(CachedTag { digest: digest.clone(), checked_at, recorded_at: recorded_at.unwrap_or(checked_at) })
        };
        // At once, since two requests can renew a tag at the same time.
        self.leases.entry((place.to_string(), tag.clone())).and_compute_with(renewed);
        if !is_to_be_recorded {
            return;
        }
        let (store, recorded) = (self.store.clone(), self.recorded.clone());
        let (record, key) = (record(place, tag, digest, checked_at), (place.to_string(), tag.clone()));
        tokio::task::spawn_blocking(move || {
            recorded.record(key, checked_at, || store.records.put_tag(&record, client));
        });
    }

    /// The upstream has just said that there is no such tag. Of a digest's tags that is remembered for outages: whether
    /// an image has a signature must be known then as well. Of others it is not, since clients can invent any.
    pub fn forget(&self, place: &RepositoryRef, tag: &Tag) {
        let forgotten_at = SystemTime::now();
        let key = (place.to_string(), tag.clone());
        self.leases.invalidate(&key);
        let (store, recorded) = (self.store.clone(), self.recorded.clone());
        let (leases, place, tag) = (self.leases.clone(), place.clone(), tag.clone());
        let forget = move || {
            store.records.forget_tag(&place.registry, &place.repository, &tag);
            // Another request may have read the record just before, or renewed the tag since.
            leases.entry((place.to_string(), tag.clone())).and_compute_with(|known| match known {
                Some(known) if known.value().checked_at <= forgotten_at => Op::Remove,
                _ => Op::Nop,
            });
            // Where each client has rights of its own, "not found" is about those.
            if tag.is_of_digest() && !place.rule.asks_who() {
                store.records.put_absent(&place.registry, &place.repository, &tag);
            }
        };
        tokio::task::spawn_blocking(move || recorded.record(key, forgotten_at, forget));
    }

    /// Whether the upstream said last that there is no such tag.
    pub async fn was_absent(&self, place: &RepositoryRef, tag: &Tag) -> bool {
        if !tag.is_of_digest() || place.rule.asks_who() {
            return false;
        }
        let (store, place, tag) = (self.store.clone(), place.clone(), tag.clone());
        let known = move || store.records.is_absent(&place.registry, &place.repository, &tag);
        tokio::task::spawn_blocking(known).await.unwrap_or(false)
    }
}

fn record(place: &RepositoryRef, tag: &Tag, digest: &Digest, checked_at: SystemTime) -> TagRecord {
    TagRecord {
        registry: place.registry.to_string(),
        repository: place.repository.to_string(),
        tag: tag.to_string(),
        digest: digest.to_string(),
        checked_at: checked_at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
    }
}

impl CachedTag {
    fn is_dated(&self) -> bool {
        self.checked_at <= SystemTime::now()
    }

    /// Whether the record on disk says nearly the same as a renewal.
    fn is_recorded(&self, digest: &Digest, checked_at: SystemTime, every: Duration) -> bool {
        self.digest == *digest && checked_at.duration_since(self.recorded_at).is_ok_and(|since| since < every)
    }

    pub fn age(&self, now: SystemTime) -> Duration {
        now.duration_since(self.checked_at).unwrap_or_default()
    }

    /// Whether the tag may be believed without asking.
    pub fn is_fresh(&self, place: &RepositoryRef, tag: &Tag, now: SystemTime) -> bool {
        self.age(now) < place.rule.lease_of(tag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, DiskShare, Size};
    use crate::metrics::Metrics;
    use crate::registries::Registries;

    #[test]
    fn renewals_that_change_nothing_are_written_once_in_a_while() {
        let (hour, at) = (Duration::from_secs(3600), |minutes: u64| UNIX_EPOCH + Duration::from_secs(minutes * 60));
        let [old, new] = [b"a", b"b"].map(|bytes| Digest::of(bytes));
        let lease = CachedTag { digest: old.clone(), checked_at: at(30), recorded_at: at(10) };
        let table = [(&old, 31, true), (&old, 69, true), (&old, 70, false), (&new, 31, false), (&old, 9, false)];
        for (digest, minutes, recorded) in table {
            assert_eq!(lease.is_recorded(digest, at(minutes), hour), recorded, "{digest} at {minutes}");
        }
    }

    #[tokio::test]
    async fn a_date_in_the_future_says_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let store =
            Store::open(dir.path(), DiskShare::Size(Size(64 << 20)), DiskShare::Percent(0), 1 << 20, &Metrics::new())
                .await
                .unwrap();
        let tags = Tags::new(Arc::new(store));
        let registries = Registries::new(&Config::parse("", "test").unwrap());
        let registry: crate::oci::Registry = "docker.io".parse().unwrap();
        let rule = registries.rule(&registry, &"library/a".parse().unwrap()).clone();
        let place = RepositoryRef::new(rule, registry, "library/a".parse().unwrap());
        let (tag, now): (Tag, _) = ("1".parse().unwrap(), SystemTime::now());
        let [old, new] = [b"a", b"b"].map(|bytes| Digest::of(bytes));
        let renew =
            |digest, checked_at| tags.renew(Resolved { place: &place, tag: &tag, digest, checked_at, client: None });
        renew(&old, now + Duration::from_secs(3600)).await;
        assert_eq!(tags.lease(&place, &tag).await, None);
        renew(&new, now - Duration::from_secs(1)).await;
        assert_eq!(tags.lease(&place, &tag).await.unwrap().digest, new);
        renew(&old, now - Duration::from_secs(2)).await;
        assert_eq!(tags.lease(&place, &tag).await.unwrap().digest, new, "the youngest word wins");
    }
}
