//! Other drays: who owns a digest, who else has it, and asking them.
//!
//! Peers speak the registry protocol, digests only, on a port of their own, and a few headers
//! beside it ([`wire`]). Questions only travel towards the origin ([`Role`]); whoever is asked as the
//! owner goes to the origin itself.

mod discovery;
mod health;
mod members;
pub mod ring;
pub mod swarm;
mod visit;
pub mod wire;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use futures_util::TryStreamExt;
use futures_util::future::join_all;
use http::header::{ACCEPT_ENCODING, CACHE_CONTROL, CONTENT_TYPE, LOCATION, RANGE};
use http::{HeaderMap, Method};
use reqwest::{Client, Response};
use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};
use xxhash_rust::xxh64::Xxh64;

use self::discovery::Discovery;
use self::health::Health;
pub use self::members::Lead;
use self::members::Members;
use self::swarm::{Contribution, Time, Tracker, View};
pub use self::visit::{Sending, Visitor};
use self::wire::Holder;
use crate::config::{Config, Peers as Settings, Zone};
use crate::metrics::Metrics;
use crate::oci::{Digest, MAX_MANIFEST_BYTES, Span, Spans};
use crate::registries::Place;
use crate::role::Role;
use crate::source::{Broken, Incoming, Part, SourceError, error_chain};

/// The other processes and what is known of them.
pub struct Peers {
    members: ArcSwap<Members>,
    settings: Settings,
    listen: SocketAddr,
    discovery: tokio::sync::Mutex<Discovery>,
    /// Whether the members are known.
    formed: watch::Sender<bool>,
    health: Health,
    client: Client,
    /// Who fetches what from this node, asked as what.
    trackers: moka::sync::Cache<(Digest, Role), Arc<Mutex<Tracker>>>,
    /// Bodies sent to peers at the moment.
    sending: AtomicU32,
    started: Instant,
    metrics: Arc<Metrics>,
}

/// A question to a peer.
pub struct Question<'a> {
    pub place: &'a Place,
    pub digest: &'a Digest,
    pub manner: Manner,
    pub redirects: Redirects,
    pub aim: Aim,
    pub deadline: Instant,
}

/// How a peer is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// For what it has, or gets now.
    IfKept,
    /// To get it, being that.
    As(Role),
}

/// Whether a busy peer may name another one instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Redirects {
    Followed,
    /// Those that it named could not help, or it was named by another one.
    Refused,
}

/// Where an answer may come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Wherever it can be had.
    Origin,
    /// What is here, or comes now: nobody else is asked for it.
    Kept,
}

/// What a range is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aim {
    /// Somebody wants just that.
    Range,
    /// All the others follow.
    Whole,
}

/// Why a peer gives nothing.
#[derive(Debug)]
pub enum Declined {
    /// It does not have it.
    NotKept,
    /// Another one has it as well, and is less busy.
    Redirected(SocketAddr),
    /// It cannot get it.
    Source(SourceError),
}

/// A peer that has not answered after this long is asked whether it is alive.
const ALIVE: Duration = Duration::from_millis(2500);
const PING: Duration = CONNECT_TIMEOUT;

/// Who only has to look has this long.
const LOOK: Duration = Duration::from_millis(500);

/// Those who may have fetched a digest while this node was away.
const SUCCESSORS: usize = 2;

/// Those asked when no origin answers.
const LAST_RESORT: usize = 16;

/// More than the second after which a lost SYN is sent again: a busy link is not a dead peer.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(1500);

/// Shorter than what the other side keeps an idle connection for.
const IDLE: Duration = Duration::from_secs(60);

/// Blobs whose peers are remembered, for how long.
const MAX_TRACKERS: u64 = 2_000;
const TRACKED: Duration = Duration::from_secs(60);

impl Peers {
    /// None: this process keeps to itself. Must run inside a tokio runtime.
    pub fn new(config: &Config, metrics: Arc<Metrics>) -> Result<Option<Self>, String> {
        let settings = config.peers.clone();
        let Some(listen) = settings.listen else { return Ok(None) };
        let discovery = Discovery::new(&settings, &config.dns.servers, listen)?;
        let members = Members::new(&settings.members, listen, settings.zone.clone(), settings.zones);
        if !discovery.is_needed() && !members.has_own() {
            return Err(format!(
                "peers.static holds no address of this host with port {}: write all members, this one included, \
                 or set peers.listen to its own address",
                listen.port()
            ));
        }
        metrics.peers.set(i64::try_from(members.len()).unwrap_or(i64::MAX));
        let client = Client::builder()
            .user_agent(concat!("dray/", env!("CARGO_PKG_VERSION")))
            .http1_only()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .pool_idle_timeout(IDLE)
            .build()
            .map_err(|e| error_chain(&e))?;
        Ok(Some(Self {
            members: ArcSwap::from_pointee(members),
            formed: watch::Sender::new(!discovery.is_needed()),
            discovery: tokio::sync::Mutex::new(discovery),
            settings,
            listen,
            health: Health::new(),
            client,
            trackers: moka::sync::Cache::builder().max_capacity(MAX_TRACKERS).time_to_idle(TRACKED).build(),
            sending: AtomicU32::new(0),
            started: Instant::now(),
            metrics,
        }))
    }

    /// Follows the names for as long as it is polled. While they cannot be resolved, everybody
    /// known stays a member.
    pub async fn follow_services(&self) {
        let mut discovery = self.discovery.lock().await;
        while discovery.is_needed() {
            if let Some(mut found) = discovery.next().await {
                found.extend(self.settings.members.iter().cloned());
                self.take(&found);
                self.formed.send_replace(true);
            }
        }
    }

    /// Waits until the members are known.
    pub async fn formed(&self) {
        // The sender lives as long as this.
        let _ = self.formed.subscribe().wait_for(|formed| *formed).await;
    }

    fn take(&self, found: &[(Zone, SocketAddr)]) {
        let members = Members::new(found, self.listen, self.settings.zone.clone(), self.settings.zones);
        if **self.members.load() != members {
            tracing::info!(members = members.len(), own = %members.own, zone = members.own_zone(), "the peers changed");
            if !members.has_own() {
                tracing::warn!("none of the peers' addresses is this host's: it asks them, but owns nothing");
            }
            self.metrics.peers.set(i64::try_from(members.len()).unwrap_or(i64::MAX));
            self.members.store(Arc::new(members));
        }
    }

    /// Whom to ask for a digest, having been asked as `role`.
    pub fn lead(&self, digest: &Digest, role: Role) -> Lead {
        self.members.load().lead(digest, role, |peer| self.health.is_well(peer))
    }

    /// Those who may have a digest that this node owns.
    pub async fn ask_successors(&self, question: &Question<'_>) -> Vec<Holder> {
        self.who_has(question, SUCCESSORS).await
    }

    /// Those who may have a digest that no origin gives.
    pub async fn ask_around(&self, question: &Question<'_>) -> Vec<Holder> {
        self.who_has(question, LAST_RESORT).await
    }

    async fn who_has(&self, question: &Question<'_>, count: usize) -> Vec<Holder> {
        let successors = self.members.load().successors(question.digest, count, |peer| self.health.is_well(peer));
        let asked = successors.into_iter().map(|peer| async move {
            let path = format!("blobs/{}", question.digest);
            let asking = self.get(Method::HEAD, peer, question, &path, Part::From(0), HeaderMap::new());
            let response = timeout(LOOK, asking).await.ok()?.ok().filter(|response| response.status() == 200)?;
            let length: u64 = wire::read(response.headers(), &http::header::CONTENT_LENGTH)?;
            let have = match wire::read_spans(response.headers()) {
                some if some.is_empty() => Span::whole(length).into(),
                some => some,
            };
            Some(Holder { peer, load: 0, have })
        });
        join_all(asked).await.into_iter().flatten().collect()
    }

    /// A blob, or a part of it, from a peer. What it says of others goes to `view`, and whether it
    /// could help.
    pub async fn blob(
        &self,
        peer: SocketAddr,
        question: &Question<'_>,
        part: Part,
        have: &Spans,
        view: &Arc<Mutex<View>>,
    ) -> Result<Incoming, Declined> {
        let answer = self.ask_for_blob(peer, question, part, have, view).await;
        match &answer {
            Ok(_) | Err(Declined::Redirected(_)) => {}
            Err(Declined::NotKept) => lock(view).refused(peer, self.now()),
            Err(Declined::Source(_)) => lock(view).broke(peer, self.now()),
        }
        answer
    }

    async fn ask_for_blob(
        &self,
        peer: SocketAddr,
        question: &Question<'_>,
        part: Part,
        have: &Spans,
        view: &Arc<Mutex<View>>,
    ) -> Result<Incoming, Declined> {
        let members = self.members.load_full();
        let mut more = HeaderMap::new();
        if members.has_own()
            && let Ok(own) = members.own.to_string().parse()
        {
            more.insert(wire::PEER, own);
            more.insert(wire::LOAD, self.sending.load(Ordering::Relaxed).into());
        }
        if let Some(have) = wire::write_spans(have) {
            more.insert(wire::HAVE, have);
        }
        let path = format!("blobs/{}", question.digest);
        let response = self.get(Method::GET, peer, question, &path, part, more).await.map_err(Declined::Source)?;
        let headers = response.headers();
        let may_be_asked =
            |other: &SocketAddr| *other != members.own && members.contains(*other) && self.health.is_well(other);
        {
            let mut view = lock(view);
            let others = wire::read_holders(headers).into_iter();
            others.filter(|holder| may_be_asked(&holder.peer)).for_each(|holder| view.learn(&holder));
            if headers.contains_key(wire::HAVE) {
                let load = wire::read(headers, &wire::LOAD).unwrap_or(0);
                view.learn(&Holder { peer, load, have: wire::read_spans(headers) });
            }
        }
        match response.status().as_u16() {
            200 | 206 => {}
            307 => {
                let to: Option<SocketAddr> = wire::read(headers, &LOCATION);
                let followed = question.redirects == Redirects::Followed;
                let to = to.filter(|to| followed && *to != peer && may_be_asked(to));
                return Err(to.map_or(Declined::NotKept, Declined::Redirected));
            }
            504 => return Err(Declined::NotKept),
            status => return Err(Declined::Source(refused(status))),
        }
        let brought = part.brought(response.status().as_u16(), headers);
        let brought = brought.and_then(|(span, total)| match part {
            // Peers honour ranges.
            Part::Span(asked) if span.start != asked.start => Err(SourceError::Malformed("another range".into())),
            _ => Ok((span, total)),
        });
        let (span, total) = brought.map_err(Declined::Source)?;
        let counter = self.metrics.peer_bytes.with_label_values(&[members.zone_of(peer), members.own_zone()]);
        let mut fetching = Fetching::new(view, peer, span, self.started);
        let body = response
            .bytes_stream()
            .inspect_ok(move |piece| {
                fetching.passed(piece);
                counter.inc_by(piece.len() as u64);
            })
            .map_err(|error| Broken(error_chain(&error)));
        Ok(Incoming::new(span, total, body))
    }

    /// A manifest by digest from a peer, with its media type. Not yet verified.
    pub async fn manifest(
        &self,
        peer: SocketAddr,
        question: &Question<'_>,
    ) -> Result<(String, bytes::Bytes), SourceError> {
        let path = format!("manifests/{}", question.digest);
        let response = self.get(Method::GET, peer, question, &path, Part::From(0), HeaderMap::new()).await?;
        match response.status().as_u16() {
            200 => {}
            504 => return Err(SourceError::NotKept),
            status => return Err(refused(status)),
        }
        let media_type = response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let media_type = media_type.ok_or_else(|| SourceError::Malformed("a peer's manifest without a type".into()))?;
        if response.content_length().is_none_or(|length| length > MAX_MANIFEST_BYTES) {
            return Err(SourceError::Malformed("a peer's manifest without an acceptable length".into()));
        }
        let bytes = match timeout_at(question.deadline, response.bytes()).await {
            Ok(Ok(bytes)) => bytes,
            Ok(Err(error)) => return Err(SourceError::Unreachable(error_chain(&error))),
            Err(_) => return Err(SourceError::TimedOut),
        };
        let members = self.members.load();
        let counter = self.metrics.peer_bytes.with_label_values(&[members.zone_of(peer), members.own_zone()]);
        counter.inc_by(bytes.len() as u64);
        Ok((media_type, bytes))
    }

    /// The first successor that has a manifest, with its media type. Not yet verified.
    pub async fn kept_manifest(&self, question: &Question<'_>) -> Option<(String, bytes::Bytes)> {
        let successors = self.members.load().successors(question.digest, SUCCESSORS, |peer| self.health.is_well(peer));
        let asked = successors
            .into_iter()
            .map(|peer| async move { timeout(LOOK, self.manifest(peer, question)).await.ok()?.ok() });
        join_all(asked).await.into_iter().flatten().next()
    }

    /// Leaves a peer alone that sent wrong bytes.
    pub fn lies(&self, peer: SocketAddr) {
        tracing::warn!(%peer, "a peer sent wrong bytes");
        self.metrics.shut_out.inc();
        self.health.lies(peer);
    }

    /// The clock of trackers and views.
    pub fn now(&self) -> Time {
        self.started.elapsed()
    }

    /// Whether a peer answers at all.
    async fn answers(&self, peer: SocketAddr) -> bool {
        let ping = self.client.get(format!("http://{peer}/v2/")).send();
        matches!(timeout(PING, ping).await, Ok(Ok(_)))
    }

    async fn get(
        &self,
        method: Method,
        peer: SocketAddr,
        question: &Question<'_>,
        path: &str,
        part: Part,
        more: HeaderMap,
    ) -> Result<Response, SourceError> {
        let place = question.place;
        let namespace = url::form_urlencoded::byte_serialize(place.registry.as_str().as_bytes());
        let url = format!("http://{peer}/v2/{}/{path}?ns={}", place.repository, namespace.collect::<String>());
        let mut request = self.client.request(method, url).header(ACCEPT_ENCODING, "identity").headers(more);
        request = match question.manner {
            Manner::IfKept => request.header(CACHE_CONTROL, wire::ONLY_IF_CACHED),
            Manner::As(role) => request.header(wire::ROLE, role.as_str()),
        };
        if question.redirects == Redirects::Refused {
            request = request.header(wire::REDIRECT, wire::NO);
        }
        if question.aim == Aim::Whole {
            request = request.header(wire::WHOLE, wire::YES);
        }
        let left = question.deadline.saturating_duration_since(Instant::now());
        request = request.header(wire::DEADLINE, u64::try_from(left.as_millis()).unwrap_or(u64::MAX));
        if let Some(range) = part.header() {
            request = request.header(RANGE, range);
        }
        let mut sending = std::pin::pin!(request.send());
        let answered = match timeout(ALIVE, &mut sending).await {
            Ok(answered) => Ok(answered),
            // It waits for its origin, or it is frozen.
            Err(_) if self.answers(peer).await => timeout_at(question.deadline, sending).await,
            Err(_) => {
                self.health.is_down(peer);
                return Err(SourceError::Unreachable("the peer is silent".into()));
            }
        };
        match answered {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => {
                self.health.is_down(peer);
                Err(SourceError::Unreachable(error_chain(&error)))
            }
            // Its origin may be slow: that is no reason for everybody to ask the origin.
            Err(_) => Err(SourceError::TimedOut),
        }
    }
}

/// A range on its way from a peer.
struct Fetching {
    view: Arc<Mutex<View>>,
    peer: SocketAddr,
    span: Span,
    /// What it promised.
    promised: u64,
    /// When the view's clock started.
    clock: Instant,
    checksum: Xxh64,
}

impl Fetching {
    fn new(view: &Arc<Mutex<View>>, peer: SocketAddr, promised: Span, clock: Instant) -> Self {
        lock(view).begin(peer);
        let span = Span { start: promised.start, end: promised.start };
        Self { view: view.clone(), peer, span, promised: promised.end, clock, checksum: Xxh64::new(0) }
    }

    fn passed(&mut self, piece: &[u8]) {
        self.checksum.update(piece);
        self.span.end += piece.len() as u64;
    }
}

impl Drop for Fetching {
    fn drop(&mut self) {
        let contribution = Contribution { peer: self.peer, span: self.span, checksum: self.checksum.digest() };
        let mut view = lock(&self.view);
        view.end(contribution);
        // It stalled, broke off, or was not needed any more: others come first for a while.
        if self.span.end < self.promised {
            view.broke(self.peer, self.clock.elapsed());
        }
    }
}

/// What a status that brings nothing says of the origin.
fn refused(status: u16) -> SourceError {
    match status {
        404 => SourceError::NotFound,
        403 => SourceError::Denied,
        status => SourceError::Failed(status),
    }
}

/// What peers have is only looked up and changed under the lock.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
