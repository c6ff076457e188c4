//! Serves lists: passed through from the upstream, and copied for outages.
//!
//! Each list is requested anew, because a push must be seen at once. Its compressed copy is served while the upstream
//! fails. If no copy of a referrers response exists, it is built from the cached artifacts that name the manifest as
//! their subject.

mod copies;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use http::HeaderValue;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};

use self::copies::{Copying, ListCopies, ListCopy};
use super::flights::fetch_ended;
use super::referrers::{ARTIFACT_TYPE, CachedReferrers, Referrers};
use super::{Authorizer, Body, PullError, RequestContext};
use crate::metrics::Metrics;
use crate::oci::{ErrorCode, INDEX_MEDIA_TYPE};
use crate::registries::RepositoryRef;
use crate::source::{Broken, MinRate, ServedFrom, SourceError, Speed};
use crate::store::{ListRecord, Store};
use crate::times::{CONFIRM_TIMEOUT, UPSTREAM_TIMEOUT};
use crate::trace;
use crate::upstream::{ListKind, UpstreamClient, UpstreamList};

/// Serves the lists of repositories and registries.
pub struct ListService {
    upstream: Arc<UpstreamClient>,
    authorizer: Arc<Authorizer>,
    referrers: Arc<Referrers>,
    copies: Arc<ListCopies>,
    metrics: Arc<Metrics>,
}

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

/// Slowest upstream whose list is passed through. Higher: lists of slow upstreams fail. Lower: stalled lists hold their
/// connections and request permits for longer.
const MIN_LIST_RATE: MinRate = MinRate { bytes: 64 * 1024, window: Duration::from_secs(180) };

impl ListService {
    pub(super) fn new(
        store: Arc<Store>,
        upstream: Arc<UpstreamClient>,
        authorizer: Arc<Authorizer>,
        referrers: Arc<Referrers>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { upstream, authorizer, referrers, copies: Arc::new(ListCopies::new(store)), metrics }
    }

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
            Err(_) => match self.copied_list(repo_ref, list, &key).await {
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
                if error.is_not_found() || error.is_denied() {
                    self.end_copy(repo_ref, list, key, &error, requested);
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
        let (service, repo_ref, list, key) = (self.clone(), repo_ref.clone(), list.clone(), key.to_owned());
        let query = query.map(str::to_owned);
        tokio::spawn(trace::carried(async move {
            let deadline = requested + UPSTREAM_TIMEOUT;
            let response = service.upstream.list(&repo_ref, &list, query.as_deref(), deadline).await;
            if let Err(Ok(response)) = sender.send(response) {
                // The body is read only for the copy, within the time that a client would wait.
                let response = service.pass_through(&repo_ref, &list, key, response, client, requested);
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
        let copy = Copying::new(&self.copies, repo_ref, client, requested, record);
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

    /// After "not found" or "denied" the copy must not be served any more.
    fn end_copy(
        &self,
        repo_ref: &RepositoryRef,
        list: &ListKind,
        key: String,
        error: &SourceError,
        requested: Instant,
    ) {
        match list {
            ListKind::Referrers(_) if error.is_not_found() => self.copies.record_absence(repo_ref, key, requested),
            _ => self.copies.remove(key, requested),
        }
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
            return Some(Ok(kept));
        }
        if !self.may_list(repo_ref) {
            return None;
        }
        let ListKind::Referrers(digest) = list else { return None };
        // The client then requests the fallback tag, which is complete, while the cached artifacts may not be.
        if self.copies.was_absent(key).await {
            return Some(Err(PullError::of(&SourceError::not_found(), missing(list))));
        }
        let CachedReferrers { index, is_filtered } = self.referrers.of(repo_ref, digest, query).await?;
        let filters_applied = is_filtered.then(|| ARTIFACT_TYPE.to_owned());
        Some(Ok(self.stale(repo_ref, list, ListCopy { next: None, filters_applied, age: None, bytes: index })))
    }

    /// The right to list ends with the right to pull.
    fn may_list(&self, repo_ref: &RepositoryRef) -> bool {
        !repo_ref.rule.is_passthrough() || self.authorizer.was_authorized(repo_ref)
    }

    fn stale(&self, repo_ref: &RepositoryRef, list: &ListKind, copy: ListCopy) -> ListResponse {
        self.metrics.stale.with_label_values(&["list"]).inc();
        tracing::info!(registry = %repo_ref.registry, repository = %repo_ref.repository, "stale list served");
        let ListCopy { next, filters_applied, age, bytes } = copy;
        ListResponse {
            media_type: media_type(list),
            next,
            filters_applied,
            encoding: None,
            length: Some(bytes.len() as u64),
            from: ServedFrom::Stale,
            age,
            body: Body::Memory(Some(bytes)),
        }
    }

    async fn copied_list(&self, repo_ref: &RepositoryRef, list: &ListKind, key: &str) -> Option<ListResponse> {
        let copy = if self.may_list(repo_ref) { self.copies.get(repo_ref, key).await? } else { return None };
        Some(self.stale(repo_ref, list, copy))
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
}
