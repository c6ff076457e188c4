//! Which registries have served a repository, for blob requests that name no registry.
//!
//! Repositories of different registries may have the same name. The registry that served it first is requested first,
//! so that another registry cannot take over a name by serving it later. If several registries have served the name,
//! bytes are verified before they are sent. The exception is the first registry, if no other has named the blob in a
//! manifest.

use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;

use crate::blocking::on_thread;
use crate::oci::{Digest, Registry, Repository, manifest};
use crate::provenance::Provenance;
use crate::registries::RepositoryRef;
use crate::store::{RepositoryRecord, Store};

/// The registries that have served each repository.
pub(super) struct RegistryHints {
    known: moka::sync::Cache<Repository, Arc<[Registry]>>,
    store: Arc<Store>,
    /// Held while a record is read, changed and written.
    remembering: Mutex<()>,
    /// Which registries have named a blob in a manifest of a repository.
    naming: moka::sync::Cache<(Repository, Digest), RepositoryNames>,
    /// Lengths of the objects that a registry is known to hold in a repository. They replace a missing
    /// `Content-Length`.
    lengths: moka::sync::Cache<(Registry, Repository, Digest), u64>,
    /// Manifests whose blobs are in both caches.
    read: moka::sync::Cache<(Registry, Repository, Digest), ReadAs>,
}

#[derive(Clone, PartialEq, Eq)]
enum RepositoryNames {
    One(Registry),
    Several,
}

/// What is known of a manifest that was served.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ReadAs {
    /// dray served it under this name, possibly from another repository's copy.
    AsServed,
    /// The registry holds it in this repository.
    AsHeld,
}

/// Registries of one repository. More: more upstreams are tried for each miss. Fewer: content of further registries is
/// only found if the client names the registry.
const MAX_REGISTRIES: usize = 4;

/// Repositories in memory. More: more memory. Fewer: more lookups read their record from the disk.
const MAX_REPOSITORIES: u64 = 50_000;

/// Manifests and blobs that are remembered; a blob takes some 700 bytes. More: memory grows for hours while tags move,
/// by 73 MB with 100,000 blobs. Fewer: content that is pulled again after thousands of other images costs a request for
/// its existence. A blob without `Content-Length` costs another one for its length.
const MAX_MANIFESTS: u64 = 5_000;
const MAX_BLOBS: u64 = 20_000;

/// Blobs of one manifest that are remembered. More: one manifest of 4 MiB evicts the blobs of others. Fewer: a blob of
/// an unusually long manifest needs a `Content-Length` of the upstream.
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

    /// The registries of a repository, in the order to request them.
    pub(super) async fn registries_of(self: &Arc<Self>, repository: &Repository) -> Arc<[Registry]> {
        if let Some(known) = self.known.get(repository) {
            return known;
        }
        let (registries, repository) = (self.clone(), repository.clone());
        on_thread(move || registries.read(&repository)).await
    }

    /// Blocks on the disk.
    fn read(&self, repository: &Repository) -> Arc<[Registry]> {
        self.known.get_with_by_ref(repository, || self.store.records.repository(repository).into())
    }

    /// Whether the blob may belong to another registry. A later registry never counts as the only one that named a
    /// blob: the names of the first may be evicted. Call it only after [`Self::of`] of the same repository.
    pub(super) fn is_ambiguous(&self, repo_ref: &RepositoryRef, digest: &Digest) -> bool {
        let Some(registries) = self.known.get(&repo_ref.repository) else { return true };
        let is_first = || registries.first() == Some(&repo_ref.registry);
        let naming = || self.naming.get(&(repo_ref.repository.clone(), digest.clone()));
        registries.len() > 1 && !(is_first() && naming() == Some(RepositoryNames::One(repo_ref.registry.clone())))
    }

    /// The length of a blob by a manifest of the same repository. Another repository's manifest may state a wrong one.
    pub(super) fn length_of(&self, repo_ref: &RepositoryRef, digest: &Digest) -> Option<u64> {
        self.lengths.get(&(repo_ref.registry.clone(), repo_ref.repository.clone(), digest.clone()))
    }

    /// Whether a repository is known to hold an object that was cached from `from`: it came from there, a manifest that
    /// was served from there names it, or a HEAD confirmed it. With upstream authorization, that check has confirmed it
    /// before.
    ///
    /// A digest names the same bytes in each repository, but clients rely on the "404" of a direct pull:
    ///
    /// - A tool that pushes skips blobs that exist. A false "200" makes its push fail (`MANIFEST_BLOB_UNKNOWN`).
    /// - A tool that copies expects "404" for a missing object.
    ///
    /// So the first response from another repository's copy is confirmed by one HEAD. In an outage the copy is served
    /// without.
    pub(super) fn is_known_at(&self, repo_ref: &RepositoryRef, digest: &Digest, from: &Provenance) -> bool {
        repo_ref.rule.is_passthrough() || repo_ref.is_source_of(from) || self.length_of(repo_ref, digest).is_some()
    }

    /// Remembers that the registry holds an object in a repository.
    pub(super) fn record_held(&self, repo_ref: &RepositoryRef, digest: &Digest, length: u64) {
        self.lengths.insert((repo_ref.registry.clone(), repo_ref.repository.clone(), digest.clone()), length);
    }

    /// Learns from a manifest that was served. `is_held`: whether the registry is known to hold it in this repository.
    /// Then it holds the named blobs as well.
    pub(super) async fn record_manifest(
        self: &Arc<Self>,
        repo_ref: &RepositoryRef,
        digest: &Digest,
        bytes: &Bytes,
        is_held: impl FnOnce() -> bool,
    ) {
        let key = (repo_ref.registry.clone(), repo_ref.repository.clone(), digest.clone());
        let before = self.read.get(&key);
        if before == Some(ReadAs::AsHeld) {
            // The entry in `lengths` may be evicted before the one in `read`.
            if self.length_of(repo_ref, digest).is_none() {
                self.record_held(repo_ref, digest, bytes.len() as u64);
            }
            return;
        }
        let now = if is_held() { ReadAs::AsHeld } else { ReadAs::AsServed };
        if before == Some(now) {
            return;
        }
        if now == ReadAs::AsHeld {
            self.record_held(repo_ref, digest, bytes.len() as u64);
        }
        let (registries, repo_ref, bytes) = (self.clone(), repo_ref.clone(), bytes.clone());
        // A manifest of some megabytes takes long to parse.
        on_thread(move || {
            registries.learn(&repo_ref, &bytes, now);
            registries.remember(&repo_ref);
        })
        .await;
        self.read.insert(key, now);
    }

    fn learn(&self, repo_ref: &RepositoryRef, bytes: &[u8], read: ReadAs) {
        for (named, length) in manifest::named(bytes).into_iter().take(MAX_NAMED) {
            if let Some(length) = length.filter(|_| read == ReadAs::AsHeld) {
                self.record_held(repo_ref, &named, length);
            }
            self.record_name(repo_ref, named);
        }
    }

    fn record_name(&self, repo_ref: &RepositoryRef, blob: Digest) {
        let registry = &repo_ref.registry;
        let naming = self.naming.entry((repo_ref.repository.clone(), blob));
        naming.and_upsert_with(|known| match known.map(moka::Entry::into_value) {
            Some(RepositoryNames::One(known)) if known != *registry => RepositoryNames::Several,
            Some(known) => known,
            None => RepositoryNames::One(registry.clone()),
        });
    }

    /// Blocks on the disk.
    fn remember(&self, repo_ref: &RepositoryRef) {
        let (registry, repository) = (&repo_ref.registry, &repo_ref.repository);
        // Two registries may serve a name at the same time: none must be lost.
        let _turn = self.remembering.lock();
        let Some(registries) = with_registry(&self.read(repository), registry, repository) else { return };
        self.store.records.put_repository(&RepositoryRecord::new(repository, &registries));
        self.known.insert(repository.clone(), registries.into());
    }
}

/// The registries of a repository with one more. None: nothing changes.
fn with_registry(known: &[Registry], registry: &Registry, repository: &Repository) -> Option<Vec<Registry>> {
    // `library/` without a registry means Docker Hub, for runtimes as well.
    let is_hubs = repository.as_str().starts_with("library/");
    if known.contains(registry) || (is_hubs && !registry.is_docker_hub()) {
        return None;
    }
    let mut registries = known.to_vec();
    if registry.is_docker_hub() {
        registries.insert(0, registry.clone());
        registries.truncate(MAX_REGISTRIES);
    } else {
        // Beyond the limit a new registry replaces only the last one.
        registries.truncate(MAX_REGISTRIES - 1);
        registries.push(registry.clone());
    }
    Some(registries)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registries(repository: &str, served: &[&str]) -> Vec<String> {
        let repository = repository.parse().unwrap();
        let mut registries = Vec::new();
        for registry in served {
            registries = with_registry(&registries, &registry.parse().unwrap(), &repository).unwrap_or(registries);
        }
        registries.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn registry_that_served_a_name_first_stays_first() {
        assert_eq!(registries("team/app", &["ghcr.io", "evil.example", "ghcr.io"]), ["ghcr.io", "evil.example"]);
        assert_eq!(registries("team/app", &["a.io", "b.io", "c.io", "d.io", "e.io"]), ["a.io", "b.io", "c.io", "e.io"]);
    }

    #[test]
    fn docker_hub_is_first_for_names_without_registry() {
        assert_eq!(registries("team/app", &["evil.example", "docker.io"]), ["docker.io", "evil.example"]);
        assert_eq!(registries("library/alpine", &["evil.example", "docker.io", "ghcr.io"]), ["docker.io"]);
    }
}
