//! The way of a list: passed on as it comes, and kept for outages as it was last seen.
//!
//! A list is always requested anew: a push must be seen at once. Its compressed copy serves while the upstream fails.
//! Where no copy of a referrers response is kept, one is put together from the cached artifacts that name the manifest as
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
use crate::source::{Broken, Floor, ServedFrom, SourceError, Speed};
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
    /// `Content-Encoding`, where an upstream compresses though it was not asked to.
    pub encoding: Option<HeaderValue>,
    /// In bytes. None: only its end tells.
    pub length: Option<u64>,
    pub from: ServedFrom,
    /// Of a kept copy.
    pub age: Option<Duration>,
    pub body: Body,
}

/// The body of a list on its way to a client, of which a copy is made.
pub struct ListBody {
    pieces: BoxStream<'static, Result<Bytes, Broken>>,
    speed: Speed,
    copy: Option<Copying>,
}

struct Copying {
    pull: Arc<Pull>,
    place: RepositoryRef,
    client: Option<IpAddr>,
    requested: Instant,
    record: ListRecord,
    encoder: DeflateEncoder<Vec<u8>>,
}

/// An upstream that sends less of a list in this time of waiting would hold its place for ever.
const SLOWEST: Floor = Floor { bytes: 64 * 1024, window: Duration::from_secs(180) };

/// Largest copy that is kept, compressed, in bytes: what the small-object tier takes, with some room for its head.
const MAX_COPY: u64 = SMALL_BYTES - 4096;

/// Largest list of which a copy is kept, in bytes.
const MAX_UNPACKED: u64 = 16 * 1024 * 1024;

/// Copies of one repository's lists that are written in an hour.
const MAX_COPIES: u32 = 64;

/// Artifacts of one manifest that are remembered.
const MAX_REFERRERS: usize = 100;

const ARTIFACT_TYPE: &str = "artifactType";

impl Pull {
    /// `GET tags/list`, `referrers/<digest>` or `_catalog`.
    pub async fn list(
        self: &Arc<Self>,
        place: &RepositoryRef,
        list: &ListKind,
        query: Option<&str>,
        asking: RequestContext,
    ) -> Result<ListResponse, PullError> {
        let key = key(place, list, query);
        let requested = Instant::now();
        let mut asked = self.requested(place, list, query, &key, asking.client, requested);
        let response = match timeout(CONFIRM_TIMEOUT.min(asking.patience), &mut asked).await {
            Ok(response) => response,
            // Only what was seen whole: that a slow upstream has something or not it will say itself.
            Err(_) => match self.kept_list(place, list, &key).await.map(|kept| self.stale(place, kept)) {
                Some(kept) => return Ok(kept),
                None => {
                    let left = asking.patience.saturating_sub(CONFIRM_TIMEOUT);
                    timeout(left, asked).await.unwrap_or(Ok(Err(SourceError::TimedOut)))
                }
            },
        };
        let response = response.unwrap_or_else(|_| fetch_ended());
        match response {
            Ok(response) => Ok(self.passed_on(place, list, key, response, asking.client, requested)),
            Err(error) if is_outage(&error) => {
                let seen = self.seen_before(place, list, query, &key).await;
                seen.unwrap_or_else(|| Err(PullError::of(&error, missing(list))))
            }
            Err(error) => {
                // "Not found" and "denied" end what was seen before.
                if error.is_not_found() || error.is_denied() {
                    self.remember_absence(place, list, key, &error, requested);
                }
                Err(PullError::of(&error, missing(list)))
            }
        }
    }

    /// Requests a list in a task of its own: where the client leaves or is answered with a copy before a slow upstream has
    /// answered, the response becomes the copy for the next one.
    fn requested(
        self: &Arc<Self>,
        place: &RepositoryRef,
        list: &ListKind,
        query: Option<&str>,
        key: &str,
        client: Option<IpAddr>,
        requested: Instant,
    ) -> oneshot::Receiver<Result<UpstreamList, SourceError>> {
        let (sender, asked) = oneshot::channel();
        let (pull, place, list, key) = (self.clone(), place.clone(), list.clone(), key.to_owned());
        let query = query.map(str::to_owned);
        tokio::spawn(trace::carried(async move {
            let deadline = requested + UPSTREAM_TIMEOUT;
            let response = pull.upstream.list(&place, &list, query.as_deref(), deadline).await;
            if let Err(Ok(response)) = sender.send(response) {
                // For the copy, and no longer than a client would wait.
                let passed_on = pull.passed_on(&place, &list, key, response, client, requested);
                let Body::List(mut body) = passed_on.body else { return };
                let copied = async { while body.is_copied() && matches!(body.next().await, Ok(Some(_))) {} };
                let _ = timeout(UPSTREAM_TIMEOUT, copied).await;
            }
        }));
        asked
    }

    fn passed_on(
        self: &Arc<Self>,
        place: &RepositoryRef,
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
        let copy = Copying { pull: self.clone(), place: place.clone(), client, requested, record, encoder };
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
        place: &RepositoryRef,
        list: &ListKind,
        key: String,
        error: &SourceError,
        requested: Instant,
    ) {
        let has_no_api = error.is_not_found() && matches!(list, ListKind::Referrers(_));
        let (pull, place) = (self.clone(), place.clone());
        tokio::task::spawn_blocking(move || {
            let records = &pull.store.records;
            // A copy that comes late must not undo a refusal.
            pull.list_words.record(key.clone(), requested, || {
                match has_no_api && (records.is_known_list(&key) || pull.may_copy(&place)) {
                    true => records.put_absent_list(&key, &place.registry),
                    false => records.forget_list(&key),
                }
            });
        });
    }

    /// Clients choose the queries of lists: of one repository so many new copies are written in an hour at most.
    fn may_copy(&self, place: &RepositoryRef) -> bool {
        let written = self.list_copies.get_with(place.to_string(), Arc::default);
        written.fetch_add(1, Ordering::Relaxed) < MAX_COPIES
    }

    /// Whether the upstream had no referrers API for this manifest: a client looks for the fall-back tag then, which is
    /// complete where cached artifacts may not be.
    async fn was_absent(&self, list: &ListKind, key: &str) -> bool {
        if !matches!(list, ListKind::Referrers(_)) {
            return false;
        }
        let (store, key) = (self.store.clone(), key.to_owned());
        tokio::task::spawn_blocking(move || store.records.is_absent_list(&key)).await.unwrap_or(false)
    }

    /// The list as it was last seen, or as cached artifacts tell. None: neither.
    async fn seen_before(
        &self,
        place: &RepositoryRef,
        list: &ListKind,
        query: Option<&str>,
        key: &str,
    ) -> Option<Result<ListResponse, PullError>> {
        if let Some(kept) = self.kept_list(place, list, key).await {
            return Some(Ok(self.stale(place, kept)));
        }
        if place.rule.asks_who() && !self.was_let_in(place) {
            return None;
        }
        if self.was_absent(list, key).await {
            return Some(Err(PullError::of(&SourceError::not_found(), missing(list))));
        }
        let made = self.referrers_of_cached(place, list, query).await?;
        Some(Ok(self.stale(place, made)))
    }

    fn stale(&self, place: &RepositoryRef, copy: ListResponse) -> ListResponse {
        self.metrics.stale.with_label_values(&["list"]).inc();
        tracing::info!(%place, "served a list stale");
        copy
    }

    async fn kept_list(&self, place: &RepositoryRef, list: &ListKind, key: &str) -> Option<ListResponse> {
        // A right to list ends with the right to pull.
        if place.rule.asks_who() && !self.was_let_in(place) {
            return None;
        }
        let (store, key) = (self.store.clone(), key.to_owned());
        let record = tokio::task::spawn_blocking(move || store.records.list(&key)).await.ok()??;
        let age = SystemTime::now().duration_since(UNIX_EPOCH + Duration::from_secs(record.checked_at)).ok()?;
        if age >= place.rule.stale_for {
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

    /// A referrers response from what is cached. None: no artifact of the manifest is known.
    async fn referrers_of_cached(
        &self,
        place: &RepositoryRef,
        list: &ListKind,
        query: Option<&str>,
    ) -> Option<ListResponse> {
        let ListKind::Referrers(digest) = list else { return None };
        let (store, subject) = (self.store.clone(), subject_key(place, digest));
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

    /// Remembers which manifest an artifact refers to, if it refers to one.
    pub(super) async fn remember_subject(&self, place: &RepositoryRef, bytes: &Bytes, media_type: &str) {
        let media_type = media_type.to_owned();
        let refers = move |bytes: &[u8]| Some((manifest::subject(bytes)?, manifest::referrer(bytes, &media_type)?));
        let Some((subject, artifact)) = parsed(bytes, refers).await else { return };
        let (store, subject, turn) = (self.store.clone(), subject_key(place, &subject), self.subjects.clone());
        let registry = place.registry.clone();
        tokio::task::spawn_blocking(move || {
            // Read, changed and written by one at a time.
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
        if !self.speed.keeps_up(SLOWEST, asked.elapsed(), len) {
            return Err(Broken("the upstream sends the list too slowly".into()));
        }
        match next.unwrap_or_else(|_| Some(Err(Broken("the upstream sends nothing more".into())))).transpose() {
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
    /// False: it is too long to be kept.
    fn add(&mut self, piece: &[u8]) -> bool {
        self.encoder.write_all(piece).is_ok()
            && self.encoder.get_ref().len() as u64 <= MAX_COPY
            && self.encoder.total_in() <= MAX_UNPACKED
    }

    /// All of it has come.
    fn keep(self) {
        let Self { pull, place, client, requested, mut record, encoder } = self;
        let Ok(packed) = encoder.finish() else { return };
        let digest = Digest::of(&packed);
        record.digest = digest.to_string();
        tokio::spawn(async move {
            let (keeper, key) = (pull.clone(), record.key.clone());
            let is_known = tokio::task::spawn_blocking(move || keeper.store.records.is_known_list(&key)).await;
            if !is_known.unwrap_or(false) && !pull.may_copy(&place) {
                return;
            }
            let object = SmallObject::new("application/octet-stream", Arc::new(place.provenance()), &packed);
            // Most lists are the same as before.
            if pull.store.find(&digest, SmallKind::Blob).await.is_none() {
                pull.store.small.insert(&digest, SmallKind::Blob, object).await;
            }
            tokio::task::spawn_blocking(move || {
                let write = || pull.store.records.put_list(&record, &place.registry, client);
                pull.list_words.record(record.key.clone(), requested, write);
            });
        });
    }
}

/// Whether an error says nothing of the list, so that an older one is better than none.
fn is_outage(error: &SourceError) -> bool {
    error.is_passing_outage() || matches!(error, SourceError::Malformed(_))
}

/// What is requested, and with whose rights.
fn key(place: &RepositoryRef, list: &ListKind, query: Option<&str>) -> String {
    let what = match list {
        ListKind::Tags => format!("{place}/tags"),
        ListKind::Referrers(digest) => format!("{place}/referrers/{digest}"),
        ListKind::Catalog => format!("{}/_catalog", place.registry),
    };
    let who = place.caller.holder().map_or(0, |holder| u128::from_be_bytes(holder.who.0));
    format!("{what}?{} {} {who:032x}", query.unwrap_or_default(), place.rule.name())
}

fn subject_key(place: &RepositoryRef, subject: &Digest) -> String {
    format!("{place}@{subject} {}", place.rule.name())
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

/// The code of a 404 without a body. Clients take any but `NAME_UNKNOWN` for "no referrers API, look for the fall-back
/// tag".
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
    fn only_an_outage_is_answered_by_a_copy() {
        for outage in [SourceError::TimedOut, SourceError::failed(503), SourceError::Malformed(String::new())] {
            assert!(is_outage(&outage), "{outage}");
        }
        for answer in [SourceError::not_found(), SourceError::denied(), SourceError::failed(413)] {
            assert!(!is_outage(&answer), "{answer}");
        }
    }

    #[test]
    fn artifact_type_is_read_from_the_query() {
        assert_eq!(wanted_type(Some("n=1&artifactType=a%2Fb")).as_deref(), Some("a/b"));
        assert_eq!((wanted_type(Some("n=1")), wanted_type(None)), (None, None));
    }
}
