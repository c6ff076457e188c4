//! Where repositories were served from, for blob requests that name no registry.
//!
//! Repositories of different registries may have the same name. Whoever served it first is asked first, so that nobody
//! takes a name from another by serving something under it later. What only one of several could prove is not passed on
//! unproven, unless it comes from the first, and nobody else has named it in a manifest.

use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;

use crate::blocking::on_thread;
use crate::oci::{Digest, Registry, Repository, manifest};
use crate::registries::RepositoryRef;
use crate::store::{RepositoryRecord, Store};

/// The registries that have served each repository.
pub(super) struct RegistryHints {
    known: moka::sync::Cache<Repository, Arc<[Registry]>>,
    store: Arc<Store>,
    /// Read, changed and written by one at a time.
    remembering: Mutex<()>,
    /// Who has named a blob in a manifest of a repository.
    naming: moka::sync::Cache<(Repository, Digest), RepositoryNames>,
    /// How long the blobs of those manifests are: what replaces a missing `Content-Length`. What has an entry is known
    /// to be held by the registry in that repository.
    lengths: moka::sync::Cache<(Registry, Repository, Digest), u64>,
    /// Manifests that were read for both.
    read: moka::sync::Cache<(Registry, Repository, Digest), ReadAs>,
}

#[derive(Clone, PartialEq, Eq)]
enum RepositoryNames {
    One(Registry),
    Several,
}

/// What a manifest was read as.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ReadAs {
    /// dray served it under this name: from a copy that another repository may have brought.
    AsServed,
    /// The registry holds it there.
    AsHeld,
}

/// Of one repository.
const MOST: usize = 4;

const MAX_REPOSITORIES: u64 = 50_000;

/// Manifests, and blobs that they name, of which something is remembered; a blob takes some 700 bytes. More: a node whose tags
/// move grows for hours, by 73 MB with 100,000 blobs. Fewer: content that is pulled again after thousands of other images costs
/// a request for its existence, and a blob without `Content-Length` another one for its length.
const MAX_MANIFESTS: u64 = 5_000;
const MAX_BLOBS: u64 = 20_000;

/// Blobs of one manifest that are remembered. More: one manifest of 4 MiB pushes out what others name. Fewer: a blob of an
/// unusually long manifest needs a `Content-Length` of the upstream.
const MAX_NAMED: usize = 4_096;

impl RegistryHints {
    pub(super) fn new(store: Arc<Store>) -> Self {
        Self {
            known: moka::sync::Cache::new(MAX_REPOSITORIES),
            store,
            remembering: Mutex::default(),
            naming: moka::sync::Cache::new(MAX_BLOBS),
            lengths: moka::sync::Cache::new(MAX_BLOBS),
            read: moka::sync::Cache::new(MAX_MANIFESTS),
        }
    }

    /// Those of a repository, in the order in which to ask them.
    pub(super) async fn of(self: &Arc<Self>, repository: &Repository) -> Arc<[Registry]> {
        if let Some(known) = self.known.get(repository) {
            return known;
        }
        let (homes, repository) = (self.clone(), repository.clone());
        on_thread(move || homes.read(&repository)).await
    }

    /// Blocks on the disk.
    fn read(&self, repository: &Repository) -> Arc<[Registry]> {
        self.known.get_with_by_ref(repository, || self.store.records.repository(repository).into())
    }

    /// Whether another registry may be meant. That nobody else is known to have named a blob says nothing for those who
    /// came later: what the first one has named may be forgotten. Only of a repository that was looked up with [`Self::of`].
    pub(super) fn may_be_anothers(&self, place: &RepositoryRef, digest: &Digest) -> bool {
        let Some(homes) = self.known.get(&place.repository) else { return true };
        let is_first = || homes.first() == Some(&place.registry);
        let naming = || self.naming.get(&(place.repository.clone(), digest.clone()));
        homes.len() > 1 && !(is_first() && naming() == Some(RepositoryNames::One(place.registry.clone())))
    }

    /// How long a blob is by a manifest of the same repository. Another repository's manifest may lie about it.
    pub(super) fn length_of(&self, place: &RepositoryRef, digest: &Digest) -> Option<u64> {
        self.lengths.get(&(place.registry.clone(), place.repository.clone(), digest.clone()))
    }

    /// Remembers that the registry holds something in a repository.
    pub(super) fn holds(&self, place: &RepositoryRef, digest: &Digest, length: u64) {
        self.lengths.insert((place.registry.clone(), place.repository.clone(), digest.clone()), length);
    }

    /// A registry has served a manifest of a repository. `is_held` says whether it is known to hold it there: then it holds
    /// what the manifest names as well.
    pub(super) async fn served(
        self: &Arc<Self>,
        place: &RepositoryRef,
        digest: &Digest,
        bytes: &Bytes,
        is_held: impl FnOnce() -> bool,
    ) {
        let key = (place.registry.clone(), place.repository.clone(), digest.clone());
        let before = self.read.get(&key);
        if before == Some(ReadAs::AsHeld) {
            // What it named stays known for longer than that it is held.
            if self.length_of(place, digest).is_none() {
                self.holds(place, digest, bytes.len() as u64);
            }
            return;
        }
        let now = if is_held() { ReadAs::AsHeld } else { ReadAs::AsServed };
        if before == Some(now) {
            return;
        }
        if now == ReadAs::AsHeld {
            self.holds(place, digest, bytes.len() as u64);
        }
        let (homes, place, bytes) = (self.clone(), place.clone(), bytes.clone());
        // A manifest of some megabytes takes a while.
        on_thread(move || {
            homes.learn(&place, &bytes, now);
            homes.remember(&place);
        })
        .await;
        self.read.insert(key, now);
    }

    fn learn(&self, place: &RepositoryRef, bytes: &[u8], read: ReadAs) {
        for (named, length) in manifest::named(bytes).into_iter().take(MAX_NAMED) {
            if let Some(length) = length.filter(|_| read == ReadAs::AsHeld) {
                self.holds(place, &named, length);
            }
            self.named_by(place, named);
        }
    }

    fn named_by(&self, place: &RepositoryRef, blob: Digest) {
        let registry = &place.registry;
        let naming = self.naming.entry((place.repository.clone(), blob));
        naming.and_upsert_with(|known| match known.map(moka::Entry::into_value) {
            Some(RepositoryNames::One(known)) if known != *registry => RepositoryNames::Several,
            Some(known) => known,
            None => RepositoryNames::One(registry.clone()),
        });
    }

    /// Blocks on the disk.
    fn remember(&self, place: &RepositoryRef) {
        let (registry, repository) = (&place.registry, &place.repository);
        // Two registries may serve a name at the same time.
        let _turn = self.remembering.lock();
        let Some(homes) = with(&self.read(repository), registry, repository) else { return };
        self.store.records.put_repository(&RepositoryRecord::new(repository, &homes));
        self.known.insert(repository.clone(), homes.into());
    }
}

/// The homes of a repository with one more. None: it is no new one.
fn with(known: &[Registry], registry: &Registry, repository: &Repository) -> Option<Vec<Registry>> {
    // Such names without a registry are Docker Hub's, which is also what those mean who name none.
    let is_hubs = repository.as_str().starts_with("library/");
    if known.contains(registry) || (is_hubs && !registry.is_docker_hub()) {
        return None;
    }
    let mut homes = known.to_vec();
    if registry.is_docker_hub() {
        homes.insert(0, registry.clone());
        homes.truncate(MOST);
    } else {
        // One too many is only exchanged for the last.
        homes.truncate(MOST - 1);
        homes.push(registry.clone());
    }
    Some(homes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn homes(repository: &str, served: &[&str]) -> Vec<String> {
        let repository = repository.parse().unwrap();
        let mut homes = Vec::new();
        for registry in served {
            homes = with(&homes, &registry.parse().unwrap(), &repository).unwrap_or(homes);
        }
        homes.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn who_served_a_name_first_keeps_it() {
        assert_eq!(homes("team/app", &["ghcr.io", "evil.example", "ghcr.io"]), ["ghcr.io", "evil.example"]);
        assert_eq!(homes("team/app", &["a.io", "b.io", "c.io", "d.io", "e.io"]), ["a.io", "b.io", "c.io", "e.io"]);
    }

    #[test]
    fn docker_hub_is_what_such_requests_mean() {
        assert_eq!(homes("team/app", &["evil.example", "docker.io"]), ["docker.io", "evil.example"]);
        assert_eq!(homes("library/alpine", &["evil.example", "docker.io", "ghcr.io"]), ["docker.io"]);
    }
}
