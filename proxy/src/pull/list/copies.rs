//! Compressed copies of lists in the store, for outages. Also the absences: manifests without a referrers API.

use std::io::{Read, Write};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use flate2::Compression;
use flate2::read::DeflateDecoder;
use flate2::write::DeflateEncoder;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::confirmed_at::ConfirmedAt;
use crate::oci::Digest;
use crate::registries::RepositoryRef;
use crate::store::{Found, ListRecord, SMALL_BYTES, SmallKind, SmallObject, Store};
use crate::times::HOUR;

pub(super) struct ListCopies {
    store: Arc<Store>,
    /// Number of copies written within the last hour, by repository.
    written: moka::sync::Cache<String, Arc<AtomicU32>>,
    unpacking: Semaphore,
    /// When the response in each record was requested.
    requested_at: ConfirmedAt<String, Instant>,
}

/// A copy that is being made while the list is sent.
pub(super) struct Copying {
    copies: Arc<ListCopies>,
    repo_ref: RepositoryRef,
    client: Option<IpAddr>,
    requested: Instant,
    record: ListRecord,
    encoder: DeflateEncoder<Vec<u8>>,
}

/// A list for an outage.
pub(super) struct ListCopy {
    pub(super) next: Option<String>,
    pub(super) filters_applied: Option<String>,
    /// None: it was built from other content.
    pub(super) age: Option<Duration>,
    pub(super) bytes: Bytes,
}

/// Largest compressed copy, in bytes: what fits into the small-object tier with its header. Larger: it is not stored.
/// Smaller: longer lists fail during an outage.
const MAX_COPY: u64 = SMALL_BYTES - 4096;

/// Largest list of which a copy is made, in bytes. Larger: more memory while a copy is served. Smaller: longer lists
/// fail during an outage.
const MAX_UNPACKED: u64 = 16 * 1024 * 1024;

/// List copies that are unpacked at the same time. More: each takes some MiB of memory before its size is counted.
/// Fewer: lists wait for each other during an outage.
const MAX_CONCURRENT_UNPACKS: usize = 4;

/// New copies of one repository's lists in an hour. More: clients with random queries push out useful records. Fewer:
/// lists with unusual queries fail during an outage.
const MAX_COPIES: u32 = 64;

/// Repositories whose copies are counted.
const MAX_REPOSITORIES: u64 = 10_000;

impl ListCopies {
    pub(super) fn new(store: Arc<Store>) -> Self {
        Self {
            store,
            written: moka::sync::Cache::builder().max_capacity(MAX_REPOSITORIES).time_to_live(HOUR).build(),
            unpacking: Semaphore::new(MAX_CONCURRENT_UNPACKS),
            requested_at: ConfirmedAt::new(HOUR),
        }
    }

    /// The copy of a list, unless it is too old to be served during an outage.
    pub(super) async fn get(&self, repo_ref: &RepositoryRef, key: &str) -> Option<ListCopy> {
        let (store, key) = (self.store.clone(), key.to_owned());
        let record = tokio::task::spawn_blocking(move || store.records.list(&key)).await.ok()??;
        let age = SystemTime::now().duration_since(UNIX_EPOCH + Duration::from_secs(record.checked_at)).ok()?;
        if age >= repo_ref.rule.stale_if_error {
            return None;
        }
        let Found::Small { object, .. } = self.store.find(&record.digest.parse().ok()?, SmallKind::Blob).await? else {
            return None;
        };
        let _permit = self.unpacking.acquire().await.ok()?;
        let bytes = tokio::task::spawn_blocking(move || unpack(&object.bytes)).await.ok()??;
        Some(ListCopy { next: record.next, filters_applied: record.filters_applied, age: Some(age), bytes })
    }

    /// Whether the upstream had no API for this list.
    pub(super) async fn was_absent(&self, key: &str) -> bool {
        let (store, key) = (self.store.clone(), key.to_owned());
        tokio::task::spawn_blocking(move || store.records.is_absent_list(&key)).await.unwrap_or(false)
    }

    /// Removes a copy that must not be served any more.
    pub(super) fn remove(self: &Arc<Self>, key: String, requested: Instant) {
        let copies = self.clone();
        tokio::task::spawn_blocking(move || {
            // A late copy of an older response must not replace this error.
            copies.requested_at.record(key.clone(), requested, || copies.store.records.forget_list(&key));
        });
    }

    /// Replaces a copy by the record that the upstream has no API for this list.
    pub(super) fn record_absence(self: &Arc<Self>, repo_ref: &RepositoryRef, key: String, requested: Instant) {
        let (copies, repo_ref) = (self.clone(), repo_ref.clone());
        tokio::task::spawn_blocking(move || {
            let records = &copies.store.records;
            copies.requested_at.record(key.clone(), requested, || {
                match records.is_known_list(&key) || copies.may_copy(&repo_ref) {
                    true => records.put_absent_list(&key, &repo_ref.registry),
                    false => records.forget_list(&key),
                }
            });
        });
    }

    /// Limits the new copies of a repository's lists, because clients choose the queries.
    fn may_copy(&self, repo_ref: &RepositoryRef) -> bool {
        let written = self.written.get_with(repo_ref.to_string(), Arc::default);
        written.fetch_add(1, Ordering::Relaxed) < MAX_COPIES
    }
}

impl Copying {
    pub(super) fn new(
        copies: &Arc<ListCopies>,
        repo_ref: &RepositoryRef,
        client: Option<IpAddr>,
        requested: Instant,
        record: ListRecord,
    ) -> Self {
        let encoder = DeflateEncoder::new(Vec::new(), Compression::fast());
        Self { copies: copies.clone(), repo_ref: repo_ref.clone(), client, requested, record, encoder }
    }

    /// False: the list is too long for a copy.
    pub(super) fn add(&mut self, piece: &[u8]) -> bool {
        self.encoder.write_all(piece).is_ok()
            && self.encoder.get_ref().len() as u64 <= MAX_COPY
            && self.encoder.total_in() <= MAX_UNPACKED
    }

    /// Stores the copy of a complete list.
    pub(super) fn keep(self) {
        let Self { copies, repo_ref, client, requested, mut record, encoder } = self;
        let Ok(packed) = encoder.finish() else { return };
        let digest = Digest::of(&packed);
        record.digest = digest.to_string();
        tokio::spawn(async move {
            let (store, key) = (copies.store.clone(), record.key.clone());
            let is_known = tokio::task::spawn_blocking(move || store.records.is_known_list(&key)).await;
            if !is_known.unwrap_or(false) && !copies.may_copy(&repo_ref) {
                return;
            }
            let object = SmallObject::new("application/octet-stream", Arc::new(repo_ref.provenance()), &packed);
            // Most lists have not changed since the last copy.
            if copies.store.find(&digest, SmallKind::Blob).await.is_none() {
                copies.store.small.insert(&digest, SmallKind::Blob, object).await;
            }
            tokio::task::spawn_blocking(move || {
                let write = || copies.store.records.put_list(&record, &repo_ref.registry, client);
                copies.requested_at.record(record.key.clone(), requested, write);
            });
        });
    }
}

fn unpack(packed: &[u8]) -> Option<Bytes> {
    let mut bytes = Vec::new();
    DeflateDecoder::new(packed).take(MAX_UNPACKED).read_to_end(&mut bytes).ok()?;
    Some(bytes.into())
}
