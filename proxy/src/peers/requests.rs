//! Asking peers: for what they have, or to get it.

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
use crate::times::LOOK_TIMEOUT;

/// What a tag means to a peer.
pub struct PeerTagResolution {
    pub digest: Digest,
    /// Since when the upstream was not asked.
    pub age: Duration,
    pub from: ServedFrom,
}

/// The same, with the manifest.
pub struct PeerTag {
    pub meaning: PeerTagResolution,
    pub media_type: String,
    pub bytes: bytes::Bytes,
}

/// Why a peer gives nothing.
#[derive(Debug)]
pub enum PeerError {
    /// It does not have it.
    NotKept,
    /// Another one has it as well, and is less busy. None: it is one whom this node may not ask, or who is down.
    Redirected(Option<SocketAddr>),
    /// This node had better fetch this part of it from the origin itself: nobody else does.
    Deputed(Span),
    /// It cannot get it.
    Source(SourceError),
}

/// What is sent whole is here so soon after its head: there has to be time to ask somebody else.
const BODY: Duration = Duration::from_secs(3);

/// Peers that may have fetched a digest while this node was away. More: each miss of the owner costs more requests that mostly
/// find nothing. Fewer: one of them that is down leads to a second download from the upstream.
const SUCCESSORS: usize = 2;

/// Those asked when no origin answers.
const LAST_RESORT: usize = 16;

impl Peers {
    /// The holders of a blob that this node owns, without those whose own requests say what they have.
    pub async fn ask_successors(&self, question: &PeerQuery<'_>) -> Vec<Holder> {
        let mut successors = self.successors(question, SUCCESSORS);
        successors.retain(|peer| !self.is_told_by(peer, question.digest));
        self.who_has(question, successors).await
    }

    /// Those who may have a digest that no origin gives.
    pub async fn ask_around(&self, question: &PeerQuery<'_>) -> Vec<Holder> {
        self.who_has(question, self.successors(question, LAST_RESORT)).await
    }

    /// The next owners, without the peers that wait for this node.
    pub(super) fn successors(&self, question: &PeerQuery<'_>, count: usize) -> Vec<SocketAddr> {
        let may_be_asked = |peer: &SocketAddr| self.is_well(peer) && !question.downstream.contains(peer);
        self.members.load().successors(question.digest, count, question.scope, may_be_asked)
    }

    /// How long a blob is, by the word of somebody who has it, where no origin says so.
    pub async fn anybodys_length(&self, question: &PeerQuery<'_>) -> Option<u64> {
        let peers = self.successors(question, LAST_RESORT);
        self.heads(question, peers).await.first().map(|(_, length)| *length)
    }

    async fn who_has(&self, question: &PeerQuery<'_>, peers: Vec<SocketAddr>) -> Vec<Holder> {
        self.heads(question, peers).await.into_iter().map(|(holder, _)| holder).collect()
    }

    /// Those who have some of a blob, and how long it is by their word.
    async fn heads(&self, question: &PeerQuery<'_>, peers: Vec<SocketAddr>) -> Vec<(Holder, u64)> {
        let asked = peers.into_iter().map(|peer| async move {
            let path = format!("blobs/{}", question.digest);
            let asking = self.get(Method::HEAD, peer, question, &path, Part::From(0), RequestMetadata::default());
            let response = self.look(peer, asking).await?.ok().filter(|response| response.status() == 200)?;
            let length: u64 = wire::read(response.headers(), &CONTENT_LENGTH)?;
            let have = wire::read_have(response.headers()).map_or_else(|| Span::whole(length).into(), |(_, have)| have);
            Some((Holder { peer, load: 0, have }, length))
        });
        join_all(asked).await.into_iter().flatten().collect()
    }

    /// Waits for a peer that only has to look. None: it takes longer than that needs.
    async fn look<T>(&self, peer: SocketAddr, asked: impl Future<Output = T>) -> Option<T> {
        let answer = timeout(LOOK_TIMEOUT, asked).await.ok();
        if answer.is_none() {
            self.is_suspect(peer);
        }
        answer
    }

    /// A blob, or a part of it, from a peer. What it says of others goes to `view`, and whether it
    /// could help.
    pub async fn blob(
        &self,
        peer: SocketAddr,
        question: &PeerQuery<'_>,
        part: Part,
        have: &Spans,
        view: &Arc<Mutex<View>>,
    ) -> Result<Incoming, PeerError> {
        let answer = self.ask_for_blob(peer, question, part, have, view).await;
        match &answer {
            Ok(_) | Err(PeerError::Redirected(_) | PeerError::Deputed(_)) => {}
            Err(PeerError::NotKept) => view.lock().refused(peer, self.now()),
            Err(PeerError::Source(_)) => view.lock().broke(peer, self.now()),
        }
        answer
    }

    async fn ask_for_blob(
        &self,
        peer: SocketAddr,
        question: &PeerQuery<'_>,
        part: Part,
        have: &Spans,
        view: &Arc<Mutex<View>>,
    ) -> Result<Incoming, PeerError> {
        let members = self.members.load_full();
        let may_depute = question.aim == RangePurpose::Whole
            && question.redirects == RedirectPolicy::Followed
            && matches!((question.manner, part), (PeerRequestMode::As(_), Part::Span(_)));
        let told = RequestMetadata { may_depute, ..self.of_this_node(have) };
        let path = format!("blobs/{}", question.digest);
        let response = self.get(Method::GET, peer, question, &path, part, told).await?;
        let headers = response.headers();
        let may_be_asked =
            |other: &SocketAddr| *other != members.own && members.is_within_reach(*other) && self.is_well(other);
        {
            let mut view = view.lock();
            let others = wire::read_holders(headers).into_iter();
            others.filter(|holder| may_be_asked(&holder.peer)).for_each(|holder| view.learn(&holder));
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
                let followed = question.redirects == RedirectPolicy::Followed;
                let to = to.filter(|to| *to != peer && may_be_asked(to));
                return Err(if followed { PeerError::Redirected(to) } else { PeerError::NotKept });
            }
            504 => return Err(PeerError::NotKept),
            _ => return Err(PeerError::Source(refused(response, question).await)),
        }
        let brought = part.brought(response.status().as_u16(), headers, None);
        let brought = brought.and_then(|(span, total)| match part {
            // Peers honour ranges.
            Part::Span(asked) if span.start != asked.start => Err(SourceError::Malformed("another range".into())),
            _ => Ok((span, total)),
        });
        let (span, total) = brought?;
        let counter = self.metrics.peer_bytes.with_label_values(&[members.zone_of(peer), members.own_zone()]);
        let source = headers.get(wire::SOURCE).and_then(|source| source.to_str().ok()).unwrap_or_default();
        let comes = [ServedFrom::Peer, ServedFrom::Upstream].iter().any(|from| from.as_str() == source);
        let claim = if comes { Claim::Relayed } else { Claim::Verified };
        let nothing = Span { start: span.start, end: span.start };
        let contribution = Contribution { peer, claim, total, span: nothing, checksum: 0 };
        let fetching = PeerDownload::new(view, contribution, span, self.started);
        let body = try_unfold((response, fetching), move |(mut response, mut fetching)| {
            let counter = counter.clone();
            async move {
                fetching.asks();
                let piece = response.chunk().await.map_err(|error| Broken(root_cause(&error)))?;
                let Some(piece) = piece else { return Ok(None) };
                counter.inc_by(piece.len() as u64);
                fetching.passed(&piece)?;
                Ok(Some((piece, (response, fetching))))
            }
        });
        Ok(Incoming::new(span, total, body))
    }

    /// How long a blob is, by the word of a peer.
    pub async fn blob_length(&self, peer: SocketAddr, question: &PeerQuery<'_>) -> Result<u64, SourceError> {
        let path = format!("blobs/{}", question.digest);
        let response = self.get(Method::HEAD, peer, question, &path, Part::From(0), RequestMetadata::default()).await?;
        match response.status().as_u16() {
            200 => wire::read(response.headers(), &CONTENT_LENGTH)
                .ok_or_else(|| SourceError::Malformed("a peer's blob without a length".into())),
            504 => Err(SourceError::NotKept),
            _ => Err(refused(response, question).await),
        }
    }

    /// Tells a peer what this node has of a blob.
    pub async fn tell(&self, peer: SocketAddr, question: &PeerQuery<'_>, have: &Spans) {
        let path = format!("blobs/{}", question.digest);
        let told = self.get(Method::HEAD, peer, question, &path, Part::From(0), self.of_this_node(have)).await;
        if let Err(error) = told {
            tracing::debug!(%peer, %error, "a peer was not told what is here");
        }
    }

    /// What a question tells of whoever asks.
    fn of_this_node(&self, have: &Spans) -> RequestMetadata {
        let have = wire::write_have(self.sending.load(Ordering::Relaxed), have);
        RequestMetadata { peers: self.behind_this_node(Downstream::NONE), have, ..RequestMetadata::default() }
    }

    /// The peers that wait for a response to this node, which is the first where the members know it.
    fn behind_this_node(&self, downstream: Downstream) -> Downstream {
        let members = self.members.load();
        if members.has_own() { downstream.behind(members.own) } else { Downstream::NONE }
    }

    /// A manifest by digest from a peer, with its media type. Not yet verified.
    pub async fn manifest(
        &self,
        peer: SocketAddr,
        question: &PeerQuery<'_>,
    ) -> Result<(String, bytes::Bytes), SourceError> {
        let path = format!("manifests/{}", question.digest);
        let told = RequestMetadata { peers: self.behind_this_node(question.downstream), ..RequestMetadata::default() };
        let response = self.get(Method::GET, peer, question, &path, Part::From(0), told).await?;
        self.take_manifest(peer, question, response).await
    }

    /// What a tag means to a peer that has proven who it is, with the manifest. `question.digest` is the tag's place in the
    /// ring.
    pub async fn tag(
        &self,
        peer: SocketAddr,
        question: &PeerQuery<'_>,
        tag: &Tag,
        accept: &str,
    ) -> Result<PeerTag, SourceError> {
        let response = self.get_tag(Method::GET, peer, question, tag, accept).await?;
        let meaning = PeerTagResolution::read(response.headers());
        let (media_type, bytes) = self.take_manifest(peer, question, response).await?;
        let meaning = meaning?;
        if !meaning.digest.matches(&bytes) {
            return Err(SourceError::Malformed("a peer's tag with another manifest than its digest".into()));
        }
        Ok(PeerTag { meaning, media_type, bytes })
    }

    /// The same without the manifest, for a peer that may have it.
    pub async fn tag_meaning(
        &self,
        peer: SocketAddr,
        question: &PeerQuery<'_>,
        tag: &Tag,
        accept: &str,
    ) -> Result<PeerTagResolution, SourceError> {
        let response = self.get_tag(Method::HEAD, peer, question, tag, accept).await?;
        match response.status().as_u16() {
            200 => PeerTagResolution::read(response.headers()),
            504 => Err(SourceError::NotKept),
            _ => Err(refused(response, question).await),
        }
    }

    async fn get_tag(
        &self,
        method: Method,
        peer: SocketAddr,
        question: &PeerQuery<'_>,
        tag: &Tag,
        accept: &str,
    ) -> Result<Response, SourceError> {
        // A peer that requests the manifest lacks it; one that only renews its tag may be the only holder.
        let lacks = method == Method::GET;
        let peers = if lacks { self.behind_this_node(question.downstream) } else { Downstream::NONE };
        let told = RequestMetadata { peers, accept: accept.parse().ok(), ..RequestMetadata::default() };
        self.get(method, peer, question, &format!("manifests/{tag}"), Part::From(0), told).await
    }

    /// What any peer knows of a tag that no upstream resolves: the youngest.
    pub async fn anybodys_tag(&self, question: &PeerQuery<'_>, tag: &Tag, accept: &str) -> Option<PeerTag> {
        let asked = self
            .successors(question, LAST_RESORT)
            .into_iter()
            .map(|peer| async move { self.look(peer, self.tag(peer, question, tag, accept)).await?.ok() });
        join_all(asked).await.into_iter().flatten().min_by_key(|answer| answer.meaning.age)
    }

    async fn take_manifest(
        &self,
        peer: SocketAddr,
        question: &PeerQuery<'_>,
        response: Response,
    ) -> Result<(String, bytes::Bytes), SourceError> {
        match response.status().as_u16() {
            200 => {}
            504 => return Err(SourceError::NotKept),
            _ => return Err(refused(response, question).await),
        }
        let stated = response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let media_type = stated.filter(|text| manifest::is_media_type(text)).map(str::to_owned);
        let media_type = media_type.ok_or_else(|| SourceError::Malformed("a peer's manifest without a type".into()))?;
        if response.content_length().is_none_or(|length| length > MAX_MANIFEST_BYTES) {
            return Err(SourceError::Malformed("a peer's manifest without an acceptable length".into()));
        }
        let bytes = match timeout_at(question.deadline.min(Instant::now() + BODY), response.bytes()).await {
            Ok(Ok(bytes)) => bytes,
            Ok(Err(error)) => return Err(SourceError::Unreachable(root_cause(&error))),
            Err(_) => return Err(SourceError::TimedOut),
        };
        let members = self.members.load();
        let counter = self.metrics.peer_bytes.with_label_values(&[members.zone_of(peer), members.own_zone()]);
        counter.inc_by(bytes.len() as u64);
        Ok((media_type, bytes))
    }

    /// What successors have of a manifest, with its media type. Not yet verified.
    pub async fn successors_manifests(&self, question: &PeerQuery<'_>) -> Vec<(String, bytes::Bytes)> {
        self.kept_manifests(question, SUCCESSORS).await
    }

    /// The same of those who may have what no origin gives.
    pub async fn anybodys_manifests(&self, question: &PeerQuery<'_>) -> Vec<(String, bytes::Bytes)> {
        self.kept_manifests(question, LAST_RESORT).await
    }

    async fn kept_manifests(&self, question: &PeerQuery<'_>, count: usize) -> Vec<(String, bytes::Bytes)> {
        let asked = self
            .successors(question, count)
            .into_iter()
            .map(|peer| async move { self.look(peer, self.manifest(peer, question)).await?.ok() });
        join_all(asked).await.into_iter().flatten().collect()
    }
}

impl PeerTagResolution {
    fn read(headers: &HeaderMap) -> Result<Self, SourceError> {
        let missing = |what: &str| SourceError::Malformed(format!("a peer's tag without {what}"));
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
        if error == SourceError::NotKept { Self::NotKept } else { Self::Source(error) }
    }
}

/// What a peer's error response says of the upstream, whose own status and body it carries.
async fn refused(response: Response, question: &PeerQuery<'_>) -> SourceError {
    if wire::PeerRefusal::read(response.headers()) == Some(wire::PeerRefusal::NoUpstream) {
        return SourceError::Unreachable("the peer has no way to it".into());
    }
    SourceError::of_response(response, question.deadline).await
}
