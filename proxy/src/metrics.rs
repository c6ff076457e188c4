//! Metric names and handles. A leaf: it knows nobody's types, labels come in as `&'static str` or
//! as names that the configuration bounds.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use prometheus::core::Collector;
use prometheus::{
    CounterVec, Encoder, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry, TextEncoder,
};

pub const REQUESTS: &str = "dray_requests_total";
pub const SENT_BYTES: &str = "dray_sent_bytes_total";
pub const SAVED_BYTES: &str = "dray_saved_bytes_total";
pub const REQUEST_SECONDS: &str = "dray_request_seconds";
pub const FIRST_BYTE: &str = "dray_first_byte_seconds";
pub const ORIGIN_REQUESTS: &str = "dray_origin_requests_total";
pub const ORIGIN_BYTES: &str = "dray_origin_bytes_total";
pub const ORIGIN_FIRST_BYTE: &str = "dray_origin_first_byte_seconds";
pub const ORIGIN_BODY_SECONDS: &str = "dray_origin_body_seconds_total";
pub const ORIGIN_DOWN: &str = "dray_origin_down";
pub const CLIENT_CHECKS: &str = "dray_client_checks_total";
pub const ORIGIN_RATE_LIMIT: &str = "dray_origin_rate_limit";
pub const ORIGIN_RATE_LIMIT_REMAINING: &str = "dray_origin_rate_limit_remaining";
pub const PEER_BYTES: &str = "dray_peer_bytes_total";
pub const PEER_REQUESTS: &str = "dray_peer_requests_total";
pub const PEER_FIRST_BYTE: &str = "dray_peer_first_byte_seconds";
pub const FILLS: &str = "dray_fills";
pub const RESUMED_BYTES: &str = "dray_resumed_bytes_total";
pub const EVICTED_BYTES: &str = "dray_evicted_bytes_total";
pub const CACHE_BYTES: &str = "dray_cache_bytes";
pub const CACHE_LIMIT: &str = "dray_cache_limit_bytes";
pub const SCRUBBED_BYTES: &str = "dray_scrubbed_bytes_total";
pub const DAMAGED: &str = "dray_damaged_blobs_total";
pub const SHUT_OUT: &str = "dray_peers_shut_out_total";
pub const UNPROVEN: &str = "dray_peers_unproven_total";
pub const SMALL_DROPPED: &str = "dray_small_dropped_total";
pub const SMALL_LOOKUPS: &str = "dray_small_lookups_total";
pub const SMALL_MEMORY: &str = "dray_small_memory_bytes";
pub const CONTAINERD_POINTED: &str = "dray_containerd_pointed";
pub const CACHE_BLOBS: &str = "dray_cache_blobs";
pub const STALE: &str = "dray_stale_total";
pub const MISMATCHES: &str = "dray_digest_mismatches_total";
pub const UNCACHED: &str = "dray_uncached_total";
pub const PEERS: &str = "dray_peers";
pub const BUILD_INFO: &str = "dray_build_info";
pub const CONFIG_INFO: &str = "dray_config_info";

/// Handles to every metric, resolved once.
pub struct Metrics {
    registry: Registry,
    /// by route, source, status
    requests: IntCounterVec,
    /// by source
    sent_bytes: IntCounterVec,
    /// to clients of this process, not from a registry
    pub saved_bytes: IntCounter,
    /// by route, source, in seconds
    request_seconds: HistogramVec,
    /// by source, in seconds
    first_byte: HistogramVec,
    /// by rule, kind, outcome
    pub origin_requests: IntCounterVec,
    /// by rule
    pub origin_bytes: IntCounterVec,
    /// by rule, in seconds
    pub origin_first_byte: HistogramVec,
    /// by rule, in seconds
    pub origin_body_seconds: CounterVec,
    /// upstreams that do not answer, by rule
    pub origin_down: IntGaugeVec,
    /// by rule, outcome
    pub client_checks: IntCounterVec,
    /// what upstreams say of their limits, by rule
    pub origin_rate_limit: IntGaugeVec,
    pub origin_rate_limit_remaining: IntGaugeVec,
    /// by from_zone, to_zone
    pub peer_bytes: IntCounterVec,
    /// by from_zone, to_zone, outcome
    pub peer_requests: IntCounterVec,
    /// by from_zone, to_zone, in seconds
    pub peer_first_byte: HistogramVec,
    /// by state
    pub fills: IntGaugeVec,
    pub evicted_bytes: IntCounter,
    /// not fetched again, because an earlier attempt had fetched them
    pub resumed_bytes: IntCounter,
    pub scrubbed_bytes: IntCounter,
    pub damaged: IntCounter,
    pub shut_out: IntCounter,
    pub unproven: IntCounterVec,
    /// by cache, reason
    pub small_dropped: IntCounterVec,
    /// by cache, found
    pub small_lookups: IntCounterVec,
    /// by cache
    pub small_memory: IntGaugeVec,
    /// by hosts directory, where there is one: whether containerd is pointed here
    pub containerd_pointed: IntGaugeVec,
    /// that are kept as files
    pub cache_blobs: IntGauge,
    /// by tier
    pub cache_bytes: IntGaugeVec,
    /// by tier
    pub cache_limit: IntGaugeVec,
    /// by reason
    pub stale: IntCounterVec,
    pub mismatches: IntCounter,
    /// by reason
    pub uncached: IntCounterVec,
    /// members of the cluster, this process included
    pub peers: IntGauge,
    /// by hash
    pub config: IntGaugeVec,
    /// What counts each kind of answer, so that a request looks for one thing and not for five.
    answers: RwLock<HashMap<Kind, Arc<Counts>>>,
}

/// An answer, to be counted.
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    pub route: &'static str,
    pub source: &'static str,
    pub status: u16,
    pub sent: u64,
    pub first_byte: Option<Duration>,
    pub took: Duration,
}

/// Route, source and status.
type Kind = (&'static str, &'static str, u16);

struct Counts {
    requests: IntCounter,
    sent_bytes: IntCounter,
    request_seconds: Histogram,
    first_byte: Histogram,
}

impl Metrics {
    /// Registers everything in a registry of its own.
    ///
    /// # Panics
    /// If a name or label above is malformed or used twice, which the first test would show.
    pub fn new() -> Self {
        let registry = Registry::new();
        let counters = |name, help, labels: &[&str]| {
            let counter = IntCounterVec::new(Opts::new(name, help), labels);
            register(&registry, counter)
        };
        let gauges = |name, help, labels: &[&str]| register(&registry, IntGaugeVec::new(Opts::new(name, help), labels));
        let seconds = |name, help, labels: &[&str]| {
            let buckets = vec![0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];
            register(&registry, HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets), labels))
        };
        let info = gauges(BUILD_INFO, "Always 1; the version is a label.", &["version"]);
        info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        Self {
            requests: counters(REQUESTS, "Requests answered.", &["route", "source", "status"]),
            sent_bytes: counters(SENT_BYTES, "Body bytes sent to clients and peers.", &["source"]),
            saved_bytes: register(
                &registry,
                IntCounter::new(SAVED_BYTES, "Body bytes sent to clients that did not come from a registry for them."),
            ),
            request_seconds: seconds(REQUEST_SECONDS, "Time to the end of an answer.", &["route", "source"]),
            first_byte: seconds(FIRST_BYTE, "Time to the first byte of an answer, by source.", &["source"]),
            origin_requests: counters(ORIGIN_REQUESTS, "Requests sent to origins.", &["rule", "kind", "outcome"]),
            origin_bytes: counters(ORIGIN_BYTES, "Body bytes received from origins.", &["rule"]),
            origin_first_byte: seconds(
                ORIGIN_FIRST_BYTE,
                "Time until an origin began to answer, tokens and redirects included.",
                &["rule"],
            ),
            origin_body_seconds: register(
                &registry,
                CounterVec::new(
                    Opts::new(ORIGIN_BODY_SECONDS, "Time that bodies of blobs took to come, all connections together."),
                    &["rule"],
                ),
            ),
            origin_down: gauges(
                ORIGIN_DOWN,
                "Upstreams that do not answer and are asked again all the time.",
                &["rule"],
            ),
            client_checks: counters(
                CLIENT_CHECKS,
                "Times a registry was asked whether a client may have something, by what it said.",
                &["rule", "outcome"],
            ),
            origin_rate_limit: gauges(
                ORIGIN_RATE_LIMIT,
                "Pulls that an upstream allows in its window, as it last said.",
                &["rule", "upstream"],
            ),
            origin_rate_limit_remaining: gauges(
                ORIGIN_RATE_LIMIT_REMAINING,
                "Pulls that an upstream still allows, as it last said.",
                &["rule", "upstream"],
            ),
            peer_bytes: counters(PEER_BYTES, "Body bytes received from peers.", &["from_zone", "to_zone"]),
            peer_requests: counters(
                PEER_REQUESTS,
                "Questions to peers, by what they gave.",
                &["from_zone", "to_zone", "outcome"],
            ),
            peer_first_byte: seconds(
                PEER_FIRST_BYTE,
                "Time until a peer gave what it was asked for.",
                &["from_zone", "to_zone"],
            ),
            fills: gauges(FILLS, "Blobs being fetched, or proven on disk.", &["state"]),
            evicted_bytes: register(&registry, IntCounter::new(EVICTED_BYTES, "Bytes of blobs evicted from disk.")),
            scrubbed_bytes: register(
                &registry,
                IntCounter::new(SCRUBBED_BYTES, "Bytes of cached blobs read again to find damage."),
            ),
            shut_out: register(
                &registry,
                IntCounter::new(SHUT_OUT, "Times a peer was left alone for sending wrong bytes."),
            ),
            unproven: counters(
                UNPROVEN,
                "Questions to us and answers to us that no peer has proven: other key, certificate, clock or address, or a stranger.",
                &["what"],
            ),
            damaged: register(
                &registry,
                IntCounter::new(DAMAGED, "Cached blobs that no longer matched their digest, and were dropped."),
            ),
            small_dropped: counters(
                SMALL_DROPPED,
                "Small objects that did not reach the disk, by queue that was full.",
                &["cache", "reason"],
            ),
            small_lookups: counters(
                SMALL_LOOKUPS,
                "Times a small object was looked for, by where it was found.",
                &["cache", "found"],
            ),
            small_memory: gauges(SMALL_MEMORY, "Bytes of small objects in memory.", &["cache"]),
            containerd_pointed: gauges(
                CONTAINERD_POINTED,
                "Whether the hosts directory of containerd says what it should.",
                &["hosts_dir"],
            ),
            cache_blobs: register(&registry, IntGauge::new(CACHE_BLOBS, "Blobs that are kept as files.")),
            resumed_bytes: register(
                &registry,
                IntCounter::new(RESUMED_BYTES, "Bytes that an earlier, unfinished fetch had left."),
            ),
            cache_bytes: gauges(CACHE_BYTES, "Bytes held, by tier.", &["tier"]),
            cache_limit: gauges(CACHE_LIMIT, "Bytes that may be held, by tier.", &["tier"]),
            stale: counters(STALE, "Tags answered from an expired record, by reason.", &["reason"]),
            mismatches: register(&registry, IntCounter::new(MISMATCHES, "Bodies that did not match their digest.")),
            uncached: counters(UNCACHED, "Blobs passed through without being kept, by reason.", &["reason"]),
            peers: register(
                &registry,
                IntGauge::new(PEERS, "Addresses that DNS or the configuration names as members, this one included."),
            ),
            config: gauges(
                CONFIG_INFO,
                "Always 1; nodes whose configuration differs have another hash, addresses and zones left out.",
                &["hash"],
            ),
            answers: RwLock::default(),
            registry,
        }
    }

    /// Counts an answer.
    pub fn answered(&self, answer: &Answer) {
        let counts = self.counts_of((answer.route, answer.source, answer.status));
        counts.requests.inc();
        counts.sent_bytes.inc_by(answer.sent);
        counts.request_seconds.observe(answer.took.as_secs_f64());
        if let Some(first_byte) = answer.first_byte {
            counts.first_byte.observe(first_byte.as_secs_f64());
        }
    }

    /// All of a kind share theirs: there are as many as routes, sources and statuses go together.
    fn counts_of(&self, kind: Kind) -> Arc<Counts> {
        let known = self.answers.read().unwrap_or_else(PoisonError::into_inner).get(&kind).cloned();
        known.unwrap_or_else(|| {
            let (route, source, status) = kind;
            let counts = Arc::new(Counts {
                requests: self.requests.with_label_values(&[route, source, &status.to_string()]),
                sent_bytes: self.sent_bytes.with_label_values(&[source]),
                request_seconds: self.request_seconds.with_label_values(&[route, source]),
                first_byte: self.first_byte.with_label_values(&[source]),
            });
            self.answers.write().unwrap_or_else(PoisonError::into_inner).insert(kind, counts.clone());
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

fn register<C: Collector + Clone + 'static>(registry: &Registry, made: prometheus::Result<C>) -> C {
    let collector = made.expect("metric names and labels are constants of this file");
    registry.register(Box::new(collector.clone())).expect("each name is registered once");
    collector
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
        assert!(text.contains(BUILD_INFO));
    }
}
