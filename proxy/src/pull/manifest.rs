//! The way of a manifest: verified before its first byte, by tag or by digest.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::time::{Instant, sleep, timeout};

use super::negative_cache::NegativeKind;
use super::owners::ask_owners;
use super::sources::last_scope;
use super::{Pull, PullError, RequestContext, Requester, fetch_ended, flights, is_personal};
use crate::blocking::parsed;
use crate::oci::{Digest, ErrorCode, Reference, manifest};
use crate::peers::{FetchPolicy, PeerQuery, PeerRequestMode, PeerTrust};
use crate::registries::RepositoryRef;
use crate::role::Role;
use crate::source::{ServedFrom, SourceError};
use crate::store::{Found, SmallKind, SmallObject};
use crate::times::{ALTERNATIVE_TIMEOUT, CONFIRM_TIMEOUT, STALL_TIMEOUT, UPSTREAM_TIMEOUT};

/// A manifest and how it was come by.
#[derive(Clone)]
pub struct ManifestResponse {
    pub digest: Digest,
    pub object: SmallObject,
    pub from: ServedFrom,
    /// For a tag: since when the origin was not asked what it means.
    pub age: Option<Duration>,
}

pub(super) type FetchedManifest = Result<(SmallObject, ServedFrom), SourceError>;

impl Pull {
    /// `GET` or `HEAD manifests/<reference>`.
    pub async fn manifest(
        self: &Arc<Self>,
        place: &RepositoryRef,
        reference: &Reference,
        accept: &str,
        asking: RequestContext,
    ) -> Result<ManifestResponse, PullError> {
        let begun = Instant::now();
        let answer = async {
            loop {
                let answer = match reference {
                    Reference::Digest(digest) => {
                        let found = self.manifest_by_digest(place, digest, accept, asking).await;
                        found.map(|(object, from)| ManifestResponse { digest: digest.clone(), object, from, age: None })
                    }
                    Reference::Tag(tag) => self.manifest_by_tag(place, tag, accept, asking).await,
                };
                // The upstream is known to be silent, or a cache in front of it has given up: it may only be slow, and
                // requests under way will tell. What fails soon is refused soon: podman tries its next mirror then.
                let is_slow = match &answer {
                    Err(SourceError::TimedOut) => true,
                    // A limit is no slowness: its end is known, and told at once.
                    Err(SourceError::Limited { .. }) => false,
                    Err(error) => error.is_passing_outage() && begun.elapsed() > CONFIRM_TIMEOUT,
                    Ok(_) => false,
                };
                if !is_slow || !asking.has_no_fallback() {
                    return answer;
                }
                sleep(ALTERNATIVE_TIMEOUT).await;
            }
        };
        // The flights go on for whoever comes next.
        let answer = timeout(asking.patience, answer).await.unwrap_or(Err(SourceError::TimedOut));
        let answer = answer.map_err(|error| PullError::of(&error, ErrorCode::ManifestUnknown))?;
        let ManifestResponse { digest, object, .. } = &answer;
        let is_held = || matches!(reference, Reference::Tag(_)) || self.is_known_at(place, digest, &object.provenance);
        if asking.asker == Requester::Client && !is_held() {
            let confirmed = self.confirm_manifest(place, &answer, accept);
            let left = asking.after(begun.elapsed()).patience;
            if let Ok(Err(error)) = timeout(left.min(CONFIRM_TIMEOUT), confirmed).await {
                return Err(PullError::of(&error, ErrorCode::ManifestUnknown));
            }
        }
        self.homes.served(place, digest, &object.bytes, is_held).await;
        Ok(answer)
    }

    pub(super) async fn manifest_by_digest(
        self: &Arc<Self>,
        place: &RepositoryRef,
        digest: &Digest,
        accept: &str,
        asking: RequestContext,
    ) -> FetchedManifest {
        if let Some(found) = self.kept_manifest(place, digest, asking.asker).await {
            return Ok(found);
        }
        if asking.reach == FetchPolicy::Kept {
            return Err(SourceError::NotKept);
        }
        if let Some(error) = self.negatives.get(place, NegativeKind::Manifest, digest.as_str()) {
            return Err(error);
        }
        let role = self.role(place, digest, asking);
        self.manifest_flight(place, digest, accept, RequestContext { role, ..asking }).await
    }

    /// Fetched once for all who ask for it at the same time.
    fn manifest_flight<'a>(
        self: &'a Arc<Self>,
        place: &'a RepositoryRef,
        digest: &'a Digest,
        accept: &'a str,
        asking: RequestContext,
    ) -> BoxFuture<'a, FetchedManifest> {
        let key = |who| (place.to_string(), digest.clone(), asking.role, who);
        let (shared, own) = flights(place, key);
        let landed = self.manifest_flights.join_or_own(
            shared,
            own,
            |fetched| is_personal(place, fetched),
            move || {
                let (pull, place, digest, accept) = (self.clone(), place.clone(), digest.clone(), accept.to_owned());
                async move {
                    let fetched = pull.fetch_manifest(&place, &digest, &accept, asking).await;
                    if let Err(error) = &fetched {
                        pull.negatives.put(&place, NegativeKind::Manifest, digest.as_str(), error);
                    }
                    fetched
                }
            },
        );
        async move { landed.await.unwrap_or_else(fetch_ended) }.boxed()
    }

    async fn fetch_manifest(
        self: &Arc<Self>,
        place: &RepositoryRef,
        digest: &Digest,
        accept: &str,
        asking: RequestContext,
    ) -> FetchedManifest {
        // Another place may have brought it while we waited for our turn. Peers may wait for this as
        // well, and get what they may have.
        if let Some(found) = self.kept_manifest(place, digest, Requester::Peer(PeerTrust::Member)).await {
            return Ok(found);
        }
        if let Some(object) = self.manifest_of_peers(place, digest, asking).await? {
            return Ok((object, ServedFrom::Peer));
        }
        if asking.role != Role::Global {
            // It takes the owner's place, as others may ask it to.
            return self.manifest_flight(place, digest, accept, RequestContext { role: Role::Global, ..asking }).await;
        }
        let deadline = Instant::now() + UPSTREAM_TIMEOUT;
        let reference = Reference::Digest(digest.clone());
        let answer = match self.upstream.manifest(place, &reference, accept, deadline).await {
            Err(error) if error.is_outage() => {
                let anybodys = self.anybodys_manifest(place, digest).await;
                return anybodys.map(|object| (object, ServedFrom::Peer)).ok_or(error);
            }
            answer => answer?,
        };
        if !digest.matches(&answer.bytes) {
            return Err(self.mismatched(place, digest));
        }
        self.blobs_reachable(place, &answer.bytes).await?;
        Ok((self.keep_manifest(place, digest, &answer.media_type, answer.bytes).await, ServedFrom::Upstream))
    }

    /// A manifest that another node has or fetches. None: this node has to fetch it.
    async fn manifest_of_peers(
        &self,
        place: &RepositoryRef,
        digest: &Digest,
        asking: RequestContext,
    ) -> Result<Option<SmallObject>, SourceError> {
        let Some(peers) = self.peers_for(place) else { return Ok(None) };
        let (scope, downstream) = (self.scope(place), asking.downstream);
        let question = |manner| {
            let deadline = Instant::now() + UPSTREAM_TIMEOUT;
            PeerQuery { scope, downstream, ..PeerQuery::about(place, digest, manner, deadline) }
        };
        let lead = peers.lead(digest, asking.role, scope);
        if asking.role == Role::Global || lead.leaders.is_empty() {
            let kept = peers.successors_manifests(&question(PeerRequestMode::IfKept)).await;
            return Ok(self.keep_one(place, digest, kept).await);
        }
        // The owner itself waits for this node, which resolves its tag: it would have to ask the upstream as well.
        if lead.leaders.first().is_some_and(|owner| downstream.contains(owner)) {
            return Ok(None);
        }
        ask_owners(lead, digest, |owner, manner| async move {
            let sent = peers.manifest(owner, &question(manner)).await?;
            self.keep_one(place, digest, vec![sent]).await.ok_or_else(|| {
                peers.lies(owner);
                SourceError::Malformed("the peer's manifest does not match its digest".into())
            })
        })
        .await
    }

    /// A manifest that somebody has, where no origin gives it.
    async fn anybodys_manifest(&self, place: &RepositoryRef, digest: &Digest) -> Option<SmallObject> {
        let deadline = Instant::now() + STALL_TIMEOUT;
        let question = PeerQuery {
            scope: last_scope(place),
            ..PeerQuery::about(place, digest, PeerRequestMode::IfKept, deadline)
        };
        let kept = self.peers_for(place)?.anybodys_manifests(&question).await;
        self.keep_one(place, digest, kept).await
    }

    /// The first of those that peers sent which is the one that is meant.
    async fn keep_one(
        &self,
        place: &RepositoryRef,
        digest: &Digest,
        sent: Vec<(String, bytes::Bytes)>,
    ) -> Option<SmallObject> {
        let (stated, bytes) = sent.into_iter().find(|(_, bytes)| digest.matches(bytes))?;
        let media_type = parsed(&bytes, manifest::media_type).await.unwrap_or(stated);
        Some(self.keep_manifest(place, digest, &media_type, bytes).await)
    }

    pub(super) async fn kept_manifest(
        &self,
        place: &RepositoryRef,
        digest: &Digest,
        asker: Requester,
    ) -> Option<(SmallObject, ServedFrom)> {
        match self.store.find(digest, SmallKind::Manifest).await? {
            Found::Small { object, tier } if self.may_give(digest, Some(&object.provenance), asker, place) => {
                Some((object, tier.into()))
            }
            _ => None,
        }
    }

    pub(super) async fn keep_manifest(
        &self,
        place: &RepositoryRef,
        digest: &Digest,
        media_type: &str,
        bytes: bytes::Bytes,
    ) -> SmallObject {
        self.entitlements.was_sent(place, digest);
        self.remember_subject(place, &bytes, media_type).await;
        // A renewed tag mostly means what it meant before: nothing is written then.
        if let Some((object, _)) = self.kept_manifest(place, digest, Requester::Peer(PeerTrust::Member)).await
            && *object.media_type == *media_type
        {
            return object;
        }
        let provenance = Arc::new(place.provenance());
        let object = SmallObject::new(media_type, provenance, &bytes);
        self.store.small.insert(digest, SmallKind::Manifest, object.clone()).await;
        object
    }

    pub(super) fn mismatched(&self, place: &RepositoryRef, digest: &Digest) -> SourceError {
        self.metrics.mismatches.inc();
        tracing::error!(%place, %digest, "the origin sent a manifest that does not match its digest");
        SourceError::Malformed("the manifest does not match its digest".into())
    }
}
