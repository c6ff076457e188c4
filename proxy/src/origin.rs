//! The registry client: upstreams in order, authorization, redirects, retries, the guard.

mod asking;
mod attempt;
mod auth;
pub mod challenge;
mod condition;
mod credentials;
mod entitled;
mod guard;
mod http;
mod question;
mod redirects;
mod retry;
mod scarcity;
mod watch;

use std::sync::Arc;

use ::http::header::{CONTENT_LENGTH, CONTENT_TYPE, RANGE};
use bytes::{Bytes, BytesMut};
use futures_util::TryStreamExt;
use reqwest::Response;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};

pub use self::auth::Exchanged;
use self::auth::Tokens;
pub use self::condition::UpstreamView;
use self::condition::{Conditions, Known};
pub use self::credentials::are_here as credentials_are_here;
use self::guard::Guard;
use self::http::Http;
use self::question::{Kind, Question, claimed_digest};
use self::redirects::Redirects;
use self::retry::RetryBudget;
use self::scarcity::Scarcity;
use crate::config::Config;
use crate::metrics::Metrics;
use crate::oci::{Digest, MAX_MANIFEST_BYTES, Reference, Registry, manifest};
use crate::registries::{Place, Registries};
use crate::shares::Shares;
use crate::source::{Broken, Incoming, Part, SourceError, error_chain};

/// All origins, behind one door.
pub struct Origin {
    http: Arc<Http>,
    tokens: Tokens,
    redirects: Redirects,
    retries: RetryBudget,
    conditions: Conditions,
    scarcity: Scarcity,
    /// Those that look after upstreams that are down, and after those that nobody has ever heard of.
    watches: Arc<Semaphore>,
    of_strangers: Arc<Semaphore>,
    /// Memory for answers that are read whole, in KiB.
    whole: Shares<Registry>,
    metrics: Arc<Metrics>,
}

/// A manifest as an origin sent it. Its digest is not yet verified.
pub struct ManifestAnswer {
    pub media_type: String,
    /// What the origin says in `Docker-Content-Digest`.
    pub claimed: Option<Digest>,
    pub bytes: Bytes,
}

/// A tag list or referrers answer, passed on as it came.
pub struct ListAnswer {
    pub media_type: String,
    pub link: Option<String>,
    pub filters_applied: Option<String>,
    pub bytes: Bytes,
}

/// Upstreams that are looked after at a time. Of others each question finds out by itself.
const MAX_WATCHES: usize = 256;

/// Clients can name hosts that never were there: they must not take the place of those that are missed.
const MAX_OF_STRANGERS: usize = 64;

/// All answers that are being read whole share this many KiB.
const WHOLE_KIB: usize = 64 * 1024;
const WHOLE_KIB_OF_REGISTRY: usize = 32 * 1024;

const STEP_KIB: usize = 64;

/// Largest tag list or referrers answer, in bytes.
const MAX_LIST_BYTES: usize = 4 * 1024 * 1024;

impl Origin {
    /// Must run inside a tokio runtime, which drives DNS.
    pub fn new(config: &Config, registries: &Registries, metrics: Arc<Metrics>) -> Result<Self, String> {
        let guard = Guard::new(config)?;
        let cas = registries.rules().iter().map(|rule| rule.ca.as_deref());
        let http = Http::new(guard, cas, config.tls.ca.as_deref())?;
        Ok(Self {
            http: Arc::new(http),
            tokens: Tokens::new(),
            redirects: Redirects::new(),
            retries: RetryBudget::new(),
            conditions: Conditions::new(),
            scarcity: Scarcity::new(metrics.clone()),
            watches: Arc::new(Semaphore::new(MAX_WATCHES)),
            of_strangers: Arc::new(Semaphore::new(MAX_OF_STRANGERS)),
            whole: Shares::new(WHOLE_KIB, WHOLE_KIB_OF_REGISTRY),
            metrics,
        })
    }

    /// `GET manifests/<reference>`.
    pub async fn manifest(
        self: &Arc<Self>,
        place: &Place,
        reference: &Reference,
        accept: &str,
        deadline: Instant,
    ) -> Result<ManifestAnswer, SourceError> {
        let question = Question::new(Kind::Manifest, format!("manifests/{reference}")).accept(accept);
        let known = if let Reference::Digest(digest) = reference { Some(digest) } else { None };
        let question = question.expect(known);
        let response = self.ask(place, &question, deadline).await?;
        let claimed = claimed_digest(&response);
        let stated = media_type(&response);
        let limit = usize::try_from(MAX_MANIFEST_BYTES).unwrap_or(usize::MAX);
        let bytes = self.read_whole(place, response, limit, deadline).await?;
        // Only a digest proves what nobody knows the shape of.
        let is_manifest = || known.is_some_and(|digest| digest.matches(&bytes)) || manifest::has_version(&bytes);
        let media_type =
            manifest::media_type(&bytes).or_else(|| stated.filter(|_| is_manifest())).ok_or_else(|| {
                SourceError::Malformed("something that is no manifest, or one without a media type".into())
            })?;
        self.count_bytes(place, bytes.len());
        Ok(ManifestAnswer { media_type, claimed, bytes })
    }

    /// `HEAD manifests/<tag>`: the digest that a tag means now. None: the origin does not say.
    pub async fn manifest_digest(
        self: &Arc<Self>,
        place: &Place,
        reference: &Reference,
        accept: &str,
        deadline: Instant,
    ) -> Result<Option<Digest>, SourceError> {
        let question = Question::new(Kind::ManifestHead, format!("manifests/{reference}")).accept(accept);
        match self.ask(place, &question, deadline).await {
            Ok(response) => Ok(claimed_digest(&response)),
            // Some registries know no HEAD.
            Err(SourceError::Failed(405)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// `GET blobs/<digest>`, whole or in part. Where Range is not honoured the answer starts at 0.
    pub async fn blob(
        self: &Arc<Self>,
        place: &Place,
        digest: &Digest,
        part: Part,
        deadline: Instant,
    ) -> Result<Incoming, SourceError> {
        let mut question = Question::new(Kind::Blob, format!("blobs/{digest}")).of_blob(digest);
        if let Some(range) = part.header() {
            question.headers.insert(RANGE, range);
        }
        let response = self.ask(place, &question, deadline).await?;
        let (span, total) = part.brought(response.status().as_u16(), response.headers())?;
        let counter = self.metrics.origin_bytes.with_label_values(&[place.rule.name()]);
        let seconds = self.metrics.origin_body_seconds.with_label_values(&[place.rule.name()]);
        let mut last = Instant::now();
        let body = response
            .bytes_stream()
            .inspect_ok(move |piece| {
                counter.inc_by(piece.len() as u64);
                seconds.inc_by(last.elapsed().as_secs_f64());
                last = Instant::now();
            })
            .map_err(|error| Broken(error_chain(&error.without_url())));
        Ok(Incoming::new(span, total, body))
    }

    /// The length of a blob, in bytes.
    pub async fn blob_length(
        self: &Arc<Self>,
        place: &Place,
        digest: &Digest,
        deadline: Instant,
    ) -> Result<u64, SourceError> {
        let question = Question::new(Kind::BlobHead, format!("blobs/{digest}")).of_blob(digest);
        match self.ask(place, &question, deadline).await {
            Ok(response) => match header_u64(&response, CONTENT_LENGTH.as_str()) {
                Some(length) => return Ok(length),
                None => tracing::debug!(%place, %digest, "HEAD without a length"),
            },
            Err(error @ (SourceError::NotFound | SourceError::Unreachable(_) | SourceError::TimedOut)) => {
                return Err(error);
            }
            // Signed URLs are often good for GET only.
            Err(error) => tracing::debug!(%place, %digest, %error, "HEAD refused, asking by GET"),
        }
        Ok(self.blob(place, digest, Part::From(0), deadline).await?.total)
    }

    /// `GET tags/list` or `GET referrers/<digest>`.
    pub async fn list(
        self: &Arc<Self>,
        place: &Place,
        path: String,
        query: Option<&str>,
        deadline: Instant,
    ) -> Result<ListAnswer, SourceError> {
        let question = Question::new(Kind::List, path).query(query);
        let response = self.ask(place, &question, deadline).await?;
        let text = |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
        let (link, filters_applied) = (text("link"), text("oci-filters-applied"));
        let media_type = media_type(&response).unwrap_or_else(|| "application/json".to_owned());
        let bytes = self.read_whole(place, response, MAX_LIST_BYTES, deadline).await?;
        Ok(ListAnswer { media_type, link, filters_applied, bytes })
    }

    /// Reads a body within the memory that all such bodies share.
    async fn read_whole(
        &self,
        place: &Place,
        response: Response,
        limit: usize,
        deadline: Instant,
    ) -> Result<Bytes, SourceError> {
        let reading = read_limited(response, limit, deadline, Some((&self.whole, &place.registry)));
        timeout_at(deadline, reading).await.unwrap_or(Err(SourceError::TimedOut))
    }

    /// The upstreams that were asked lately.
    pub fn upstreams(&self) -> Vec<UpstreamView> {
        let tokens = self.tokens.counts();
        self.conditions.views(|rule, upstream| Known {
            remaining: self.scarcity.remaining(rule, upstream),
            tokens: tokens.get(&(rule.to_owned(), upstream.to_owned())).copied().unwrap_or(0),
        })
    }

    /// Whether pulls are few by which a rule's registry counts, so that what nobody waits for is put off.
    pub fn is_scarce(&self, place: &Place) -> bool {
        let mut upstreams = place.rule.upstreams(&place.registry).into_iter().map(|(upstream, _)| upstream.base());
        let (rule, now) = (place.rule.name(), Instant::now());
        upstreams.any(|upstream| self.scarcity.is_scarce(rule, &upstream, now))
    }

    /// Forgets where a blob's redirect led: the bytes from there broke off or were wrong.
    pub async fn forget_redirects(&self, place: &Place, digest: &Digest) {
        let question = Question::new(Kind::Blob, format!("blobs/{digest}"));
        for (upstream, _) in place.rule.upstreams(&place.registry) {
            if let Ok(url) = question.url(&upstream, place) {
                self.redirects.forget(&url).await;
            }
        }
    }

    fn count_bytes(&self, place: &Place, bytes: usize) {
        self.metrics.origin_bytes.with_label_values(&[place.rule.name()]).inc_by(bytes as u64);
    }
}

/// Reads a body of at most `limit` bytes, taking from the shared memory (in KiB) what has come, not
/// what is announced.
async fn read_limited(
    mut response: Response,
    limit: usize,
    deadline: Instant,
    memory: Option<(&Shares<Registry>, &Registry)>,
) -> Result<Bytes, SourceError> {
    let too_large = || SourceError::Malformed(format!("an answer of more than {limit} bytes"));
    if header_u64(&response, CONTENT_LENGTH.as_str()).is_some_and(|length| length > limit as u64) {
        return Err(too_large());
    }
    let mut bytes = BytesMut::new();
    let mut taken = Vec::new();
    loop {
        // Who has sent nothing has nothing of it.
        while let Some((memory, registry)) = memory.filter(|_| taken.len() * STEP_KIB * 1024 < bytes.len()) {
            taken.push(memory.wait(registry, STEP_KIB).await);
        }
        match timeout_at(deadline, response.chunk()).await {
            Err(_) => return Err(SourceError::TimedOut),
            Ok(Err(error)) => return Err(SourceError::Unreachable(error_chain(&error.without_url()))),
            Ok(Ok(None)) => return Ok(bytes.freeze()),
            Ok(Ok(Some(piece))) if bytes.len() + piece.len() > limit => return Err(too_large()),
            Ok(Ok(Some(piece))) => bytes.extend_from_slice(&piece),
        }
    }
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
