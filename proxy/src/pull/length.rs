//! How long a blob is, where somebody only wants to know that.

use std::sync::Arc;
use tokio::time::{Instant, timeout};

use super::blob::{Fetch, severer};
use super::owners::ask_owners;
use super::sources::last_scope;
use super::{BlobRequest, Pull, PullError, fetch_ended, flights, is_personal};
use crate::oci::Digest;
use crate::peers::{FetchPolicy, PeerQuery, PeerRequestMode};
use crate::registries::RepositoryRef;
use crate::role::Role;
use crate::source::{ServedFrom, SourceError};
use crate::store::Found;
use crate::times::{CONFIRM_TIMEOUT, STALL_TIMEOUT, UPSTREAM_TIMEOUT};

/// How long a blob is, and who said so.
pub(super) type Length = Result<(u64, ServedFrom), SourceError>;

impl Pull {
    /// `HEAD blobs/<digest>`: its length, and where it would come from.
    pub async fn blob_length(self: &Arc<Self>, request: &BlobRequest) -> Result<(u64, ServedFrom), PullError> {
        let length = timeout(request.asking.patience, self.find_length(request)).await;
        length.unwrap_or(Err(SourceError::TimedOut)).map_err(|error| Fetch::Source(error).into_refusal())
    }

    pub(super) async fn find_length(self: &Arc<Self>, request: &BlobRequest) -> Length {
        let places = self.candidates(request).await;
        let mut in_outage = None;
        match self.kept_blob(request).await {
            Some(found) => {
                let kept = match &found {
                    Found::Small { object, tier } => (object.bytes.len() as u64, (*tier).into()),
                    Found::Large { blob, .. } => (blob.len, ServedFrom::Disk),
                };
                let from = found.provenance();
                let is_known = |place| from.is_some_and(|from| self.is_known_at(place, &request.digest, from));
                if request.asking.reach == FetchPolicy::Kept || places.iter().any(is_known) {
                    return Ok(kept);
                }
                in_outage = Some(kept);
            }
            None if request.asking.reach == FetchPolicy::Kept => {
                let running = self.fills.running(&self.fill_key(request)).filter(|fill| !fill.written().is_empty());
                let length = running.and_then(|fill| fill.length_now()).ok_or(SourceError::NotKept)?;
                return Ok((length, ServedFrom::Peer));
            }
            None => {}
        }
        // Another repository's says nothing of this one, and one that follows an owner may wait for the requester.
        if let Some(fill) = self.fills.running(&self.fill_key(request))
            && fill.role() >= self.role_of(request)
            && (fill.place == request.place || self.homes.length_of(&request.place, &request.digest).is_some())
            && let Ok(opened) = fill.opened().await
        {
            return Ok(opened.length());
        }
        let mut last = None;
        for place in places {
            let elsewhere = BlobRequest { place: place.clone(), ..request.clone() };
            let length = self.length_elsewhere(&elsewhere);
            // What is cached is answered in time, whatever the upstream does.
            let limit =
                if in_outage.is_some() { CONFIRM_TIMEOUT.min(request.asking.patience / 2) } else { UPSTREAM_TIMEOUT };
            match timeout(limit, length).await.unwrap_or(Err(SourceError::TimedOut)) {
                Ok((length, from)) => {
                    self.homes.holds(&place, &request.digest, length);
                    return Ok(in_outage.unwrap_or((length, from)));
                }
                Err(error) => last = Some(severer(last, error)),
            }
        }
        let error = last.unwrap_or_else(SourceError::not_found);
        in_outage.filter(|_| error.is_outage()).ok_or(error)
    }

    /// What the owner of a blob says of its length, or the origin; asked once for all who want to know.
    pub(super) async fn length_elsewhere(self: &Arc<Self>, request: &BlobRequest) -> Length {
        let (place, digest) = (&request.place, &request.digest);
        let lengths_key = (place.registry.clone(), place.repository.clone(), digest.clone());
        // Where a rule asks who, the origin's word is a word about rights as well.
        if let Some(length) = self.lengths.get(&lengths_key).filter(|_| !place.rule.asks_who()) {
            // It is not kept here for that.
            return Ok((length, ServedFrom::Upstream));
        }
        let role = self.role(place, digest, request.asking);
        let key = |who| (place.to_string(), digest.clone(), role, who);
        let (shared, own) = flights(place, key);
        let landed = self.length_flights.join_or_own(
            shared,
            own,
            |length| is_personal(place, length),
            || {
                let (pull, place, digest, key) = (self.clone(), place.clone(), digest.clone(), lengths_key.clone());
                async move {
                    if let Some(length) = pull.length_of_owners(&place, &digest, role).await? {
                        return Ok((length, ServedFrom::Peer));
                    }
                    let known = pull.homes.length_of(&place, &digest);
                    match pull.upstream.blob_length(&place, &digest, known, Instant::now() + UPSTREAM_TIMEOUT).await {
                        Ok(length) => {
                            pull.lengths.insert(key, length);
                            Ok((length, ServedFrom::Upstream))
                        }
                        Err(error) => {
                            let anybodys = pull.anybodys_length(&place, &digest, &error).await;
                            anybodys.map(|length| (length, ServedFrom::Peer)).ok_or(error)
                        }
                    }
                }
            },
        );
        landed.await.unwrap_or_else(fetch_ended)
    }

    /// None: this node is the owner, or no owner can be reached.
    async fn length_of_owners(
        &self,
        place: &RepositoryRef,
        digest: &Digest,
        role: Role,
    ) -> Result<Option<u64>, SourceError> {
        let Some(peers) = self.peers_for(place).filter(|_| role != Role::Global) else { return Ok(None) };
        let lead = peers.lead(digest, role, self.scope(place));
        ask_owners(lead, digest, |owner, manner| async move {
            // One that hangs leaves time for the next.
            let deadline = Instant::now() + UPSTREAM_TIMEOUT / 2;
            peers.blob_length(owner, &PeerQuery::about(place, digest, manner, deadline)).await
        })
        .await
    }

    /// What somebody who has it says, where the origin is out of order.
    async fn anybodys_length(&self, place: &RepositoryRef, digest: &Digest, error: &SourceError) -> Option<u64> {
        let peers = self.peers_for(place).filter(|_| error.is_outage())?;
        let question = PeerQuery::about(place, digest, PeerRequestMode::IfKept, Instant::now() + STALL_TIMEOUT);
        peers.anybodys_length(&PeerQuery { scope: last_scope(place), ..question }).await
    }
}
