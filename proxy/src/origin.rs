//! The registry client: upstreams in order, authorization, redirects, retries, the guard.

mod auth;
pub mod challenge;
mod credentials;
mod guard;
mod http;
mod redirects;
mod retry;

use std::sync::Arc;
use std::time::Duration;

use ::http::header::{
    ACCEPT, ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, RANGE, WWW_AUTHENTICATE,
};
use ::http::{HeaderMap, HeaderValue, Method};
use bytes::{Bytes, BytesMut};
use futures_util::TryStreamExt;
use reqwest::Response;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};
use url::Url;

use self::auth::Tokens;
use self::challenge::Challenge;
use self::guard::Guard;
use self::http::{Ask, Home, Http, Patience};
use self::redirects::Redirects;
use self::retry::RetryBudget;
use crate::config::{Config, Upstream};
use crate::metrics::Metrics;
use crate::oci::{Digest, MAX_MANIFEST_BYTES, Reference, manifest};
use crate::registries::{Place, Registries};
use crate::source::{Broken, Incoming, Part, SourceError, error_chain};

/// All origins, behind one door.
pub struct Origin {
    http: Arc<Http>,
    tokens: Tokens,
    redirects: Redirects,
    retries: RetryBudget,
    /// Upstreams that did not answer lately.
    silent: moka::sync::Cache<String, ()>,
    /// Memory for answers that are read whole, in KiB.
    whole: Semaphore,
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

/// What came of asking where an earlier redirect led.
enum Remembered {
    Answered(Response),
    /// None is known.
    Nothing,
    /// It did not lead there any more.
    Expired,
}

/// Only failures this fast are worth another try.
const FAILS_FAST: Duration = Duration::from_secs(1);

/// An upstream has this long to answer where another one follows.
const OTHERS_FOLLOW: Duration = Duration::from_millis(2500);

/// For how long a silent upstream is asked last.
const SILENT: Duration = Duration::from_secs(10);

/// All answers that are being read whole share this many KiB.
const WHOLE_KIB: usize = 64 * 1024;

const STEP_KIB: usize = 64;

/// Largest tag list or referrers answer, in bytes.
const MAX_LIST_BYTES: usize = 4 * 1024 * 1024;

const DOCKER_CONTENT_DIGEST: &str = "docker-content-digest";

/// One question to a registry, without saying which.
struct Question<'a> {
    kind: &'static str,
    method: Method,
    /// Below the repository: `manifests/<reference>`
    path: String,
    query: Option<&'a str>,
    headers: HeaderMap,
    /// The blob whose redirect may be remembered.
    blob: Option<&'a Digest>,
}

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
            silent: moka::sync::Cache::builder().max_capacity(10_000).time_to_live(SILENT).build(),
            whole: Semaphore::new(WHOLE_KIB),
            metrics,
        })
    }

    /// `GET manifests/<reference>`.
    pub async fn manifest(
        &self,
        place: &Place,
        reference: &Reference,
        accept: &str,
        deadline: Instant,
    ) -> Result<ManifestAnswer, SourceError> {
        let question = Question::new("manifest", Method::GET, format!("manifests/{reference}")).accept(accept);
        let response = self.ask(place, &question, deadline).await?;
        let claimed = claimed_digest(&response);
        let stated = media_type(&response);
        let limit = usize::try_from(MAX_MANIFEST_BYTES).unwrap_or(usize::MAX);
        let bytes = self.read_whole(response, limit, deadline).await?;
        let media_type = manifest::media_type(&bytes)
            .or(stated)
            .ok_or_else(|| SourceError::Malformed("a manifest without a media type".into()))?;
        self.count_bytes(place, bytes.len());
        Ok(ManifestAnswer { media_type, claimed, bytes })
    }

    /// `HEAD manifests/<tag>`: the digest that a tag means now. None: the origin does not say.
    pub async fn manifest_digest(
        &self,
        place: &Place,
        reference: &Reference,
        accept: &str,
        deadline: Instant,
    ) -> Result<Option<Digest>, SourceError> {
        let question = Question::new("manifest_head", Method::HEAD, format!("manifests/{reference}")).accept(accept);
        match self.ask(place, &question, deadline).await {
            Ok(response) => Ok(claimed_digest(&response)),
            // Some registries know no HEAD.
            Err(SourceError::Failed(405)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// `GET blobs/<digest>`, whole or in part. Where Range is not honoured the answer starts at 0.
    pub async fn blob(
        &self,
        place: &Place,
        digest: &Digest,
        part: Part,
        deadline: Instant,
    ) -> Result<Incoming, SourceError> {
        let mut question = Question::new("blob", Method::GET, format!("blobs/{digest}"));
        question.blob = Some(digest);
        if let Some(range) = part.header() {
            question.headers.insert(RANGE, range);
        }
        let response = self.ask(place, &question, deadline).await?;
        if claimed_digest(&response)
            .is_some_and(|claimed| claimed.algorithm() == digest.algorithm() && claimed != *digest)
        {
            return Err(SourceError::Malformed("another blob's Docker-Content-Digest".into()));
        }
        let (span, total) = part.brought(response.status().as_u16(), response.headers())?;
        let counter = self.metrics.origin_bytes.with_label_values(&[place.rule.name()]);
        let body = response
            .bytes_stream()
            .inspect_ok(move |piece| counter.inc_by(piece.len() as u64))
            .map_err(|error| Broken(error_chain(&error.without_url())));
        Ok(Incoming::new(span, total, body))
    }

    /// The length of a blob, in bytes.
    pub async fn blob_length(&self, place: &Place, digest: &Digest, deadline: Instant) -> Result<u64, SourceError> {
        let mut question = Question::new("blob_head", Method::HEAD, format!("blobs/{digest}"));
        question.blob = Some(digest);
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
        &self,
        place: &Place,
        path: String,
        query: Option<&str>,
        deadline: Instant,
    ) -> Result<ListAnswer, SourceError> {
        let mut question = Question::new("list", Method::GET, path);
        question.query = query;
        let response = self.ask(place, &question, deadline).await?;
        let text = |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
        let (link, filters_applied) = (text("link"), text("oci-filters-applied"));
        let media_type = media_type(&response).unwrap_or_else(|| "application/json".to_owned());
        let bytes = self.read_whole(response, MAX_LIST_BYTES, deadline).await?;
        Ok(ListAnswer { media_type, link, filters_applied, bytes })
    }

    /// Asks the upstreams in order until one answers with 200 or 206.
    async fn ask(&self, place: &Place, question: &Question<'_>, deadline: Instant) -> Result<Response, SourceError> {
        let mut upstreams = place.rule.upstreams(&place.registry);
        // Who was silent a moment ago is asked last.
        upstreams.sort_by_key(|(upstream, _)| self.silent.contains_key(&upstream.base()));
        let mut worst = SourceError::NotFound;
        for (nth, (upstream, trust)) in upstreams.iter().enumerate() {
            let last = nth + 1 == upstreams.len();
            let (patience, deadline) = if last {
                (Patience::LastResort, deadline)
            } else {
                (Patience::OthersFollow, deadline.min(Instant::now() + OTHERS_FOLLOW))
            };
            let home = Home { upstream, trust: *trust, ca: place.rule.ca.as_deref(), patience };
            let answer = self.ask_patiently(home, place, question, deadline).await;
            let outcome = answer.as_ref().map_or_else(SourceError::as_str, |_| "ok");
            self.metrics.origin_requests.with_label_values(&[place.rule.name(), question.kind, outcome]).inc();
            match answer {
                Ok(response) => return Ok(response),
                Err(error) => {
                    tracing::debug!(%place, upstream = upstream.base(), kind = question.kind, %error, "upstream gave nothing");
                    if matches!(error, SourceError::TimedOut | SourceError::Unreachable(_)) {
                        self.silent.insert(upstream.base(), ());
                    }
                    worst = worst.severer(error);
                }
            }
        }
        Err(worst)
    }

    /// Repeats what is likely to pass, within the deadline and the budget.
    async fn ask_patiently(
        &self,
        home: Home<'_>,
        place: &Place,
        question: &Question<'_>,
        deadline: Instant,
    ) -> Result<Response, SourceError> {
        self.retries.earn();
        let mut attempt = 0;
        loop {
            let asked = Instant::now();
            match self.ask_once(home, place, question, deadline).await {
                // What took long to fail will take long again, and the client waits.
                Err(error) if error.is_passing() && asked.elapsed() < FAILS_FAST => {
                    match self.retries.pause(attempt, deadline) {
                        Some(pause) => tokio::time::sleep(pause).await,
                        None => return Err(error),
                    }
                }
                other => return other,
            }
            attempt += 1;
        }
    }

    async fn ask_once(
        &self,
        home: Home<'_>,
        place: &Place,
        question: &Question<'_>,
        deadline: Instant,
    ) -> Result<Response, SourceError> {
        let url = question.url(home.upstream, place)?;
        // Held until the registry has told where the blob is now.
        let mut _turn = None;
        match self.ask_remembered(home, question, &url, deadline).await {
            Remembered::Answered(response) => return Ok(response),
            Remembered::Nothing if !self.redirects.is_redirector(&url) => {}
            Remembered::Nothing | Remembered::Expired => {
                _turn = timeout_at(deadline, self.redirects.turn(&url)).await.ok();
                if let Remembered::Answered(response) = self.ask_remembered(home, question, &url, deadline).await {
                    return Ok(response);
                }
            }
        }
        let mut authorization = match self.tokens.known(&self.http, home, place, deadline).await {
            Ok(authorization) => authorization,
            Err(error) => {
                tracing::debug!(%place, %error, "the remembered challenge leads nowhere, asking anew");
                self.tokens.forget(home, place).await;
                None
            }
        };
        for last_try in [false, true] {
            let ask = Ask {
                method: question.method.clone(),
                url: url.clone(),
                headers: &question.headers,
                authorization: authorization.clone(),
                form: None,
            };
            let (response, answered_by) = self.http.follow(home, ask, deadline).await?;
            // Only the upstream itself is given credentials, never the target of its redirect.
            let challenged = response.status().as_u16() == 401 && answered_by == url && !last_try;
            if !challenged {
                if question.blob.is_some() && answered_by != url && response.status().is_success() {
                    self.redirects.remember(&url, answered_by).await;
                }
                return checked(response);
            }
            let lines = response.headers().get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
            let challenge = Challenge::pick(lines).ok_or(SourceError::Denied)?;
            let answer =
                self.tokens.answer(&self.http, home, place, challenge, authorization.as_ref(), deadline).await?;
            if answer.is_none() {
                return Err(SourceError::Denied);
            }
            authorization = answer;
        }
        Err(SourceError::Denied)
    }

    /// Asks where an earlier redirect led.
    async fn ask_remembered(
        &self,
        home: Home<'_>,
        question: &Question<'_>,
        url: &Url,
        deadline: Instant,
    ) -> Remembered {
        let Some(target) = self.redirects.target(url).await.filter(|_| question.blob.is_some()) else {
            return Remembered::Nothing;
        };
        let ask = Ask {
            method: question.method.clone(),
            url: target.clone(),
            headers: &question.headers,
            authorization: None,
            form: None,
        };
        let soon = deadline.min(Instant::now() + OTHERS_FOLLOW);
        match self.http.send(home, &ask, soon).await.and_then(checked) {
            Ok(response) => Remembered::Answered(response),
            Err(error) => {
                tracing::debug!(%error, "a remembered redirect no longer works");
                self.redirects.expired(url, &target).await;
                Remembered::Expired
            }
        }
    }

    /// Reads a body within the memory that all such bodies share.
    async fn read_whole(&self, response: Response, limit: usize, deadline: Instant) -> Result<Bytes, SourceError> {
        let reading = read_limited(response, limit, deadline, Some(&self.whole));
        timeout_at(deadline, reading).await.unwrap_or(Err(SourceError::TimedOut))
    }

    /// Forgets where a blob's redirect led: the bytes from there broke off or were wrong.
    pub async fn forget_redirects(&self, place: &Place, digest: &Digest) {
        let question = Question::new("blob", Method::GET, format!("blobs/{digest}"));
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

impl<'a> Question<'a> {
    fn new(kind: &'static str, method: Method, path: String) -> Self {
        let mut headers = HeaderMap::new();
        // Ranges and lengths are those of the stored bytes.
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        Self { kind, method, path, query: None, headers, blob: None }
    }

    fn accept(mut self, accept: &str) -> Self {
        if let Ok(value) = HeaderValue::from_str(accept) {
            self.headers.insert(ACCEPT, value);
        }
        self
    }

    fn url(&self, upstream: &Upstream, place: &Place) -> Result<Url, SourceError> {
        let repository = upstream.repository(&place.repository);
        let query = self.query.map_or_else(String::new, |query| format!("?{query}"));
        let text = format!("{}/v2/{repository}/{}{query}", upstream.base(), self.path);
        Url::parse(&text).map_err(|e| SourceError::Malformed(format!("no URL: {e}")))
    }
}

/// Turns an answer that is no content into an error.
fn checked(response: Response) -> Result<Response, SourceError> {
    match response.status().as_u16() {
        200 | 206 => {}
        404 | 410 => return Err(SourceError::NotFound),
        401 | 403 => return Err(SourceError::Denied),
        429 => return Err(SourceError::Limited),
        status => return Err(SourceError::Failed(status)),
    }
    let encoding = response.headers().get(CONTENT_ENCODING);
    if encoding.is_some_and(|value| !value.as_bytes().eq_ignore_ascii_case(b"identity")) {
        return Err(SourceError::Malformed("compressed although identity was asked for".into()));
    }
    Ok(response)
}

/// Reads a body of at most `limit` bytes, taking from the shared memory (in KiB) what has come, not
/// what is announced.
async fn read_limited(
    mut response: Response,
    limit: usize,
    deadline: Instant,
    memory: Option<&Semaphore>,
) -> Result<Bytes, SourceError> {
    let too_large = || SourceError::Malformed(format!("an answer of more than {limit} bytes"));
    if header_u64(&response, CONTENT_LENGTH.as_str()).is_some_and(|length| length > limit as u64) {
        return Err(too_large());
    }
    let mut bytes = BytesMut::new();
    let mut taken = Vec::new();
    loop {
        while let Some(memory) = memory.filter(|_| taken.len() * STEP_KIB * 1024 <= bytes.len()) {
            taken.push(memory.acquire_many(u32::try_from(STEP_KIB).unwrap_or(1)).await.map_err(|_| SourceError::Busy)?);
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

fn claimed_digest(response: &Response) -> Option<Digest> {
    response.headers().get(DOCKER_CONTENT_DIGEST)?.to_str().ok()?.parse().ok()
}

/// The media type without parameters, which clients would take as part of it.
fn media_type(response: &Response) -> Option<String> {
    let value = response.headers().get(CONTENT_TYPE)?.to_str().ok()?;
    let bare = value.split(';').next().unwrap_or_default().trim();
    (!bare.is_empty()).then(|| bare.to_owned())
}
