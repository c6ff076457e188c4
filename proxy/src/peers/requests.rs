//! Requests to peers, for what they have, or to download it as the owner.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::join_all;
use futures_util::stream::try_unfold;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, LOCATION};
use http::{HeaderMap, Method};
use parking_lot::Mutex;
use reqwest::Response;
use tokio::time::{Instant, timeout, timeout_at};

use super::download::PeerDownload;
use super::exchange::RequestMetadata;
use super::query::{Downstream, PeerQuery, PeerRequestMode, RangePurpose, RedirectPolicy};
use super::swarm::{Claim, Contribution, View};
use super::wire::Holder;
use super::{Peers, wire};
use crate::oci::{Digest, MAX_MANIFEST_BYTES, Span, Spans, Tag, manifest};
use crate::source::{Broken, Incoming, Part, ServedFrom, SourceError, root_cause};
use crate::times::LOOKUP_TIMEOUT;

/// A peer's resolution of a tag.
pub struct PeerTagResolution {
    pub digest: Digest,
    /// Time since the upstream last confirmed it.
    pub age: Duration,
    pub from: ServedFrom,
}

/// A peer's resolution of a tag, with the manifest.
pub struct PeerTag {
    pub meaning: PeerTagResolution,
    pub media_type: String,
    pub bytes: bytes::Bytes,
}

/// Why a request to a peer brings no bytes.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    #[error("the peer does not have it")]
    NotCached,
    /// Another holder is less loaded. None: that holder is down, or must not be used by this node.
    #[error("redirected to another holder")]
    Redirected(Option<SocketAddr>),
    /// This node is to download this span from the upstream, as the owner's deputy.
    #[error("lent to this node")]
    Deputed(Span),
    /// The peer, or its source, fails.
    #[error(transparent)]
    Source(SourceError),
}

/// Timeout for a manifest's body, which follows its head at once. Longer: no time is left for another source. Shorter:
/// slow links fail.
const MANIFEST_BODY_TIMEOUT: Duration = Duration::from_secs(3);

/// Peers that may have downloaded a digest while this node was away. More: each miss of the owner costs more requests
/// that mostly find nothing. Fewer: one of them that is down leads to a second download from the upstream.
const MAX_SUCCESSORS: usize = 2;

/// Peers that are queried when no upstream responds. Larger: an outage costs more requests. Smaller: a remaining copy
/// is found less often.
const MAX_LAST_RESORT_PEERS: usize = 16;

impl Peers {
    /// The holders of a blob that this node owns, without those whose own requests report what they have.
    pub async fn query_successors(&self, query: &PeerQuery<'_>) -> Vec<Holder> {
        let mut successors = self.successors(query, MAX_SUCCESSORS);
        successors.retain(|peer| !self.reports_have(peer, query.digest));
        self.query_holders(query, successors).await
    }

    /// Holders of a digest that no upstream delivers.
    pub async fn query_last_resort(&self, query: &PeerQuery<'_>) -> Vec<Holder> {
        self.query_holders(query, self.successors(query, MAX_LAST_RESORT_PEERS)).await
    }

    /// The next owners, without the peers that wait for this node.
    pub(super) fn successors(&self, query: &PeerQuery<'_>, count: usize) -> Vec<SocketAddr> {
        let may_be_used = |peer: &SocketAddr| self.is_available(peer) && !query.downstream.contains(peer);
        self.members.load().successors(query.digest, count, query.scope, may_be_used)
    }

    /// A blob's length as a holder reports it, where no upstream does.
    pub async fn last_resort_length(&self, query: &PeerQuery<'_>) -> Option<u64> {
        let peers = self.successors(query, MAX_LAST_RESORT_PEERS);
        self.query_heads(query, peers).await.first().map(|(_, length)| *length)
    }

    async fn query_holders(&self, query: &PeerQuery<'_>, peers: Vec<SocketAddr>) -> Vec<Holder> {
        self.query_heads(query, peers).await.into_iter().map(|(holder, _)| holder).collect()
    }

    /// Holders of parts of a blob, each with the length that it reports.
    async fn query_heads(&self, query: &PeerQuery<'_>, peers: Vec<SocketAddr>) -> Vec<(Holder, u64)> {
        let responses = peers.into_iter().map(|peer| async move {
            let path = format!("blobs/{}", query.digest);
            let request = self.get(Method::HEAD, peer, query, &path, Part::From(0), RequestMetadata::default());
            let response =
                self.within_look_timeout(peer, request).await?.ok().filter(|response| response.status() == 200)?;
            let length: u64 = wire::read(response.headers(), &CONTENT_LENGTH)?;
            let have = wire::read_have(response.headers()).map_or_else(|| Span::whole(length).into(), |(_, have)| have);
            Some((Holder { peer, load: 0, have }, length))
        });
        join_all(responses).await.into_iter().flatten().collect()
    }

    /// Waits for a peer that only has to look into its cache. None: it timed out, and is suspect now.
    async fn within_look_timeout<T>(&self, peer: SocketAddr, request: impl Future<Output = T>) -> Option<T> {
        let response = timeout(LOOKUP_TIMEOUT, request).await.ok();
        if response.is_none() {
            self.mark_suspect(peer);
        }
        response
    }

    /// A blob, or a part of it, from a peer. `view` learns the holders that the response names, and whether the peer
    /// delivers.
    pub async fn blob(
        &self,
        peer: SocketAddr,
        query: &PeerQuery<'_>,
        part: Part,
        have: &Spans,
        view: &Arc<Mutex<View>>,
    ) -> Result<Incoming, PeerError> {
        let result = self.request_blob(peer, query, part, have, view).await;
        match &result {
            Ok(_) | Err(PeerError::Redirected(_) | PeerError::Deputed(_)) => {}
            Err(PeerError::NotCached) => view.lock().mark_refused(peer, self.now()),
            Err(PeerError::Source(_)) => view.lock().mark_failed(peer, self.now()),
        }
        result
    }

    async fn request_blob(
        &self,
        peer: SocketAddr,
        query: &PeerQuery<'_>,
        part: Part,
        have: &Spans,
        view: &Arc<Mutex<View>>,
    ) -> Result<Incoming, PeerError> {
        let members = self.members.load_full();
        let may_depute = query.range_purpose == RangePurpose::Whole
            && query.redirects == RedirectPolicy::Followed
            && matches!((query.mode, part), (PeerRequestMode::As(_), Part::Span(_)));
        let metadata = RequestMetadata { may_depute, ..self.own_metadata(have) };
        let path = format!("blobs/{}", query.digest);
        let response = self.get(Method::GET, peer, query, &path, part, metadata).await?;
        let headers = response.headers();
        let may_be_used =
            |other: &SocketAddr| *other != members.own && members.is_within_reach(*other) && self.is_available(other);
        {
            let mut view = view.lock();
            let others = wire::read_holders(headers).into_iter();
            others.filter(|holder| may_be_used(&holder.peer)).for_each(|holder| view.learn(&holder));
            if let Some((load, have)) = wire::read_have(headers) {
                view.learn(&Holder { peer, load, have });
            }
        }
        match response.status().as_u16() {
            200 | 206 => {}
            307 => {
                if let Some(wire::PeerRefusal::Deputy(span)) = wire::PeerRefusal::read(headers) {
                    return Err(PeerError::Deputed(span));
                }
                let to: Option<SocketAddr> = wire::read(headers, &LOCATION);
                let followed = query.redirects == RedirectPolicy::Followed;
                let to = to.filter(|to| *to != peer && may_be_used(to));
                return Err(if followed { PeerError::Redirected(to) } else { PeerError::NotCached });
            }
            504 => return Err(PeerError::NotCached),
            _ => return Err(PeerError::Source(upstream_error(response, query).await)),
        }
        let range = part.brought(response.status().as_u16(), headers, None);
        let range = range.and_then(|(span, total)| match part {
            // Peers honour ranges, so a body that starts elsewhere is an error.
            Part::Span(requested) if span.start != requested.start => {
                Err(SourceError::Malformed("the peer sent another range than requested".into()))
            }
            _ => Ok((span, total)),
        });
        let (span, total) = range?;
        let counter = self.metrics.peer_bytes.with_label_values(&[members.zone_of(peer), members.own_zone()]);
        let source = headers.get(wire::SOURCE).and_then(|source| source.to_str().ok()).unwrap_or_default();
        let is_relayed = [ServedFrom::Peer, ServedFrom::Upstream].iter().any(|from| from.as_str() == source);
        let claim = if is_relayed { Claim::Relayed } else { Claim::Verified };
        let nothing = Span { start: span.start, end: span.start };
        let contribution = Contribution { peer, claim, total, span: nothing, checksum: 0 };
        let download = PeerDownload::new(view, contribution, span, self.started);
        let body = try_unfold((response, download), move |(mut response, mut download)| {
            let counter = counter.clone();
            async move {
                download.start_waiting();
                let piece = response.chunk().await.map_err(|error| Broken(root_cause(&error)))?;
                let Some(piece) = piece else { return Ok(None) };
                counter.inc_by(piece.len() as u64);
                download.record(&piece)?;
                Ok(Some((piece, (response, download))))
            }
        });
        Ok(Incoming::new(span, total, body))
    }

    /// A blob's length as a peer reports it.
    pub async fn blob_length(&self, peer: SocketAddr, query: &PeerQuery<'_>) -> Result<u64, SourceError> {
        let path = format!("blobs/{}", query.digest);
        let response = self.get(Method::HEAD, peer, query, &path, Part::From(0), RequestMetadata::default()).await?;
        match response.status().as_u16() {
            200 => wire::read(response.headers(), &CONTENT_LENGTH)
                .ok_or_else(|| SourceError::Malformed("the peer's response has no length of the blob".into())),
            504 => Err(SourceError::NotCached),
            _ => Err(upstream_error(response, query).await),
        }
    }

    /// Reports to a peer what this node has of a blob.
    pub async fn tell(&self, peer: SocketAddr, query: &PeerQuery<'_>, have: &Spans) {
        let path = format!("blobs/{}", query.digest);
        let response = self.get(Method::HEAD, peer, query, &path, Part::From(0), self.own_metadata(have)).await;
        if let Err(error) = response {
            tracing::debug!(%peer, %error, "have report failed");
        }
    }

    /// What a request reports of this node.
    fn own_metadata(&self, have: &Spans) -> RequestMetadata {
        let have = wire::write_have(self.sending.load(Ordering::Relaxed), have);
        RequestMetadata { peers: self.downstream_of_this_node(Downstream::NONE), have, ..RequestMetadata::default() }
    }

    /// The peers that wait for a response to this node, which is the first where the members know it.
    fn downstream_of_this_node(&self, downstream: Downstream) -> Downstream {
        let members = self.members.load();
        if members.has_own() { downstream.behind(members.own) } else { Downstream::NONE }
    }

    /// A manifest by digest from a peer, with its media type. Not yet verified.
    pub async fn manifest(
        &self,
        peer: SocketAddr,
        query: &PeerQuery<'_>,
    ) -> Result<(String, bytes::Bytes), SourceError> {
        let path = format!("manifests/{}", query.digest);
        let metadata =
            RequestMetadata { peers: self.downstream_of_this_node(query.downstream), ..RequestMetadata::default() };
        let response = self.get(Method::GET, peer, query, &path, Part::From(0), metadata).await?;
        self.take_manifest(peer, query, response).await
    }

    /// An authenticated peer's resolution of a tag, with the manifest. The query's digest is the tag's position in the
    /// ring.
    pub async fn tag(
        &self,
        peer: SocketAddr,
        query: &PeerQuery<'_>,
        tag: &Tag,
        accept: &str,
    ) -> Result<PeerTag, SourceError> {
        let response = self.get_tag(Method::GET, peer, query, tag, accept).await?;
        let meaning = PeerTagResolution::read(response.headers());
        let (media_type, bytes) = self.take_manifest(peer, query, response).await?;
        let meaning = meaning?;
        if !meaning.digest.matches(&bytes) {
            return Err(SourceError::Malformed("the peer's manifest does not match the tag's digest".into()));
        }
        Ok(PeerTag { meaning, media_type, bytes })
    }

    /// The same without the manifest, which this node may have.
    pub async fn tag_resolution(
        &self,
        peer: SocketAddr,
        query: &PeerQuery<'_>,
        tag: &Tag,
        accept: &str,
    ) -> Result<PeerTagResolution, SourceError> {
        let response = self.get_tag(Method::HEAD, peer, query, tag, accept).await?;
        match response.status().as_u16() {
            200 => PeerTagResolution::read(response.headers()),
            504 => Err(SourceError::NotCached),
            _ => Err(upstream_error(response, query).await),
        }
    }

    async fn get_tag(
        &self,
        method: Method,
        peer: SocketAddr,
        query: &PeerQuery<'_>,
        tag: &Tag,
        accept: &str,
    ) -> Result<Response, SourceError> {
        // A peer that requests the manifest lacks it; one that only renews its tag may be the only holder.
        let lacks_manifest = method == Method::GET;
        let peers = if lacks_manifest { self.downstream_of_this_node(query.downstream) } else { Downstream::NONE };
        let metadata = RequestMetadata { peers, accept: accept.parse().ok(), ..RequestMetadata::default() };
        self.get(method, peer, query, &format!("manifests/{tag}"), Part::From(0), metadata).await
    }

    /// The youngest resolution that any peer has of a tag which no upstream resolves.
    pub async fn last_resort_tag(&self, query: &PeerQuery<'_>, tag: &Tag, accept: &str) -> Option<PeerTag> {
        let responses = self
            .successors(query, MAX_LAST_RESORT_PEERS)
            .into_iter()
            .map(|peer| async move { self.within_look_timeout(peer, self.tag(peer, query, tag, accept)).await?.ok() });
        join_all(responses).await.into_iter().flatten().min_by_key(|tag| tag.meaning.age)
    }

    async fn take_manifest(
        &self,
        peer: SocketAddr,
        query: &PeerQuery<'_>,
        response: Response,
    ) -> Result<(String, bytes::Bytes), SourceError> {
        match response.status().as_u16() {
            200 => {}
            504 => return Err(SourceError::NotCached),
            _ => return Err(upstream_error(response, query).await),
        }
        let stated = response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let media_type = stated.filter(|text| manifest::is_media_type(text)).map(str::to_owned);
        let media_type =
            media_type.ok_or_else(|| SourceError::Malformed("the peer's manifest has no valid media type".into()))?;
        if response.content_length().is_none_or(|length| length > MAX_MANIFEST_BYTES) {
            return Err(SourceError::Malformed("the peer's manifest has no length, or is too large".into()));
        }
        let bytes = match timeout_at(query.deadline.min(Instant::now() + MANIFEST_BODY_TIMEOUT), response.bytes()).await
        {
            Ok(Ok(bytes)) => bytes,
            Ok(Err(error)) => return Err(SourceError::Unreachable(root_cause(&error))),
            Err(_) => return Err(SourceError::TimedOut),
        };
        let members = self.members.load();
        let counter = self.metrics.peer_bytes.with_label_values(&[members.zone_of(peer), members.own_zone()]);
        counter.inc_by(bytes.len() as u64);
        Ok((media_type, bytes))
    }

    /// Copies of a manifest that the successors have, with their media types. Not yet verified.
    pub async fn successor_manifests(&self, query: &PeerQuery<'_>) -> Vec<(String, bytes::Bytes)> {
        self.cached_manifests(query, MAX_SUCCESSORS).await
    }

    /// The same from more peers, for a manifest that no upstream delivers.
    pub async fn last_resort_manifests(&self, query: &PeerQuery<'_>) -> Vec<(String, bytes::Bytes)> {
        self.cached_manifests(query, MAX_LAST_RESORT_PEERS).await
    }

    async fn cached_manifests(&self, query: &PeerQuery<'_>, count: usize) -> Vec<(String, bytes::Bytes)> {
        let responses = self
            .successors(query, count)
            .into_iter()
            .map(|peer| async move { self.within_look_timeout(peer, self.manifest(peer, query)).await?.ok() });
        join_all(responses).await.into_iter().flatten().collect()
    }
}

impl PeerTagResolution {
    fn read(headers: &HeaderMap) -> Result<Self, SourceError> {
        let missing = |what: &str| SourceError::Malformed(format!("the peer's response for a tag lacks {what}"));
        let stale = headers.get(wire::SOURCE).is_some_and(|source| source == ServedFrom::Stale.as_str());
        Ok(Self {
            digest: wire::read(headers, &wire::CONTENT_DIGEST).ok_or_else(|| missing("its digest"))?,
            age: wire::read(headers, &wire::AGE).map(Duration::from_millis).ok_or_else(|| missing("its age"))?,
            from: if stale { ServedFrom::Stale } else { ServedFrom::Peer },
        })
    }
}

impl From<SourceError> for PeerError {
    fn from(error: SourceError) -> Self {
        if error == SourceError::NotCached { Self::NotCached } else { Self::Source(error) }
    }
}

/// The error in a peer's response. It carries the upstream's own status and body, where the upstream fails.
async fn upstream_error(response: Response, query: &PeerQuery<'_>) -> SourceError {
    if wire::PeerRefusal::read(response.headers()) == Some(wire::PeerRefusal::NoUpstream) {
        return SourceError::Unreachable("the peer cannot reach the upstream".into());
    }
    SourceError::of_response(response, query.deadline).await
}
