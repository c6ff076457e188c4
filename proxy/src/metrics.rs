//! Metrics: what they are called, and the handles that count. A leaf: it knows nobody's types, labels come in as `&'static str` or
//! as names that the configuration bounds.

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
            /// What counts each kind of answer, so that a request looks for one thing and not for five.
            answers: RwLock<HashMap<ResponseKey, Arc<ResponseCounts>>>,
        }

        impl Metrics {
            /// Registers everything in a registry of its own.
            ///
            /// # Panics
            /// If a name or label is malformed or used twice, which the first test would show.
            pub fn new() -> Self {
                let registry = Registry::new();
                $(let $handle: $kind = register(&registry, $name, $help, &[$($label),*]);)*
                let metrics = Self { registry, $($handle,)* answers: RwLock::default() };
                metrics.build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
                metrics
            }
        }
    };
}

metrics! {
    requests: IntCounterVec ["route", "source", "status"] = "dray_requests_total",
        "Requests answered.";
    sent_bytes: IntCounterVec ["source"] = "dray_sent_bytes_total",
        "Body bytes sent to clients and peers.";
    pub saved_bytes: IntCounter [] = "dray_saved_bytes_total",
        "Body bytes sent to clients that did not come from a registry for them.";
    request_seconds: HistogramVec ["route", "source"] = "dray_request_seconds",
        "Time to the end of an answer.";
    first_byte: HistogramVec ["source"] = "dray_first_byte_seconds",
        "Time to the first byte of an answer, by source.";
    pub upstream_requests: IntCounterVec ["rule", "kind", "outcome"] = "dray_origin_requests_total",
        "Requests sent to origins.";
    pub upstream_bytes: IntCounterVec ["rule"] = "dray_origin_bytes_total",
        "Body bytes received from origins.";
    pub upstream_first_byte: HistogramVec ["rule"] = "dray_origin_first_byte_seconds",
        "Time until an origin began to answer, tokens and redirects included.";
    pub upstream_body_seconds: CounterVec ["rule"] = "dray_origin_body_seconds_total",
        "Time that bodies of blobs took to come, all connections together.";
    pub upstream_down: IntGaugeVec ["rule"] = "dray_origin_down",
        "Upstreams that do not answer and are asked again all the time.";
    pub client_checks: IntCounterVec ["rule", "outcome"] = "dray_client_checks_total",
        "Times a registry was asked whether a client may have something, by what it said.";
    pub upstream_rate_limit: IntGaugeVec ["rule", "upstream"] = "dray_origin_rate_limit",
        "Pulls that an upstream allows in its window, as it last said.";
    pub upstream_rate_limit_remaining: IntGaugeVec ["rule", "upstream"] = "dray_origin_rate_limit_remaining",
        "Pulls that an upstream still allows, as it last said.";
    pub peer_bytes: IntCounterVec ["from_zone", "to_zone"] = "dray_peer_bytes_total",
        "Body bytes received from peers.";
    pub peer_requests: IntCounterVec ["from_zone", "to_zone", "outcome"] = "dray_peer_requests_total",
        "Questions to peers, by what they gave.";
    pub peer_first_byte: HistogramVec ["from_zone", "to_zone"] = "dray_peer_first_byte_seconds",
        "Time until a peer gave what it was asked for.";
    pub fills: IntGaugeVec ["state"] = "dray_fills",
        "Blobs being fetched, or proven on disk.";
    pub evicted_bytes: IntCounter [] = "dray_evicted_bytes_total",
        "Bytes of blobs evicted from disk.";
    pub resumed_bytes: IntCounter [] = "dray_resumed_bytes_total",
        "Bytes that an earlier, unfinished fetch had left.";
    pub scrubbed_bytes: IntCounter [] = "dray_scrubbed_bytes_total",
        "Bytes of cached blobs read again to find damage.";
    pub damaged: IntCounter [] = "dray_damaged_blobs_total",
        "Cached blobs that no longer matched their digest, and were dropped.";
    pub shut_out: IntCounter [] = "dray_peers_shut_out_total",
        "Times a peer was left alone for sending wrong bytes.";
    pub unproven: IntCounterVec ["what"] = "dray_peers_unproven_total",
        "Questions to us and answers to us that no peer has proven: other key, certificate, clock or address, or a stranger.";
    pub small_dropped: IntCounterVec ["cache", "reason"] = "dray_small_dropped_total",
        "Small objects that did not reach the disk, by queue that was full.";
    pub small_lookups: IntCounterVec ["cache", "found"] = "dray_small_lookups_total",
        "Times a small object was looked for, by where it was found.";
    pub small_memory: IntGaugeVec ["cache"] = "dray_small_memory_bytes",
        "Bytes of small objects in memory.";
    pub containerd_pointed: IntGaugeVec ["hosts_dir"] = "dray_containerd_pointed",
        "Whether the hosts directory of containerd says what it should.";
    pub cache_blobs: IntGauge [] = "dray_cache_blobs",
        "Blobs that are kept as files.";
    pub cache_bytes: IntGaugeVec ["tier"] = "dray_cache_bytes",
        "Bytes held, by tier.";
    pub cache_limit: IntGaugeVec ["tier"] = "dray_cache_limit_bytes",
        "Bytes that may be held, by tier.";
    pub stale: IntCounterVec ["reason"] = "dray_stale_total",
        "Tags answered from an expired record, by reason.";
    pub mismatches: IntCounter [] = "dray_digest_mismatches_total",
        "Bodies that did not match their digest.";
    pub uncached: IntCounterVec ["reason"] = "dray_uncached_total",
        "Blobs passed through without being kept, by reason.";
    pub peers: IntGauge [] = "dray_peers",
        "Addresses that DNS or the configuration names as members, this one included.";
    pub config: IntGaugeVec ["hash"] = "dray_config_info",
        "Always 1; nodes whose configuration differs have another hash, addresses and zones left out.";
    pub build: IntGaugeVec ["version"] = "dray_build_info",
        "Always 1; the version is a label.";
}

/// The upper bounds of all histograms, in seconds.
const BUCKETS: [f64; 14] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

/// An answer, to be counted.
#[derive(Clone, Copy, Debug)]
pub struct ResponseLabels {
    pub route: &'static str,
    pub source: &'static str,
    pub status: u16,
    pub sent: u64,
    pub first_byte: Option<Duration>,
    pub took: Duration,
}

/// Route, source and status.
type ResponseKey = (&'static str, &'static str, u16);

struct ResponseCounts {
    requests: IntCounter,
    sent_bytes: IntCounter,
    request_seconds: Histogram,
    first_byte: Histogram,
}

impl Metrics {
    /// Counts an answer.
    pub fn answered(&self, answer: &ResponseLabels) {
        let counts = self.counts_of((answer.route, answer.source, answer.status));
        counts.requests.inc();
        counts.sent_bytes.inc_by(answer.sent);
        counts.request_seconds.observe(answer.took.as_secs_f64());
        if let Some(first_byte) = answer.first_byte {
            counts.first_byte.observe(first_byte.as_secs_f64());
        }
    }

    /// All of a kind share theirs: there are as many as routes, sources and statuses go together.
    fn counts_of(&self, kind: ResponseKey) -> Arc<ResponseCounts> {
        let known = self.answers.read().get(&kind).cloned();
        known.unwrap_or_else(|| {
            let (route, source, status) = kind;
            let counts = Arc::new(ResponseCounts {
                requests: self.requests.with_label_values(&[route, source, &status.to_string()]),
                sent_bytes: self.sent_bytes.with_label_values(&[source]),
                request_seconds: self.request_seconds.with_label_values(&[route, source]),
                first_byte: self.first_byte.with_label_values(&[source]),
            });
            self.answers.write().insert(kind, counts.clone());
            counts
        })
    }

    /// A counter over all its labels.
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

/// A kind of metric. Those without labels take none.
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
