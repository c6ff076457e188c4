//! What a process does, in one piece of JSON: `/api/v1/status`, the status page, `dray status`.
//!
//! Names only grow: what is there keeps its meaning. Nothing in it is a secret.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::activity::{Activity, Demand, ServedContent, Traffic};
use crate::fill::FillView;
use crate::metrics::Metrics;
use crate::peers::PeerView;
use crate::pull::Pull;
use crate::upstream::UpstreamView;

/// Where everything that is shown comes from.
pub struct StatusSources {
    pub pull: Arc<Pull>,
    pub activity: Arc<Activity>,
    pub metrics: Arc<Metrics>,
    pub registry: SocketAddr,
    pub peers: Option<SocketAddr>,
    pub started: Instant,
}

/// One process at one time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub uptime_seconds: u64,
    /// Where clients connect.
    pub registry: SocketAddr,
    /// Where other drays connect; null: this one keeps to itself.
    pub peers_listen: Option<SocketAddr>,
    pub cache: CacheUsage,
    /// What clients were sent since the start, by source: memory, disk, peer, origin, stale; none: refusals.
    pub sources: BTreeMap<Cow<'static, str>, Traffic>,
    pub traffic: Totals,
    pub fills: Vec<FillView>,
    pub peers: Vec<PeerView>,
    pub upstreams: Vec<UpstreamView>,
    pub recent: Vec<ServedContent>,
    pub images: Vec<Demand>,
}

/// Bytes on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheUsage {
    /// Of large blobs.
    pub blobs_bytes: u64,
    /// That they may take now.
    pub blobs_limit: u64,
    /// Set aside for small objects.
    pub small_bytes: u64,
    pub evicted_bytes: u64,
}

/// Bytes since the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// To clients.
    pub sent_bytes: u64,
    /// From registries, also on behalf of other nodes.
    pub upstream_bytes: u64,
    /// From other drays.
    pub peer_bytes: u64,
    /// What clients of this node were sent that did not come from a registry for them.
    pub saved_bytes: u64,
}

impl StatusSources {
    pub fn status(&self) -> Status {
        let sources = self.activity.sources();
        let sent: u64 = sources.values().map(|traffic| traffic.bytes).sum();
        let (blobs_bytes, blobs_limit, small_bytes) = self.pull.disk_usage();
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_seconds: self.started.elapsed().as_secs(),
            registry: self.registry,
            peers_listen: self.peers,
            cache: CacheUsage {
                blobs_bytes,
                blobs_limit,
                small_bytes,
                evicted_bytes: self.metrics.evicted_bytes.get(),
            },
            traffic: Totals {
                sent_bytes: sent,
                upstream_bytes: Metrics::sum(&self.metrics.upstream_bytes),
                peer_bytes: Metrics::sum(&self.metrics.peer_bytes),
                saved_bytes: self.metrics.saved_bytes.get(),
            },
            fills: self.pull.fills_now(),
            peers: self.pull.peers().map(|peers| peers.views()).unwrap_or_default(),
            upstreams: self.pull.upstreams_now(),
            recent: self.activity.recent(),
            images: self.activity.images(),
            sources,
        }
    }
}
