//! Serves lists: passed through from the upstream, and copied for outages.
//!
//! Each list is requested anew, because a push must be seen at once. Its compressed copy is served while the upstream
//! fails. If no copy of a referrers response exists, it is built from the cached artifacts that name the manifest as
//! their subject.

use std::io::{Read, Write};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use flate2::Compression;
use flate2::read::DeflateDecoder;
use flate2::write::DeflateEncoder;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use http::HeaderValue;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};

use super::{Body, Pull, PullError, RequestContext, fetch_ended};
use crate::blocking::parsed;
use crate::oci::{Digest, ErrorCode, INDEX_MEDIA_TYPE, manifest};
use crate::registries::RepositoryRef;
use crate::source::{Broken, MinRate, ServedFrom, SourceError, Speed};
use crate::store::{Found, ListRecord, ReferrersRecord, SMALL_BYTES, SmallKind, SmallObject};
use crate::times::{CONFIRM_TIMEOUT, UPSTREAM_TIMEOUT};
use crate::trace;
use crate::upstream::{ListKind, UpstreamList};

/// A list, ready to be sent.
pub struct ListResponse {
    pub media_type: &'static str,
    /// The query of the next page.
    pub next: Option<String>,
    pub filters_applied: Option<String>,
    /// `Content-Encoding`, if an upstream compresses without `Accept-Encoding`.
    pub encoding: Option<HeaderValue>,
    /// In bytes. None: unknown until the end.
    pub length: Option<u64>,
    pub from: ServedFrom,
    /// Of a copy.
    pub age: Option<Duration>,
    pub body: Body,
}

/// The body of a list that is passed through and copied.
pub struct ListBody {
    pieces: BoxStream<'static, Result<Bytes, Broken>>,
    speed: Speed,
    copy: Option<Copying>,
}

struct Copying {
    pull: Arc<Pull>,
    repo_ref: RepositoryRef,
    client: Option<IpAddr>,
    requested: Instant,
    record: ListRecord,
    encoder: DeflateEncoder<Vec<u8>>,
}

/// Slowest upstream whose list is passed through. Higher: lists of slow upstreams fail. Lower: stalled lists hold their
/// connections and request permits for longer.
const MIN_LIST_RATE: MinRate = MinRate { bytes: 64 * 1024, window: Duration::from_secs(180) };

/// Largest compressed copy, in bytes: what fits into the small-object tier with its header. Larger: it is not stored.
/// Smaller: longer lists fail during an outage.
const MAX_COPY: u64 = SMALL_BYTES - 4096;

/// Largest list of which a copy is made, in bytes. Larger: more memory while a copy is served. Smaller: longer lists
/// fail during an outage.
const MAX_UNPACKED: u64 = 16 * 1024 * 1024;

/// New copies of one repository's lists in an hour. More: clients with random queries push out useful records. Fewer:
/// lists with unusual queries fail during an outage.
const MAX_COPIES: u32 = 64;

/// Artifacts of one manifest that are remembered. More: larger records. Fewer: incomplete referrers during an outage.
const MAX_REFERRERS: usize = 100;

const ARTIFACT_TYPE: &str = "artifactType";

impl Pull {
    /// `GET tags/list`, `referrers/<digest>` or `_catalog`.
    pub async fn list(
        self: &Arc<Self>,
        repo_ref: &RepositoryRef,
        list: &ListKind,
        query: Option<&str>,
        request_context: RequestContext,
    ) -> Result<ListResponse, PullError> {
        let key = key(repo_ref, list, query);
        let requested = Instant::now();
        let mut asked = self.request_list(repo_ref, list, query, &key, request_context.client, requested);
        let response = match timeout(CONFIRM_TIMEOUT.min(request_context.time_limit), &mut asked).await {
            Ok(response) => response,
            // Only a copy of a whole list: an absence, or a list built from artifacts, is for outages only.
            Err(_) => match self.copied_list(repo_ref, list, &key).await.map(|kept| self.stale(repo_ref, kept)) {
                Some(kept) => return Ok(kept),
                None => {
                    let left = request_context.time_limit.saturating_sub(CONFIRM_TIMEOUT);
                    timeout(left, asked).await.unwrap_or(Ok(Err(SourceError::TimedOut)))
                }
            },
        };
        let response = response.unwrap_or_else(|_| fetch_ended());
        match response {
            Ok(response) => Ok(self.pass_through(repo_ref, list, key, response, request_context.client, requested)),
            Err(error) if is_outage(&error) => {
                let seen = self.list_from_cache(repo_ref, list, query, &key).await;
                seen.unwrap_or_else(|| Err(PullError::of(&error, missing(list))))
            }
            Err(error) => {
                // After "not found" or "denied" the copy must not be served any more.
                if error.is_not_found() || error.is_denied() {
                    self.remember_absence(repo_ref, list, key, &error, requested);
                }
                Err(PullError::of(&error, missing(list)))
            }
        }
    }

    /// Requests a list in a task of its own. If the client disconnects or gets a copy before a slow upstream responds,
    /// the late response becomes the next copy.
    fn request_list(
        self: &Arc<Self>,
        repo_ref: &RepositoryRef,
        list: &ListKind,
        query: Option<&str>,
        key: &str,
        client: Option<IpAddr>,
        requested: Instant,
    ) -> oneshot::Receiver<Result<UpstreamList, SourceError>> {
        let (sender, asked) = oneshot::channel();
        let (pull, repo_ref, list, key) = (self.clone(), repo_ref.clone(), list.clone(), key.to_owned());
        let query = query.map(str::to_owned);
        tokio::spawn(trace::carried(async move {
            let deadline = requested + UPSTREAM_TIMEOUT;
            let response = pull.upstream.list(&repo_ref, &list, query.as_deref(), deadline).await;
            if let Err(Ok(response)) = sender.send(response) {
                // The body is read only for the copy, within the time that a client would wait.
                let response = pull.pass_through(&repo_ref, &list, key, response, client, requested);
                let Body::List(mut body) = response.body else { return };
                let copied = async { while body.is_copied() && matches!(body.next().await, Ok(Some(_))) {} };
                let _ = timeout(UPSTREAM_TIMEOUT, copied).await;
            }
        }));
        asked
    }

    fn pass_through(
        self: &Arc<Self>,
        repo_ref: &RepositoryRef,
        list: &ListKind,
        key: String,
        response: UpstreamList,
        client: Option<IpAddr>,
        requested: Instant,
    ) -> ListResponse {
        let UpstreamList { next, filters_applied, encoding, length, body } = response;
        let record = ListRecord {
            key,
            digest: String::new(),
            next: next.clone(),
            filters_applied: filters_applied.clone(),
            checked_at: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
        };
        let encoder = DeflateEncoder::new(Vec::new(), Compression::fast());
        let copy = Copying { pull: self.clone(), repo_ref: repo_ref.clone(), client, requested, record, encoder };
        let copy = Some(copy).filter(|_| encoding.is_none());
        ListResponse {
            media_type: media_type(list),
            next,
            filters_applied,
            encoding,
            length,
            from: ServedFrom::Upstream,
            age: None,
            body: Body::List(Box::new(ListBody { pieces: body, speed: Speed::default(), copy })),
        }
    }

    fn remember_absence(
        self: &Arc<Self>,
        repo_ref: &RepositoryRef,
        list: &ListKind,
        key: String,
        error: &SourceError,
        requested: Instant,
    ) {
        let has_no_api = error.is_not_found() && matches!(list, ListKind::Referrers(_));
        let (pull, repo_ref) = (self.clone(), repo_ref.clone());
        tokio::task::spawn_blocking(move || {
            let records = &pull.store.records;
            // A late copy of an older response must not replace this error.
            pull.list_times.record(key.clone(), requested, || {
                match has_no_api && (records.is_known_list(&key) || pull.may_copy(&repo_ref)) {
                    true => records.put_absent_list(&key, &repo_ref.registry),
                    false => records.forget_list(&key),
                }
            });
        });
    }

    /// Limits the new copies of a repository's lists, because clients choose the queries.
    fn may_copy(&self, repo_ref: &RepositoryRef) -> bool {
        let written = self.list_copies.get_with(repo_ref.to_string(), Arc::default);
        written.fetch_add(1, Ordering::Relaxed) < MAX_COPIES
    }

    /// Whether the upstream had no referrers API for this manifest. The client then requests the fallback tag, which is
    /// complete, while the cached artifacts may not be.
    async fn was_absent(&self, list: &ListKind, key: &str) -> bool {
        if !matches!(list, ListKind::Referrers(_)) {
            return false;
        }
        let (store, key) = (self.store.clone(), key.to_owned());
        tokio::task::spawn_blocking(move || store.records.is_absent_list(&key)).await.unwrap_or(false)
    }

    /// The copy of a list, or the list built from cached artifacts. None: neither exists.
    async fn list_from_cache(
        &self,
        repo_ref: &RepositoryRef,
        list: &ListKind,
        query: Option<&str>,
        key: &str,
    ) -> Option<Result<ListResponse, PullError>> {
        if let Some(kept) = self.copied_list(repo_ref, list, key).await {
            return Some(Ok(self.stale(repo_ref, kept)));
        }
        if repo_ref.rule.is_passthrough() && !self.was_authorized(repo_ref) {
            return None;
        }
        if self.was_absent(list, key).await {
            return Some(Err(PullError::of(&SourceError::not_found(), missing(list))));
        }
        let made = self.referrers_of_cached(repo_ref, list, query).await?;
        Some(Ok(self.stale(repo_ref, made)))
    }

    fn stale(&self, repo_ref: &RepositoryRef, copy: ListResponse) -> ListResponse {
        self.metrics.stale.with_label_values(&["list"]).inc();
        tracing::info!(registry = %repo_ref.registry, repository = %repo_ref.repository, "stale list served");
        copy
    }

    async fn copied_list(&self, repo_ref: &RepositoryRef, list: &ListKind, key: &str) -> Option<ListResponse> {
        // The right to list ends with the right to pull.
        if repo_ref.rule.is_passthrough() && !self.was_authorized(repo_ref) {
            return None;
        }
        let (store, key) = (self.store.clone(), key.to_owned());
        let record = tokio::task::spawn_blocking(move || store.records.list(&key)).await.ok()??;
        let age = SystemTime::now().duration_since(UNIX_EPOCH + Duration::from_secs(record.checked_at)).ok()?;
        if age >= repo_ref.rule.stale_if_error {
            return None;
        }
        let Found::Small { object, .. } = self.store.find(&record.digest.parse().ok()?, SmallKind::Blob).await? else {
            return None;
        };
        let _turn = self.unpacking.acquire().await.ok()?;
        let bytes = tokio::task::spawn_blocking(move || unpack(&object.bytes)).await.ok()??;
        Some(ListResponse {
            media_type: media_type(list),
            next: record.next,
            filters_applied: record.filters_applied,
            encoding: None,
            length: Some(bytes.len() as u64),
            from: ServedFrom::Stale,
            age: Some(age),
            body: Body::Memory(Some(bytes)),
        })
    }

    /// A referrers response built from cached artifacts. None: no artifact of the manifest is known.
    async fn referrers_of_cached(
        &self,
        repo_ref: &RepositoryRef,
        list: &ListKind,
        query: Option<&str>,
    ) -> Option<ListResponse> {
        let ListKind::Referrers(digest) = list else { return None };
        let (store, subject) = (self.store.clone(), subject_key(repo_ref, digest));
        let known = tokio::task::spawn_blocking(move || store.records.referrers(&subject)).await.ok()?;
        if known.is_empty() {
            return None;
        }
        let wanted = wanted_type(query);
        let is_wanted = |artifact: &serde_json::Value| {
            wanted.as_deref().is_none_or(|wanted| artifact[ARTIFACT_TYPE].as_str() == Some(wanted))
        };
        let manifests: Vec<_> = known.into_iter().filter(is_wanted).collect();
        let index = serde_json::json!({"schemaVersion": 2, "mediaType": INDEX_MEDIA_TYPE, "manifests": manifests});
        let bytes = Bytes::from(index.to_string());
        Some(ListResponse {
            media_type: INDEX_MEDIA_TYPE,
            next: None,
            filters_applied: wanted.map(|_| ARTIFACT_TYPE.to_owned()),
            encoding: None,
            length: Some(bytes.len() as u64),
            from: ServedFrom::Stale,
            age: None,
            body: Body::Memory(Some(bytes)),
        })
    }

    /// Remembers which manifest an artifact refers to, if any.
    pub(super) async fn remember_subject(&self, repo_ref: &RepositoryRef, bytes: &Bytes, media_type: &str) {
        let media_type = media_type.to_owned();
        let refers = move |bytes: &[u8]| Some((manifest::subject(bytes)?, manifest::referrer(bytes, &media_type)?));
        let Some((subject, artifact)) = parsed(bytes, refers).await else { return };
        let (store, subject, turn) = (self.store.clone(), subject_key(repo_ref, &subject), self.referrers_lock.clone());
        let registry = repo_ref.registry.clone();
        tokio::task::spawn_blocking(move || {
            // Two artifacts of one manifest may come at the same time: none must be lost.
            let _turn = turn.lock();
            let mut referrers = store.records.referrers(&subject);
            if !referrers.contains(&artifact) && referrers.len() < MAX_REFERRERS {
                referrers.push(artifact);
                store.records.put_referrers(&ReferrersRecord { subject, referrers }, &registry);
            }
        });
    }
}

impl ListBody {
    fn is_copied(&self) -> bool {
        self.copy.is_some()
    }

    /// The next piece; None at the end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Broken> {
        let asked = Instant::now();
        let next = timeout(UPSTREAM_TIMEOUT, self.pieces.next()).await;
        let len = next.as_ref().ok().and_then(|next| next.as_ref()?.as_ref().ok()).map_or(0, Bytes::len);
        if !self.speed.meets_minimum(MIN_LIST_RATE, asked.elapsed(), len) {
            return Err(Broken("the upstream sends the list too slowly".into()));
        }
        match next
            .unwrap_or_else(|_| Some(Err(Broken("the upstream stalled while sending the list".into()))))
            .transpose()
        {
            Ok(Some(piece)) => {
                let fits = |copy: &mut Copying| copy.add(&piece);
                if !self.copy.as_mut().is_some_and(fits) {
                    self.copy = None;
                }
                Ok(Some(piece))
            }
            Ok(None) => {
                self.copy.take().into_iter().for_each(Copying::keep);
                Ok(None)
            }
            Err(broken) => Err(broken),
        }
    }
}

impl Copying {
    /// False: the list is too long for a copy.
    fn add(&mut self, piece: &[u8]) -> bool {
        self.encoder.write_all(piece).is_ok()
            && self.encoder.get_ref().len() as u64 <= MAX_COPY
            && self.encoder.total_in() <= MAX_UNPACKED
    }

    /// Stores the copy of a complete list.
    fn keep(self) {
        let Self { pull, repo_ref, client, requested, mut record, encoder } = self;
        let Ok(packed) = encoder.finish() else { return };
        let digest = Digest::of(&packed);
        record.digest = digest.to_string();
        tokio::spawn(async move {
            let (keeper, key) = (pull.clone(), record.key.clone());
            let is_known = tokio::task::spawn_blocking(move || keeper.store.records.is_known_list(&key)).await;
            if !is_known.unwrap_or(false) && !pull.may_copy(&repo_ref) {
                return;
            }
            let object = SmallObject::new("application/octet-stream", Arc::new(repo_ref.provenance()), &packed);
            // Most lists have not changed since the last copy.
            if pull.store.find(&digest, SmallKind::Blob).await.is_none() {
                pull.store.small.insert(&digest, SmallKind::Blob, object).await;
            }
            tokio::task::spawn_blocking(move || {
                let write = || pull.store.records.put_list(&record, &repo_ref.registry, client);
                pull.list_times.record(record.key.clone(), requested, write);
            });
        });
    }
}

/// Whether an error says nothing of the list itself, so that a copy may be served.
fn is_outage(error: &SourceError) -> bool {
    error.is_transient_outage() || matches!(error, SourceError::Malformed(_))
}

/// The key of a list's record: the request, the settings of its rule and the principal.
fn key(repo_ref: &RepositoryRef, list: &ListKind, query: Option<&str>) -> String {
    let what = match list {
        ListKind::Tags => format!("{repo_ref}/tags"),
        ListKind::Referrers(digest) => format!("{repo_ref}/referrers/{digest}"),
        ListKind::Catalog => format!("{}/_catalog", repo_ref.registry),
    };
    let principal_id = repo_ref.principal.holder().map_or(0, |holder| u128::from_be_bytes(holder.id.0));
    format!("{what}?{} {} {principal_id:032x}", query.unwrap_or_default(), repo_ref.rule.fingerprint())
}

fn subject_key(repo_ref: &RepositoryRef, subject: &Digest) -> String {
    format!("{repo_ref}@{subject} {}", repo_ref.rule.fingerprint())
}

fn wanted_type(query: Option<&str>) -> Option<String> {
    let mut pairs = url::form_urlencoded::parse(query?.as_bytes());
    pairs.find(|(key, _)| key == ARTIFACT_TYPE).map(|(_, value)| value.into_owned())
}

fn media_type(list: &ListKind) -> &'static str {
    match list {
        ListKind::Referrers(_) => INDEX_MEDIA_TYPE,
        ListKind::Tags | ListKind::Catalog => "application/json",
    }
}

/// The code of a 404 without a body. Clients take any code but `NAME_UNKNOWN` for a missing referrers API, and request
/// the fallback tag.
fn missing(list: &ListKind) -> ErrorCode {
    match list {
        ListKind::Referrers(_) => ErrorCode::Unsupported,
        ListKind::Tags | ListKind::Catalog => ErrorCode::NameUnknown,
    }
}

fn unpack(packed: &[u8]) -> Option<Bytes> {
    let mut bytes = Vec::new();
    DeflateDecoder::new(packed).take(MAX_UNPACKED).read_to_end(&mut bytes).ok()?;
    Some(bytes.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn list_copy_is_served_only_in_an_outage() {
        for outage in [SourceError::TimedOut, SourceError::failed(503), SourceError::Malformed(String::new())] {
            assert!(is_outage(&outage), "{outage}");
        }
        for error in [SourceError::not_found(), SourceError::denied(), SourceError::failed(413)] {
            assert!(!is_outage(&error), "{error}");
        }
    }

    #[test]
    fn artifact_type_is_parsed_from_the_query() {
        assert_eq!(wanted_type(Some("n=1&artifactType=a%2Fb")).as_deref(), Some("a/b"));
        assert_eq!((wanted_type(Some("n=1")), wanted_type(None)), (None, None));
    }
}
