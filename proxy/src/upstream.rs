//! Client of the upstream registries: failover, authentication, redirects, retries, egress policy.

mod access_check;
mod attempt;
mod auth;
pub mod challenge;
mod credentials;
mod egress;
mod env_proxies;
mod failover;
mod health;
mod http;
mod probes;
mod rate_limits;
mod recent_hosts;
mod redirects;
mod request;
mod retry;
mod sessions;
mod tls;
mod token_endpoint;

use std::collections::HashMap;
use std::sync::Arc;

use ::http::HeaderValue;
use ::http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, LINK, RANGE};
use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, BoxStream, Stream};
use futures_util::{StreamExt, TryStreamExt};
use reqwest::Response;
use tokio::sync::{Notify, Semaphore};
use tokio::time::{Instant, timeout_at};

pub use self::auth::ExchangedSecret;
pub use self::credentials::check as check_credentials;
pub use self::health::UpstreamView;
use self::health::{KnownHealth, UpstreamStates};
use self::rate_limits::RateLimits;
use self::request::{RequestKind, UpstreamRequest, claimed_digest};
pub use self::retry::ROUNDS;
use self::retry::RetryBudget;
pub(crate) use self::sessions::ReloadedSessions;
use self::sessions::{Sessions, UpstreamSession};
use crate::bandwidth::{CurrentPriority, Priority, RateLimiter, Throttle};
use crate::blocking::parsed;
use crate::config::{ByteRate, Config, EgressConfig};
use crate::memory::{Memory, UpstreamBytes};
use crate::metrics::Metrics;
use crate::oci::{Digest, ErrorCode, MAX_MANIFEST_BYTES, Reference, Registry, error, link, manifest};
use crate::registries::{Registries, RepositoryRef, Rules};
use crate::shares::Shares;
use crate::source::{Broken, Incoming, Part, SourceError, UpstreamError, root_cause};
use crate::times::OBSERVATION_TTL;

/// Sends requests to all upstream registries.
pub struct UpstreamClient {
    registries: Arc<Registries>,
    sessions: Sessions,
    /// The limit of all upstreams together.
    limiter: Arc<RateLimiter>,
    /// By registry, so that a failing registry does not spend the retries that others have earned.
    retries: moka::sync::Cache<Registry, Arc<RetryBudget>>,
    health: UpstreamStates,
    /// Hosts that the egress policy blocked recently, by rule and URL, with the reason.
    blocked: moka::sync::Cache<(String, String), String>,
    /// Notified when an upstream goes down or limits its requests.
    became_unavailable: Notify,
    rate_limits: RateLimits,
    /// One permit for each probed upstream that is configured or has responded before.
    probe_permits: Arc<Semaphore>,
    unknown_host_permits: Arc<Semaphore>,
    memory: Arc<Memory>,
    lists: Shares<Registry>,
    metrics: Arc<Metrics>,
}

/// A manifest as the upstream sent it. Its digest is not yet verified.
pub struct UpstreamManifest {
    pub media_type: String,
    pub bytes: Bytes,
    /// From `Docker-Content-Digest`, which may be wrong.
    pub claimed: Option<Digest>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListKind {
    Tags,
    Referrers(Digest),
    /// The repositories of a registry.
    Catalog,
}

/// A list response, which is streamed to the client.
pub struct UpstreamList {
    /// The query of the next page, as the upstream wrote it.
    pub next: Option<String>,
    pub filters_applied: Option<String>,
    /// `Content-Encoding`: some upstreams send one although the request accepts only `identity`.
    pub encoding: Option<HeaderValue>,
    /// In bytes. None: the response has no `Content-Length`.
    pub length: Option<u64>,
    pub body: BoxStream<'static, Result<Bytes, Broken>>,
}

/// Registries with a retry budget. More: more memory. Fewer: an evicted registry starts with a new budget.
const MAX_RETRY_BUDGETS: u64 = 10_000;

/// Known upstreams that are probed at the same time. More: more requests in a large outage. Fewer: without a probe,
/// client requests find out that an upstream is down.
const MAX_PROBED_UPSTREAMS: usize = 256;

/// The same for hosts that have never responded. Clients can invent such hosts, so these probes must not use the
/// permits of known upstreams.
const MAX_PROBED_UNKNOWN_HOSTS: usize = 64;

/// Blocked hosts that are listed. More: clients that invent hosts fill the status page. Fewer: a host that an operator
/// looks for may be missing.
const MAX_BLOCKED_HOSTS: u64 = 100;

/// Lists that are streamed at the same time: a list has no size limit. More: more connections. Fewer: clients wait for
/// each other's lists.
const MAX_LISTS: usize = 256;

/// Largest `OCI-Filters-Applied` that clients get, in bytes. A larger one is dropped.
const MAX_FILTERS_APPLIED_BYTES: usize = 256;

impl UpstreamClient {
    /// Must run inside a tokio runtime, which drives DNS.
    pub fn new(
        config: &Config,
        registries: &Arc<Registries>,
        memory: Arc<Memory>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, String> {
        Ok(Self {
            registries: registries.clone(),
            sessions: Sessions::new(config, &registries.rules())?,
            limiter: Arc::new(RateLimiter::new(config.limits.upstream.map(ByteRate::bytes_per_second))),
            retries: moka::sync::Cache::new(MAX_RETRY_BUDGETS),
            health: UpstreamStates::new(),
            blocked: moka::sync::Cache::builder().max_capacity(MAX_BLOCKED_HOSTS).time_to_live(OBSERVATION_TTL).build(),
            became_unavailable: Notify::new(),
            rate_limits: RateLimits::new(metrics.clone()),
            probe_permits: Arc::new(Semaphore::new(MAX_PROBED_UPSTREAMS)),
            unknown_host_permits: Arc::new(Semaphore::new(MAX_PROBED_UNKNOWN_HOSTS)),
            memory,
            lists: Shares::new(MAX_LISTS),
            metrics,
        })
    }

    /// `GET manifests/<reference>`.
    pub async fn manifest(
        self: &Arc<Self>,
        repo_ref: &RepositoryRef,
        reference: &Reference,
        accept: &str,
        deadline: Instant,
    ) -> Result<UpstreamManifest, SourceError> {
        let known = if let Reference::Digest(digest) = reference { Some(digest) } else { None };
        let request = UpstreamRequest::new(RequestKind::Manifest, format!("manifests/{reference}")).accept(accept);
        let response = self.send_for_content(repo_ref, request, known, deadline).await?;
        let (stated, claimed) = (media_type(&response), claimed_digest(&response));
        let limit = usize::try_from(MAX_MANIFEST_BYTES).unwrap_or(usize::MAX);
        let bytes = self.read_whole(repo_ref, response, limit, deadline).await?;
        let known = known.cloned();
        let media_type = parsed(&bytes, move |bytes| manifest_type(bytes, stated, known.as_ref())).await?;
        self.count_bytes(repo_ref, bytes.len());
        Ok(UpstreamManifest { media_type, bytes, claimed })
    }

    /// `HEAD manifests/<tag>`: the digest that the tag resolves to. None: only a GET can tell. A HEAD is a hint: some
    /// registries respond with 404, 403, 405, 5xx or a web page although GET succeeds.
    pub async fn manifest_digest(
        self: &Arc<Self>,
        repo_ref: &RepositoryRef,
        reference: &Reference,
        accept: &str,
        deadline: Instant,
    ) -> Result<Option<Digest>, SourceError> {
        let request = UpstreamRequest::new(RequestKind::ManifestHead, format!("manifests/{reference}")).accept(accept);
        match self.send(repo_ref, &request, deadline).await {
            Ok(response) => Ok(claimed_digest(&response)),
            Err(SourceError::Denied(error)) if error.status == 401 => Err(SourceError::Denied(error)),
            Err(
                SourceError::NotFound(_) | SourceError::Denied(_) | SourceError::Failed(_) | SourceError::Malformed(_),
            ) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// `GET blobs/<digest>`, whole or in part. If the upstream ignores `Range`, the body starts at 0. `known` is the
    /// length from a manifest and replaces a missing `Content-Length`.
    pub async fn blob(
        self: &Arc<Self>,
        repo_ref: &RepositoryRef,
        digest: &Digest,
        part: Part,
        known: Option<u64>,
        deadline: Instant,
    ) -> Result<Incoming, SourceError> {
        let mut request = UpstreamRequest::new(RequestKind::Blob, format!("blobs/{digest}")).of_blob(digest);
        if let Some(range) = part.header() {
            request.headers.insert(RANGE, range);
        }
        let mut response = self.send_for_content(repo_ref, request.clone(), Some(digest), deadline).await?;
        let has_length = response.status() != 200 || header_u64(&response, CONTENT_LENGTH.as_str()).is_some();
        let known = match known {
            None if !has_length => match self.blob_head(repo_ref, digest, deadline).await.ok().flatten() {
                Some(length) => Some(length),
                None => {
                    let length = self.measured_length(repo_ref, response, deadline).await?;
                    response = self.send_for_content(repo_ref, request, Some(digest), deadline).await?;
                    Some(length)
                }
            },
            known => known,
        };
        let understands_ranges = response.status() == 206;
        let (span, total) = part.brought(response.status().as_u16(), response.headers(), known)?;
        let counter = self.metrics.upstream_bytes.with_label_values(&[repo_ref.rule.name()]);
        let seconds = self.metrics.upstream_body_seconds.with_label_values(&[repo_ref.rule.name()]);
        let mut last = Instant::now();
        let body = response
            .bytes_stream()
            .inspect_ok(move |piece| {
                counter.inc_by(piece.len() as u64);
                seconds.inc_by(last.elapsed().as_secs_f64());
                last = Instant::now();
            })
            .map_err(|error| Broken(root_cause(&error.without_url())));
        let incoming = Incoming::new(span, total, body).throttled(self.throttle(repo_ref));
        Ok(if understands_ranges { incoming } else { incoming.not_resumable() })
    }

    /// Downloads a body only to measure it, if neither the response nor a manifest states its length. The bytes are not
    /// kept, since they may not fit the store. A second download is better than an error.
    async fn measured_length(
        &self,
        repo_ref: &RepositoryRef,
        response: Response,
        deadline: Instant,
    ) -> Result<u64, SourceError> {
        let counting = self
            .throttled(repo_ref, response.bytes_stream())
            .try_fold(0, |length, piece| std::future::ready(Ok(length + piece.len() as u64)));
        match timeout_at(deadline, counting).await {
            Ok(length) => length.map_err(|error| SourceError::Interrupted(root_cause(&error.without_url()))),
            Err(_) => Err(SourceError::Unreachable("the upstream does not state the length of the blob".into())),
        }
    }

    /// The length of a blob, in bytes. `known` is the length from a manifest.
    pub async fn blob_length(
        self: &Arc<Self>,
        repo_ref: &RepositoryRef,
        digest: &Digest,
        known: Option<u64>,
        deadline: Instant,
    ) -> Result<u64, SourceError> {
        match self.blob_head(repo_ref, digest, deadline).await {
            Ok(length) => match length.or(known) {
                Some(length) => return Ok(length),
                None => {
                    tracing::debug!(registry = %repo_ref.registry, repository = %repo_ref.repository, %digest, "HEAD response without length");
                }
            },
            Err(error @ (SourceError::Unreachable(_) | SourceError::Interrupted(_) | SourceError::TimedOut)) => {
                return Err(error);
            }
            Err(error @ SourceError::NotFound(_)) => return Err(error),
            // Signed URLs are often valid for GET only.
            Err(error) => {
                tracing::debug!(registry = %repo_ref.registry, repository = %repo_ref.repository, %digest, %error, "HEAD request failed");
            }
        }
        Ok(self.blob(repo_ref, digest, Part::From(0), known, deadline).await?.total)
    }

    /// Requests content. With several upstreams, one with another `Docker-Content-Digest` is skipped first. If none
    /// matches, the header is ignored: many registries send a wrong one with the right bytes.
    async fn send_for_content(
        self: &Arc<Self>,
        repo_ref: &RepositoryRef,
        request: UpstreamRequest,
        digest: Option<&Digest>,
        deadline: Instant,
    ) -> Result<Response, SourceError> {
        if digest.is_some() && repo_ref.rule.upstreams(&repo_ref.registry).len() > 1 {
            match self.send(repo_ref, &request.clone().expect(digest), deadline).await {
                Err(SourceError::Malformed(_)) => {}
                result => return result,
            }
        }
        self.send(repo_ref, &request, deadline).await
    }

    /// `HEAD blobs/<digest>`: the blob's length. None: the response has no `Content-Length`.
    pub async fn blob_head(
        self: &Arc<Self>,
        repo_ref: &RepositoryRef,
        digest: &Digest,
        deadline: Instant,
    ) -> Result<Option<u64>, SourceError> {
        let request =
            UpstreamRequest::new(RequestKind::BlobHead, format!("blobs/{digest}")).of_blob(digest).expect(Some(digest));
        let response = self.send(repo_ref, &request, deadline).await?;
        Ok(header_u64(&response, CONTENT_LENGTH.as_str()))
    }

    /// `GET tags/list`, `GET referrers/<digest>` or `GET _catalog`, streamed.
    pub async fn list(
        self: &Arc<Self>,
        repo_ref: &RepositoryRef,
        list: &ListKind,
        query: Option<&str>,
        deadline: Instant,
    ) -> Result<UpstreamList, SourceError> {
        let permit = timeout_at(deadline, self.lists.wait(&repo_ref.registry, 1)).await;
        let permit = permit.map_err(|_| SourceError::Busy)?;
        let request = UpstreamRequest::list(list).query(query);
        let response = match (self.send(repo_ref, &request, deadline).await, list) {
            // A registry without the referrers API may respond with its login page or a redirect to it.
            (Err(SourceError::Malformed(_)), ListKind::Referrers(_)) => return Err(no_referrers_api()),
            (response, _) => response?,
        };
        let filters = response.headers().get("oci-filters-applied").and_then(|value| value.to_str().ok());
        let filters_applied = filters.filter(|filters| filters.len() <= MAX_FILTERS_APPLIED_BYTES).map(str::to_owned);
        let encoding = response.headers().get(CONTENT_ENCODING).filter(|encoding| *encoding != "identity").cloned();
        let next = link::next(response.headers().get_all(LINK).iter().map(HeaderValue::as_bytes));
        let length = header_u64(&response, CONTENT_LENGTH.as_str());
        let body = self
            .throttled(repo_ref, response.bytes_stream())
            .inspect_ok(move |_| {
                let _ = &permit;
            })
            .map_err(|error| Broken(root_cause(&error.without_url())));
        Ok(UpstreamList { next, filters_applied, encoding, length, body: body.boxed() })
    }

    /// Reads a body into memory, within the budget that all such bodies share.
    async fn read_whole(
        &self,
        repo_ref: &RepositoryRef,
        response: Response,
        limit: usize,
        deadline: Instant,
    ) -> Result<Bytes, SourceError> {
        let announced = header_u64(&response, CONTENT_LENGTH.as_str()).and_then(|length| usize::try_from(length).ok());
        // Reserved before reading, so that no request waits while it holds memory. A body without a length grows its
        // reservation.
        let held = self.memory.of_upstreams.wait(&repo_ref.registry, announced.unwrap_or(0).min(limit));
        let held = timeout_at(deadline, held).await.map_err(|_| SourceError::Busy)?;
        read_limited(response, limit, deadline, Some(held)).await
    }

    /// Reloads the client certificates for upstreams. Blocks on the disk.
    pub fn reload(&self) -> Result<(), String> {
        self.sessions.reload_certificates()
    }

    /// What other rules need before they can apply. Must run inside a tokio runtime. [`Self::store`] applies it.
    pub(crate) fn reloaded(&self, egress: &EgressConfig, next: &Rules) -> Result<ReloadedSessions, String> {
        self.sessions.reloaded(egress, next)
    }

    /// New requests use these sessions, all downloads this limit.
    pub(crate) fn store(&self, sessions: ReloadedSessions, limit: Option<ByteRate>) {
        self.sessions.store(sessions);
        self.limiter.set_rate(limit.map(ByteRate::bytes_per_second));
    }

    fn session(&self, repo_ref: &RepositoryRef) -> Arc<UpstreamSession> {
        self.sessions.of(repo_ref)
    }

    /// The bandwidth limits of a download. None: there is none.
    fn throttle(&self, repo_ref: &RepositoryRef) -> Option<Throttle> {
        let limiters = [&repo_ref.rule.limiter, &self.limiter];
        Throttle::new(limiters.into_iter().cloned(), CurrentPriority::new(Priority::Client))
    }

    /// The upstreams with recent requests.
    pub fn upstreams(&self) -> Vec<UpstreamView> {
        let mut tokens = HashMap::new();
        for session in self.sessions.distinct() {
            tokens.extend(session.tokens.counts());
        }
        let rules = self.registries.rules();
        let is_current = |id: u64| rules.iter().any(|rule| rule.id == id);
        let mut views = self.health.views(is_current, |rule, upstream| KnownHealth {
            remaining: self.rate_limits.remaining(rule, upstream),
            tokens: tokens.get(&(rule.to_owned(), upstream.to_owned())).copied().unwrap_or(0),
        });
        views.extend(self.blocked.iter().map(|(key, error)| {
            let (rule, upstream) = &*key;
            UpstreamView::blocked(rule, upstream, &error)
        }));
        views
    }

    /// Whether few pulls remain of an upstream's rate limit, so that background work should wait.
    pub fn is_rate_limit_low(&self, repo_ref: &RepositoryRef) -> bool {
        let mut upstreams =
            repo_ref.rule.upstreams(&repo_ref.registry).into_iter().map(|(upstream, _)| upstream.base());
        let (rule, now) = (repo_ref.rule.name(), Instant::now());
        upstreams.any(|upstream| self.rate_limits.is_rate_limit_low(rule, &upstream, now))
    }

    /// Forgets the redirect targets of a blob, after a body from one of them was incomplete or corrupt.
    pub async fn forget_redirects(&self, repo_ref: &RepositoryRef, digest: &Digest) {
        let request = UpstreamRequest::new(RequestKind::Blob, format!("blobs/{digest}"));
        for (upstream, _) in repo_ref.rule.upstreams(&repo_ref.registry) {
            if let Ok(url) = request.url(&upstream, repo_ref) {
                self.session(repo_ref).redirects.forget(&url).await;
            }
        }
    }

    /// A body that is not a blob, counted and under the bandwidth limits.
    fn throttled<E, S>(
        &self,
        repo_ref: &RepositoryRef,
        body: S,
    ) -> impl Stream<Item = Result<Bytes, E>> + Send + use<E, S>
    where
        S: Stream<Item = Result<Bytes, E>> + Send + 'static,
    {
        let counter = self.metrics.upstream_bytes.with_label_values(&[repo_ref.rule.name()]);
        stream::unfold((Box::pin(body), self.throttle(repo_ref)), move |(mut body, mut throttle)| {
            let counter = counter.clone();
            async move {
                if let Some(throttle) = &mut throttle {
                    throttle.ready().await;
                }
                let piece = body.next().await?;
                if let Ok(bytes) = &piece {
                    counter.inc_by(bytes.len() as u64);
                    throttle.iter_mut().for_each(|throttle| throttle.count(bytes.len() as u64));
                }
                Some((piece, (body, throttle)))
            }
        })
    }

    /// Counts bytes that waited for no bandwidth limit.
    fn count_bytes(&self, repo_ref: &RepositoryRef, bytes: usize) {
        if let Some(mut throttle) = self.throttle(repo_ref) {
            throttle.count(bytes as u64);
        }
        self.metrics.upstream_bytes.with_label_values(&[repo_ref.rule.name()]).inc_by(bytes as u64);
    }
}

/// Reads a body of at most `limit` bytes. `held` grows if the body exceeds its announced length. None: the body is
/// small.
async fn read_limited(
    mut response: Response,
    limit: usize,
    deadline: Instant,
    mut held: Option<UpstreamBytes>,
) -> Result<Bytes, SourceError> {
    let too_large = || SourceError::Malformed(format!("a response of more than {limit} bytes"));
    if header_u64(&response, CONTENT_LENGTH.as_str()).is_some_and(|length| length > limit as u64) {
        return Err(too_large());
    }
    let mut bytes = BytesMut::new();
    loop {
        match timeout_at(deadline, response.chunk()).await {
            Err(_) => return Err(SourceError::TimedOut),
            Ok(Err(error)) => return Err(SourceError::Unreachable(root_cause(&error.without_url()))),
            Ok(Ok(None)) => return Ok(bytes.freeze()),
            Ok(Ok(Some(piece))) if bytes.len() + piece.len() > limit => return Err(too_large()),
            Ok(Ok(Some(piece))) if held.as_mut().is_some_and(|held| !held.cover(bytes.len() + piece.len())) => {
                return Err(SourceError::Busy);
            }
            Ok(Ok(Some(piece))) => bytes.extend_from_slice(&piece),
        }
    }
}

/// The media type of a manifest response. `known` is the requested digest.
fn manifest_type(bytes: &[u8], stated: Option<String>, known: Option<&Digest>) -> Result<String, SourceError> {
    if manifest::is_first_schema(bytes) {
        return Err(first_schema());
    }
    // A body without the shape of a manifest may still be one, by its digest or its declared type.
    let is_manifest = |stated: &String| {
        (manifest::is_manifest_type(stated) && manifest::is_object(bytes))
            || known.is_some_and(|digest| digest.matches(bytes))
            || manifest::has_version(bytes)
    };
    manifest::media_type(bytes).or_else(|| stated.filter(is_manifest)).ok_or_else(|| {
        SourceError::Malformed("a body that is not a manifest, or a manifest without a media type".into())
    })
}

/// Docker's schema 1 is not supported: its digest is not the digest of its bytes, and containerd 2 rejects it as well.
fn first_schema() -> SourceError {
    let message =
        "the image has a manifest of Docker's schema 1, which is not supported: push it again with a current client";
    SourceError::NotFound(UpstreamError::new(404, &error::body(ErrorCode::ManifestUnknown, message)))
}

/// Makes clients use the fallback tag, which they do after any 404 except `NAME_UNKNOWN`.
fn no_referrers_api() -> SourceError {
    let message = "the upstream has no referrers API";
    SourceError::NotFound(UpstreamError::new(404, &error::body(ErrorCode::Unsupported, message)))
}

fn header_u64(response: &Response, name: &str) -> Option<u64> {
    response.headers().get(name)?.to_str().ok()?.trim().parse().ok()
}

/// Without parameters: clients would take them as part of the type.
fn media_type(response: &Response) -> Option<String> {
    let value = response.headers().get(CONTENT_TYPE)?.to_str().ok()?;
    let bare = value.split(';').next().unwrap_or_default().trim();
    manifest::is_media_type(bare).then(|| bare.to_owned())
}
