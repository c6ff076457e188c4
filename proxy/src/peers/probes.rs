//! Which peers are there: who is silent is pinged, and left alone until it answers.

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

/// Whoever owes an answer and is there says so within this time.
const ANSWER: Duration = CONNECT_TIMEOUT;

/// Whoever is there answers a ping within this time: time for one SYN that is sent again.
const PING: Duration = Duration::from_millis(1200);

/// Pinged at the same time.
const AT_A_TIME: usize = 64;

impl Peers {
    /// Pings those who were silent, for as long as it is polled.
    pub async fn look_after(&self) {
        let mut pinged = FuturesUnordered::new();
        loop {
            let next = self.health.lock().next_ping().filter(|_| pinged.len() < AT_A_TIME);
            tokio::select! {
                () = sleep_until(self.started + next.unwrap_or_default()), if next.is_some() => {}
                () = self.troubled.notified() => {}
                Some(()) = pinged.next() => {}
            }
            let members = self.members.load_full();
            let room = AT_A_TIME - pinged.len();
            let due = self.health.lock().to_ping(self.now(), room, |peer| members.contains(*peer));
            pinged.extend(due.into_iter().map(|peer| self.ping(peer)));
        }
    }

    async fn ping(&self, peer: SocketAddr) {
        let url = format!("{}://{peer}/v2/", self.proof.scheme());
        match timeout(PING, self.client.get(url).send()).await {
            Ok(Ok(_)) => self.health.lock().is_up(&peer),
            Ok(Err(_)) | Err(_) => self.health.lock().is_missed(peer, self.now()),
        }
    }

    /// A peer could not be reached.
    pub(super) fn is_down(&self, peer: SocketAddr) {
        self.health.lock().is_down(peer, self.now());
        self.troubled.notify_one();
    }

    /// A peer took long for what needs no time.
    pub(super) fn is_suspect(&self, peer: SocketAddr) {
        self.health.lock().is_suspect(peer, self.now());
        self.troubled.notify_one();
    }

    /// A peer gave what it was asked for.
    pub(super) fn gives(&self, peer: SocketAddr) {
        self.health.lock().gives(&peer);
    }

    /// Whether a peer that owes an answer says what it has of the same: no origin is needed for that.
    pub(super) async fn answers(&self, peer: SocketAddr, owed: Option<reqwest::Request>) -> bool {
        let Some(mut probe) = owed else { return false };
        *probe.method_mut() = Method::HEAD;
        ask_nothing(probe.headers_mut());
        let path = probe.url()[url::Position::BeforePath..].to_owned();
        self.proof.sign(peer, &Method::HEAD, &path, probe.headers_mut());
        matches!(timeout(ANSWER, self.client.execute(probe)).await, Ok(Ok(_)))
    }
}

/// Makes a request one that only finds out whether the peer is there: it is not to be remembered by this.
fn ask_nothing(headers: &mut HeaderMap) {
    let terms = Terms { peers: Downstream::NONE, may_depute: false, ..Terms::read(headers) };
    if let Some(terms) = terms.write() {
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
        ask_nothing(&mut headers);
        let all: Vec<_> = headers.get_all(wire::REQUEST).iter().collect();
        assert_eq!(all, ["role=zone; rule=4f1c; whole"]);
        assert_eq!(headers[CACHE_CONTROL], "only-if-cached");
        assert_eq!(headers.len(), 2);
    }
}
