//! Pings peers that are suspected or down. A peer that is down gets no other request until it responds to a ping.

use std::net::SocketAddr;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use http::header::{CACHE_CONTROL, RANGE};
use http::{HeaderMap, HeaderValue, Method};
use tokio::time::{sleep_until, timeout};

use super::query::Downstream;
use super::wire::Terms;
use super::{CONNECT_TIMEOUT, Peers, wire};

/// Timeout of the probe that tells a slow peer from a frozen one. Longer: requests wait longer for frozen peers.
/// Shorter: peers under load are marked as down.
const PROBE_TIMEOUT: Duration = CONNECT_TIMEOUT;

/// Timeout of a ping: enough for one SYN that TCP resends after a second. Shorter: one lost packet counts as a missed
/// ping.
const PING_TIMEOUT: Duration = Duration::from_millis(1200);

/// Concurrent pings. Larger: more sockets when much of the cluster is down. Smaller: recovered peers are found later.
const MAX_CONCURRENT_PINGS: usize = 64;

impl Peers {
    /// Pings the peers that are due, while it is polled.
    pub async fn run_pings(&self) {
        let mut pinged = FuturesUnordered::new();
        loop {
            let next = self.health.lock().next_ping().filter(|_| pinged.len() < MAX_CONCURRENT_PINGS);
            tokio::select! {
                () = sleep_until(self.started + next.unwrap_or_default()), if next.is_some() => {}
                () = self.ping_due.notified() => {}
                Some(()) = pinged.next() => {}
            }
            let members = self.members.load_full();
            let room = MAX_CONCURRENT_PINGS - pinged.len();
            let due = self.health.lock().take_due_pings(self.now(), room, |peer| members.contains(*peer));
            pinged.extend(due.into_iter().map(|peer| self.ping(peer)));
        }
    }

    async fn ping(&self, peer: SocketAddr) {
        let url = format!("{}://{peer}/v2/", self.auth.scheme());
        match timeout(PING_TIMEOUT, self.client.get(url).send()).await {
            Ok(Ok(_)) => self.health.lock().mark_up(&peer),
            Ok(Err(_)) | Err(_) => self.health.lock().record_missed_ping(peer, self.now()),
        }
    }

    /// Records that a peer cannot be reached.
    pub(super) fn mark_down(&self, peer: SocketAddr) {
        self.health.lock().mark_down(peer, self.now());
        self.ping_due.notify_one();
    }

    /// Records that a peer was slow for a request that needs no work, and pings it.
    pub(super) fn mark_suspect(&self, peer: SocketAddr) {
        self.health.lock().mark_suspect(peer, self.now());
        self.ping_due.notify_one();
    }

    /// Records a successful response of a peer.
    pub(super) fn record_success(&self, peer: SocketAddr) {
        self.health.lock().record_success(&peer);
    }

    /// Whether a peer with an outstanding response responds to a request that needs no upstream.
    pub(super) async fn responds_to_probe(&self, peer: SocketAddr, outstanding: Option<reqwest::Request>) -> bool {
        let Some(mut probe) = outstanding else { return false };
        *probe.method_mut() = Method::HEAD;
        make_probe(probe.headers_mut());
        let path = probe.url()[url::Position::BeforePath..].to_owned();
        self.auth.sign(peer, &Method::HEAD, &path, probe.headers_mut());
        matches!(timeout(PROBE_TIMEOUT, self.client.execute(probe)).await, Ok(Ok(_)))
    }
}

/// Turns a request into a probe, which must not register this node as a holder or a waiting peer, nor report it as idle.
fn make_probe(headers: &mut HeaderMap) {
    let terms = Terms { peers: Downstream::NONE, may_depute: false, ..Terms::read(headers) };
    if let Some(terms) = terms.write() {
        // Replaces the header: of two, the peer reads the first, which names this node.
        headers.insert(wire::REQUEST, terms);
    }
    [wire::HAVE, RANGE].iter().for_each(|name| drop(headers.remove(name)));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static(wire::ONLY_IF_CACHED));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probe_names_no_peer_and_no_bytes() {
        let lines = [
            (wire::REQUEST, "role=zone; rule=4f1c; peers=10.0.0.1:5052; whole; deputy"),
            (wire::HAVE, "2;0-99"),
            (RANGE, "bytes=0-9"),
        ];
        let mut headers: HeaderMap =
            lines.into_iter().map(|(name, text)| (name, HeaderValue::from_static(text))).collect();
        make_probe(&mut headers);
        let all: Vec<_> = headers.get_all(wire::REQUEST).iter().collect();
        assert_eq!(all, ["role=zone; rule=4f1c; whole"]);
        assert_eq!(headers[CACHE_CONTROL], "only-if-cached");
        assert_eq!(headers.len(), 2);
    }
}
