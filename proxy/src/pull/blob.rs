//! The way of a blob: kept, being filled, or fetched.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, timeout_at};

use super::sources::BlobSources;
use super::{Asker, FIRST_BYTE, Pull, Refusal};
use crate::fill::{Feed, Fill, Opened, Passage, Reader};
use crate::oci::{Digest, ErrorCode, NamedBy, RangeRequest, Registry, Span};
use crate::registries::Place;
use crate::source::{Broken, ServedFrom, SourceError};
use crate::store::{Blob, Found, Kind, Proof, Tier};

/// A blob or a part of it, ready to be sent.
pub struct BlobAnswer {
    pub total: u64,
    /// The part that was asked for; None: the whole.
    pub span: Option<Span>,
    pub from: ServedFrom,
    pub body: Body,
}

/// Where the bytes of an answer come from, piece by piece.
pub enum Body {
    /// Whole in memory, or already sent.
    Memory(Option<Bytes>),
    File(Reader),
    Passing(Box<Passage>),
}

/// A client that sends no `ns` has chosen its mirror for the whole image: a blob refused is a pull
/// failed, so an outage is waited out this long, asking again and again.
const FIRST_BYTE_WITHOUT_NS: Duration = Duration::from_secs(60);
const AGAIN: Duration = Duration::from_secs(2);

/// Bounded ranges of a blob are passed through until this much, or this share, was asked for.
const FILL_AFTER_BYTES: u64 = 8 * 1024 * 1024;
const FILL_AFTER_SHARE: u64 = 20;

/// A bounded range waits for a running fill that is at most this far behind it.
const WAIT_FOR_FILL: u64 = 16 * 1024 * 1024;

impl Pull {
    /// `GET blobs/<digest>`.
    pub async fn blob(
        self: &Arc<Self>,
        place: &Place,
        digest: &Digest,
        range: Option<RangeRequest>,
        named_by: NamedBy,
        asker: Asker,
    ) -> Result<BlobAnswer, Refusal> {
        // Bytes that lately proved wrong: whoever holds a beginning must not get an end.
        let resumes =
            matches!(range, Some(RangeRequest::From(1..) | RangeRequest::Bounded(1.., _) | RangeRequest::Suffix(_)));
        if resumes && self.fills.is_distrusted(digest) && self.store.find(digest, Kind::Blob).await.is_none() {
            let message = "the bytes that came before did not match this digest: start again".to_owned();
            return Err(Refusal::NotFound { code: ErrorCode::BlobUnknown, message });
        }
        match self.store.find(digest, Kind::Blob).await {
            Some(Found::Small { object, tier }) => {
                let from = if tier == Tier::Memory { ServedFrom::Memory } else { ServedFrom::Disk };
                return BlobAnswer::of_bytes(&object.bytes, range, from);
            }
            Some(Found::Large { blob, proof: Proof::Verified }) => return BlobAnswer::of_blob(blob, range),
            Some(Found::Large { blob, proof: Proof::Unproven }) => {
                let fill = self.fills.prove(digest, blob);
                return self.follow(&fill, place, digest, range, asker).await.map_err(blob_refusal);
            }
            None => {}
        }
        let mut last = SourceError::NotFound;
        for place in self.candidates(place, named_by) {
            match self.fetch_blob(&place, digest, range, named_by, asker).await {
                Ok(answer) => return Ok(answer),
                Err(Fetch::Refused(refusal)) => return Err(refusal),
                Err(Fetch::Source(error)) => last = last.severer(error),
            }
        }
        Err(blob_refusal(Fetch::Source(last)))
    }

    /// `HEAD blobs/<digest>`: its length, and where it would come from.
    pub async fn blob_length(
        self: &Arc<Self>,
        place: &Place,
        digest: &Digest,
        named_by: NamedBy,
    ) -> Result<(u64, ServedFrom), Refusal> {
        match self.store.find(digest, Kind::Blob).await {
            Some(Found::Small { object, tier: Tier::Memory }) => {
                return Ok((object.bytes.len() as u64, ServedFrom::Memory));
            }
            Some(Found::Small { object, tier: Tier::Disk }) => {
                return Ok((object.bytes.len() as u64, ServedFrom::Disk));
            }
            Some(Found::Large { blob, .. }) => return Ok((blob.len, ServedFrom::Disk)),
            None => {}
        }
        if let Some(fill) = self.fills.running(digest)
            && let Ok(opened) = fill.opened().await
        {
            return Ok(opened.length());
        }
        let mut last = SourceError::NotFound;
        for place in self.candidates(place, named_by) {
            let key = (place.to_string(), digest.clone());
            let landed = self.length_flights.join(key, || {
                let (pull, place, digest) = (self.clone(), place.clone(), digest.clone());
                async move { pull.origin.blob_length(&place, &digest, Instant::now() + FIRST_BYTE).await }
            });
            match landed.await {
                Some(Ok(length)) => return Ok((length, ServedFrom::Origin)),
                Some(Err(error)) => last = last.severer(error),
                None => last = last.severer(SourceError::Unreachable("the fetch ended".into())),
            }
        }
        Err(blob_refusal(Fetch::Source(last)))
    }

    /// The places that may have a blob. A request that names no registry is first looked for where
    /// its repository was last served from.
    fn candidates(&self, place: &Place, named_by: NamedBy) -> Vec<Place> {
        let learned = match named_by {
            NamedBy::Default => self.learned(&place.repository).filter(|registry| *registry != place.registry),
            _ => None,
        };
        let mut places: Vec<Place> =
            learned.into_iter().map(|registry| self.place(registry, place.repository.clone())).collect();
        places.push(place.clone());
        places.retain(|place| !place.rule.deny);
        places
    }

    async fn fetch_blob(
        self: &Arc<Self>,
        place: &Place,
        digest: &Digest,
        range: Option<RangeRequest>,
        named_by: NamedBy,
        asker: Asker,
    ) -> Result<BlobAnswer, Fetch> {
        if let Some(RangeRequest::Bounded(..) | RangeRequest::Suffix(_)) = range
            && let Some(answer) = self.pass_range(place, digest, range, asker).await?
        {
            return Ok(answer);
        }
        let sources = self.sources(place, digest, asker);
        let patience = if named_by == NamedBy::Namespace { FIRST_BYTE } else { FIRST_BYTE_WITHOUT_NS };
        let deadline = Instant::now() + patience;
        loop {
            let fill = self.fills.join(digest, place, sources.clone());
            let opened = timeout_at(deadline, self.follow(&fill, place, digest, range, asker)).await;
            match opened.unwrap_or(Err(Fetch::Source(SourceError::TimedOut))) {
                // Another place's origin refused: ours may have it.
                Err(Fetch::Source(_)) if fill.place.as_ref() != Some(place) => {}
                Err(Fetch::Source(error)) if error.is_outage() && Instant::now() + AGAIN < deadline => {
                    if named_by == NamedBy::Namespace {
                        return Err(Fetch::Source(error));
                    }
                    tokio::time::sleep(AGAIN).await;
                }
                other => return other,
            }
        }
    }

    /// Serves a range from a fill, or around it where there was no space.
    async fn follow(
        self: &Arc<Self>,
        fill: &Arc<Fill>,
        place: &Place,
        digest: &Digest,
        range: Option<RangeRequest>,
        asker: Asker,
    ) -> Result<BlobAnswer, Fetch> {
        match fill.opened().await? {
            Opened::Small { object, from } => Ok(BlobAnswer::of_bytes(&object.bytes, range, from)?),
            Opened::Growing { blob, from } => {
                let total = blob.len;
                let span = span_of(range, total)?;
                let reader = fill.reader(blob, span.unwrap_or(Span::whole(total)));
                Ok(BlobAnswer { total, span, from, body: Body::File(reader) })
            }
            Opened::Uncached { total } => {
                let span = span_of(range, total)?;
                let sources = self.sources(place, digest, asker);
                let end = span.map(|span| span.end).filter(|end| *end < total);
                let feed = Feed::open(sources, span.map_or(0, |span| span.start), end).await?;
                Ok(BlobAnswer::passing(feed, span, digest))
            }
        }
    }

    /// Answers a bounded range straight from the source, while little of the blob was asked for.
    /// None: the blob is worth a fill.
    async fn pass_range(
        self: &Arc<Self>,
        place: &Place,
        digest: &Digest,
        range: Option<RangeRequest>,
        asker: Asker,
    ) -> Result<Option<BlobAnswer>, Fetch> {
        let (start, end) = match range {
            Some(RangeRequest::Bounded(start, last)) if start <= last => (start, last.saturating_add(1)),
            Some(RangeRequest::Suffix(_)) => {
                let total = self.origin.blob_length(place, digest, Instant::now() + FIRST_BYTE).await?;
                let span = span_of(range, total)?.unwrap_or(Span::whole(total));
                (span.start, span.end)
            }
            _ => return Ok(None),
        };
        if let Some(fill) = self.fills.running(digest)
            && fill.released() + WAIT_FOR_FILL >= start
        {
            return Ok(None);
        }
        let asked = self.asked.get(digest).unwrap_or(0) + (end - start);
        self.asked.insert(digest.clone(), asked);
        if asked >= FILL_AFTER_BYTES {
            // Enough to want it all; this range need not wait for what lies before it.
            self.fills.join(digest, place, self.sources(place, digest, asker));
            if start < WAIT_FOR_FILL {
                return Ok(None);
            }
        }
        let feed = Feed::open(self.sources(place, digest, asker), start, Some(end)).await?;
        let total = feed.total();
        if feed.skips() || asked >= total / FILL_AFTER_SHARE {
            // Its source knows no ranges, or a good share was asked for.
            return Ok(None);
        }
        let span = span_of(range, total)?;
        Ok(Some(BlobAnswer::passing(feed, span, digest)))
    }

    fn sources(self: &Arc<Self>, place: &Place, digest: &Digest, asker: Asker) -> Arc<BlobSources> {
        let peers = self.ask_peers(place, asker);
        Arc::new(BlobSources { pull: self.clone(), place: place.clone(), digest: digest.clone(), peers })
    }

    fn learned(&self, repository: &crate::oci::Repository) -> Option<Registry> {
        self.learned.get(repository).or_else(|| self.store.records.repository(repository))
    }
}

/// Why a blob was not fetched.
enum Fetch {
    Source(SourceError),
    Refused(Refusal),
}

impl From<SourceError> for Fetch {
    fn from(error: SourceError) -> Self {
        Self::Source(error)
    }
}

impl From<Refusal> for Fetch {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

fn blob_refusal(fetch: Fetch) -> Refusal {
    match fetch {
        Fetch::Source(error) => Refusal::of(&error, ErrorCode::BlobUnknown),
        Fetch::Refused(refusal) => refusal,
    }
}

/// The part of a blob that a range means; None: the whole.
fn span_of(range: Option<RangeRequest>, total: u64) -> Result<Option<Span>, Refusal> {
    range.map(|range| range.within(total)).transpose().map_err(|_| Refusal::Unsatisfiable { total })
}

impl BlobAnswer {
    /// A part of what is in memory.
    pub fn of_bytes(bytes: &Bytes, range: Option<RangeRequest>, from: ServedFrom) -> Result<Self, Refusal> {
        let total = bytes.len() as u64;
        let span = span_of(range, total)?;
        let Span { start, end } = span.unwrap_or(Span::whole(total));
        // Both lie within the bytes, so they fit.
        let part = bytes.slice(usize::try_from(start).unwrap_or(0)..usize::try_from(end).unwrap_or(0));
        Ok(Self { total, span, from, body: Body::Memory(Some(part)) })
    }

    fn of_blob(blob: Arc<Blob>, range: Option<RangeRequest>) -> Result<Self, Refusal> {
        let total = blob.len;
        let span = span_of(range, total)?;
        let reader = Reader::of_blob(blob, span.unwrap_or(Span::whole(total)));
        Ok(Self { total, span, from: ServedFrom::Disk, body: Body::File(reader) })
    }

    fn passing(feed: Feed, span: Option<Span>, digest: &Digest) -> Self {
        let (total, from) = (feed.total(), feed.served_from());
        let whole = span.is_none_or(|span| span == Span::whole(total));
        let passage = if whole { Passage::whole(feed, digest) } else { Passage::part(feed) };
        Self { total, span, from, body: Body::Passing(Box::new(passage)) }
    }
}

impl Body {
    /// The next piece; None at the end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Broken> {
        match self {
            Self::Memory(bytes) => Ok(bytes.take().filter(|bytes| !bytes.is_empty())),
            Self::File(reader) => reader.next().await,
            Self::Passing(passage) => passage.next().await,
        }
    }
}
