//! Other drays: who owns a digest, and asking them.
//!
//! Peers speak the registry protocol, digests only, on a port of their own. Whoever is asked there
//! goes to the origin itself, so that no request ever travels in a circle.

pub mod ring;

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use futures_util::TryStreamExt;
use hickory_resolver::TokioResolver;
use http::header::{ACCEPT_ENCODING, CONTENT_TYPE, RANGE};
use reqwest::{Client, Response};
use tokio::time::{Instant, timeout, timeout_at};

use crate::config::Config;
use crate::dns;
use crate::metrics::Metrics;
use crate::oci::{Digest, MAX_MANIFEST_BYTES};
use crate::registries::Place;
use crate::source::{Broken, Incoming, Part, SourceError, error_chain};

/// The other processes and what is known of their health.
pub struct Peers {
    members: ArcSwap<Members>,
    /// Members that the configuration names, and where this process listens.
    written: Vec<SocketAddr>,
    listen: SocketAddr,
    /// Names that have the addresses of the others.
    services: Vec<String>,
    resolver: TokioResolver,
    down: moka::sync::Cache<SocketAddr, ()>,
    client: Client,
    metrics: Arc<Metrics>,
}

/// Who takes part.
#[derive(Debug, PartialEq, Eq)]
struct Members {
    /// All members, this process included, in order.
    all: Vec<SocketAddr>,
    own: SocketAddr,
}

/// How often the names are asked.
const REFRESH: Duration = Duration::from_secs(5);

/// A peer that cannot be reached is left alone for this long.
const DOWN: Duration = Duration::from_secs(5);

/// A peer that has not answered after this long is asked whether it is alive.
const ALIVE: Duration = Duration::from_millis(2500);
const PING: Duration = Duration::from_millis(500);

/// Owners tried before the origin is asked instead.
const MAX_OWNERS: usize = 3;

const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);

/// Where all members count as one zone.
const ZONE: &str = "-";

impl Peers {
    /// None: this process keeps to itself.
    pub fn new(config: &Config, metrics: Arc<Metrics>) -> Result<Option<Self>, String> {
        let Some(listen) = config.peers.listen else { return Ok(None) };
        let resolver = dns::resolver(&config.dns.servers)?;
        let written = config.peers.members.clone();
        let members = Members::new(written.clone(), listen);
        if config.peers.service.is_empty() && !members.has_own() {
            return Err(format!(
                "peers.static holds no address of this host with port {}: write all members, this one included, \
                 or set peers.listen to its own address",
                listen.port()
            ));
        }
        metrics.peers.set(i64::try_from(members.all.len()).unwrap_or(i64::MAX));
        let members = ArcSwap::from_pointee(members);
        let client = Client::builder()
            .user_agent(concat!("dray/", env!("CARGO_PKG_VERSION")))
            .http1_only()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .build()
            .map_err(|e| error_chain(&e))?;
        let down = moka::sync::Cache::builder().max_capacity(100_000).time_to_live(DOWN).build();
        let services = config.peers.service.clone();
        Ok(Some(Self { members, written, listen, services, resolver, down, client, metrics }))
    }

    /// Follows the names for as long as it is polled. While they cannot be resolved, everybody
    /// known stays a member.
    pub async fn follow_services(&self) {
        let mut trouble = None;
        while !self.services.is_empty() {
            match self.resolve().await {
                Ok(found) => {
                    trouble = None;
                    self.take(found);
                }
                Err(error) if trouble.as_ref() == Some(&error) => {}
                Err(error) => {
                    tracing::warn!(error, "the peers' name cannot be resolved");
                    trouble = Some(error);
                }
            }
            let jitter = fastrand::u64(0..1000);
            tokio::time::sleep(REFRESH + Duration::from_millis(jitter)).await;
        }
    }

    async fn resolve(&self) -> Result<Vec<SocketAddr>, String> {
        let mut found = self.written.clone();
        for service in &self.services {
            let answer = self.resolver.lookup_ip(service.as_str()).await.map_err(|e| format!("{service}: {e}"))?;
            found.extend(answer.iter().map(|ip| SocketAddr::new(ip, self.listen.port())));
        }
        Ok(found)
    }

    fn take(&self, found: Vec<SocketAddr>) {
        let members = Members::new(found, self.listen);
        if **self.members.load() != members {
            tracing::info!(members = members.all.len(), own = %members.own, "the peers changed");
            if !members.has_own() {
                tracing::warn!("none of the peers' addresses is this host's: it asks them, but owns nothing");
            }
            self.metrics.peers.set(i64::try_from(members.all.len()).unwrap_or(i64::MAX));
            self.members.store(Arc::new(members));
        }
    }

    /// The peers to ask before the origin, best first. Empty: this process is the owner.
    pub fn owners(&self, digest: &Digest) -> Vec<SocketAddr> {
        let alive = |peer: &SocketAddr| !self.down.contains_key(peer);
        let members = self.members.load();
        ring::order(&members.all, digest)
            .into_iter()
            .take(MAX_OWNERS)
            .take_while(|member| *member != members.own)
            .filter(alive)
            .collect()
    }

    /// A blob, or the rest of it, from a peer.
    pub async fn blob(
        &self,
        peer: SocketAddr,
        place: &Place,
        digest: &Digest,
        part: Part,
        deadline: Instant,
    ) -> Result<Incoming, SourceError> {
        let response = self.get(peer, place, &format!("blobs/{digest}"), part, deadline).await?;
        let (span, total) = part.brought(response.status().as_u16(), response.headers())?;
        let counter = self.metrics.peer_bytes.with_label_values(&[ZONE, ZONE]);
        let body = response
            .bytes_stream()
            .inspect_ok(move |piece| counter.inc_by(piece.len() as u64))
            .map_err(|error| Broken(error_chain(&error)));
        Ok(Incoming::new(span, total, body))
    }

    /// A manifest by digest from a peer, with its media type. Not yet verified.
    pub async fn manifest(
        &self,
        peer: SocketAddr,
        place: &Place,
        digest: &Digest,
        deadline: Instant,
    ) -> Result<(String, bytes::Bytes), SourceError> {
        let response = self.get(peer, place, &format!("manifests/{digest}"), Part::From(0), deadline).await?;
        let media_type = response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let media_type = media_type.ok_or_else(|| SourceError::Malformed("a peer's manifest without a type".into()))?;
        if response.content_length().is_none_or(|length| length > MAX_MANIFEST_BYTES) {
            return Err(SourceError::Malformed("a peer's manifest without an acceptable length".into()));
        }
        let bytes = match timeout_at(deadline, response.bytes()).await {
            Ok(Ok(bytes)) => bytes,
            Ok(Err(error)) => return Err(SourceError::Unreachable(error_chain(&error))),
            Err(_) => return Err(SourceError::TimedOut),
        };
        self.metrics.peer_bytes.with_label_values(&[ZONE, ZONE]).inc_by(bytes.len() as u64);
        Ok((media_type, bytes))
    }

    /// Whether a peer answers at all.
    async fn answers(&self, peer: SocketAddr) -> bool {
        let ping = self.client.get(format!("http://{peer}/v2/")).send();
        matches!(timeout(PING, ping).await, Ok(Ok(_)))
    }

    async fn get(
        &self,
        peer: SocketAddr,
        place: &Place,
        path: &str,
        part: Part,
        deadline: Instant,
    ) -> Result<Response, SourceError> {
        let namespace = url::form_urlencoded::byte_serialize(place.registry.as_str().as_bytes());
        let url = format!("http://{peer}/v2/{}/{path}?ns={}", place.repository, namespace.collect::<String>());
        let mut request = self.client.get(url).header(ACCEPT_ENCODING, "identity");
        if let Some(range) = part.header() {
            request = request.header(RANGE, range);
        }
        let mut sending = std::pin::pin!(request.send());
        let answered = match timeout(ALIVE, &mut sending).await {
            Ok(answered) => Ok(answered),
            // It waits for its origin, or it is frozen.
            Err(_) if self.answers(peer).await => timeout_at(deadline, sending).await,
            Err(_) => {
                self.down.insert(peer, ());
                return Err(SourceError::Unreachable("the peer is silent".into()));
            }
        };
        let response = match answered {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => {
                self.down.insert(peer, ());
                return Err(SourceError::Unreachable(error_chain(&error)));
            }
            // Its origin may be slow: that is no reason for everybody to ask the origin.
            Err(_) => return Err(SourceError::TimedOut),
        };
        match response.status().as_u16() {
            200 | 206 => Ok(response),
            404 => Err(SourceError::NotFound),
            403 => Err(SourceError::Denied),
            status => Err(SourceError::Failed(status)),
        }
    }
}

impl Members {
    fn new(mut all: Vec<SocketAddr>, listen: SocketAddr) -> Self {
        let own = all.iter().copied().find(|member| is_own(*member, listen)).unwrap_or(listen);
        // Others know this process by the address they were given: 0.0.0.0 owns nothing.
        if !own.ip().is_unspecified() {
            all.push(own);
        }
        all.sort_unstable();
        all.dedup();
        Self { all, own }
    }

    /// Whether the others know this process as a member.
    fn has_own(&self) -> bool {
        !self.own.ip().is_unspecified()
    }
}

/// Whether a member is this process: it listens on that port, and on that address or on all
/// addresses of which that one is local.
fn is_own(member: SocketAddr, listen: SocketAddr) -> bool {
    let local = || UdpSocket::bind((member.ip(), 0)).is_ok();
    member == listen || (member.port() == listen.port() && listen.ip().is_unspecified() && local())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_knows_itself() {
        let own = |member: &str, listen: &str| is_own(member.parse().unwrap(), listen.parse().unwrap());
        assert!(own("127.0.0.1:5052", "127.0.0.1:5052"));
        assert!(own("127.0.0.1:5052", "0.0.0.0:5052"));
        assert!(!own("127.0.0.1:5053", "0.0.0.0:5052"));
        assert!(!own("192.0.2.1:5052", "0.0.0.0:5052"));
    }
}
