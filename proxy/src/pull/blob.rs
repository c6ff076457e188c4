//! Serves a blob: from the cache, from a running fill, or by a new one.

mod cached;
mod lend;
mod length;
mod parts;
mod range;
mod response;
mod sources;

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout, timeout_at};

use self::length::LengthLookup;
pub(super) use self::parts::{PARTS_AHEAD, Parts};
use self::range::RequestedRanges;
use self::response::span_of;
pub use self::response::{BlobExtent, BlobResponse};
pub(super) use self::sources::BlobContext;
use self::sources::BlobSources;
pub use self::sources::{MAX_HOLDERS_TRIED, MAX_PEER_RANGES};
use super::cached_content::CachedContent;
use super::negative_cache::{NegativeCache, NegativeKind};
use super::{Body, PullError, RequestContext, Requester, check_rule};
use crate::fill::{
    ContentSource, Fill, FillKey, FillOutcome, FillView, Fills, OpenedFill, PassthroughStream, ReadMode, SpanStream,
};
use crate::oci::{Digest, ErrorCode, RangeRequest, Registry, RegistryFrom, Span};
use crate::peers::{FetchPolicy, RangePurpose};
use crate::registries::{Registries, RepositoryRef};
use crate::role::Role;
use crate::source::{ServedFrom, SourceError};
use crate::store::{Blob, Found, SMALL_BYTES, Verification};
use crate::times::{CONFIRM_TIMEOUT, RETRY_INTERVAL, STALL_TIMEOUT};
use crate::upstream::ROUNDS;

/// Serves blobs.
pub struct BlobService {
    registries: Arc<Registries>,
    content: Arc<CachedContent>,
    negative_cache: Arc<NegativeCache>,
    context: Arc<BlobContext>,
    lengths: Arc<LengthLookup>,
    /// Bytes requested in bounded ranges.
    requested_ranges: RequestedRanges,
}

/// A request for a blob, or a part of it.
#[derive(Clone)]
pub struct BlobRequest {
    pub repo_ref: RepositoryRef,
    pub digest: Digest,
    pub range: Option<RangeRequest>,
    pub registry_from: RegistryFrom,
    pub request_context: RequestContext,
}

/// Why a blob was not fetched.
pub(super) enum BlobError {
    Source(SourceError),
    Refused(PullError),
}

/// What an outage means for a blob.
#[derive(Clone, Copy, PartialEq, Eq)]
enum OutageWait {
    /// The requester has another source: refuse soon.
    Refuse,
    /// A client that sends no `ns` has no other source for the image, so a refused blob fails its pull. The request is
    /// repeated until the outage or the client's deadline ends.
    WaitOut,
}

impl BlobService {
    pub(super) fn new(
        registries: Arc<Registries>,
        content: Arc<CachedContent>,
        negative_cache: Arc<NegativeCache>,
        context: Arc<BlobContext>,
    ) -> Self {
        let lengths = Arc::new(LengthLookup::new(context.clone()));
        Self { registries, content, negative_cache, context, lengths, requested_ranges: RequestedRanges::new() }
    }

    /// `GET blobs/<digest>`.
    pub async fn blob(self: &Arc<Self>, request: &BlobRequest) -> Result<BlobResponse, PullError> {
        let (digest, range) = (&request.digest, request.range);
        let repo_refs = self.candidates(request).await;
        // The blob lately came with corrupt bytes: a client that holds a corrupt beginning must not get a correct end.
        let is_distrusted =
            |repo_ref: &RepositoryRef| self.fills().is_distrusted(&ContentSource::new(repo_ref, digest));
        let distrusted = || repo_refs.iter().any(is_distrusted);
        let kept = self.content.blob(request).await;
        // Peers verify the whole digest themselves: they may resume from a verified blob.
        let is_verified =
            matches!(kept, Some(Found::Small { .. } | Found::Large { proof: Verification::Verified, .. }));
        let may_resume = request.request_context.requester.is_peer() && is_verified;
        if let Some(range) = range
            && !may_resume
            && distrusted()
        {
            if range.is_resumption() {
                let message = "an earlier download of this blob was corrupt: restart it from the first byte".to_owned();
                return Err(PullError::NotFound { code: ErrorCode::BlobUnknown, message });
            }
            if request.request_context.is_follower() {
                // A peer could not resume with ranges: it gets the whole blob in one response.
                return Box::pin(self.blob(&BlobRequest { range: None, ..request.clone() })).await;
            }
        }
        if request.request_context.fetch_policy == FetchPolicy::CacheOnly {
            return self.blob_from_node(request, kept).await;
        }
        self.confirm(request, kept.as_ref(), &repo_refs).await?;
        match kept {
            Some(Found::Small { object, tier }) => return BlobResponse::of_bytes(&object.bytes, range, tier.into()),
            Some(Found::Large { blob, proof: Verification::Verified }) => return BlobResponse::of_blob(blob, range),
            Some(Found::Large { blob, proof: Verification::Unverified }) => {
                let fill = self.verify_cached(request, blob);
                // Most files are hashed within this time, and a corrupt one is downloaded anew before its first byte is
                // sent. A client of a larger file reads while it is hashed.
                let outcome = timeout(CONFIRM_TIMEOUT, fill.ended()).await;
                if outcome != Ok(FillOutcome::Failed) {
                    let followed = timeout(STALL_TIMEOUT - CONFIRM_TIMEOUT, self.follow(&fill, request)).await;
                    return followed
                        .unwrap_or(Err(BlobError::Source(SourceError::TimedOut)))
                        .map_err(BlobError::into_pull_error);
                }
            }
            None => {}
        }
        let mut last = None;
        let count = repo_refs.len();
        for (nth, repo_ref) in repo_refs.into_iter().enumerate() {
            let (wait, limit) = match request.registry_from {
                // Another registry may hold it.
                _ if nth + 1 < count => (OutageWait::Refuse, request.request_context.time_limit.min(STALL_TIMEOUT)),
                RegistryFrom::Namespace => (OutageWait::Refuse, request.request_context.time_limit),
                RegistryFrom::Path | RegistryFrom::Host | RegistryFrom::Default => {
                    (OutageWait::WaitOut, request.request_context.time_limit)
                }
            };
            let request = BlobRequest { repo_ref, ..request.clone() };
            let deadline = Instant::now() + limit;
            // After a timeout the fill continues for later requests.
            let fetched = timeout_at(deadline, self.fetch_blob(&request, wait, deadline)).await;
            match fetched.unwrap_or(Err(BlobError::Source(SourceError::TimedOut))) {
                Ok(response) => return Ok(response),
                Err(BlobError::Refused(refusal)) => return Err(refusal),
                Err(BlobError::Source(error)) => last = Some(more_severe(last, error)),
            }
        }
        Err(BlobError::Source(last.unwrap_or_else(SourceError::not_found)).into_pull_error())
    }

    fn fills(&self) -> &Arc<Fills> {
        &self.context.fills
    }

    /// The downloads in progress.
    pub fn downloads(&self) -> Vec<FillView> {
        self.fills().views()
    }

    /// Verifies cached blobs again, at most `rate` bytes a second, for as long as it is polled.
    pub async fn scrub(&self, rate: u64) {
        self.fills().scrub(rate).await;
    }

    /// Whether this node owns a digest: it downloads and caches it for all nodes.
    pub fn is_owner(&self, repo_ref: &RepositoryRef, digest: &Digest) -> bool {
        self.context.routing.role(repo_ref, digest, RequestContext::CLIENT) == Role::Global
    }

    /// Checks whether a repository holds a blob that is cached from another one, by one upstream request; see
    /// [`RegistryHints::is_known_at`](super::registry_hints::RegistryHints::is_known_at). If the manifest came through
    /// dray, its blobs need no request: it names them.
    async fn confirm(
        &self,
        request: &BlobRequest,
        kept: Option<&Found>,
        repo_refs: &[RepositoryRef],
    ) -> Result<(), PullError> {
        let from = kept.and_then(Found::provenance).filter(|_| request.request_context.requester == Requester::Client);
        let Some(from) = from else { return Ok(()) };
        let hints = &self.context.registry_hints;
        if repo_refs.iter().any(|repo_ref| hints.is_known_at(repo_ref, &request.digest, from)) {
            return Ok(());
        }
        let (repo_ref, digest) = (&request.repo_ref, request.digest.as_str());
        let known = self.negative_cache.get(repo_ref, NegativeKind::Blob, digest);
        let error = match known {
            Some(error) => error,
            None if self.context.upstream.trouble(repo_ref).is_some() => return Ok(()),
            None => match timeout(request.request_context.time_limit, self.find_length(request)).await {
                Ok(Err(error)) => {
                    self.negative_cache.put(repo_ref, NegativeKind::Blob, digest, &error);
                    error
                }
                Ok(Ok(_)) | Err(_) => return Ok(()),
            },
        };
        if error.is_outage() { Ok(()) } else { Err(BlobError::Source(error).into_pull_error()) }
    }

    /// The repositories to fetch a blob from, in order. If the request names no registry, those that served the
    /// repository come first. A registry that lately sent corrupt bytes of the blob comes last.
    async fn candidates(&self, request: &BlobRequest) -> Vec<RepositoryRef> {
        let repo_ref = &request.repo_ref;
        let registries = match request.registry_from {
            RegistryFrom::Default => self.context.registry_hints.registries_of(&repo_ref.repository).await,
            RegistryFrom::Namespace | RegistryFrom::Path | RegistryFrom::Host => [].into(),
        };
        let in_registry = |registry: &Registry| match *registry == repo_ref.registry {
            true => repo_ref.clone(),
            false => self.registries.repo_ref(registry.clone(), repo_ref.repository.clone()),
        };
        let mut repo_refs: Vec<RepositoryRef> = registries.iter().map(in_registry).collect();
        if !registries.contains(&repo_ref.registry) {
            repo_refs.push(repo_ref.clone());
        }
        repo_refs.retain(|repo_ref| check_rule(repo_ref, request.request_context.requester).is_ok());
        repo_refs.sort_by_key(|repo_ref| self.fills().is_distrusted(&ContentSource::new(repo_ref, &request.digest)));
        repo_refs
    }

    /// Whether several registries have served the requested repository. Only the verified digest shows which of them
    /// has sent the right bytes.
    fn is_ambiguous(&self, request: &BlobRequest) -> bool {
        request.registry_from == RegistryFrom::Default
            && self.context.registry_hints.is_ambiguous(&request.repo_ref, &request.digest)
    }

    async fn fetch_blob(
        self: &Arc<Self>,
        request: &BlobRequest,
        wait: OutageWait,
        deadline: Instant,
    ) -> Result<BlobResponse, BlobError> {
        let (repo_ref, digest) = (&request.repo_ref, &request.digest);
        if let Some(error) = self.negative_cache.get(repo_ref, NegativeKind::Blob, digest.as_str()) {
            return Err(error.into());
        }
        if let Some(response) = self.pass_range(request).await? {
            return Ok(response);
        }
        let key = self.fill_key(request);
        // A peer with room caches the blob itself, instead of this node downloading it for each request.
        let is_uncacheable = || self.fills().has_no_space(&key) && self.fills().running(&key).is_none();
        if request.request_context.requester.is_peer() && is_uncacheable() {
            return Err(SourceError::NotCached.into());
        }
        let mut error_responses = 0;
        loop {
            // The role is computed anew each time: the owner may be reachable again.
            let sources = self.sources(request, RangePurpose::Whole);
            let fill = self.fills().join(
                &key,
                repo_ref,
                request.request_context.client,
                sources,
                first_byte_wanted(request.range),
            );
            if request.request_context.requester.is_peer()
                && matches!(fill.opened().await, Ok(OpenedFill::Uncached { .. }))
            {
                return Err(SourceError::NotCached.into());
            }
            let error = match self.follow(&fill, request).await {
                Err(BlobError::Source(error)) => error,
                other => return other,
            };
            if fill.failed_for_another(repo_ref).await {
                continue;
            }
            if !error.is_outage() {
                self.negative_cache.put(repo_ref, NegativeKind::Blob, digest.as_str(), &error);
            }
            error_responses += u32::from(is_error_response(&error));
            let may_wait = wait == OutageWait::WaitOut && may_repeat(&error, error_responses);
            if !may_wait || Instant::now() + RETRY_INTERVAL > deadline {
                return Err(error.into());
            }
            tokio::time::sleep(RETRY_INTERVAL).await;
        }
    }

    /// Serves a range from a fill, or past it if the blob cannot be cached.
    async fn follow(&self, fill: &Arc<Fill>, request: &BlobRequest) -> Result<BlobResponse, BlobError> {
        match fill.opened().await? {
            // The fill may have been started for another repository: its rule decides as well.
            OpenedFill::Small { object, .. }
                if !self.content.policy.allows(
                    &request.digest,
                    Some(&object.provenance),
                    request.request_context.requester,
                    &request.repo_ref,
                ) =>
            {
                Err(SourceError::NotCached.into())
            }
            OpenedFill::Small { object, from } => Ok(BlobResponse::of_bytes(&object.bytes, request.range, from)?),
            OpenedFill::Growing { blob, .. }
                if !self.content.policy.allows(
                    &request.digest,
                    blob.provenance.as_ref(),
                    request.request_context.requester,
                    &request.repo_ref,
                ) =>
            {
                Err(SourceError::NotCached.into())
            }
            OpenedFill::Growing { blob, from } => {
                let total = blob.len;
                let span = span_of(request.range, total)?;
                let mode = read_mode(&request.request_context, span, total, || self.is_ambiguous(request));
                let from = match (mode, from) {
                    // A file that is not verified yet is labelled as a peer's: this node does not vouch for it.
                    (ReadMode::Unverified | ReadMode::UnverifiedUntilStall, ServedFrom::Disk) => ServedFrom::Peer,
                    (_, from) => from,
                };
                let reader = fill.reader(blob, span.unwrap_or(Span::whole(total)), mode);
                Ok(BlobResponse { total, extent: span.into(), from, body: Body::File(reader) })
            }
            OpenedFill::Uncached { total, feed, .. } => {
                let wanted = span_of(request.range, total)?.unwrap_or(Span::whole(total));
                let whole = wanted == Span::whole(total);
                if !whole && self.is_ambiguous(request) {
                    let why = "several registries have served this repository: add ?ns=REGISTRY to the request";
                    return Err(PullError::BadRequest(why).into());
                }
                let opened = whole.then(|| feed.lock().take()).flatten();
                let feed = match opened {
                    Some(feed) => feed,
                    None => {
                        let end = (wanted.end < total).then_some(wanted.end);
                        SpanStream::open(self.sources(request, RangePurpose::Range), wanted.start, end).await?
                    }
                };
                self.passing(feed, request)
            }
        }
    }

    /// Passes a stream through as it comes. A whole blob is completed only if its digest matches.
    fn passing(&self, feed: SpanStream, request: &BlobRequest) -> Result<BlobResponse, BlobError> {
        let (total, from) = (feed.total(), feed.served_from());
        let span = span_of(request.range, total)?;
        let passage = if span.is_none_or(|span| span == Span::whole(total)) {
            PassthroughStream::whole(feed, self.fills(), &request.digest, &request.repo_ref)
        } else {
            PassthroughStream::part(feed)
        };
        Ok(BlobResponse { total, extent: span.into(), from, body: Body::Passing(Box::new(passage)) })
    }

    fn fill_key(&self, request: &BlobRequest) -> FillKey {
        FillKey::new(&request.repo_ref, &request.digest)
    }

    /// The role in which this node has to download for this request.
    fn role_of(&self, request: &BlobRequest) -> Role {
        self.context.routing.role(&request.repo_ref, &request.digest, request.request_context)
    }

    /// Verifies a file that may be corrupt, while readers follow.
    fn verify_cached(&self, request: &BlobRequest, blob: Arc<Blob>) -> Arc<Fill> {
        self.fills().prove(&self.fill_key(request), &request.repo_ref, self.role_of(request), blob)
    }

    /// The sources of this request's fill, in the role that the request assigns to this node.
    fn sources(&self, request: &BlobRequest, range_purpose: RangePurpose) -> Arc<BlobSources> {
        Arc::new(BlobSources::new(
            &self.context,
            &request.repo_ref,
            self.fill_key(request),
            self.role_of(request),
            range_purpose,
            request.request_context.priority,
        ))
    }
}

/// The error to return when several sources failed.
pub(super) fn more_severe(known: Option<SourceError>, error: SourceError) -> SourceError {
    match known {
        Some(known) => known.more_severe(error),
        None => error,
    }
}

/// Where a fill for this range starts. A range near the beginning starts the fill at the beginning.
fn first_byte_wanted(range: Option<RangeRequest>) -> u64 {
    match range {
        Some(RangeRequest::From(start) | RangeRequest::Bounded(start, _)) if start > SMALL_BYTES => start,
        _ => 0,
    }
}

/// How a growing blob is read. Only a peer, which verifies the whole blob itself, gets all bytes of a range before the
/// digest matches.
fn read_mode(
    request_context: &RequestContext,
    span: Option<Span>,
    total: u64,
    is_ambiguous: impl FnOnce() -> bool,
) -> ReadMode {
    match (request_context.requester, request_context.fetch_policy, span) {
        (Requester::Peer(_), FetchPolicy::CacheOnly, Some(_)) => ReadMode::UnverifiedUntilStall,
        (Requester::Peer(_), FetchPolicy::Upstream, Some(_)) => ReadMode::Unverified,
        (Requester::Client, _, Some(span)) if span.end < total && is_ambiguous() => ReadMode::Verified,
        _ => ReadMode::VerifiedTail,
    }
}

/// Whether the upstream has responded with an error, as opposed to no response.
fn is_error_response(error: &SourceError) -> bool {
    match error {
        SourceError::Limited { again } => again.is_none_or(|again| again < STALL_TIMEOUT),
        SourceError::Interrupted(_) => true,
        error => error.failed_status().is_some(),
    }
}

/// Whether a failed download may be repeated: an unreachable upstream until the deadline, an error response only
/// [`ROUNDS`] times.
fn may_repeat(error: &SourceError, error_responses: u32) -> bool {
    error.is_transient_outage() && (!is_error_response(error) || error_responses < ROUNDS)
}

impl BlobRequest {
    /// The same request, with less time left.
    pub fn after(&self, waited: Duration) -> Self {
        Self { request_context: self.request_context.after(waited), ..self.clone() }
    }
}

impl BlobError {
    pub(super) fn into_pull_error(self) -> PullError {
        match self {
            Self::Source(error) => PullError::of(&error, ErrorCode::BlobUnknown),
            Self::Refused(refusal) => refusal,
        }
    }
}

impl From<SourceError> for BlobError {
    fn from(error: SourceError) -> Self {
        Self::Source(error)
    }
}

impl From<PullError> for BlobError {
    fn from(refusal: PullError) -> Self {
        Self::Refused(refusal)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peers::PeerTrust;

    #[test]
    fn client_gets_the_end_of_a_blob_only_verified() {
        let (client, peer) = (Requester::Client, Requester::Peer(PeerTrust::Authenticated));
        let (range, tail) = (Some(Span { start: 0, end: 50 }), Some(Span { start: 50, end: 100 }));
        let mode = |requester, fetch_policy, span, is_ambiguous| {
            let context = RequestContext { requester, fetch_policy, ..RequestContext::CLIENT };
            read_mode(&context, span, 100, || is_ambiguous)
        };
        let cases = [
            (client, FetchPolicy::Upstream, None, false, ReadMode::VerifiedTail),
            (client, FetchPolicy::Upstream, range, false, ReadMode::VerifiedTail),
            (client, FetchPolicy::Upstream, range, true, ReadMode::Verified),
            (client, FetchPolicy::Upstream, tail, true, ReadMode::VerifiedTail),
            (peer, FetchPolicy::Upstream, None, false, ReadMode::VerifiedTail),
            (peer, FetchPolicy::Upstream, range, true, ReadMode::Unverified),
            (peer, FetchPolicy::CacheOnly, range, true, ReadMode::UnverifiedUntilStall),
        ];
        for (requester, policy, span, is_ambiguous, want) in cases {
            assert_eq!(mode(requester, policy, span, is_ambiguous), want, "{requester:?} {policy:?} {span:?}");
        }
    }

    #[test]
    fn download_is_repeated_while_the_outage_may_end() {
        let soon = SourceError::Limited { again: Some(Duration::from_secs(1)) };
        let cases = [
            (SourceError::TimedOut, [true, true]),
            (SourceError::Unreachable("refused".into()), [true, true]),
            (SourceError::failed(503), [true, false]),
            (SourceError::Interrupted("reset".into()), [true, false]),
            (soon, [true, false]),
            (SourceError::not_found(), [false, false]),
            (SourceError::denied(), [false, false]),
        ];
        for (error, want) in cases {
            assert_eq!([1, ROUNDS].map(|responses| may_repeat(&error, responses)), want, "{error}");
        }
    }
}
