//! The names of all metrics and the handles that count. This module imports no other one: labels come in as `&'static str`
//! or as names that the configuration bounds.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use prometheus::core::Collector;
use prometheus::{
    CounterVec, Encoder, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry, TextEncoder,
};

/// Declares each metric once: handle, kind, labels, name and help text.
macro_rules! metrics {
    ($($(#[$attribute:meta])* $visible:vis $handle:ident: $kind:ident [$($label:literal),*] = $name:literal, $help:literal;)*) => {
        /// Handles to every metric, resolved once.
        pub struct Metrics {
            registry: Registry,
            $($(#[$attribute])* $visible $handle: $kind,)*
            /// The handles for each kind of response, so that a request needs one lookup instead of five.
            responses: RwLock<HashMap<ResponseKey, Arc<ResponseCounts>>>,
        }

        impl Metrics {
            /// Registers everything in a registry of its own.
            ///
            /// # Panics
            /// If a name or label is malformed or used twice, which the first test would show.
            pub fn new() -> Self {
                let registry = Registry::new();
                $(let $handle: $kind = register(&registry, $name, $help, &[$($label),*]);)*
                let metrics = Self { registry, $($handle,)* responses: RwLock::default() };
                metrics.build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
                metrics
            }
        }
    };
}

metrics! {
    requests: IntCounterVec ["route", "source", "status"] = "dray_requests_total",
        "Requests of clients and peers that got a response.";
    client_bytes: IntCounterVec ["source"] = "dray_client_bytes_total",
        "Body bytes sent to clients.";
    peer_sent_bytes: IntCounterVec ["source"] = "dray_peer_sent_bytes_total",
        "Body bytes sent to peers.";
    request_seconds: HistogramVec ["route", "source"] = "dray_request_seconds",
        "Time to the end of a response.";
    first_byte: HistogramVec ["source"] = "dray_first_byte_seconds",
        "Time to the first byte of a response, by source.";
    pub upstream_requests: IntCounterVec ["rule", "kind", "outcome"] = "dray_upstream_requests_total",
        "Requests sent to upstream registries.";
    pub upstream_bytes: IntCounterVec ["rule"] = "dray_upstream_bytes_total",
        "Body bytes received from upstream registries.";
    pub upstream_first_byte: HistogramVec ["rule"] = "dray_upstream_first_byte_seconds",
        "Time to the first byte of an upstream's response, token requests and redirects included.";
    pub upstream_body_seconds: CounterVec ["rule"] = "dray_upstream_body_seconds_total",
        "Time that connections to upstreams spent on bodies of blobs.";
    pub upstream_down: IntGaugeVec ["rule"] = "dray_upstream_down",
        "Upstreams that are down, and are probed until they respond.";
    pub client_authorizations: IntCounterVec ["rule", "outcome"] = "dray_client_authorizations_total",
        "Authorization checks of clients at upstream registries, by outcome.";
    pub upstream_rate_limit: IntGaugeVec ["rule", "upstream"] = "dray_upstream_rate_limit",
        "Pulls that an upstream allows in its window, by its last response.";
    pub upstream_rate_limit_remaining: IntGaugeVec ["rule", "upstream"] = "dray_upstream_rate_limit_remaining",
        "Pulls that an upstream still allows, by its last response.";
    pub peer_bytes: IntCounterVec ["from_zone", "to_zone"] = "dray_peer_bytes_total",
        "Body bytes received from peers.";
    pub peer_requests: IntCounterVec ["from_zone", "to_zone", "outcome"] = "dray_peer_requests_total",
        "Requests to peers, by outcome.";
    pub peer_first_byte: HistogramVec ["from_zone", "to_zone"] = "dray_peer_first_byte_seconds",
        "Time to the first byte of a peer's response with content.";
    pub downloads: IntGauge [] = "dray_downloads_in_progress",
        "Blobs that are being downloaded.";
    pub evicted_bytes: IntCounter [] = "dray_evicted_bytes_total",
        "Bytes of blobs evicted from disk.";
    pub resumed_bytes: IntCounter [] = "dray_resumed_bytes_total",
        "Bytes that an earlier, unfinished download had left on disk.";
    pub scrubbed_bytes: IntCounter [] = "dray_scrubbed_bytes_total",
        "Bytes of cached blobs read again to find corrupt ones.";
    pub corrupt_blobs: IntCounter [] = "dray_corrupt_blobs_total",
        "Cached blobs that no longer matched their digest and were dropped.";
    pub peer_ejections: IntCounter [] = "dray_peer_ejections_total",
        "Times a peer was ejected for sending corrupt bytes.";
    pub peer_auth_failures: IntCounterVec ["direction"] = "dray_peer_auth_failures_total",
        "Requests from peers and responses of peers whose proof of identity failed: other key, certificate, clock or address.";
    pub small_dropped: IntCounterVec ["cache", "reason"] = "dray_small_dropped_total",
        "Small objects that did not reach the disk, by queue that was full.";
    pub small_lookups: IntCounterVec ["cache", "result"] = "dray_small_lookups_total",
        "Lookups of small objects, by result.";
    pub small_memory: IntGaugeVec ["cache"] = "dray_small_memory_bytes",
        "Bytes of small objects in memory.";
    pub containerd_mirror_configured: IntGaugeVec ["hosts_dir"] = "dray_containerd_mirror_configured",
        "Whether dray is configured as the mirror in the hosts directory of containerd.";
    pub cache_blobs: IntGauge [] = "dray_cache_blobs",
        "Blobs that are cached as files.";
    pub cache_bytes: IntGaugeVec ["tier"] = "dray_cache_bytes",
        "Bytes held, by tier.";
    pub cache_limit: IntGaugeVec ["tier"] = "dray_cache_limit_bytes",
        "Bytes that may be held, by tier.";
    pub stale: IntCounterVec ["reason"] = "dray_stale_total",
        "Tags and lists served stale, by reason.";
    pub mismatches: IntCounter [] = "dray_digest_mismatches_total",
        "Bodies that did not match their digest.";
    pub cache_bypass: IntCounterVec ["reason"] = "dray_cache_bypass_total",
        "Blobs that were proxied without being cached, by reason.";
    pub peers: IntGauge [] = "dray_peers",
        "Addresses that DNS or the configuration lists as peers, this node included.";
    pub config: IntGaugeVec ["hash"] = "dray_config_info",
        "Always 1; nodes whose configuration differs have another hash, addresses and zones left out.";
    pub config_reload_failed: IntGauge [] = "dray_config_reload_failed",
        "Whether the configuration file was rejected when it last changed; the previous configuration stays in use.";
    pub build: IntGaugeVec ["version"] = "dray_build_info",
        "Always 1; the version is a label.";
}

/// The upper bounds of all histograms, in seconds.
const BUCKETS: [f64; 14] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

/// The kind of connection that a response is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Receiver {
    Client,
    Peer,
}

/// A response, to be counted.
#[derive(Clone, Copy, Debug)]
pub struct ResponseLabels {
    pub receiver: Receiver,
    pub route: &'static str,
    pub source: &'static str,
    pub status: u16,
    pub sent: u64,
    pub first_byte: Option<Duration>,
    pub took: Duration,
}

/// Receiver, route, source and status.
type ResponseKey = (Receiver, &'static str, &'static str, u16);

struct ResponseCounts {
    requests: IntCounter,
    sent_bytes: IntCounter,
    request_seconds: Histogram,
    first_byte: Histogram,
}

impl Metrics {
    pub fn count(&self, response: &ResponseLabels) {
        let counts = self.counts_of((response.receiver, response.route, response.source, response.status));
        counts.requests.inc();
        counts.sent_bytes.inc_by(response.sent);
        counts.request_seconds.observe(response.took.as_secs_f64());
        if let Some(first_byte) = response.first_byte {
            counts.first_byte.observe(first_byte.as_secs_f64());
        }
    }

    /// Bounded by the combinations of routes, sources and statuses.
    fn counts_of(&self, kind: ResponseKey) -> Arc<ResponseCounts> {
        let known = self.responses.read().get(&kind).cloned();
        known.unwrap_or_else(|| {
            let (receiver, route, source, status) = kind;
            let sent_bytes = match receiver {
                Receiver::Client => &self.client_bytes,
                Receiver::Peer => &self.peer_sent_bytes,
            };
            let counts = Arc::new(ResponseCounts {
                requests: self.requests.with_label_values(&[route, source, &status.to_string()]),
                sent_bytes: sent_bytes.with_label_values(&[source]),
                request_seconds: self.request_seconds.with_label_values(&[route, source]),
                first_byte: self.first_byte.with_label_values(&[source]),
            });
            self.responses.write().insert(kind, counts.clone());
            counts
        })
    }

    /// The sum of a counter over all its labels.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "counters count, and stay below 2^53")]
    pub fn sum(counters: &IntCounterVec) -> u64 {
        let families = counters.collect();
        let metrics = families.iter().flat_map(|family| family.get_metric());
        metrics.map(|metric| metric.get_counter().get_value() as u64).sum()
    }

    /// The text exposition format.
    pub fn render(&self) -> Vec<u8> {
        let mut text = Vec::new();
        // Writing into memory fails only on a malformed family, which register() refused.
        let _ = TextEncoder::new().encode(&self.registry.gather(), &mut text);
        text
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// A kind of metric. Kinds without labels ignore them.
trait Metric: Collector + Clone + 'static {
    fn make(options: Opts, labels: &[&str]) -> prometheus::Result<Self>;
}

macro_rules! kinds {
    ($($kind:ty: $make:expr;)*) => {
        $(impl Metric for $kind {
            fn make(options: Opts, labels: &[&str]) -> prometheus::Result<Self> {
                $make(options, labels)
            }
        })*
    };
}

kinds! {
    IntCounter: |options, _| IntCounter::with_opts(options);
    IntGauge: |options, _| IntGauge::with_opts(options);
    IntCounterVec: IntCounterVec::new;
    IntGaugeVec: IntGaugeVec::new;
    CounterVec: CounterVec::new;
    HistogramVec: |common_opts, labels| HistogramVec::new(HistogramOpts { common_opts, buckets: BUCKETS.to_vec() }, labels);
}

fn register<M: Metric>(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> M {
    let metric = M::make(Opts::new(name, help), labels).expect("metric names and labels are constants of this file");
    registry.register(Box::new(metric.clone())).expect("each name is registered once");
    metric
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_can_be_scraped() {
        let metrics = Metrics::new();
        metrics.requests.with_label_values(&["blob", "disk", "200"]).inc();
        let text = String::from_utf8(metrics.render()).unwrap();
        assert!(text.contains("dray_requests_total{route=\"blob\",source=\"disk\",status=\"200\"} 1"));
        assert!(text.contains("dray_build_info"));
    }
}
