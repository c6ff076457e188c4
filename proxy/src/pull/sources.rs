//! Where a blob is fetched from: whoever has it, its owner among the peers, then the origin.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::time::{Instant, timeout};
use xxhash_rust::xxh64::Xxh64;

use super::owners::ask_owners;
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
    place: RepositoryRef,
    key: FillKey,
    /// The role at first, and at the moment.
    first_role: Role,
    role: CurrentRole,
    aim: RangePurpose,
    /// Which peers have some of it.
    view: Arc<Mutex<View>>,
    begun: Instant,
    /// Bytes that the origin was asked for.
    of_upstream: AtomicU64,
}

/// Which peers were asked what they have.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum PeersAsked {
    AtSuccessors,
    Everywhere,
}

/// After so many sources in a row that brought nothing the next owner is asked, by all who wait.
const PASS_OVER: u32 = 3;

/// Peers asked for one range before its owner is.
const ASK_HOLDERS: usize = 3;

/// Who only has to look what it has, or gets now, answers within this time.
const IF_KEPT: Duration = Duration::from_secs(4);

/// No owner leaves less of a range, in bytes.
const SMALLEST_LOAN: u64 = 1024 * 1024;

/// Ranges fetched from peers at the same time.
const IN_FLIGHT: usize = 4;

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

    /// How many connections an origin is worth is found out; peers are asked for a few ranges.
    fn connections(&self) -> ConnectionMode {
        match self.role.get() {
            Role::Global => ConnectionMode::Climbing,
            Role::Client | Role::Zone => ConnectionMode::Chosen(IN_FLIGHT),
        }
    }

    fn choose(&self, ranges: &[Span]) -> Option<usize> {
        self.view.lock().choose(ranges, fastrand::u64(..))
    }

    fn alternatives(&self, at: u64) -> usize {
        // An owner that left a slow peer would go on at the origin.
        let Some(peers) = self.peers().filter(|_| self.role.get() != Role::Global) else { return 0 };
        let has = self.have().len();
        self.view.lock().able(at, has, peers.now())
    }

    fn is_elsewhere(&self, span: Span) -> bool {
        self.peers().is_some_and(|peers| peers.is_elsewhere(&self.key.digest, span))
    }

    fn matched(&self, truth: VerifiedContent) {
        self.pull.entitlements.was_sent(&self.place, &self.key.digest);
        // The time of a promoted fill is that of peers as well.
        if let Some((sender, bytes)) = self.sender(truth.total()).filter(|_| !self.was_promoted()) {
            self.pull.speeds.measured(self.place.rule.name(), sender, bytes, self.begun.elapsed());
        }
        let key = (self.key.digest.clone(), self.key.registry.clone());
        if let (Some(suspects), Some(peers)) = (self.pull.suspects.remove(&key), &self.pull.peers) {
            let peers = peers.clone();
            tokio::task::spawn_blocking(move || {
                let wrong = suspects.iter().filter(|contribution| is_wrong(contribution, &truth));
                let liars: HashSet<_> = wrong.map(|contribution| (contribution.peer, contribution.claim)).collect();
                liars.into_iter().for_each(|(peer, claim)| peers.sent_wrong(peer, claim));
            });
        }
    }

    fn mismatched(&self) {
        let contributions = self.view.lock().contributions().to_vec();
        if !contributions.is_empty() {
            let key = (self.key.digest.clone(), self.key.registry.clone());
            self.pull.suspects.insert(key, Arc::new(contributions));
        }
    }
}

/// Whom to ask when no origin answers: peers that are slow are better than none.
pub(super) fn last_scope(place: &RepositoryRef) -> Scope {
    if place.rule.far_peers == CrossZonePeers::Never { Scope::OwnZone } else { Scope::AllZones }
}

/// Whether a peer sent something else than what was verified.
fn is_wrong(contribution: &Contribution, truth: &VerifiedContent) -> bool {
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
    pub(super) fn new(pull: &Arc<Pull>, place: &RepositoryRef, key: FillKey, role: Role, aim: RangePurpose) -> Self {
        let begun = Instant::now();
        let view = Arc::new(Mutex::new(View::new(pull.peers.as_ref().map_or(1, |peers| peers.count()))));
        let of_upstream = AtomicU64::new(0);
        let (first_role, role) = (role, CurrentRole::new(role));
        Self { pull: pull.clone(), place: place.clone(), key, first_role, role, aim, view, begun, of_upstream }
    }

    /// Opens a part in this role. None: no owner can be reached, so that this node has to take its place, or it has done so
    /// meanwhile.
    async fn open_as(
        &self,
        role: Role,
        part: Part,
        failures: u32,
    ) -> Result<Option<(Incoming, ServedFrom)>, SourceError> {
        if let Some(peers) = self.peers() {
            if role == Role::Global {
                self.look(peers, PeersAsked::AtSuccessors).await;
                let visitors = peers.who_visited_has(&self.key.digest, part.start());
                visitors.iter().for_each(|holder| self.view.lock().learn(holder));
            }
            // After a break the owner, which is best placed, is asked before holders.
            if (failures == 0 || role == Role::Global)
                && let Some(incoming) = timeout(CONFIRM_TIMEOUT, self.ask_holders(peers, part)).await.ok().flatten()
            {
                return Ok(Some((incoming, ServedFrom::Peer)));
            }
            // When a connection breaks, the owner still has, or downloads, what comes next: asking it again keeps the
            // followers from the upstream.
            if let Some(answer) = self.of_owners(peers, role, part, failures).await? {
                return Ok(Some(answer));
            }
            if role != Role::Global && self.aim == RangePurpose::Whole {
                return Ok(None);
            }
        }
        if failures > 0 {
            self.pull.upstream.forget_redirects(&self.place, &self.key.digest).await;
        }
        match self.of_upstream(part, Instant::now() + self.upstream_timeout()).await {
            Ok(incoming) => Ok(Some((incoming, ServedFrom::Upstream))),
            Err(error) => match self.last_resort(part, &error).await {
                Some(incoming) => Ok(Some((incoming, ServedFrom::Peer))),
                None => Err(error),
            },
        }
    }

    async fn of_upstream(&self, part: Part, deadline: Instant) -> Result<Incoming, SourceError> {
        let incoming = self.ask_upstream(part, deadline).await?;
        self.of_upstream.fetch_add(incoming.span.len(), Ordering::Relaxed);
        Ok(incoming)
    }

    /// The registry is shown what somebody who joined has, which is probably good for longer: what the first caller showed
    /// may end before the blob does. Who is refused with it leaves the others what they had.
    async fn ask_upstream(&self, part: Part, deadline: Instant) -> Result<Incoming, SourceError> {
        let digest = &self.key.digest;
        let known = self.pull.homes.length_of(&self.place, digest);
        if let Some(fill) = self.pull.fills.running(&self.key)
            && let newest = fill.newest_place()
            && newest.caller != self.place.caller
        {
            let answer = self.pull.upstream.blob(&newest, digest, part, known, deadline).await;
            if !is_personal(&self.place, &answer) {
                return answer;
            }
            fill.forget_newest(&newest.caller);
        }
        self.pull.upstream.blob(&self.place, digest, part, known, deadline).await
    }

    /// Who has sent most of it, one of both whose speeds are compared, and how much. What was here before came from
    /// nobody.
    fn sender(&self, total: u64) -> Option<(Sender, u64)> {
        let peers = self.pull.peers.as_ref()?;
        let view = self.view.lock();
        let from_far = view.contributions().iter().filter(|sent| peers.is_far(sent.peer));
        let far: u64 = from_far.map(|sent| sent.span.len()).sum();
        let upstream = self.of_upstream.load(Ordering::Relaxed).min(total);
        if far > total / 2 {
            Some((Sender::Far, far))
        } else {
            Some((Sender::Upstream, upstream)).filter(|_| upstream > total / 2)
        }
    }

    /// Asks peers what they have. What was just asked, for another range, is not asked again.
    async fn look(&self, peers: &Peers, looked: PeersAsked) {
        let key = (self.key.clone(), looked);
        let found = match self.pull.holders.get(&key) {
            Some(found) => found,
            None => {
                let question = self.question(PeerRequestMode::IfKept);
                let found = Arc::new(match looked {
                    PeersAsked::AtSuccessors => {
                        peers.ask_successors(&PeerQuery { scope: self.pull.scope(&self.place), ..question }).await
                    }
                    PeersAsked::Everywhere => {
                        peers.ask_around(&PeerQuery { scope: last_scope(&self.place), ..question }).await
                    }
                });
                // Peers that had nothing a moment ago may be what an outage is survived by.
                if looked == PeersAsked::AtSuccessors || !found.is_empty() {
                    self.pull.holders.insert(key, found.clone());
                }
                found
            }
        };
        found.iter().for_each(|holder| self.view.lock().learn(holder));
    }

    /// The first of the holders that gives it.
    async fn ask_holders(&self, peers: &Arc<Peers>, part: Part) -> Option<Incoming> {
        let has = self.have().len();
        for _ in 0..ASK_HOLDERS {
            let holder = self.view.lock().pick(part.start(), has, peers.now(), fastrand::u64(..))?;
            match self.ask(peers, holder, PeerRequestMode::IfKept, part).await {
                Ok(incoming) => return Some(incoming),
                Err(why) => tracing::debug!(%holder, digest = %self.key.digest, ?why, "a holder gives nothing"),
            }
        }
        None
    }

    /// None: this node is the owner, or no owner can be reached.
    async fn of_owners(
        &self,
        peers: &Arc<Peers>,
        role: Role,
        part: Part,
        failures: u32,
    ) -> Result<Option<(Incoming, ServedFrom)>, SourceError> {
        let mut lead = peers.lead(&self.key.digest, role, self.pull.scope(&self.place));
        // An owner that brings nothing is passed over, as by all its other followers.
        if failures >= PASS_OVER && !lead.leaders.is_empty() {
            lead.leaders.remove(0);
        }
        let given = ask_owners(lead, &self.key.digest, |owner, manner| async move {
            match self.of_owner(peers, owner, manner, part, failures).await {
                // The owner has sent some of it, and is about to change its source: `failures` decide when to pass it over.
                Err(PeerError::Source(error @ SourceError::TimedOut)) if !self.have().is_empty() => Ok(Err(error)),
                Err(PeerError::Source(error)) => Err(error),
                Err(PeerError::NotKept | PeerError::Redirected(_) | PeerError::Deputed(_)) => Err(SourceError::NotKept),
                Ok(given) => Ok(Ok(given)),
            }
        });
        given.await?.transpose()
    }

    async fn of_owner(
        &self,
        peers: &Arc<Peers>,
        owner: SocketAddr,
        manner: PeerRequestMode,
        part: Part,
        failures: u32,
    ) -> Result<(Incoming, ServedFrom), PeerError> {
        if self.view.lock().crawls(owner, peers.now()) {
            return Err(PeerError::NotKept);
        }
        let answer = match failures {
            0 => self.ask(peers, owner, manner, part).await,
            _ => self.ask_once(peers, owner, manner, RedirectPolicy::Refused, part).await,
        };
        match answer {
            Err(PeerError::Deputed(span)) => self.in_its_stead(peers, owner, manner, part, span).await,
            answer => answer.map(|incoming| (incoming, ServedFrom::Peer)),
        }
    }

    /// Fetches from the origin what of a range its owner leaves to this node, and tells it when it is here. Where
    /// the origin does not give it, the owner has to.
    async fn in_its_stead(
        &self,
        peers: &Arc<Peers>,
        owner: SocketAddr,
        manner: PeerRequestMode,
        part: Part,
        span: Span,
    ) -> Result<(Incoming, ServedFrom), PeerError> {
        // Smaller parts would make many questions of one.
        let is_part = matches!(part, Part::Span(asked) if asked.start == span.start
            && (span.end == asked.end || (span.end < asked.end && span.len() >= SMALLEST_LOAN)));
        if let Some(fill) = self.pull.fills.running(&self.key).filter(|_| is_part) {
            fill.depute(span);
            let deadline = Instant::now() + STALL_TIMEOUT;
            match self.of_upstream(Part::Span(span), deadline).await {
                Ok(incoming) if incoming.span == span => {
                    let (peers, place, digest) = (peers.clone(), self.place.clone(), self.key.digest.clone());
                    let told = incoming.followed_by(move || {
                        tokio::spawn(async move {
                            let question =
                                PeerQuery::about(&place, &digest, PeerRequestMode::IfKept, Instant::now() + IF_KEPT);
                            peers.tell(owner, &question, &span.into()).await;
                        });
                    });
                    return Ok((told, ServedFrom::Upstream));
                }
                Ok(_) => tracing::info!(digest = %self.key.digest, "the origin gives a deputy no ranges"),
                Err(error) => tracing::info!(digest = %self.key.digest, %error, "the origin gives a deputy nothing"),
            }
            fill.fail_as_deputy(span);
        }
        let insisting = self.ask_once(peers, owner, manner, RedirectPolicy::Refused, part).await;
        insisting.map(|incoming| (incoming, ServedFrom::Peer))
    }

    /// Asks one peer; if it names another, that one, and if that cannot help or may not be asked, the first again.
    async fn ask(
        &self,
        peers: &Peers,
        peer: SocketAddr,
        manner: PeerRequestMode,
        part: Part,
    ) -> Result<Incoming, PeerError> {
        let named = match self.ask_once(peers, peer, manner, RedirectPolicy::Followed, part).await {
            Err(PeerError::Redirected(named)) => named,
            answer => return answer,
        };
        if let Some(named) = named
            && let Ok(incoming) =
                self.ask_once(peers, named, PeerRequestMode::IfKept, RedirectPolicy::Refused, part).await
        {
            return Ok(incoming);
        }
        self.ask_once(peers, peer, manner, RedirectPolicy::Refused, part).await
    }

    /// Requests a part from one peer. A request to an owner ends when this node becomes the same: the peer may take this node
    /// for the owner, and then neither has what the other waits for. Holders have what they are asked for.
    async fn ask_once(
        &self,
        peers: &Peers,
        peer: SocketAddr,
        manner: PeerRequestMode,
        redirects: RedirectPolicy,
        part: Part,
    ) -> Result<Incoming, PeerError> {
        let question = PeerQuery { redirects, ..self.question(manner) };
        let have = self.have();
        let asked = peers.blob(peer, &question, part, &have, &self.view);
        let PeerRequestMode::As(owner) = manner else { return asked.await };
        tokio::select! {
            biased;
            () = self.role.clone().reaches(owner) => Err(superseded().into()),
            incoming = asked => Ok(incoming?.until(self.role.clone().reaches(owner))),
        }
    }

    /// Where the origin is out of order, somebody may still have it.
    async fn last_resort(&self, part: Part, error: &SourceError) -> Option<Incoming> {
        let peers = self.peers().filter(|_| error.is_outage() && !error.is_about_ranges())?;
        self.look(peers, PeersAsked::Everywhere).await;
        self.view.lock().forgive();
        self.ask_holders(peers, part).await
    }

    /// A source has this long to begin. The first request of a blob stays open for as long as an upstream may take: there
    /// is nothing to lose by it. Once bytes have come, a connection that does not begin soon is replaced.
    fn first_byte_timeout(&self) -> Duration {
        let has_begun = self.pull.fills.running(&self.key).is_some_and(|fill| fill.length_now().is_some());
        if has_begun { STALL_TIMEOUT } else { UPSTREAM_TIMEOUT }
    }

    /// The same for the upstream. Of a promoted fill peers have sent the first bytes, which says nothing of the upstream.
    fn upstream_timeout(&self) -> Duration {
        let is_first = self.was_promoted() && self.of_upstream.load(Ordering::Relaxed) == 0;
        if is_first { UPSTREAM_TIMEOUT } else { self.first_byte_timeout() }
    }

    /// Whether this node took an owner's place meanwhile.
    fn was_promoted(&self) -> bool {
        self.role.get() > self.first_role
    }

    /// What this node has of it.
    fn have(&self) -> Spans {
        self.pull.fills.running(&self.key).map_or_else(Spans::default, |fill| fill.written())
    }

    fn question(&self, manner: PeerRequestMode) -> PeerQuery<'_> {
        let deadline =
            Instant::now() + if manner == PeerRequestMode::IfKept { IF_KEPT } else { self.first_byte_timeout() };
        PeerQuery { aim: self.aim, ..PeerQuery::about(&self.place, &self.key.digest, manner, deadline) }
    }

    /// None: peers may not know of it. And what came wrong comes from the
    /// origin alone, since whoever lied may be among them.
    fn peers(&self) -> Option<&Arc<Peers>> {
        let distrusted = || self.pull.fills.is_distrusted(&self.key.content());
        self.pull.peers_for(&self.place).filter(|_| !distrusted())
    }
}

/// This node has become the owner: what it requested from owners comes from elsewhere.
fn superseded() -> SourceError {
    SourceError::Unreachable("this node has become the owner".into())
}
