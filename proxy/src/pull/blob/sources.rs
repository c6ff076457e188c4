//! The sources of a blob, in order: its holders, its owner, then the upstream.

use std::collections::HashSet;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::time::{Instant, timeout};
use xxhash_rust::xxh64::Xxh64;

use crate::bandwidth::{CurrentPriority, Priority};
use crate::fill::{ConnectionMode, FillKey, FillSources, Fills, VerifiedContent};
use crate::oci::{Digest, Registry, Span, Spans};
use crate::peers::swarm::{Contribution, View};
use crate::peers::wire::Holder;
use crate::peers::{OwnerRoute, PeerError, PeerQuery, PeerRequestMode, Peers, RangePurpose, RedirectPolicy};
use crate::pull::authorization::AuthorizationCache;
use crate::pull::flights::is_personal;
use crate::pull::peer_routing::{PeerRouting, outage_scope};
use crate::pull::registry_hints::RegistryHints;
use crate::pull::source_search::{
    HolderStep, ObjectSource, SearchProgress, SearchResult, Source, SourceFailure, SourceSearch, WithoutOwner, search,
};
use crate::pull::throughput::Sender;
use crate::registries::RepositoryRef;
use crate::role::{CurrentRole, Role};
use crate::source::{Incoming, Part, ServedFrom, SourceError};
use crate::times::{CONFIRM_TIMEOUT, OBSERVATION_TTL, STALL_TIMEOUT, UPSTREAM_TIMEOUT};
use crate::upstream::UpstreamClient;

/// What the sources of all blobs share.
pub(in crate::pull) struct BlobContext {
    pub(in crate::pull) fills: Arc<Fills>,
    pub(in crate::pull) routing: Arc<PeerRouting>,
    pub(in crate::pull) upstream: Arc<UpstreamClient>,
    pub(in crate::pull) authorizations: Arc<AuthorizationCache>,
    pub(in crate::pull) registry_hints: Arc<RegistryHints>,
    /// The holders of blobs as peers last reported them.
    holders: moka::sync::Cache<(FillKey, QueryScope), Arc<Vec<Holder>>>,
    /// What each peer sent of a corrupt blob, until a verified copy shows which peer was wrong.
    suspect_contributions: moka::sync::Cache<(Digest, Registry), Arc<Vec<Contribution>>>,
}

/// The sources of one blob.
pub(super) struct BlobSources {
    context: Arc<BlobContext>,
    repo_ref: RepositoryRef,
    key: FillKey,
    /// The role at the start, and the current role.
    first_role: Role,
    role: CurrentRole,
    range_purpose: RangePurpose,
    priority: CurrentPriority,
    /// Which peers have parts of it.
    view: Arc<Mutex<View>>,
    begun: Instant,
    /// Bytes requested from the upstream.
    upstream_bytes: AtomicU64,
}

/// Which peers were queried for holders.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum QueryScope {
    Successors,
    Everywhere,
}

/// Failed sources in a row before the first owner is skipped, by all its followers. More: a failing owner delays pulls
/// for longer. Fewer: short failures move followers to another owner, which downloads the blob again.
const MAX_OWNER_FAILURES: u32 = 3;

/// Holders that are tried for one range before its owner. More: a range waits longer if holders fail. Fewer: more load
/// on the owner.
pub const MAX_HOLDERS_TRIED: usize = 3;

/// Ranges requested from peers at the same time. More: more load on each peer. Fewer: one slow peer slows the blob.
pub const MAX_PEER_RANGES: usize = 4;

/// Time limit of a peer that only serves what it has or gets now. Longer: a silent peer delays the range. Shorter:
/// loaded peers are skipped.
const HOLDER_TIMEOUT: Duration = Duration::from_secs(4);

/// Blobs whose holders are in memory. Fewer: peers are queried more often.
const MAX_BLOBS_WITH_HOLDERS: u64 = 10_000;

/// Corrupt blobs whose senders are in memory. Fewer: the sender of a corrupt blob is found out later.
const MAX_SUSPECT_BLOBS: u64 = 100;

/// Smallest part of a range that an owner may lend, in bytes. Larger: loans are refused, and the owner downloads more.
/// Smaller: one range becomes many requests.
const MIN_LOAN_BYTES: u64 = 1024 * 1024;

#[async_trait]
impl FillSources for BlobSources {
    async fn open(&self, from: u64, end: Option<u64>, failures: u32) -> Result<(Incoming, ServedFrom), SourceError> {
        let role = self.role.get();
        let sources = PartSources { sources: self, peers: self.peers(), role, part: Part::new(from, end), failures };
        if let SearchResult::Found(opened) = search(sources.search(), &sources).await? {
            return Ok(opened);
        }
        // Other nodes may turn to this one as well: all of them share its fill, which downloads from the upstream.
        if self.role.get() == role {
            self.role.promote(Role::Global);
        }
        Err(superseded())
    }

    fn role(&self) -> CurrentRole {
        self.role.clone()
    }

    fn priority(&self) -> CurrentPriority {
        self.priority.clone()
    }

    /// The number of upstream connections is found by measurement; for peers it is fixed.
    fn connections(&self) -> ConnectionMode {
        match self.role.get() {
            Role::Global => ConnectionMode::Adaptive,
            Role::Client | Role::Zone => ConnectionMode::Chosen(MAX_PEER_RANGES),
        }
    }

    fn choose(&self, ranges: &[Span]) -> Option<usize> {
        self.view.lock().choose(ranges, fastrand::u64(..))
    }

    fn alternatives(&self, at: u64) -> usize {
        // An owner has no alternatives: without a slow peer it would continue at the upstream.
        let Some(peers) = self.peers().filter(|_| self.role.get() != Role::Global) else { return 0 };
        let has = self.cached_spans().len();
        self.view.lock().able(at, has, peers.now())
    }

    fn is_at_a_peer(&self, span: Span) -> bool {
        self.peers().is_some_and(|peers| peers.is_at_a_peer(&self.key.digest, span))
    }

    fn matched(&self, truth: VerifiedContent) {
        self.context.authorizations.mark_sent(&self.repo_ref, &self.key.digest);
        // A promoted fill came from peers as well: its time is not the upstream's.
        if let Some((sender, bytes)) = self.sender(truth.total()).filter(|_| !self.was_promoted()) {
            self.context.routing.throughput.record(self.repo_ref.rule.name(), sender, bytes, self.begun.elapsed());
        }
        let key = (self.key.digest.clone(), self.key.registry.clone());
        if let (Some(suspects), Some(peers)) =
            (self.context.suspect_contributions.remove(&key), self.context.routing.peers())
        {
            let peers = peers.clone();
            tokio::task::spawn_blocking(move || {
                let corrupt = suspects.iter().filter(|contribution| is_corrupt(contribution, &truth));
                let corrupt_senders: HashSet<_> =
                    corrupt.map(|contribution| (contribution.peer, contribution.claim)).collect();
                corrupt_senders.into_iter().for_each(|(peer, claim)| peers.report_corrupt(peer, claim));
            });
        }
    }

    fn mismatched(&self) {
        let contributions = self.view.lock().contributions().to_vec();
        if !contributions.is_empty() {
            let key = (self.key.digest.clone(), self.key.registry.clone());
            self.context.suspect_contributions.insert(key, Arc::new(contributions));
        }
    }
}

/// Whether the bytes of a peer differ from the verified content.
fn is_corrupt(contribution: &Contribution, truth: &VerifiedContent) -> bool {
    if contribution.total != truth.total() {
        return true;
    }
    let mut checksum = Xxh64::new(0);
    let mut piece = vec![0; 1 << 20];
    let mut at = contribution.span.start;
    while at < contribution.span.end {
        let count = piece.len().min(usize::try_from(contribution.span.end - at).unwrap_or(usize::MAX));
        if truth.read(&mut piece[..count], at).is_err() {
            return false;
        }
        checksum.update(&piece[..count]);
        at += count as u64;
    }
    checksum.digest() != contribution.checksum
}

impl BlobSources {
    pub(super) fn new(
        context: &Arc<BlobContext>,
        repo_ref: &RepositoryRef,
        key: FillKey,
        role: Role,
        range_purpose: RangePurpose,
        priority: Priority,
    ) -> Self {
        let begun = Instant::now();
        let view = Arc::new(Mutex::new(View::new(context.routing.peers().map_or(1, |peers| peers.count()))));
        let upstream_bytes = AtomicU64::new(0);
        let (first_role, role) = (role, CurrentRole::new(role));
        Self {
            context: context.clone(),
            repo_ref: repo_ref.clone(),
            key,
            first_role,
            role,
            range_purpose,
            priority: CurrentPriority::new(priority),
            view,
            begun,
            upstream_bytes,
        }
    }

    async fn open_upstream(&self, part: Part, deadline: Instant) -> Result<Incoming, SourceError> {
        let incoming = self.request_upstream(part, deadline).await?;
        self.upstream_bytes.fetch_add(incoming.span.len(), Ordering::Relaxed);
        Ok(incoming.for_priority(self.priority.clone()))
    }

    /// Uses the credential of the principal that joined the fill last: the first one may expire before the download
    /// ends. If the upstream denies it, the first credential is used for the rest.
    async fn request_upstream(&self, part: Part, deadline: Instant) -> Result<Incoming, SourceError> {
        let digest = &self.key.digest;
        let known = self.context.registry_hints.length_of(&self.repo_ref, digest);
        if let Some(fill) = self.context.fills.running(&self.key)
            && let newest = fill.newest_repo_ref()
            && newest.principal != self.repo_ref.principal
        {
            let response = self.context.upstream.blob(&newest, digest, part, known, deadline).await;
            if !is_personal(&self.repo_ref, &response) {
                return response;
            }
            fill.forget_principal(&newest.principal);
        }
        self.context.upstream.blob(&self.repo_ref, digest, part, known, deadline).await
    }

    /// The sender of more than half of the blob, for the comparison of speeds, and its bytes. Bytes that were cached
    /// before count for neither.
    fn sender(&self, total: u64) -> Option<(Sender, u64)> {
        let peers = self.context.routing.peers()?;
        let view = self.view.lock();
        let cross_zone = view.contributions().iter().filter(|sent| peers.is_cross_zone(sent.peer));
        let cross_zone_bytes: u64 = cross_zone.map(|sent| sent.span.len()).sum();
        let upstream = self.upstream_bytes.load(Ordering::Relaxed).min(total);
        if cross_zone_bytes > total / 2 {
            Some((Sender::CrossZone, cross_zone_bytes))
        } else {
            Some((Sender::Upstream, upstream)).filter(|_| upstream > total / 2)
        }
    }

    /// Queries peers for holders. A recent result is reused for other ranges.
    async fn query_holders(&self, peers: &Peers, scope: QueryScope) {
        let key = (self.key.clone(), scope);
        let found = match self.context.holders.get(&key) {
            Some(found) => found,
            None => {
                let query = self.query(PeerRequestMode::OnlyIfCached);
                let found = Arc::new(match scope {
                    QueryScope::Successors => {
                        peers
                            .query_successors(&PeerQuery { scope: self.context.routing.scope(&self.repo_ref), ..query })
                            .await
                    }
                    QueryScope::Everywhere => {
                        peers.query_last_resort(&PeerQuery { scope: outage_scope(&self.repo_ref), ..query }).await
                    }
                });
                // In an outage an empty result is not cached: a peer may get the blob at any moment.
                if scope == QueryScope::Successors || !found.is_empty() {
                    self.context.holders.insert(key, found.clone());
                }
                found
            }
        };
        found.iter().for_each(|holder| self.view.lock().learn(holder));
    }

    /// Opens the part at the first holder that serves it.
    async fn open_at_holders(&self, peers: &Arc<Peers>, part: Part) -> Option<Incoming> {
        let has = self.cached_spans().len();
        for _ in 0..MAX_HOLDERS_TRIED {
            let holder = self.view.lock().pick(part.start(), has, peers.now(), fastrand::u64(..))?;
            match self.request_part(peers, holder, PeerRequestMode::OnlyIfCached, part).await {
                Ok(incoming) => return Some(incoming),
                Err(error) => {
                    let digest = &self.key.digest;
                    tracing::debug!(peer = %holder, role = "holder", %digest, %error, "peer request failed");
                }
            }
        }
        None
    }

    async fn open_at_owner(
        &self,
        peers: &Arc<Peers>,
        owner: SocketAddr,
        mode: PeerRequestMode,
        part: Part,
        failures: u32,
    ) -> Result<(Incoming, ServedFrom), PeerError> {
        if self.view.lock().is_too_slow(owner, peers.now()) {
            return Err(PeerError::NotCached);
        }
        let response = match failures {
            0 => self.request_part(peers, owner, mode, part).await,
            _ => self.request_once(peers, owner, mode, RedirectPolicy::Refused, part).await,
        };
        match response {
            Err(PeerError::Deputed(span)) => self.fetch_as_deputy(peers, owner, mode, part, span).await,
            response => response.map(|incoming| (incoming, ServedFrom::Peer)),
        }
    }

    /// Downloads a range from the upstream that its owner lent to this node, and notifies the owner at the end. If the
    /// upstream fails, the owner has to serve it.
    async fn fetch_as_deputy(
        &self,
        peers: &Arc<Peers>,
        owner: SocketAddr,
        mode: PeerRequestMode,
        part: Part,
        span: Span,
    ) -> Result<(Incoming, ServedFrom), PeerError> {
        // Smaller loans would make many requests of one.
        let is_part = matches!(part, Part::Span(asked) if asked.start == span.start
            && (span.end == asked.end || (span.end < asked.end && span.len() >= MIN_LOAN_BYTES)));
        if let Some(fill) = self.context.fills.running(&self.key).filter(|_| is_part) {
            fill.depute(span);
            let deadline = Instant::now() + STALL_TIMEOUT;
            match self.open_upstream(Part::Span(span), deadline).await {
                Ok(incoming) if incoming.span == span => {
                    let (peers, repo_ref, digest) = (peers.clone(), self.repo_ref.clone(), self.key.digest.clone());
                    let incoming = incoming.on_complete(move || {
                        tokio::spawn(async move {
                            let query = PeerQuery::about(
                                &repo_ref,
                                &digest,
                                PeerRequestMode::OnlyIfCached,
                                Instant::now() + HOLDER_TIMEOUT,
                            );
                            peers.tell(owner, &query, &span.into()).await;
                        });
                    });
                    return Ok((incoming, ServedFrom::Upstream));
                }
                Ok(_) => {
                    let error = "the upstream ignores range requests";
                    tracing::info!(digest = %self.key.digest, error, "lent range not downloaded");
                }
                Err(error) => tracing::info!(digest = %self.key.digest, %error, "lent range not downloaded"),
            }
            fill.fail_as_deputy(span);
        }
        let served = self.request_once(peers, owner, mode, RedirectPolicy::Refused, part).await;
        served.map(|incoming| (incoming, ServedFrom::Peer))
    }

    /// Requests a part from one peer, and follows one redirect. If that fails or is not allowed, the first peer has to
    /// serve it.
    async fn request_part(
        &self,
        peers: &Peers,
        peer: SocketAddr,
        mode: PeerRequestMode,
        part: Part,
    ) -> Result<Incoming, PeerError> {
        let named = match self.request_once(peers, peer, mode, RedirectPolicy::Followed, part).await {
            Err(PeerError::Redirected(named)) => named,
            response => return response,
        };
        if let Some(named) = named
            && let Ok(incoming) =
                self.request_once(peers, named, PeerRequestMode::OnlyIfCached, RedirectPolicy::Refused, part).await
        {
            return Ok(incoming);
        }
        self.request_once(peers, peer, mode, RedirectPolicy::Refused, part).await
    }

    /// Requests a part from one peer. A request to an owner ends when this node becomes the owner: if the peer waits
    /// for this node at the same time, both wait for ever. Holders serve only what they have.
    async fn request_once(
        &self,
        peers: &Peers,
        peer: SocketAddr,
        mode: PeerRequestMode,
        redirects: RedirectPolicy,
        part: Part,
    ) -> Result<Incoming, PeerError> {
        let query = PeerQuery { redirects, ..self.query(mode) };
        let have = self.cached_spans();
        let asked = peers.blob(peer, &query, part, &have, &self.view);
        let PeerRequestMode::As(owner) = mode else { return asked.await };
        tokio::select! {
            biased;
            () = self.role.clone().reaches(owner) => Err(superseded().into()),
            incoming = asked => Ok(incoming?.until(self.role.clone().reaches(owner))),
        }
    }

    /// Opens the part at any peer that has it.
    async fn open_at_any_peer(&self, peers: &Arc<Peers>, part: Part) -> Option<Incoming> {
        self.query_holders(peers, QueryScope::Everywhere).await;
        self.view.lock().forgive();
        self.open_at_holders(peers, part).await
    }

    /// Time limit of a source's first byte. The first request of a blob may take as long as an upstream may: there is
    /// no better source. Once bytes have come, a connection that does not begin soon is replaced.
    fn first_byte_timeout(&self) -> Duration {
        let has_begun = self.context.fills.running(&self.key).is_some_and(|fill| fill.known_length().is_some());
        if has_begun { STALL_TIMEOUT } else { UPSTREAM_TIMEOUT }
    }

    /// The same for the upstream. In a promoted fill peers have sent the first bytes, which says nothing of the
    /// upstream.
    fn upstream_timeout(&self) -> Duration {
        let is_first = self.was_promoted() && self.upstream_bytes.load(Ordering::Relaxed) == 0;
        if is_first { UPSTREAM_TIMEOUT } else { self.first_byte_timeout() }
    }

    /// Whether this node has become the owner since the start.
    fn was_promoted(&self) -> bool {
        self.role.get() > self.first_role
    }

    /// The bytes of the blob on this node.
    fn cached_spans(&self) -> Spans {
        self.context.fills.running(&self.key).map_or_else(Spans::default, |fill| fill.written())
    }

    fn query(&self, mode: PeerRequestMode) -> PeerQuery<'_> {
        let deadline = Instant::now()
            + if mode == PeerRequestMode::OnlyIfCached { HOLDER_TIMEOUT } else { self.first_byte_timeout() };
        PeerQuery {
            range_purpose: self.range_purpose,
            priority: self.priority.get(),
            ..PeerQuery::about(&self.repo_ref, &self.key.digest, mode, deadline)
        }
    }

    /// None: the blob may not be shared with peers, or it lately came corrupt. A corrupt blob is downloaded from the
    /// upstream alone, because any peer may have sent the wrong bytes.
    fn peers(&self) -> Option<&Arc<Peers>> {
        let distrusted = || self.context.fills.is_distrusted(&self.key.content());
        self.context.routing.peers_for(&self.repo_ref).filter(|_| !distrusted())
    }
}

/// The sources of one part of a blob.
struct PartSources<'a> {
    sources: &'a BlobSources,
    peers: Option<&'a Arc<Peers>>,
    role: Role,
    part: Part,
    failures: u32,
}

impl PartSources<'_> {
    fn search(&self) -> SourceSearch {
        let Some(peers) = self.peers else { return SourceSearch::upstream_only().of_range() };
        let scope = self.sources.context.routing.scope(&self.sources.repo_ref);
        let route = peers.owner_route(&self.sources.key.digest, self.role, scope);
        part_search(route, self.role, self.sources.range_purpose, self.failures)
    }
}

/// The search for a source of a part in this role, after `failures` sources in a row have failed.
fn part_search(route: OwnerRoute, role: Role, range_purpose: RangePurpose, failures: u32) -> SourceSearch {
    // After a failure the owner comes before other holders: it has or downloads the next bytes.
    let holders = match failures == 0 || role == Role::Global {
        true => HolderStep::First,
        false => HolderStep::Skipped,
    };
    let without_owner = match range_purpose {
        RangePurpose::Whole => WithoutOwner::ActAsOwner,
        RangePurpose::Range => WithoutOwner::RequestUpstream,
    };
    let search = SourceSearch::new(role, route, holders, without_owner).of_range();
    if failures >= MAX_OWNER_FAILURES { search.without_first_owner() } else { search }
}

#[async_trait]
impl ObjectSource for PartSources<'_> {
    type Object = (Incoming, ServedFrom);

    async fn request(&self, source: Source) -> Result<Self::Object, SourceFailure> {
        let Self { sources, role, part, failures, peers } = self;
        match (source, *peers) {
            (Source::Upstream, _) => {
                if *failures > 0 {
                    sources.context.upstream.forget_redirects(&sources.repo_ref, &sources.key.digest).await;
                }
                let incoming = sources.open_upstream(*part, Instant::now() + sources.upstream_timeout()).await?;
                Ok((incoming, ServedFrom::Upstream))
            }
            (Source::Holders, Some(peers)) => {
                if *role == Role::Global {
                    sources.query_holders(peers, QueryScope::Successors).await;
                    let requesters = peers.requesting_holders(&sources.key.digest, part.start());
                    requesters.iter().for_each(|holder| sources.view.lock().learn(holder));
                }
                let incoming = timeout(CONFIRM_TIMEOUT, sources.open_at_holders(peers, *part)).await.ok().flatten();
                Ok((incoming.ok_or(SourceError::NotCached)?, ServedFrom::Peer))
            }
            // When a connection breaks, the owner still has or downloads the next bytes. A second request to it keeps
            // followers away from the upstream.
            (Source::Owner { peer, role }, Some(peers)) => {
                let mode = PeerRequestMode::As(role);
                sources.open_at_owner(peers, peer, mode, *part, *failures).await.map_err(|error| match error {
                    PeerError::Source(error) => error.into(),
                    PeerError::NotCached | PeerError::Redirected(_) | PeerError::Deputed(_) => {
                        SourceError::NotCached.into()
                    }
                })
            }
            (Source::AnyPeer, Some(peers)) => {
                let incoming = sources.open_at_any_peer(peers, *part).await.ok_or(SourceError::NotCached)?;
                Ok((incoming, ServedFrom::Peer))
            }
            (Source::Holders | Source::Owner { .. } | Source::AnyPeer, None) => Err(SourceError::NotCached.into()),
        }
    }

    /// An owner that is silent after some bytes may be changing its source: `failures` decide when to skip it.
    fn progress(&self) -> SearchProgress {
        match self.sources.cached_spans().is_empty() {
            true => SearchProgress::NotBegun,
            false => SearchProgress::Begun,
        }
    }

    fn name(&self) -> impl fmt::Display + Send {
        &self.sources.key.digest
    }
}

impl BlobContext {
    pub(in crate::pull) fn new(
        fills: Arc<Fills>,
        routing: Arc<PeerRouting>,
        upstream: Arc<UpstreamClient>,
        authorizations: Arc<AuthorizationCache>,
        registry_hints: Arc<RegistryHints>,
    ) -> Self {
        let holders =
            moka::sync::Cache::builder().max_capacity(MAX_BLOBS_WITH_HOLDERS).time_to_live(STALL_TIMEOUT).build();
        let suspect_contributions =
            moka::sync::Cache::builder().max_capacity(MAX_SUSPECT_BLOBS).time_to_live(OBSERVATION_TTL).build();
        Self { fills, routing, upstream, authorizations, registry_hints, holders, suspect_contributions }
    }
}

/// This node has become the owner: its requests to owners end.
fn superseded() -> SourceError {
    SourceError::Unreachable("this node has become the owner".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pull::source_search::Decision;

    #[test]
    fn failures_decide_what_is_requested_first() {
        let owner = |nth: u8| SocketAddr::from(([192, 0, 2, nth], 5052));
        let route = || OwnerRoute { role: Role::Client, owners: vec![owner(1), owner(2)], request_role: Role::Global };
        let first = |role, purpose, failures| part_search(route(), role, purpose, failures).first();
        let at = |nth| Decision::Request(Source::Owner { peer: owner(nth), role: Role::Global });
        let holders = || Decision::Request(Source::Holders);
        for purpose in [RangePurpose::Whole, RangePurpose::Range] {
            let of_client = [0, 1, MAX_OWNER_FAILURES].map(|failures| first(Role::Client, purpose, failures));
            assert_eq!(of_client, [holders(), at(1), at(2)]);
            assert_eq!(first(Role::Global, purpose, 1), holders());
        }
    }

    #[test]
    fn node_without_an_owner_acts_as_one_only_for_whole_blobs() {
        let nothing = || OwnerRoute { role: Role::Client, owners: Vec::new(), request_role: Role::Global };
        let after_holders = |role, purpose| {
            let mut search = part_search(nothing(), role, purpose, 0);
            search.first();
            search.after(Source::Holders, SourceError::NotCached, SearchProgress::NotBegun)
        };
        let upstream = || Decision::Request(Source::Upstream);
        assert_eq!(after_holders(Role::Client, RangePurpose::Whole), Decision::ActAsOwner);
        assert_eq!(after_holders(Role::Client, RangePurpose::Range), upstream());
        assert_eq!(after_holders(Role::Global, RangePurpose::Whole), upstream());
    }
}
