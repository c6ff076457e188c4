//! The sources of a blob, in order: its holders, its owner, then the upstream.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::time::{Instant, timeout};
use xxhash_rust::xxh64::Xxh64;

use super::owners::request_from_owners;
use super::throughput::Sender;
use super::{Pull, is_personal};
use crate::config::CrossZonePeers;
use crate::fill::{ConnectionMode, FillKey, FillSources, VerifiedContent};
use crate::oci::{Span, Spans};
use crate::peers::swarm::{Contribution, View};
use crate::peers::{PeerError, PeerQuery, PeerRequestMode, Peers, RangePurpose, RedirectPolicy, Scope};
use crate::registries::RepositoryRef;
use crate::role::{CurrentRole, Role};
use crate::source::{Incoming, Part, ServedFrom, SourceError};
use crate::times::{CONFIRM_TIMEOUT, STALL_TIMEOUT, UPSTREAM_TIMEOUT};

/// The sources of one blob.
pub(super) struct BlobSources {
    pull: Arc<Pull>,
    repo_ref: RepositoryRef,
    key: FillKey,
    /// The role at the start, and the current role.
    first_role: Role,
    role: CurrentRole,
    range_purpose: RangePurpose,
    /// Which peers have parts of it.
    view: Arc<Mutex<View>>,
    begun: Instant,
    /// Bytes requested from the upstream.
    upstream_bytes: AtomicU64,
}

/// Which peers were queried for holders.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum QueryScope {
    Successors,
    Everywhere,
}

/// Failed sources in a row before the first owner is skipped, by all its followers. More: a failing owner delays pulls
/// for longer. Fewer: short failures move followers to another owner, which downloads the blob again.
const MAX_OWNER_FAILURES: u32 = 3;

/// Holders that are tried for one range before its owner. More: a range waits longer if holders fail. Fewer: more load
/// on the owner.
const MAX_HOLDERS_TRIED: usize = 3;

/// Time limit of a peer that only serves what it has or gets now. Longer: a silent peer delays the range. Shorter:
/// loaded peers are skipped.
const HOLDER_TIMEOUT: Duration = Duration::from_secs(4);

/// Smallest part of a range that an owner may lend, in bytes. Larger: loans are refused, and the owner downloads more.
/// Smaller: one range becomes many requests.
const MIN_LOAN_BYTES: u64 = 1024 * 1024;

/// Ranges requested from peers at the same time. More: more load on each peer. Fewer: one slow peer slows the blob.
const MAX_PEER_RANGES: usize = 4;

#[async_trait]
impl FillSources for BlobSources {
    async fn open(&self, from: u64, end: Option<u64>, failures: u32) -> Result<(Incoming, ServedFrom), SourceError> {
        let role = self.role.get();
        if let Some(opened) = self.open_as(role, Part::new(from, end), failures).await? {
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
        self.pull.authorizations.mark_sent(&self.repo_ref, &self.key.digest);
        // A promoted fill came from peers as well: its time is not the upstream's.
        if let Some((sender, bytes)) = self.sender(truth.total()).filter(|_| !self.was_promoted()) {
            self.pull.throughput.record(self.repo_ref.rule.name(), sender, bytes, self.begun.elapsed());
        }
        let key = (self.key.digest.clone(), self.key.registry.clone());
        if let (Some(suspects), Some(peers)) = (self.pull.suspect_contributions.remove(&key), &self.pull.peers) {
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
            self.pull.suspect_contributions.insert(key, Arc::new(contributions));
        }
    }
}

/// The peers to request from when the upstream is down: slow peers are better than none.
pub(super) fn outage_scope(repo_ref: &RepositoryRef) -> Scope {
    if repo_ref.rule.cross_zone_peers == CrossZonePeers::Never { Scope::OwnZone } else { Scope::AllZones }
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
        pull: &Arc<Pull>,
        repo_ref: &RepositoryRef,
        key: FillKey,
        role: Role,
        range_purpose: RangePurpose,
    ) -> Self {
        let begun = Instant::now();
        let view = Arc::new(Mutex::new(View::new(pull.peers.as_ref().map_or(1, |peers| peers.count()))));
        let upstream_bytes = AtomicU64::new(0);
        let (first_role, role) = (role, CurrentRole::new(role));
        Self {
            pull: pull.clone(),
            repo_ref: repo_ref.clone(),
            key,
            first_role,
            role,
            range_purpose,
            view,
            begun,
            upstream_bytes,
        }
    }

    /// Opens a part in this role. None: no owner can be reached, so that this node has to act as the owner, or already
    /// does.
    async fn open_as(
        &self,
        role: Role,
        part: Part,
        failures: u32,
    ) -> Result<Option<(Incoming, ServedFrom)>, SourceError> {
        if let Some(peers) = self.peers() {
            if role == Role::Global {
                self.query_holders(peers, QueryScope::Successors).await;
                let visitors = peers.requesting_holders(&self.key.digest, part.start());
                visitors.iter().for_each(|holder| self.view.lock().learn(holder));
            }
            // After a failure the owner comes before other holders: it has or downloads the next bytes.
            if (failures == 0 || role == Role::Global)
                && let Some(incoming) = timeout(CONFIRM_TIMEOUT, self.open_at_holders(peers, part)).await.ok().flatten()
            {
                return Ok(Some((incoming, ServedFrom::Peer)));
            }
            // When a connection breaks, the owner still has or downloads the next bytes. A second request to it keeps
            // followers away from the upstream.
            if let Some(response) = self.open_at_owners(peers, role, part, failures).await? {
                return Ok(Some(response));
            }
            if role != Role::Global && self.range_purpose == RangePurpose::Whole {
                return Ok(None);
            }
        }
        if failures > 0 {
            self.pull.upstream.forget_redirects(&self.repo_ref, &self.key.digest).await;
        }
        match self.open_upstream(part, Instant::now() + self.upstream_timeout()).await {
            Ok(incoming) => Ok(Some((incoming, ServedFrom::Upstream))),
            Err(error) => match self.open_at_any_peer(part, &error).await {
                Some(incoming) => Ok(Some((incoming, ServedFrom::Peer))),
                None => Err(error),
            },
        }
    }

    async fn open_upstream(&self, part: Part, deadline: Instant) -> Result<Incoming, SourceError> {
        let incoming = self.request_upstream(part, deadline).await?;
        self.upstream_bytes.fetch_add(incoming.span.len(), Ordering::Relaxed);
        Ok(incoming)
    }

    /// Uses the credential of the principal that joined the fill last: the first one may expire before the download
    /// ends. If the upstream denies it, the first credential is used for the rest.
    async fn request_upstream(&self, part: Part, deadline: Instant) -> Result<Incoming, SourceError> {
        let digest = &self.key.digest;
        let known = self.pull.registry_hints.length_of(&self.repo_ref, digest);
        if let Some(fill) = self.pull.fills.running(&self.key)
            && let newest = fill.newest_repo_ref()
            && newest.principal != self.repo_ref.principal
        {
            let response = self.pull.upstream.blob(&newest, digest, part, known, deadline).await;
            if !is_personal(&self.repo_ref, &response) {
                return response;
            }
            fill.forget_principal(&newest.principal);
        }
        self.pull.upstream.blob(&self.repo_ref, digest, part, known, deadline).await
    }

    /// The sender of more than half of the blob, for the comparison of speeds, and its bytes. Bytes that were cached
    /// before count for neither.
    fn sender(&self, total: u64) -> Option<(Sender, u64)> {
        let peers = self.pull.peers.as_ref()?;
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
        let found = match self.pull.holders.get(&key) {
            Some(found) => found,
            None => {
                let query = self.query(PeerRequestMode::OnlyIfCached);
                let found = Arc::new(match scope {
                    QueryScope::Successors => {
                        peers.query_successors(&PeerQuery { scope: self.pull.scope(&self.repo_ref), ..query }).await
                    }
                    QueryScope::Everywhere => {
                        peers.query_last_resort(&PeerQuery { scope: outage_scope(&self.repo_ref), ..query }).await
                    }
                });
                // In an outage an empty result is not cached: a peer may get the blob at any moment.
                if scope == QueryScope::Successors || !found.is_empty() {
                    self.pull.holders.insert(key, found.clone());
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
                    tracing::debug!(peer = %holder, role = "holder", %digest, ?error, "peer request failed");
                }
            }
        }
        None
    }

    /// None: this node is the owner, or no owner can be reached.
    async fn open_at_owners(
        &self,
        peers: &Arc<Peers>,
        role: Role,
        part: Part,
        failures: u32,
    ) -> Result<Option<(Incoming, ServedFrom)>, SourceError> {
        let mut lead = peers.owner_route(&self.key.digest, role, self.pull.scope(&self.repo_ref));
        // After too many failures the first owner is skipped, as by its other followers.
        if failures >= MAX_OWNER_FAILURES && !lead.owners.is_empty() {
            lead.owners.remove(0);
        }
        let given = request_from_owners(lead, &self.key.digest, |owner, mode| async move {
            match self.open_at_owner(peers, owner, mode, part, failures).await {
                // The owner has sent some bytes and may be changing its source: `failures` decide when to skip it.
                Err(PeerError::Source(error @ SourceError::TimedOut)) if !self.cached_spans().is_empty() => {
                    Ok(Err(error))
                }
                Err(PeerError::Source(error)) => Err(error),
                Err(PeerError::NotCached | PeerError::Redirected(_) | PeerError::Deputed(_)) => {
                    Err(SourceError::NotCached)
                }
                Ok(given) => Ok(Ok(given)),
            }
        });
        given.await?.transpose()
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
        if let Some(fill) = self.pull.fills.running(&self.key).filter(|_| is_part) {
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

    /// Opens the part at any peer that has it, if the upstream is down.
    async fn open_at_any_peer(&self, part: Part, error: &SourceError) -> Option<Incoming> {
        let peers = self.peers().filter(|_| error.is_outage() && !error.is_about_ranges())?;
        self.query_holders(peers, QueryScope::Everywhere).await;
        self.view.lock().forgive();
        self.open_at_holders(peers, part).await
    }

    /// Time limit of a source's first byte. The first request of a blob may take as long as an upstream may: there is
    /// no better source. Once bytes have come, a connection that does not begin soon is replaced.
    fn first_byte_timeout(&self) -> Duration {
        let has_begun = self.pull.fills.running(&self.key).is_some_and(|fill| fill.known_length().is_some());
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
        self.pull.fills.running(&self.key).map_or_else(Spans::default, |fill| fill.written())
    }

    fn query(&self, mode: PeerRequestMode) -> PeerQuery<'_> {
        let deadline = Instant::now()
            + if mode == PeerRequestMode::OnlyIfCached { HOLDER_TIMEOUT } else { self.first_byte_timeout() };
        PeerQuery {
            range_purpose: self.range_purpose,
            ..PeerQuery::about(&self.repo_ref, &self.key.digest, mode, deadline)
        }
    }

    /// None: the blob may not be shared with peers, or it lately came corrupt. A corrupt blob is downloaded from the
    /// upstream alone, because any peer may have sent the wrong bytes.
    fn peers(&self) -> Option<&Arc<Peers>> {
        let distrusted = || self.pull.fills.is_distrusted(&self.key.content());
        self.pull.peers_for(&self.repo_ref).filter(|_| !distrusted())
    }
}

/// This node has become the owner: its requests to owners end.
fn superseded() -> SourceError {
    SourceError::Unreachable("this node has become the owner".into())
}
