//! The registry client: upstreams in order, authorization, redirects, retries, the guard.

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
mod tls;
mod token_endpoint;

use std::sync::Arc;

use ::http::HeaderValue;
use ::http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, LINK, RANGE};
use bytes::{Bytes, BytesMut};
use futures_util::stream::BoxStream;
use futures_util::{StreamExt, TryStreamExt};
use reqwest::Response;
use tokio::sync::{Notify, Semaphore};
use tokio::time::{Instant, timeout_at};

pub use self::auth::ExchangedSecret;
use self::auth::TokenCache;
use self::credentials::ExternalCredentials;
pub use self::credentials::are_here as credentials_are_here;
use self::egress::EgressPolicy;
pub use self::health::UpstreamView;
use self::health::{KnownHealth, UpstreamStates};
use self::http::UpstreamHttp;
use self::rate_limits::RateLimits;
use self::redirects::RedirectCache;
use self::request::{RequestKind, UpstreamRequest, claimed_digest};
pub use self::retry::ROUNDS;
use self::retry::RetryBudget;
use crate::blocking::parsed;
use crate::config::Config;
use crate::memory::{Memory, UpstreamBytes};
use crate::metrics::Metrics;
use crate::oci::{Digest, ErrorCode, MAX_MANIFEST_BYTES, Reference, Registry, error, link, manifest};
use crate::registries::{Registries, RepositoryRef};
use crate::shares::Shares;
use crate::source::{Broken, Incoming, Part, SourceError, UpstreamError, root_cause};

/// All origins, behind one door.
pub struct UpstreamClient {
    http: Arc<UpstreamHttp>,
    tokens: TokenCache,
    redirects: RedirectCache,
    /// By registry: one that fails does not spend what others earn.
    retries: moka::sync::Cache<Registry, Arc<RetryBudget>>,
    conditions: UpstreamStates,
    /// An upstream was found to be down, or limits its requests.
    in_trouble: Notify,
    scarcity: RateLimits,
    /// Probes of upstreams that are down, and of those that have never answered.
    watches: Arc<Semaphore>,
    of_strangers: Arc<Semaphore>,
    memory: Arc<Memory>,
    lists: Shares<Registry>,
    metrics: Arc<Metrics>,
}

/// A manifest as an origin sent it. Its digest is not yet verified.
pub struct UpstreamManifest {
    pub media_type: String,
    pub bytes: Bytes,
    /// The digest that the upstream names, which may be wrong.
    pub claimed: Option<Digest>,
}

/// What can be listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListKind {
    Tags,
    Referrers(Digest),
    /// The repositories of a registry.
    Catalog,
}

/// A list, passed on as it comes.
pub struct UpstreamList {
    /// The query of the next page, as the upstream wrote it.
    pub next: Option<String>,
    pub filters_applied: Option<String>,
    /// `Content-Encoding`, though none was asked for.
    pub encoding: Option<HeaderValue>,
    /// In bytes. None: only its end tells.
    pub length: Option<u64>,
    pub body: BoxStream<'static, Result<Bytes, Broken>>,
}

/// Registries whose retries are counted. One that is forgotten begins anew.
const MAX_RETRY_BUDGETS: u64 = 10_000;

/// Upstreams that are looked after at a time. Of others each question finds out by itself.
const MAX_WATCHES: usize = 256;

/// Clients can name hosts that never were there: they must not take the place of those that are missed.
const MAX_OF_STRANGERS: usize = 64;

/// Lists that are passed on at the same time: their size has no bound, their number has.
const MAX_LISTS: usize = 256;

/// Longest `OCI-Filters-Applied` that is passed on, in bytes.
const LONGEST_FILTERS: usize = 256;

impl UpstreamClient {
    /// Must run inside a tokio runtime, which drives DNS.
    pub fn new(
        config: &Config,
        registries: &Registries,
        memory: Arc<Memory>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, String> {
        let guard = EgressPolicy::new(config)?;
        let http = UpstreamHttp::new(guard, registries.rules().iter().map(|rule| &rule.tls), config.tls.ca.as_deref())?;
        let outside = ExternalCredentials::new(http.cloud.clone());
        Ok(Self {
            http: Arc::new(http),
            tokens: TokenCache::new(outside),
            redirects: RedirectCache::new(),
            retries: moka::sync::Cache::new(MAX_RETRY_BUDGETS),
            conditions: UpstreamStates::new(),
            in_trouble: Notify::new(),
            scarcity: RateLimits::new(metrics.clone()),
            watches: Arc::new(Semaphore::new(MAX_WATCHES)),
            of_strangers: Arc::new(Semaphore::new(MAX_OF_STRANGERS)),
            memory,
            lists: Shares::new(MAX_LISTS),
            metrics,
        })
    }

    /// `GET manifests/<reference>`.
    pub async fn manifest(
        self: &Arc<Self>,
        place: &RepositoryRef,
        reference: &Reference,
        accept: &str,
        deadline: Instant,
    ) -> Result<UpstreamManifest, SourceError> {
        let known = if let Reference::Digest(digest) = reference { Some(digest) } else { None };
        let question = UpstreamRequest::new(RequestKind::Manifest, format!("manifests/{reference}")).accept(accept);
        let response = self.ask_for(place, question, known, deadline).await?;
        let (stated, claimed) = (media_type(&response), claimed_digest(&response));
        let limit = usize::try_from(MAX_MANIFEST_BYTES).unwrap_or(usize::MAX);
        let bytes = self.read_whole(place, response, limit, deadline).await?;
        let known = known.cloned();
        let media_type = parsed(&bytes, move |bytes| manifest_type(bytes, stated, known.as_ref())).await?;
        self.count_bytes(place, bytes.len());
        Ok(UpstreamManifest { media_type, bytes, claimed })
    }

    /// `HEAD manifests/<tag>`: the digest that a tag means now. None: the upstream does not say, and a GET decides. A
    /// HEAD is a hint: registries answer it with 404, 403, 405, 5xx or a web page for what a GET gives.
    pub async fn manifest_digest(
        self: &Arc<Self>,
        place: &RepositoryRef,
        reference: &Reference,
        accept: &str,
        deadline: Instant,
    ) -> Result<Option<Digest>, SourceError> {
        let question = UpstreamRequest::new(RequestKind::ManifestHead, format!("manifests/{reference}")).accept(accept);
        match self.ask(place, &question, deadline).await {
            Ok(response) => Ok(claimed_digest(&response)),
            Err(SourceError::Denied(told)) if told.status == 401 => Err(SourceError::Denied(told)),
            Err(
                SourceError::NotFound(_) | SourceError::Denied(_) | SourceError::Failed(_) | SourceError::Malformed(_),
            ) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// `GET blobs/<digest>`, whole or in part. Where Range is not honoured the response starts at 0. `known` is the
    /// blob's length by a manifest: it replaces a missing `Content-Length`.
    pub async fn blob(
        self: &Arc<Self>,
        place: &RepositoryRef,
        digest: &Digest,
        part: Part,
        known: Option<u64>,
        deadline: Instant,
    ) -> Result<Incoming, SourceError> {
        let mut question = UpstreamRequest::new(RequestKind::Blob, format!("blobs/{digest}")).of_blob(digest);
        if let Some(range) = part.header() {
            question.headers.insert(RANGE, range);
        }
        let mut response = self.ask_for(place, question.clone(), Some(digest), deadline).await?;
        let has_length = response.status() != 200 || header_u64(&response, CONTENT_LENGTH.as_str()).is_some();
        let known = match known {
            None if !has_length => match self.blob_head(place, digest, deadline).await.ok().flatten() {
                Some(length) => Some(length),
                None => {
                    let length = self.counted(place, response, deadline).await?;
                    response = self.ask_for(place, question, Some(digest), deadline).await?;
                    Some(length)
                }
            },
            known => known,
        };
        let understands_ranges = response.status() == 206;
        let (span, total) = part.brought(response.status().as_u16(), response.headers(), known)?;
        let counter = self.metrics.upstream_bytes.with_label_values(&[place.rule.name()]);
        let seconds = self.metrics.upstream_body_seconds.with_label_values(&[place.rule.name()]);
        let mut last = Instant::now();
        let body = response
            .bytes_stream()
            .inspect_ok(move |piece| {
                counter.inc_by(piece.len() as u64);
                seconds.inc_by(last.elapsed().as_secs_f64());
                last = Instant::now();
            })
            .map_err(|error| Broken(root_cause(&error.without_url())));
        let incoming = Incoming::new(span, total, body);
        Ok(if understands_ranges { incoming } else { incoming.not_resumable() })
    }

    /// The length of a body that only its end tells. Its bytes are not kept, since there may be more than fit: the blob is
    /// downloaded twice, which is better than not at all. No manifest has named it, or none that passed through here.
    async fn counted(&self, place: &RepositoryRef, response: Response, deadline: Instant) -> Result<u64, SourceError> {
        let counter = self.metrics.upstream_bytes.with_label_values(&[place.rule.name()]);
        let counting = response.bytes_stream().try_fold(0, |length, piece| {
            counter.inc_by(piece.len() as u64);
            std::future::ready(Ok(length + piece.len() as u64))
        });
        match timeout_at(deadline, counting).await {
            Ok(counted) => counted.map_err(|error| SourceError::Interrupted(root_cause(&error.without_url()))),
            Err(_) => Err(SourceError::Unreachable("the upstream does not tell the length of the blob".into())),
        }
    }

    /// The length of a blob, in bytes. `known` is the one by a manifest.
    pub async fn blob_length(
        self: &Arc<Self>,
        place: &RepositoryRef,
        digest: &Digest,
        known: Option<u64>,
        deadline: Instant,
    ) -> Result<u64, SourceError> {
        match self.blob_head(place, digest, deadline).await {
            Ok(length) => match length.or(known) {
                Some(length) => return Ok(length),
                None => tracing::debug!(%place, %digest, "HEAD without a length"),
            },
            Err(error @ (SourceError::Unreachable(_) | SourceError::Interrupted(_) | SourceError::TimedOut)) => {
                return Err(error);
            }
            Err(error @ SourceError::NotFound(_)) => return Err(error),
            // Signed URLs are often good for GET only.
            Err(error) => tracing::debug!(%place, %digest, %error, "HEAD refused, asking by GET"),
        }
        Ok(self.blob(place, digest, Part::From(0), known, deadline).await?.total)
    }

    /// Asks for content. Of several upstreams one that names another digest is passed over, where another one has what is
    /// meant; alone it is believed, since many registries name a wrong one for the right bytes.
    async fn ask_for(
        self: &Arc<Self>,
        place: &RepositoryRef,
        question: UpstreamRequest,
        digest: Option<&Digest>,
        deadline: Instant,
    ) -> Result<Response, SourceError> {
        if digest.is_some() && place.rule.upstreams(&place.registry).len() > 1 {
            match self.ask(place, &question.clone().expect(digest), deadline).await {
                Err(SourceError::Malformed(_)) => {}
                answer => return answer,
            }
        }
        self.ask(place, &question, deadline).await
    }

    /// `HEAD blobs/<digest>`, of which only the outcome counts. The length: None, if it is not told.
    pub async fn blob_head(
        self: &Arc<Self>,
        place: &RepositoryRef,
        digest: &Digest,
        deadline: Instant,
    ) -> Result<Option<u64>, SourceError> {
        let question =
            UpstreamRequest::new(RequestKind::BlobHead, format!("blobs/{digest}")).of_blob(digest).expect(Some(digest));
        let response = self.ask(place, &question, deadline).await?;
        Ok(header_u64(&response, CONTENT_LENGTH.as_str()))
    }

    /// `GET tags/list`, `GET referrers/<digest>` or `GET _catalog`: passed on as it comes.
    pub async fn list(
        self: &Arc<Self>,
        place: &RepositoryRef,
        list: &ListKind,
        query: Option<&str>,
        deadline: Instant,
    ) -> Result<UpstreamList, SourceError> {
        let turn = timeout_at(deadline, self.lists.wait(&place.registry, 1)).await;
        let turn = turn.map_err(|_| SourceError::Busy)?;
        let question = UpstreamRequest::list(list).query(query);
        let response = match (self.ask(place, &question, deadline).await, list) {
            // A web page, or a redirect to one, stands where a registry without the API has a login.
            (Err(SourceError::Malformed(_)), ListKind::Referrers(_)) => return Err(no_referrers_api()),
            (response, _) => response?,
        };
        let filters = response.headers().get("oci-filters-applied").and_then(|value| value.to_str().ok());
        let filters_applied = filters.filter(|filters| filters.len() <= LONGEST_FILTERS).map(str::to_owned);
        let encoding = response.headers().get(CONTENT_ENCODING).filter(|encoding| *encoding != "identity").cloned();
        let next = link::next(response.headers().get_all(LINK).iter().map(HeaderValue::as_bytes));
        let length = header_u64(&response, CONTENT_LENGTH.as_str());
        let counter = self.metrics.upstream_bytes.with_label_values(&[place.rule.name()]);
        let body = response
            .bytes_stream()
            .inspect_ok(move |piece| {
                let _ = &turn;
                counter.inc_by(piece.len() as u64);
            })
            .map_err(|error| Broken(root_cause(&error.without_url())));
        Ok(UpstreamList { next, filters_applied, encoding, length, body: body.boxed() })
    }

    /// Reads a body within the memory that all such bodies share.
    async fn read_whole(
        &self,
        place: &RepositoryRef,
        response: Response,
        limit: usize,
        deadline: Instant,
    ) -> Result<Bytes, SourceError> {
        let announced = header_u64(&response, CONTENT_LENGTH.as_str()).and_then(|length| usize::try_from(length).ok());
        // Before anything is read, so that nobody waits while holding some. What is not announced takes it as it comes.
        let held = self.memory.of_upstreams.wait(&place.registry, announced.unwrap_or(0).min(limit));
        let held = timeout_at(deadline, held).await.map_err(|_| SourceError::Busy)?;
        read_limited(response, limit, deadline, Some(held)).await
    }

    /// Reads the certificates again that upstreams are shown. Blocks on the disk.
    pub fn reload(&self) -> Result<(), String> {
        self.http.reload()
    }

    /// The upstreams that were asked lately.
    pub fn upstreams(&self) -> Vec<UpstreamView> {
        let tokens = self.tokens.counts();
        self.conditions.views(|rule, upstream| KnownHealth {
            remaining: self.scarcity.remaining(rule, upstream),
            tokens: tokens.get(&(rule.to_owned(), upstream.to_owned())).copied().unwrap_or(0),
        })
    }

    /// Whether pulls are few by which a rule's registry counts, so that what nobody waits for is put off.
    pub fn is_scarce(&self, place: &RepositoryRef) -> bool {
        let mut upstreams = place.rule.upstreams(&place.registry).into_iter().map(|(upstream, _)| upstream.base());
        let (rule, now) = (place.rule.name(), Instant::now());
        upstreams.any(|upstream| self.scarcity.is_scarce(rule, &upstream, now))
    }

    /// Forgets where a blob's redirect led: the bytes from there broke off or were wrong.
    pub async fn forget_redirects(&self, place: &RepositoryRef, digest: &Digest) {
        let question = UpstreamRequest::new(RequestKind::Blob, format!("blobs/{digest}"));
        for (upstream, _) in place.rule.upstreams(&place.registry) {
            if let Ok(url) = question.url(&upstream, place) {
                self.redirects.forget(&url).await;
            }
        }
    }

    fn count_bytes(&self, place: &RepositoryRef, bytes: usize) {
        self.metrics.upstream_bytes.with_label_values(&[place.rule.name()]).inc_by(bytes as u64);
    }
}

/// Reads a body of at most `limit` bytes. `held` grows where more comes than was announced; None: it is small.
async fn read_limited(
    mut response: Response,
    limit: usize,
    deadline: Instant,
    mut held: Option<UpstreamBytes>,
) -> Result<Bytes, SourceError> {
    let too_large = || SourceError::Malformed(format!("an answer of more than {limit} bytes"));
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

/// The media type of what an upstream sent for a manifest. `known` is the digest that was requested.
fn manifest_type(bytes: &[u8], stated: Option<String>, known: Option<&Digest>) -> Result<String, SourceError> {
    if manifest::is_first_schema(bytes) {
        return Err(first_schema());
    }
    // What has not the shape of a manifest may still be one, by its digest or its declared type.
    let is_manifest = |stated: &String| {
        (manifest::is_manifest_type(stated) && manifest::is_object(bytes))
            || known.is_some_and(|digest| digest.matches(bytes))
            || manifest::has_version(bytes)
    };
    manifest::media_type(bytes)
        .or_else(|| stated.filter(is_manifest))
        .ok_or_else(|| SourceError::Malformed("something that is not a manifest, or one without a media type".into()))
}

/// Docker's first schema is not supported: its digest is not that of its bytes, and containerd 2 refuses it as well.
fn first_schema() -> SourceError {
    let message =
        "the image has a manifest of Docker's schema 1, which is not supported: push it again with a current client";
    SourceError::NotFound(UpstreamError::new(404, &error::body(ErrorCode::ManifestUnknown, message)))
}

/// What clients take for "look for the fall-back tag": any 404 but `NAME_UNKNOWN`.
fn no_referrers_api() -> SourceError {
    let message = "the upstream has no referrers API";
    SourceError::NotFound(UpstreamError::new(404, &error::body(ErrorCode::Unsupported, message)))
}

fn header_u64(response: &Response, name: &str) -> Option<u64> {
    response.headers().get(name)?.to_str().ok()?.trim().parse().ok()
}

/// The media type without parameters, which clients would take as part of it.
fn media_type(response: &Response) -> Option<String> {
    let value = response.headers().get(CONTENT_TYPE)?.to_str().ok()?;
    let bare = value.split(';').next().unwrap_or_default().trim();
    manifest::is_media_type(bare).then(|| bare.to_owned())
}
