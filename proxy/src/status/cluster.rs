//! All nodes at a glance. Nothing of it is stored: each node is requested when an operator asks.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use futures_util::StreamExt;
use http::Method;
use serde::{Deserialize, Serialize};

use super::{StatusSources, Totals};
use crate::peers::{NodeResult, PEER_OPERATIONS, Peers};
use crate::times::LOOKUP_TIMEOUT;

/// The nodes of a cluster, and what they did together since their start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClusterStatus {
    /// This node first, then by address.
    pub nodes: Vec<NodeResult<NodeSummary>>,
    pub traffic: Totals,
    /// What clients got without a download from an upstream.
    pub saved_bytes: u64,
    /// The part of the responses with content that came from a cache or a peer; null: there was none.
    pub hit_ratio: Option<f64>,
    pub downloads: u64,
    /// More than one: nodes run different releases.
    pub versions: BTreeSet<String>,
    /// More than one: nodes have different configurations.
    pub config_hashes: BTreeSet<String>,
}

/// One node at a glance, within a KiB.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeSummary {
    pub version: String,
    pub config_hash: String,
    pub uptime_seconds: u64,
    /// Responses with content to clients, and how many of them came from an upstream.
    pub requests: u64,
    pub upstream_requests: u64,
    pub traffic: Totals,
    /// In progress.
    pub downloads: u64,
    pub blobs_bytes: u64,
    pub blobs_limit_bytes: u64,
    /// Peers that it does not use, the first few.
    pub unhealthy_peers: Vec<UnhealthyPeer>,
    pub unhealthy_peers_total: u64,
    /// Upstreams that it cannot use or that limit it, the first few.
    pub unhealthy_upstreams: Vec<UnhealthyUpstream>,
    pub unhealthy_upstreams_total: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UnhealthyPeer {
    pub address: SocketAddr,
    pub state: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UnhealthyUpstream {
    pub upstream: String,
    pub state: String,
    pub since_seconds: Option<u64>,
    pub last_error: Option<String>,
}

/// Peers and upstreams of one summary. More: a thousand summaries exceed a MiB.
const MAX_LISTED: usize = 2;

/// Characters of an error.
const MAX_ERROR: usize = 120;

/// Where a response with content came from, if it cost the upstreams nothing.
const CACHED: [&str; 4] = ["memory", "disk", "peer", "stale"];

impl StatusSources {
    pub fn summary(&self) -> NodeSummary {
        let status = self.status();
        let requests_from = |source: &str| status.sources.get(source).map_or(0, |traffic| traffic.requests);
        let upstream_requests = requests_from("upstream");
        let unhealthy_peers: Vec<_> = status.peers.into_iter().filter(|peer| peer.state != "healthy").collect();
        let is_unhealthy = |state: &str| !matches!(state, "healthy" | "unknown");
        let unhealthy_upstreams: Vec<_> =
            status.upstreams.into_iter().filter(|upstream| is_unhealthy(&upstream.state)).collect();
        NodeSummary {
            version: status.version,
            config_hash: status.config_hash,
            uptime_seconds: status.uptime_seconds,
            requests: upstream_requests + CACHED.into_iter().map(requests_from).sum::<u64>(),
            upstream_requests,
            traffic: status.traffic,
            downloads: status.downloads.len() as u64,
            blobs_bytes: status.cache.blobs_bytes,
            blobs_limit_bytes: status.cache.blobs_limit_bytes,
            unhealthy_peers_total: unhealthy_peers.len() as u64,
            unhealthy_upstreams_total: unhealthy_upstreams.len() as u64,
            unhealthy_peers: unhealthy_peers
                .into_iter()
                .take(MAX_LISTED)
                .map(|peer| UnhealthyPeer { address: peer.address, state: peer.state })
                .collect(),
            unhealthy_upstreams: unhealthy_upstreams
                .into_iter()
                .take(MAX_LISTED)
                .map(|upstream| UnhealthyUpstream {
                    upstream: upstream.upstream,
                    state: upstream.state,
                    since_seconds: upstream.since_seconds,
                    last_error: upstream.last_error.map(|error| error.chars().take(MAX_ERROR).collect()),
                })
                .collect(),
        }
    }

    /// Requests the summaries of all nodes. Error, for operators: peers do not authenticate each other.
    pub async fn cluster(&self) -> Result<ClusterStatus, &'static str> {
        let peers = self.pull.peers().filter(|peers| peers.are_authenticated());
        let Some(peers) = peers else {
            return Err(
                "the other nodes are shown only if peers authenticate each other: set peers.key_file or peers.mtls",
            );
        };
        let path = format!("{PEER_OPERATIONS}summary");
        let others = Peers::request_all(peers, Method::GET, path, LOOKUP_TIMEOUT).collect::<Vec<_>>().await;
        Ok(ClusterStatus::of(self.summary(), others))
    }
}

impl ClusterStatus {
    fn of(own: NodeSummary, mut others: Vec<NodeResult<NodeSummary>>) -> Self {
        others.sort_by_key(|other| other.node);
        let nodes: Vec<_> = std::iter::once(NodeResult::new(None, Ok(own))).chain(others).collect();
        let reached = || nodes.iter().filter_map(|node| node.result.as_ref());
        let sum = |of: fn(&NodeSummary) -> u64| reached().map(of).sum::<u64>();
        let traffic = Totals {
            sent_bytes: sum(|node| node.traffic.sent_bytes),
            upstream_bytes: sum(|node| node.traffic.upstream_bytes),
            peer_bytes: sum(|node| node.traffic.peer_bytes),
        };
        let (requests, upstream_requests) = (sum(|node| node.requests), sum(|node| node.upstream_requests));
        #[allow(clippy::cast_precision_loss, reason = "a ratio for people")]
        let hit_ratio = (requests > 0).then(|| 1.0 - upstream_requests as f64 / requests as f64);
        Self {
            traffic,
            saved_bytes: traffic.sent_bytes.saturating_sub(traffic.upstream_bytes),
            hit_ratio,
            downloads: sum(|node| node.downloads),
            versions: reached().map(|node| node.version.clone()).collect(),
            config_hashes: reached().map(|node| node.config_hash.clone()).collect(),
            nodes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(version: &str, sent: u64, upstream: u64) -> NodeSummary {
        NodeSummary {
            version: version.to_owned(),
            config_hash: "h".repeat(12),
            uptime_seconds: u64::MAX,
            requests: 10,
            upstream_requests: 1,
            traffic: Totals { sent_bytes: sent, upstream_bytes: upstream, peer_bytes: 5 },
            downloads: 1,
            blobs_bytes: u64::MAX,
            blobs_limit_bytes: u64::MAX,
            unhealthy_peers: (0..2)
                .map(|nth| UnhealthyPeer { address: ([10, 0, 0, 1], 10_000 + nth).into(), state: "ejected".into() })
                .collect(),
            unhealthy_peers_total: 999,
            unhealthy_upstreams: vec![
                UnhealthyUpstream {
                    upstream: "https://registry-1.docker.io".into(),
                    state: "rate_limited".into(),
                    since_seconds: Some(u64::MAX),
                    last_error: Some("e".repeat(MAX_ERROR)),
                };
                MAX_LISTED
            ],
            unhealthy_upstreams_total: 9,
        }
    }

    #[test]
    fn cluster_sums_the_nodes_that_were_reached() {
        let peer = |nth: u8| Some(SocketAddr::from(([10, 0, 0, nth], 5052)));
        let others = vec![
            NodeResult { node: peer(3), result: None, error: Some("down".into()) },
            NodeResult { node: peer(2), result: Some(summary("0.2.0", 100, 10)), error: None },
        ];
        let cluster = ClusterStatus::of(summary("0.1.0", 50, 60), others);
        assert_eq!(cluster.nodes.iter().map(|node| node.node).collect::<Vec<_>>(), [None, peer(2), peer(3)]);
        assert_eq!((cluster.traffic.sent_bytes, cluster.saved_bytes, cluster.downloads), (150, 80, 2));
        assert_eq!((cluster.hit_ratio, cluster.versions.len(), cluster.config_hashes.len()), (Some(0.9), 2, 1));
    }

    #[test]
    fn thousand_nodes_fit_into_a_mebibyte() {
        let others = (0..999).map(|nth| NodeResult {
            node: Some(SocketAddr::from(([10, 0, 0, 1], nth))),
            result: Some(summary("0.1.0", u64::MAX / 2000, 0)),
            error: None,
        });
        let cluster = ClusterStatus::of(summary("0.1.0", 0, 0), others.collect());
        let bytes = serde_json::to_vec(&cluster).unwrap().len();
        assert!(bytes <= 1 << 20, "{bytes}");
    }
}
