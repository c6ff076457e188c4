//! Looks into the cache, and removes content from it, for operators.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::blocking::{on_thread, parsed};
use crate::fill::Fills;
use crate::oci::{Digest, ImageName, Reference, Registry, manifest};
use crate::registries::Registries;
use crate::store::{Found, SmallKind, Store, StoredBlob};
use crate::tags::Tags;

pub struct CacheAdmin {
    registries: Arc<Registries>,
    store: Arc<Store>,
    tags: Arc<Tags>,
    fills: Arc<Fills>,
}

/// What to remove from a cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PurgeTarget {
    /// A tag or a manifest, with all that it names.
    Image(ImageName),
    /// One manifest or blob.
    Digest(Digest),
    /// Everything that was downloaded from a registry.
    Registry(Registry),
}

/// What a purge has removed from one node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Purged {
    /// Records of tags and lists.
    pub records: u64,
    /// Manifests and blobs, without the small ones of a whole registry: these cannot be counted.
    pub objects: u64,
    pub bytes: u64,
    /// Downloads in progress of what was purged: they cache it again when they end.
    pub downloads: u64,
}

/// The large blobs on one node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheList {
    /// As many as were asked for, in the requested order.
    pub blobs: Vec<ListedBlob>,
    /// Number and size of all that match.
    pub total_blobs: u64,
    pub total_bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListedBlob {
    pub digest: String,
    pub bytes: u64,
    /// Seconds since it was used last.
    pub idle_seconds: u64,
    /// Whether it is evicted last.
    pub pinned: bool,
    /// Where it was first downloaded from; null: its record is lost.
    pub registry: Option<String>,
    pub repository: Option<String>,
}

/// The order of a list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheOrder {
    /// Largest first.
    #[default]
    Size,
    /// Most recently used first.
    Used,
}

/// Manifests of one image that a purge follows. More: one hostile index costs more reads.
const MAX_MANIFESTS: usize = 1_000;

impl PurgeTarget {
    /// `key` is `image`, `digest` or `registry`.
    pub fn parse(key: &str, value: &str) -> Result<Self, String> {
        match key {
            "image" => value.parse().map(Self::Image),
            "digest" => value
                .parse()
                .map(Self::Digest)
                .map_err(|_| format!("\"{value}\" is not a valid digest: expected sha256:...")),
            "registry" => value
                .parse()
                .map(Self::Registry)
                .map_err(|_| format!("\"{value}\" is not a valid registry: expected HOST[:PORT]")),
            _ => Err(format!("\"{key}\" is unknown: expected image, digest or registry")),
        }
    }
}

impl Purged {
    /// What two parts of a purge have removed.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            records: self.records + other.records,
            objects: self.objects + other.objects,
            bytes: self.bytes + other.bytes,
            downloads: self.downloads + other.downloads,
        }
    }
}

impl fmt::Display for PurgeTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Image(image) => image.fmt(f),
            Self::Digest(digest) => digest.fmt(f),
            Self::Registry(registry) => registry.fmt(f),
        }
    }
}

impl CacheAdmin {
    pub(super) fn new(registries: Arc<Registries>, store: Arc<Store>, tags: Arc<Tags>, fills: Arc<Fills>) -> Self {
        Self { registries, store, tags, fills }
    }

    /// The large blobs, at most `limit` of them.
    pub async fn list(&self, registry: Option<Registry>, order: CacheOrder, limit: usize) -> CacheList {
        let store = self.store.clone();
        let stored = on_thread(move || store.large.inventory()).await;
        listed(stored, registry.as_ref(), order, limit, SystemTime::now())
    }

    /// Removes content from this node, and `more` of an image, which other nodes know to belong to it. It goes on to its
    /// end, also if the caller does not wait. An error is text for operators.
    pub async fn purge(self: &Arc<Self>, target: PurgeTarget, more: HashSet<Digest>) -> Result<Purged, String> {
        let admin = self.clone();
        let purging = tokio::spawn(async move {
            let purged = match &target {
                PurgeTarget::Image(image) => admin.purge_image(image, more).await,
                PurgeTarget::Digest(digest) => admin.purge_digests(&HashSet::from([digest.clone()])).await,
                PurgeTarget::Registry(registry) => admin.purge_registry(registry).await?,
            };
            let Purged { records, objects, bytes, downloads } = purged;
            tracing::info!(%target, records, objects, bytes, downloads, "cache purged");
            Ok(purged)
        });
        purging.await.unwrap_or_else(|error| Err(error.to_string()))
    }

    /// The digests that belong to an image, as far as this node knows.
    pub async fn names(&self, image: &ImageName) -> HashSet<Digest> {
        let root = match &image.reference {
            Reference::Digest(digest) => Some(digest.clone()),
            Reference::Tag(tag) => {
                let repo_ref = self.registries.rules().of_image(image);
                self.tags.resolution(&repo_ref, tag).await.map(|known| known.digest)
            }
        };
        match root {
            Some(root) => self.named_by(root).await,
            None => HashSet::new(),
        }
    }

    /// The TTL of a tag ends now: the next request revalidates it. False: the tag is not cached.
    pub async fn revalidate(&self, image: &ImageName) -> bool {
        let repo_ref = self.registries.rules().of_image(image);
        let Reference::Tag(tag) = &image.reference else { return false };
        self.tags.expire(&repo_ref, tag).await
    }

    async fn purge_image(&self, image: &ImageName, more: HashSet<Digest>) -> Purged {
        let mut digests = self.names(image).await;
        digests.extend(more);
        let purged = self.purge_digests(&digests).await;
        let Reference::Tag(tag) = &image.reference else { return purged };
        let repo_ref = self.registries.rules().of_image(image);
        // Last, so that the purge can be repeated by name: also while downloads will cache something again.
        let is_known = if purged.downloads > 0 {
            self.tags.expire(&repo_ref, tag).await
        } else {
            let known = self.tags.resolution(&repo_ref, tag).await;
            self.tags.purge(&repo_ref, tag).await;
            known.is_some()
        };
        Purged { records: u64::from(is_known), ..purged }
    }

    /// A manifest, and all that it and its manifests name.
    async fn named_by(&self, root: Digest) -> HashSet<Digest> {
        let (mut all, mut manifests) = (HashSet::from([root.clone()]), vec![root]);
        let mut read = 0;
        while let Some(digest) = manifests.pop().filter(|_| read < MAX_MANIFESTS) {
            let Some(Found::Small { object, .. }) = self.store.find(&digest, SmallKind::Manifest).await else {
                continue;
            };
            read += 1;
            let named = parsed(&object.bytes, manifest::named).await;
            let new = named.into_iter().map(|(digest, _)| digest).filter(|digest| all.insert(digest.clone()));
            // Blobs are looked up as manifests as well, in vain.
            manifests.extend(new);
        }
        all
    }

    async fn purge_digests(&self, digests: &HashSet<Digest>) -> Purged {
        let mut purged = Purged::default();
        for digest in digests {
            let mut sizes = self.store.small.purge(digest).await;
            let (store, large) = (self.store.clone(), digest.clone());
            sizes.extend(on_thread(move || store.large.purge(&large)).await);
            purged.objects += sizes.len() as u64;
            purged.bytes += sizes.iter().sum::<u64>();
        }
        purged.downloads = self.fills.count(|key| digests.contains(&key.digest));
        purged
    }

    async fn purge_registry(&self, registry: &Registry) -> Result<Purged, String> {
        let (store, of) = (self.store.clone(), registry.clone());
        let purged = on_thread(move || store.purge_registry(&of)).await;
        self.tags.purge_registry(registry);
        let (sizes, records) = purged.map_err(|error| {
            format!("purged, but objects up to 256 KiB come back after a restart: the time of the purge cannot be written: {error}")
        })?;
        Ok(Purged {
            records: records as u64,
            objects: sizes.len() as u64,
            bytes: sizes.iter().sum(),
            downloads: self.fills.count(|key| key.registry == *registry),
        })
    }
}

fn listed(
    stored: Vec<StoredBlob>,
    registry: Option<&Registry>,
    order: CacheOrder,
    limit: usize,
    now: SystemTime,
) -> CacheList {
    let is_wanted = |blob: &StoredBlob| {
        registry.is_none_or(|wanted| blob.provenance.as_ref().is_some_and(|from| from.registry == wanted.as_str()))
    };
    let mut stored: Vec<StoredBlob> = stored.into_iter().filter(is_wanted).collect();
    match order {
        CacheOrder::Size => stored.sort_by_key(|blob| std::cmp::Reverse(blob.bytes)),
        CacheOrder::Used => stored.sort_by_key(|blob| std::cmp::Reverse(blob.last_used)),
    }
    let (total_blobs, total_bytes) = (stored.len() as u64, stored.iter().map(|blob| blob.bytes).sum());
    let blobs = stored.into_iter().take(limit).map(|blob| {
        let (registry, repository) = blob.provenance.map(|from| (from.registry, from.repository)).unzip();
        ListedBlob {
            digest: blob.digest.to_string(),
            bytes: blob.bytes,
            idle_seconds: now.duration_since(blob.last_used).unwrap_or_default().as_secs(),
            pinned: blob.is_pinned,
            registry,
            repository,
        }
    });
    CacheList { blobs: blobs.collect(), total_blobs, total_bytes }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;
    use crate::provenance::Provenance;

    fn blob(text: &str, registry: &str, bytes: u64, used: u64) -> StoredBlob {
        let provenance = Provenance { rule: "*".into(), registry: registry.into(), repository: "team/app".into() };
        StoredBlob {
            digest: Digest::of(text.as_bytes()),
            bytes,
            last_used: UNIX_EPOCH + Duration::from_secs(used),
            is_pinned: false,
            provenance: Some(provenance),
        }
    }

    #[test]
    fn list_is_filtered_sorted_and_cut_off() {
        let stored = || vec![blob("a", "a.io", 10, 3), blob("b", "b.io", 30, 1), blob("c", "a.io", 20, 2)];
        let list = |registry: Option<&str>, order, limit| {
            let registry = registry.map(|registry| registry.parse().unwrap());
            let list = listed(stored(), registry.as_ref(), order, limit, UNIX_EPOCH + Duration::from_secs(10));
            (list.blobs.iter().map(|blob| blob.bytes).collect::<Vec<_>>(), list.total_blobs, list.total_bytes)
        };
        assert_eq!(list(None, CacheOrder::Size, 10), (vec![30, 20, 10], 3, 60));
        assert_eq!(list(None, CacheOrder::Used, 2), (vec![10, 20], 3, 60));
        assert_eq!(list(Some("a.io"), CacheOrder::Size, 10), (vec![20, 10], 2, 30));
        assert_eq!(list(Some("c.io"), CacheOrder::Size, 10), (vec![], 0, 0));
    }

    #[test]
    fn target_names_one_kind() {
        let digest = Digest::of(b"x");
        assert_eq!(PurgeTarget::parse("digest", digest.as_str()), Ok(PurgeTarget::Digest(digest)));
        assert!(matches!(PurgeTarget::parse("image", "ghcr.io/team/app:1"), Ok(PurgeTarget::Image(_))));
        assert!(matches!(PurgeTarget::parse("registry", "ghcr.io"), Ok(PurgeTarget::Registry(_))));
        for (key, value) in [("digest", "sha256:short"), ("image", "A:B:C"), ("registry", "a/b"), ("all", "x")] {
            assert!(PurgeTarget::parse(key, value).is_err(), "{key}={value}");
        }
    }
}
