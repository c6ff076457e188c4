//! Serves a blob: from the cache, from a running fill, or by a new one.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, timeout, timeout_at};

use super::negative_cache::NegativeKind;
use super::parts::{self, Parts};
use super::sources::BlobSources;
use super::{ListBody, Pull, PullError, RequestContext, Requester};
use crate::fill::{
    ContentSource, Fill, FillKey, FillOutcome, OpenedFill, PART_BYTES, PassthroughStream, ReadMode, Reader, SpanStream,
};
use crate::oci::{Digest, ErrorCode, Multipart, RangeRequest, Registry, RegistryFrom, Span};
use crate::peers::{FetchPolicy, RangePurpose};
use crate::registries::RepositoryRef;
use crate::role::Role;
use crate::source::{Broken, ServedFrom, SourceError};
use crate::store::{Blob, Found, SMALL_BYTES, SmallKind, Tier, Verification};
use crate::times::{CONFIRM_TIMEOUT, RETRY_INTERVAL, STALL_TIMEOUT};
use crate::upstream::ROUNDS;

/// A request for a blob, or a part of it.
#[derive(Clone)]
pub struct BlobRequest {
    pub repo_ref: RepositoryRef,
    pub digest: Digest,
    pub range: Option<RangeRequest>,
    pub registry_from: RegistryFrom,
    pub request_context: RequestContext,
}

/// A blob or a part of it, ready to be sent.
pub struct BlobResponse {
    pub total: u64,
    pub extent: BlobExtent,
    pub from: ServedFrom,
    pub body: Body,
}

/// Which bytes of a blob a response holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlobExtent {
    Whole,
    Part(Span),
    /// Several parts, with the multipart headers between them.
    Parts(Multipart),
}

/// The body of a response.
pub enum Body {
    /// Whole in memory, or already sent.
    Memory(Option<Bytes>),
    File(Reader),
    Passing(Box<PassthroughStream>),
    List(Box<ListBody>),
    Parts(Box<Parts>),
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

/// Memory that each list body counts as: buffers of the upstream connection, and the copy. Larger: fewer
/// concurrent lists. Smaller: lists exceed the memory limit.
const LIST_BYTES: usize = 512 * 1024;

impl Pull {
    /// `GET blobs/<digest>`.
    pub async fn blob(self: &Arc<Self>, request: &BlobRequest) -> Result<BlobResponse, PullError> {
        let (digest, range) = (&request.digest, request.range);
        let repo_refs = self.candidates(request).await;
        // The blob lately came with corrupt bytes: a client that holds a corrupt beginning must not get a correct end.
        let is_distrusted = |repo_ref: &RepositoryRef| self.fills.is_distrusted(&ContentSource::new(repo_ref, digest));
        let distrusted = || repo_refs.iter().any(is_distrusted);
        let kept = self.cached_blob(request).await;
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
        self.confirm_blob(request, kept.as_ref(), &repo_refs).await?;
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
            let (time_limit, limit) = match request.registry_from {
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
            let fetched = timeout_at(deadline, self.fetch_blob(&request, time_limit, deadline)).await;
            match fetched.unwrap_or(Err(BlobError::Source(SourceError::TimedOut))) {
                Ok(response) => return Ok(response),
                Err(BlobError::Refused(refusal)) => return Err(refusal),
                Err(BlobError::Source(error)) => last = Some(more_severe(last, error)),
            }
        }
        Err(BlobError::Source(last.unwrap_or_else(SourceError::not_found)).into_pull_error())
    }

    pub(super) async fn cached_blob(&self, request: &BlobRequest) -> Option<Found> {
        let found = self.store.find(&request.digest, SmallKind::Blob).await?;
        let (requester, repo_ref) = (request.request_context.requester, &request.repo_ref);
        self.may_serve(&request.digest, found.provenance(), requester, repo_ref).then_some(found)
    }

    /// The repositories to fetch a blob from, in order. If the request names no registry, those that served the
    /// repository come first. A registry that lately sent corrupt bytes of the blob comes last.
    pub(super) async fn candidates(&self, request: &BlobRequest) -> Vec<RepositoryRef> {
        let repo_ref = &request.repo_ref;
        let registries = match request.registry_from {
            RegistryFrom::Default => self.registry_hints.registries_of(&repo_ref.repository).await,
            RegistryFrom::Namespace | RegistryFrom::Path | RegistryFrom::Host => [].into(),
        };
        let in_registry = |registry: &Registry| match *registry == repo_ref.registry {
            true => repo_ref.clone(),
            false => self.repo_ref(registry.clone(), repo_ref.repository.clone()),
        };
        let mut repo_refs: Vec<RepositoryRef> = registries.iter().map(in_registry).collect();
        if !registries.contains(&repo_ref.registry) {
            repo_refs.push(repo_ref.clone());
        }
        repo_refs.retain(|repo_ref| self.permit(repo_ref, request.request_context.requester).is_ok());
        repo_refs.sort_by_key(|repo_ref| self.fills.is_distrusted(&ContentSource::new(repo_ref, &request.digest)));
        repo_refs
    }

    /// Whether several registries have served the requested repository. Only the verified digest shows which of them
    /// has sent the right bytes.
    pub(super) fn is_ambiguous(&self, request: &BlobRequest) -> bool {
        request.registry_from == RegistryFrom::Default
            && self.registry_hints.is_ambiguous(&request.repo_ref, &request.digest)
    }

    async fn fetch_blob(
        self: &Arc<Self>,
        request: &BlobRequest,
        time_limit: OutageWait,
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
        let is_uncacheable = || self.fills.has_no_space(&key) && self.fills.running(&key).is_none();
        if request.request_context.requester.is_peer() && is_uncacheable() {
            return Err(SourceError::NotCached.into());
        }
        let mut error_responses = 0;
        loop {
            // The role is computed anew each time: the owner may be reachable again.
            let sources = self.sources(request, RangePurpose::Whole);
            let fill = self.fills.join(
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
            // An unreachable upstream is retried until the deadline, an error response only `ROUNDS` times.
            let is_error_response = match &error {
                SourceError::Limited { again } => again.is_none_or(|again| again < STALL_TIMEOUT),
                SourceError::Interrupted(_) => true,
                error => error.failed_status().is_some(),
            };
            error_responses += u32::from(is_error_response);
            let may_wait = time_limit == OutageWait::WaitOut
                && error.is_transient_outage()
                && (!is_error_response || error_responses < ROUNDS);
            if !may_wait || Instant::now() + RETRY_INTERVAL > deadline {
                return Err(error.into());
            }
            tokio::time::sleep(RETRY_INTERVAL).await;
        }
    }

    /// Serves a range from a fill, or past it if the blob cannot be cached.
    pub(super) async fn follow(
        self: &Arc<Self>,
        fill: &Arc<Fill>,
        request: &BlobRequest,
    ) -> Result<BlobResponse, BlobError> {
        match fill.opened().await? {
            // The fill may have been started for another repository: its rule decides as well.
            OpenedFill::Small { object, .. }
                if !self.may_serve(
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
                if !self.may_serve(
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
                let mode = match (request.request_context.requester, request.request_context.fetch_policy, span) {
                    (Requester::Peer(_), FetchPolicy::CacheOnly, Some(_)) => ReadMode::UnverifiedUntilStall,
                    (Requester::Peer(_), FetchPolicy::Upstream, Some(_)) => ReadMode::Unverified,
                    (Requester::Client, _, Some(span)) if span.end < total && self.is_ambiguous(request) => {
                        ReadMode::Verified
                    }
                    _ => ReadMode::VerifiedTail,
                };
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
                    return Err(SourceError::Malformed(why.into()).into());
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
    pub(super) fn passing(&self, feed: SpanStream, request: &BlobRequest) -> Result<BlobResponse, BlobError> {
        let (total, from) = (feed.total(), feed.served_from());
        let span = span_of(request.range, total)?;
        let passage = if span.is_none_or(|span| span == Span::whole(total)) {
            PassthroughStream::whole(feed, &self.fills, &request.digest, &request.repo_ref)
        } else {
            PassthroughStream::part(feed)
        };
        Ok(BlobResponse { total, extent: span.into(), from, body: Body::Passing(Box::new(passage)) })
    }

    pub(super) fn fill_key(&self, request: &BlobRequest) -> FillKey {
        FillKey::new(&request.repo_ref, &request.digest)
    }

    /// The role in which this node has to download for this request.
    pub(super) fn role_of(&self, request: &BlobRequest) -> Role {
        self.role(&request.repo_ref, &request.digest, request.request_context)
    }

    /// Verifies a file that may be corrupt, while readers follow.
    pub(super) fn verify_cached(&self, request: &BlobRequest, blob: Arc<Blob>) -> Arc<Fill> {
        self.fills.prove(&self.fill_key(request), &request.repo_ref, self.role_of(request), blob)
    }

    /// The sources of this request's fill, in the role that the request assigns to this node.
    pub(super) fn sources(self: &Arc<Self>, request: &BlobRequest, range_purpose: RangePurpose) -> Arc<BlobSources> {
        Arc::new(BlobSources::new(
            self,
            &request.repo_ref,
            self.fill_key(request),
            self.role_of(request),
            range_purpose,
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

/// The part of a blob that a range names; None: the whole.
pub(super) fn span_of(range: Option<RangeRequest>, total: u64) -> Result<Option<Span>, PullError> {
    range.map(|range| range.within(total)).transpose().map_err(|_| PullError::Unsatisfiable { total })
}

/// Where a fill for this range starts. A range near the beginning starts the fill at the beginning.
fn first_byte_wanted(range: Option<RangeRequest>) -> u64 {
    match range {
        Some(RangeRequest::From(start) | RangeRequest::Bounded(start, _)) if start > SMALL_BYTES => start,
        _ => 0,
    }
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

impl From<Option<Span>> for BlobExtent {
    fn from(span: Option<Span>) -> Self {
        span.map_or(Self::Whole, Self::Part)
    }
}

impl From<Tier> for ServedFrom {
    fn from(tier: Tier) -> Self {
        match tier {
            Tier::Memory => Self::Memory,
            Tier::Disk => Self::Disk,
        }
    }
}

impl BlobResponse {
    /// A part of an object in memory.
    pub fn of_bytes(bytes: &Bytes, range: Option<RangeRequest>, from: ServedFrom) -> Result<Self, PullError> {
        let total = bytes.len() as u64;
        let span = span_of(range, total)?;
        let Span { start, end } = span.unwrap_or(Span::whole(total));
        // Both lie within the bytes, so they fit.
        let part = bytes.slice(usize::try_from(start).unwrap_or(0)..usize::try_from(end).unwrap_or(0));
        Ok(Self { total, extent: span.into(), from, body: Body::Memory(Some(part)) })
    }

    pub(super) fn of_blob(blob: Arc<Blob>, range: Option<RangeRequest>) -> Result<Self, PullError> {
        let total = blob.len;
        let span = span_of(range, total)?;
        let reader = Reader::of_blob(blob, span.unwrap_or(Span::whole(total)));
        Ok(Self { total, extent: span.into(), from: ServedFrom::Disk, body: Body::File(reader) })
    }
}

impl Body {
    /// The next piece; None at the end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Broken> {
        match self {
            Self::Memory(bytes) => Ok(bytes.take().filter(|bytes| !bytes.is_empty())),
            Self::File(reader) => reader.next().await,
            Self::Passing(passage) => passage.next().await,
            Self::List(list) => list.next().await,
            Self::Parts(parts) => parts.next().await,
        }
    }

    /// The client does not read: closes a source that can be opened again.
    pub fn release(&mut self) {
        if let Self::Passing(passage) = self {
            passage.release();
        }
    }

    /// Bytes in memory until they are sent, also while the client does not read.
    pub fn held(&self) -> usize {
        match self {
            Self::Memory(Some(bytes)) => bytes.len(),
            Self::Passing(passage) => passage.held(),
            Self::List(_) => LIST_BYTES,
            // The part that is sent, and those that are opened ahead.
            Self::Parts(_) => PART_BYTES * (parts::PARTS_AHEAD + 1),
            Self::Memory(None) | Self::File(_) => 0,
        }
    }
}
