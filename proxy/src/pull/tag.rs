//! The way of a tag: a lease while it is young, then the tag's owner among the peers, then the origin.
//!
//! Peers that prove who they are ask the tag's owner, so that all of them agree on what it means. What
//! they say carries its age: of several answers the youngest wins, and a lease ends everywhere at the
//! same time.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::time::{Instant, timeout};

use super::negative_cache::NegativeKind;
use super::owners::ask_owners;
use super::sources::last_scope;
use super::{ManifestResponse, Pull, RequestContext, Requester, fetch_ended, flights, is_personal};
use crate::oci::{Digest, Reference, Tag};
use crate::peers::{Downstream, FetchPolicy, PeerQuery, PeerRequestMode, PeerTag, PeerTagResolution, PeerTrust, Peers};
use crate::registries::RepositoryRef;
use crate::role::Role;
use crate::source::{ServedFrom, SourceError};
use crate::tags::Resolved;
use crate::times::{ALTERNATIVE_TIMEOUT, UPSTREAM_TIMEOUT};

/// What a tag means.
pub(super) type TagResolution = Result<ManifestResponse, SourceError>;

/// A renewal stays open for this long: clients are served the stale tag meanwhile. Longer: a request that an upstream has
/// lost keeps the tag stale for longer. Shorter: tags of slower upstreams are never renewed.
const RENEWAL_TIMEOUT: Duration = Duration::from_secs(30);

/// An upstream that lately took longer has this long.
const WHERE_SLOW: Duration = Duration::from_millis(20);

impl Pull {
    pub(super) async fn manifest_by_tag(
        self: &Arc<Self>,
        place: &RepositoryRef,
        tag: &Tag,
        accept: &str,
        asking: RequestContext,
    ) -> TagResolution {
        let now = SystemTime::now();
        let mut expired = None;
        if let Some(lease) = self.tags.lease(place, tag).await
            && let Some((object, from)) = self.kept_manifest(place, &lease.digest, asking.asker).await
        {
            let age = Some(lease.age(now));
            let answer = ManifestResponse { digest: lease.digest.clone(), object, from, age };
            // Whoever asks for what is kept judges its age.
            if asking.reach == FetchPolicy::Kept || lease.is_fresh(place, tag, now) {
                return Ok(answer);
            }
            if lease.age(now) < place.rule.stale_for {
                expired = Some(answer);
            }
        }
        if asking.reach == FetchPolicy::Kept {
            return Err(SourceError::NotKept);
        }
        let peers = self.peers_for_tags().filter(|_| place.caller.may_be_lent());
        let role =
            peers.map_or(Role::Global, |peers| peers.lead(&in_ring(place, tag), asking.role, self.scope(place)).role);
        let asked = self.ask_for_tag(place, tag, accept, RequestContext { role, ..asking });
        let Some(expired) = expired else {
            return match asked.await {
                Err(error) if error.is_passing_outage() && self.tags.was_absent(place, tag).await => {
                    Err(SourceError::not_found())
                }
                meant => self.count_stale(place, tag, meant, "peer"),
            };
        };
        let patience = if self.slow.contains_key(&place.registry) { WHERE_SLOW } else { ALTERNATIVE_TIMEOUT };
        let asked = tokio::select! {
            biased;
            // One that is down is asked by whoever looks after it, and one that said "later" is not asked.
            trouble = self.upstream.trouble_begins(place), if role == Role::Global => {
                return self.count_stale(place, tag, Ok(stale(expired)), trouble.as_str());
            }
            asked = timeout(patience, asked) => asked,
        };
        match asked {
            Ok(Ok(answer)) if answer.from != ServedFrom::Stale || answer.age < expired.age => {
                self.count_stale(place, tag, Ok(answer), "peer")
            }
            Ok(Ok(_)) => self.count_stale(place, tag, Ok(stale(expired)), "peer"),
            Ok(Err(error)) if error.is_outage() => self.count_stale(place, tag, Ok(stale(expired)), error.as_str()),
            Ok(Err(error)) => Err(error),
            // The flight goes on and renews the lease for whoever comes next.
            Err(_) => {
                if patience == ALTERNATIVE_TIMEOUT {
                    self.slow.insert(place.registry.clone(), ());
                }
                self.count_stale(place, tag, Ok(stale(expired)), "slow")
            }
        }
    }

    fn count_stale(&self, place: &RepositoryRef, tag: &Tag, meant: TagResolution, reason: &str) -> TagResolution {
        if is_stale(&meant) {
            self.metrics.stale.with_label_values(&[reason]).inc();
            tracing::info!(%place, %tag, reason, "served stale");
        }
        meant
    }

    /// Asked once for all who ask at the same time.
    fn ask_for_tag<'a>(
        self: &'a Arc<Self>,
        place: &'a RepositoryRef,
        tag: &'a Tag,
        accept: &'a str,
        asking: RequestContext,
    ) -> BoxFuture<'a, TagResolution> {
        if let Some(error) = self.negatives.get(place, NegativeKind::Manifest, tag.as_str()) {
            return std::future::ready(Err(error)).boxed();
        }
        let key = |who| (place.to_string(), tag.clone(), asking.role, who);
        let (shared, own) = flights(place, key);
        let landed = self.tag_flights.join_or_own(
            shared,
            own,
            // What is left to somebody who can ask nothing is for nobody else.
            |meant| is_personal(place, meant) || (place.rule.asks_who() && is_stale(meant)),
            move || {
                let (pull, place, tag, accept) = (self.clone(), place.clone(), tag.clone(), accept.to_owned());
                async move {
                    // Another flight may have landed since this one was wanted.
                    if let Some(answer) = pull.just_resolved(&place, &tag).await {
                        return Ok(answer);
                    }
                    let meant = pull.find_meaning(&place, &tag, &accept, asking).await;
                    pull.remember(&place, &tag, &meant, asking.client).await;
                    meant
                }
            },
        );
        async move { landed.await.unwrap_or_else(fetch_ended) }.boxed()
    }

    /// What a tag is in memory to mean, if that is fresh.
    async fn just_resolved(&self, place: &RepositoryRef, tag: &Tag) -> Option<ManifestResponse> {
        let now = SystemTime::now();
        let lease = self.tags.in_memory(place, tag).filter(|lease| lease.is_fresh(place, tag, now))?;
        let (object, from) = self.kept_manifest(place, &lease.digest, Requester::Peer(PeerTrust::Member)).await?;
        Some(ManifestResponse { age: Some(lease.age(now)), digest: lease.digest, object, from })
    }

    async fn remember(&self, place: &RepositoryRef, tag: &Tag, meant: &TagResolution, client: Option<IpAddr>) {
        match meant {
            Ok(answer) => {
                if answer.from != ServedFrom::Stale {
                    self.slow.invalidate(&place.registry);
                }
                let age = answer.age.unwrap_or_default();
                let checked_at = SystemTime::now().checked_sub(age).unwrap_or(SystemTime::UNIX_EPOCH);
                self.tags.renew(Resolved { place, tag, digest: &answer.digest, checked_at, client }).await;
            }
            Err(error) => {
                self.negatives.put_tag(place, tag, error);
                if error.is_not_found() {
                    self.tags.forget(place, tag);
                }
            }
        }
    }

    async fn find_meaning(
        self: &Arc<Self>,
        place: &RepositoryRef,
        tag: &Tag,
        accept: &str,
        asking: RequestContext,
    ) -> TagResolution {
        let downstream = asking.downstream;
        let Some(peers) = self.peers_for_tags() else {
            return self.revalidate(place, tag, accept, downstream).await;
        };
        if asking.role != Role::Global {
            return match self.tag_of_owners(peers, place, tag, accept, asking).await? {
                Some(answer) => Ok(answer),
                // It takes the owner's place, as others may ask it to.
                None => self.ask_for_tag(place, tag, accept, RequestContext { role: Role::Global, ..asking }).await,
            };
        }
        // The upstream knows better than peers what a tag means, and a HEAD is cheap.
        let in_ring = in_ring(place, tag);
        let of_anybody = PeerQuery { scope: last_scope(place), ..question(place, &in_ring, PeerRequestMode::IfKept) };
        match self.revalidate(place, tag, accept, downstream).await {
            Err(error) if error.is_outage() => match peers.anybodys_tag(&of_anybody, tag, accept).await {
                Some(answer) => {
                    let (age, ttl) = (answer.meaning.age, place.rule.lease_of(tag));
                    match self.take_tag(place, answer).await {
                        fresh if age < ttl => Ok(fresh),
                        old if age < place.rule.stale_for => Ok(stale(old)),
                        _ => Err(error),
                    }
                }
                _ => Err(error),
            },
            meant => meant,
        }
    }

    /// None: no owner can be reached.
    async fn tag_of_owners(
        &self,
        peers: &Peers,
        place: &RepositoryRef,
        tag: &Tag,
        accept: &str,
        asking: RequestContext,
    ) -> Result<Option<ManifestResponse>, SourceError> {
        let in_ring = &in_ring(place, tag);
        let lead = peers.lead(in_ring, asking.role, self.scope(place));
        ask_owners(lead, format!("{place}:{tag}"), |owner, manner| async move {
            let question = PeerQuery { downstream: asking.downstream, ..question(place, in_ring, manner) };
            self.tag_of_owner(peers, owner, &question, tag, accept).await
        })
        .await
    }

    /// A tag that is renewed mostly means what it meant before: then the manifest is not sent again.
    async fn tag_of_owner(
        &self,
        peers: &Peers,
        owner: SocketAddr,
        question: &PeerQuery<'_>,
        tag: &Tag,
        accept: &str,
    ) -> Result<ManifestResponse, SourceError> {
        let place = question.place;
        if let Some(known) = self.tags.lease(place, tag).await
            && let Some((object, _)) =
                self.kept_manifest(place, &known.digest, Requester::Peer(PeerTrust::Member)).await
        {
            match peers.tag_meaning(owner, question, tag, accept).await {
                Ok(PeerTagResolution { digest, age, from }) if digest == known.digest => {
                    return Ok(ManifestResponse { digest, object, from, age: Some(age) });
                }
                // It has moved, or only a GET brings the body of the upstream's error.
                Ok(_) => {}
                Err(SourceError::NotFound(_) | SourceError::Denied(_) | SourceError::Failed(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(self.take_tag(place, peers.tag(owner, question, tag, accept).await?).await)
    }

    async fn take_tag(&self, place: &RepositoryRef, answer: PeerTag) -> ManifestResponse {
        let PeerTag { meaning: PeerTagResolution { digest, age, from }, media_type, bytes } = answer;
        let object = self.keep_manifest(place, &digest, &media_type, bytes).await;
        ManifestResponse { digest, object, from, age: Some(age) }
    }

    /// Asks the origin what a tag means. A HEAD is not counted by rate limits; only a digest that
    /// is not here yet is fetched.
    async fn revalidate(
        self: &Arc<Self>,
        place: &RepositoryRef,
        tag: &Tag,
        accept: &str,
        downstream: Downstream,
    ) -> TagResolution {
        let is_known = self.tags.lease(place, tag).await.is_some();
        let deadline = Instant::now() + if is_known { RENEWAL_TIMEOUT } else { UPSTREAM_TIMEOUT };
        let reference = Reference::Tag(tag.clone());
        // A HEAD can spare the body where the manifest may be cached: the tag was resolved before, or peers may have it. A
        // tag that is new to a single node is requested at once, which takes half the time.
        let may_be_cached = is_known || self.peers_for_tags().is_some() || place.rule.asks_who();
        let head = match may_be_cached {
            true => self.upstream.manifest_digest(place, &reference, accept, deadline).await?,
            false => None,
        };
        if let Some(digest) = head {
            // Peers may wait for this as well: only what they may have is taken from what is kept.
            let asking =
                RequestContext { asker: Requester::Peer(PeerTrust::Member), downstream, ..RequestContext::CLIENT };
            match self.manifest_by_digest(place, &digest, accept, asking).await {
                Ok((object, from)) => return Ok(ManifestResponse { digest, object, from, age: Some(Duration::ZERO) }),
                // The tag may have moved meanwhile, or the HEAD was wrong: the GET of the tag decides.
                Err(SourceError::NotFound(_) | SourceError::Malformed(_)) => {}
                Err(error) => return Err(error),
            }
        }
        // The digest of the bytes is what the tag means. `Docker-Content-Digest` is wrong at many registries, so that
        // go-containerregistry ignores it for tags as well; where it is right it may be of another algorithm.
        let answer = self.upstream.manifest(place, &reference, accept, deadline).await?;
        let digest = answer.claimed.filter(|claimed| claimed.matches(&answer.bytes));
        let digest = digest.unwrap_or_else(|| Digest::of(&answer.bytes));
        self.blobs_reachable(place, &answer.bytes).await?;
        let object = self.keep_manifest(place, &digest, &answer.media_type, answer.bytes).await;
        Ok(ManifestResponse { digest, object, from: ServedFrom::Upstream, age: Some(Duration::ZERO) })
    }

    /// No digest proves what a tag means: only those are believed who prove who they are.
    fn peers_for_tags(&self) -> Option<&Arc<Peers>> {
        self.peers.as_ref().filter(|peers| peers.are_proven())
    }
}

/// A tag's place in the ring.
pub(super) fn in_ring(place: &RepositoryRef, tag: &Tag) -> Digest {
    Digest::of(format!("{place}:{tag}").as_bytes())
}

fn question<'a>(place: &'a RepositoryRef, in_ring: &'a Digest, manner: PeerRequestMode) -> PeerQuery<'a> {
    PeerQuery::about(place, in_ring, manner, Instant::now() + UPSTREAM_TIMEOUT)
}

fn is_stale(meant: &TagResolution) -> bool {
    meant.as_ref().is_ok_and(|answer| answer.from == ServedFrom::Stale)
}

fn stale(answer: ManifestResponse) -> ManifestResponse {
    ManifestResponse { from: ServedFrom::Stale, ..answer }
}
