//! The state of a process as JSON, for `/api/v1/status`, the status page and `dray status`.
//!
//! Fields are only added: existing ones keep their meaning. None contains a secret.

mod cluster;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use arc_swap::ArcSwap;
use serde::{Deserialize, Serialize};

pub use self::cluster::{ClusterStatus, NodeSummary};
use crate::activity::{Activity, Demand, ServedContent, Traffic};
use crate::config::Config;
use crate::fill::FillView;
use crate::metrics::Metrics;
use crate::peers::PeerView;
use crate::pull::Pull;
use crate::upstream::UpstreamView;

/// The components that the status is collected from.
pub struct StatusSources {
    pub pull: Arc<Pull>,
    pub activity: Arc<Activity>,
    pub metrics: Arc<Metrics>,
    pub config: Arc<ArcSwap<Config>>,
    pub registry: SocketAddr,
    pub peers: Option<SocketAddr>,
    pub started: Instant,
}

/// The state of one process at one time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    /// Of the running configuration, as `dray check-config` prints it and `dray_config_info` exports it.
    pub config_hash: String,
    pub uptime_seconds: u64,
    /// The address of the registry listener.
    pub registry_listen: SocketAddr,
    /// The address of the peer listener; null: this process has no peers.
    pub peers_listen: Option<SocketAddr>,
    pub cache: CacheUsage,
    /// Responses to clients since the start, by source: memory, disk, peer, upstream, stale; none: errors.
    pub sources: BTreeMap<Cow<'static, str>, Traffic>,
    pub traffic: Totals,
    pub downloads: Vec<FillView>,
    pub peers: Vec<PeerView>,
    pub upstreams: Vec<UpstreamView>,
    pub recent_requests: Vec<ServedContent>,
    pub top_images: Vec<Demand>,
}

/// Bytes on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheUsage {
    /// Size of the large blobs.
    pub blobs_bytes: u64,
    /// Current limit for the large blobs.
    pub blobs_limit_bytes: u64,
    /// Reserved for small objects.
    pub small_bytes: u64,
    pub evicted_bytes: u64,
}

/// Bytes since the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Sent to clients.
    pub sent_bytes: u64,
    /// Downloaded from upstreams, also on behalf of peers.
    pub upstream_bytes: u64,
    /// Received from peers.
    pub peer_bytes: u64,
}

impl StatusSources {
    pub fn status(&self) -> Status {
        let sources = self.activity.sources();
        let sent: u64 = sources.values().map(|traffic| traffic.bytes).sum();
        let (blobs_bytes, blobs_limit, small_bytes) = self.pull.disk_usage();
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            config_hash: self.config.load().hash(),
            uptime_seconds: self.started.elapsed().as_secs(),
            registry_listen: self.registry,
            peers_listen: self.peers,
            cache: CacheUsage {
                blobs_bytes,
                blobs_limit_bytes: blobs_limit,
                small_bytes,
                evicted_bytes: self.metrics.evicted_bytes.get(),
            },
            traffic: Totals {
                sent_bytes: sent,
                upstream_bytes: Metrics::sum(&self.metrics.upstream_bytes),
                peer_bytes: Metrics::sum(&self.metrics.peer_bytes),
            },
            downloads: self.pull.blobs.downloads(),
            peers: self.pull.peers().map(|peers| peers.views()).unwrap_or_default(),
            upstreams: self.pull.upstream_views(),
            recent_requests: self.activity.recent(),
            top_images: self.activity.images(),
            sources,
        }
    }
}
