//! The way of a blob: kept, being filled, or fetched.

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
    pub place: RepositoryRef,
    pub digest: Digest,
    pub range: Option<RangeRequest>,
    pub named_by: RegistryFrom,
    pub asking: RequestContext,
}

/// A blob or a part of it, ready to be sent.
pub struct BlobResponse {
    pub total: u64,
    pub extent: BlobExtent,
    pub from: ServedFrom,
    pub body: Body,
}

/// What of a blob an answer holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlobExtent {
    Whole,
    Part(Span),
    /// Several, with what is between them.
    Parts(Multipart),
}

/// Where the bytes of an answer come from, piece by piece.
pub enum Body {
    /// Whole in memory, or already sent.
    Memory(Option<Bytes>),
    File(Reader),
    Passing(Box<PassthroughStream>),
    List(Box<ListBody>),
    Parts(Box<Parts>),
}

/// Why a blob was not fetched.
pub(super) enum Fetch {
    Source(SourceError),
    Refused(PullError),
}

/// What an outage means for a blob.
#[derive(Clone, Copy, PartialEq, Eq)]
enum OutageWait {
    /// The requester can ask elsewhere: refuse soon.
    Refuse,
    /// A client that sends no `ns` has chosen its mirror for the whole image: a blob refused is a
    /// pull failed, so an outage is waited out, asking again and again.
    WaitOut,
}

/// A list on its way: buffers of the upstream's connection, and the copy that is made of it.
const LIST_BYTES: usize = 512 * 1024;

impl Pull {
    /// `GET blobs/<digest>`.
    pub async fn blob(self: &Arc<Self>, request: &BlobRequest) -> Result<BlobResponse, PullError> {
        let (digest, range) = (&request.digest, request.range);
        let places = self.candidates(request).await;
        // Bytes that lately proved wrong: whoever holds a beginning must not get an end.
        let is_distrusted = |place: &RepositoryRef| self.fills.is_distrusted(&ContentSource::new(place, digest));
        let distrusted = || places.iter().any(is_distrusted);
        let kept = self.kept_blob(request).await;
        // Peers hash the whole: they may have any part of what is verified.
        let is_proven = matches!(kept, Some(Found::Small { .. } | Found::Large { proof: Verification::Verified, .. }));
        let may_resume = request.asking.asker.is_peer() && is_proven;
        if let Some(range) = range
            && !may_resume
            && distrusted()
        {
            if range.is_resumption() {
                let message = "the bytes that came before did not match this digest: start again".to_owned();
                return Err(PullError::NotFound { code: ErrorCode::BlobUnknown, message });
            }
            if request.asking.is_follower() {
                // It could not go on with what comes by ranges: it gets all in one.
                return Box::pin(self.blob(&BlobRequest { range: None, ..request.clone() })).await;
            }
        }
        if request.asking.reach == FetchPolicy::Kept {
            return self.blob_here(request, kept).await;
        }
        self.confirm_blob(request, kept.as_ref(), &places).await?;
        match kept {
            Some(Found::Small { object, tier }) => return BlobResponse::of_bytes(&object.bytes, range, tier.into()),
            Some(Found::Large { blob, proof: Verification::Verified }) => return BlobResponse::of_blob(blob, range),
            Some(Found::Large { blob, proof: Verification::Unproven }) => {
                let fill = self.verify_kept(request, blob);
                // Most files are hashed soon: then a damaged one is fetched anew and nobody notices.
                // Who cannot wait for a large one reads along.
                let proven = timeout(CONFIRM_TIMEOUT, fill.ended()).await;
                if proven != Ok(FillOutcome::Failed) {
                    let followed = timeout(STALL_TIMEOUT - CONFIRM_TIMEOUT, self.follow(&fill, request)).await;
                    return followed.unwrap_or(Err(Fetch::Source(SourceError::TimedOut))).map_err(Fetch::into_refusal);
                }
            }
            None => {}
        }
        let mut last = None;
        let count = places.len();
        for (nth, place) in places.into_iter().enumerate() {
            let (patience, limit) = match request.named_by {
                // Another place may have it, now.
                _ if nth + 1 < count => (OutageWait::Refuse, request.asking.patience.min(STALL_TIMEOUT)),
                RegistryFrom::Namespace => (OutageWait::Refuse, request.asking.patience),
                RegistryFrom::Path | RegistryFrom::Host | RegistryFrom::Default => {
                    (OutageWait::WaitOut, request.asking.patience)
                }
            };
            let request = BlobRequest { place, ..request.clone() };
            let deadline = Instant::now() + limit;
            // The fill goes on for whoever comes next.
            let fetched = timeout_at(deadline, self.fetch_blob(&request, patience, deadline)).await;
            match fetched.unwrap_or(Err(Fetch::Source(SourceError::TimedOut))) {
                Ok(answer) => return Ok(answer),
                Err(Fetch::Refused(refusal)) => return Err(refusal),
                Err(Fetch::Source(error)) => last = Some(severer(last, error)),
            }
        }
        Err(Fetch::Source(last.unwrap_or_else(SourceError::not_found)).into_refusal())
    }

    pub(super) async fn kept_blob(&self, request: &BlobRequest) -> Option<Found> {
        let found = self.store.find(&request.digest, SmallKind::Blob).await?;
        let (asker, place) = (request.asking.asker, &request.place);
        self.may_give(&request.digest, found.provenance(), asker, place).then_some(found)
    }

    /// The places that may have a blob. A request that names no registry is first looked for where its repository was
    /// served from; what came from somewhere with wrong bytes is first looked for elsewhere.
    pub(super) async fn candidates(&self, request: &BlobRequest) -> Vec<RepositoryRef> {
        let place = &request.place;
        let homes = match request.named_by {
            RegistryFrom::Default => self.homes.of(&place.repository).await,
            RegistryFrom::Namespace | RegistryFrom::Path | RegistryFrom::Host => [].into(),
        };
        let home = |registry: &Registry| match *registry == place.registry {
            true => place.clone(),
            false => self.place(registry.clone(), place.repository.clone()),
        };
        let mut places: Vec<RepositoryRef> = homes.iter().map(home).collect();
        if !homes.contains(&place.registry) {
            places.push(place.clone());
        }
        places.retain(|place| self.permit(place, request.asking.asker).is_ok());
        places.sort_by_key(|place| self.fills.is_distrusted(&ContentSource::new(place, &request.digest)));
        places
    }

    /// Whether several registries have served what a request may mean: which of them is to be believed is only known
    /// when all is here.
    pub(super) fn is_ambiguous(&self, request: &BlobRequest) -> bool {
        request.named_by == RegistryFrom::Default && self.homes.may_be_anothers(&request.place, &request.digest)
    }

    async fn fetch_blob(
        self: &Arc<Self>,
        request: &BlobRequest,
        patience: OutageWait,
        deadline: Instant,
    ) -> Result<BlobResponse, Fetch> {
        let (place, digest) = (&request.place, &request.digest);
        if let Some(error) = self.negatives.get(place, NegativeKind::Blob, digest.as_str()) {
            return Err(error.into());
        }
        if let Some(answer) = self.pass_range(request).await? {
            return Ok(answer);
        }
        let key = self.fill_key(request);
        // What cannot be kept here somebody else may have room for: the origin is not asked for it again and again.
        let is_unkeepable = || self.fills.has_no_room(&key) && self.fills.running(&key).is_none();
        if request.asking.asker.is_peer() && is_unkeepable() {
            return Err(SourceError::NotKept.into());
        }
        let mut answers = 0;
        loop {
            // Each time in the role of the request: the owner may be back.
            let sources = self.sources(request, RangePurpose::Whole);
            let fill = self.fills.join(&key, place, request.asking.client, sources, first_byte_wanted(request.range));
            if request.asking.asker.is_peer() && matches!(fill.opened().await, Ok(OpenedFill::Uncached { .. })) {
                return Err(SourceError::NotKept.into());
            }
            let error = match self.follow(&fill, request).await {
                Err(Fetch::Source(error)) => error,
                other => return other,
            };
            if fill.refused_another(place).await {
                continue;
            }
            if !error.is_outage() {
                self.negatives.put(place, NegativeKind::Blob, digest.as_str(), &error);
            }
            // A registry that cannot be reached is waited for; one that answers with an error so often means it.
            let is_answer = match &error {
                SourceError::Limited { again } => again.is_none_or(|again| again < STALL_TIMEOUT),
                SourceError::Interrupted(_) => true,
                error => error.failed_status().is_some(),
            };
            answers += u32::from(is_answer);
            let may_wait =
                patience == OutageWait::WaitOut && error.is_passing_outage() && (!is_answer || answers < ROUNDS);
            if !may_wait || Instant::now() + RETRY_INTERVAL > deadline {
                return Err(error.into());
            }
            tokio::time::sleep(RETRY_INTERVAL).await;
        }
    }

    /// Serves a range from a fill, or around it where it cannot be kept.
    pub(super) async fn follow(
        self: &Arc<Self>,
        fill: &Arc<Fill>,
        request: &BlobRequest,
    ) -> Result<BlobResponse, Fetch> {
        match fill.opened().await? {
            // What was kept may come from elsewhere than whoever asked for it thinks.
            OpenedFill::Small { object, .. }
                if !self.may_give(&request.digest, Some(&object.provenance), request.asking.asker, &request.place) =>
            {
                Err(SourceError::NotKept.into())
            }
            OpenedFill::Small { object, from } => Ok(BlobResponse::of_bytes(&object.bytes, request.range, from)?),
            OpenedFill::Growing { blob, .. }
                if !self.may_give(&request.digest, blob.provenance.as_ref(), request.asking.asker, &request.place) =>
            {
                Err(SourceError::NotKept.into())
            }
            OpenedFill::Growing { blob, from } => {
                let total = blob.len;
                let span = span_of(request.range, total)?;
                let manner = match (request.asking.asker, request.asking.reach, span) {
                    (Requester::Peer(_), FetchPolicy::Kept, Some(_)) => ReadMode::OfWhatComes,
                    (Requester::Peer(_), FetchPolicy::Origin, Some(_)) => ReadMode::Unproven,
                    (Requester::Client, _, Some(span)) if span.end < total && self.is_ambiguous(request) => {
                        ReadMode::Verified
                    }
                    _ => ReadMode::Proven,
                };
                let from = match (manner, from) {
                    // A file that is not hashed yet is passed on as somebody else's: nobody vouches for it.
                    (ReadMode::Unproven | ReadMode::OfWhatComes, ServedFrom::Disk) => ServedFrom::Peer,
                    (_, from) => from,
                };
                let reader = fill.reader(blob, span.unwrap_or(Span::whole(total)), manner);
                Ok(BlobResponse { total, extent: span.into(), from, body: Body::File(reader) })
            }
            OpenedFill::Uncached { total, feed, .. } => {
                let wanted = span_of(request.range, total)?.unwrap_or(Span::whole(total));
                let whole = wanted == Span::whole(total);
                if !whole && self.is_ambiguous(request) {
                    let why = "several registries have served this repository: say which one is meant, by ns";
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

    /// Sends a feed on as it comes; a whole blob only if it matches in the end.
    pub(super) fn passing(&self, feed: SpanStream, request: &BlobRequest) -> Result<BlobResponse, Fetch> {
        let (total, from) = (feed.total(), feed.served_from());
        let span = span_of(request.range, total)?;
        let passage = if span.is_none_or(|span| span == Span::whole(total)) {
            PassthroughStream::whole(feed, &self.fills, &request.digest, &request.place)
        } else {
            PassthroughStream::part(feed)
        };
        Ok(BlobResponse { total, extent: span.into(), from, body: Body::Passing(Box::new(passage)) })
    }

    pub(super) fn fill_key(&self, request: &BlobRequest) -> FillKey {
        FillKey::new(&request.place, &request.digest)
    }

    /// The role in which this node has to download for this request.
    pub(super) fn role_of(&self, request: &BlobRequest) -> Role {
        self.role(&request.place, &request.digest, request.asking)
    }

    /// Hashes a file that may have been damaged, while readers follow.
    pub(super) fn verify_kept(&self, request: &BlobRequest, blob: Arc<Blob>) -> Arc<Fill> {
        self.fills.prove(&self.fill_key(request), &request.place, self.role_of(request), blob)
    }

    /// What this request's fill is fetched from, in the role in which the request asks this node.
    pub(super) fn sources(self: &Arc<Self>, request: &BlobRequest, aim: RangePurpose) -> Arc<BlobSources> {
        Arc::new(BlobSources::new(self, &request.place, self.fill_key(request), self.role_of(request), aim))
    }
}

/// What is to be said where several places give nothing.
pub(super) fn severer(known: Option<SourceError>, error: SourceError) -> SourceError {
    match known {
        Some(known) => known.severer(error),
        None => error,
    }
}

/// The part of a blob that a range means; None: the whole.
pub(super) fn span_of(range: Option<RangeRequest>, total: u64) -> Result<Option<Span>, PullError> {
    range.map(|range| range.within(total)).transpose().map_err(|_| PullError::Unsatisfiable { total })
}

/// Where a fill for this range had best begin; what is near the start is no detour.
fn first_byte_wanted(range: Option<RangeRequest>) -> u64 {
    match range {
        Some(RangeRequest::From(start) | RangeRequest::Bounded(start, _)) if start > SMALL_BYTES => start,
        _ => 0,
    }
}

impl BlobRequest {
    /// The same once some of its time has passed.
    pub fn after(&self, waited: Duration) -> Self {
        Self { asking: self.asking.after(waited), ..self.clone() }
    }
}

impl Fetch {
    pub(super) fn into_refusal(self) -> PullError {
        match self {
            Self::Source(error) => PullError::of(&error, ErrorCode::BlobUnknown),
            Self::Refused(refusal) => refusal,
        }
    }
}

impl From<SourceError> for Fetch {
    fn from(error: SourceError) -> Self {
        Self::Source(error)
    }
}

impl From<PullError> for Fetch {
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
    /// A part of what is in memory.
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

    /// The client does not read: what can be had again later need not stay open.
    pub fn release(&mut self) {
        if let Self::Passing(passage) = self {
            passage.release();
        }
    }

    /// Bytes that are held in memory until they are sent, or while their client does not read.
    pub fn held(&self) -> usize {
        match self {
            Self::Memory(Some(bytes)) => bytes.len(),
            Self::Passing(passage) => passage.held(),
            Self::List(_) => LIST_BYTES,
            // The one that is sent, and those that are opened before their turn.
            Self::Parts(_) => PART_BYTES * (parts::AHEAD + 1),
            Self::Memory(None) | Self::File(_) => 0,
        }
    }
}
