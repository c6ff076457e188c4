//! foyer's two overflow counters, out of all its metrics: foyer drops what its queues cannot take without an error.

use std::borrow::Cow;

use mixtrics::metrics::{
    BoxedCounter, BoxedCounterVec, BoxedGaugeVec, BoxedHistogramVec, CounterOps, CounterVecOps, RegistryOps,
};
use mixtrics::registry::noop::NoopMetricsRegistry;
use prometheus::{IntCounter, IntCounterVec};

/// The metric and the labels under which foyer counts them.
const OPERATIONS: &str = "foyer_storage_inner_op_total";
const QUEUES: [(&str, &str); 2] = [("buffer_overflow", "buffer"), ("channel_overflow", "channel")];

/// Counts by cache and queue.
#[derive(Debug)]
pub(super) struct Overflow(pub(super) IntCounterVec);

#[derive(Debug)]
struct Operations(IntCounterVec);

#[derive(Debug)]
struct Counter(IntCounter);

impl RegistryOps for Overflow {
    fn register_counter_vec(
        &self,
        name: Cow<'static, str>,
        help: Cow<'static, str>,
        labels: &'static [&'static str],
    ) -> BoxedCounterVec {
        if name == OPERATIONS {
            return Box::new(Operations(self.0.clone()));
        }
        NoopMetricsRegistry.register_counter_vec(name, help, labels)
    }

    fn register_gauge_vec(
        &self,
        name: Cow<'static, str>,
        help: Cow<'static, str>,
        labels: &'static [&'static str],
    ) -> BoxedGaugeVec {
        NoopMetricsRegistry.register_gauge_vec(name, help, labels)
    }

    fn register_histogram_vec(
        &self,
        name: Cow<'static, str>,
        help: Cow<'static, str>,
        labels: &'static [&'static str],
    ) -> BoxedHistogramVec {
        NoopMetricsRegistry.register_histogram_vec(name, help, labels)
    }

    fn register_histogram_vec_with_buckets(
        &self,
        name: Cow<'static, str>,
        help: Cow<'static, str>,
        labels: &'static [&'static str],
        buckets: Vec<f64>,
    ) -> BoxedHistogramVec {
        NoopMetricsRegistry.register_histogram_vec_with_buckets(name, help, labels, buckets)
    }
}

impl CounterVecOps for Operations {
    fn counter(&self, labels: &[Cow<'static, str>]) -> BoxedCounter {
        let queue = QUEUES.iter().find(|(operation, _)| labels.iter().any(|label| label == operation));
        match (labels.first(), queue) {
            (Some(cache), Some((_, queue))) => {
                // foyer names the tier too: "manifests.storage".
                let cache = cache.split('.').next().unwrap_or(cache);
                Box::new(Counter(self.0.with_label_values(&[cache, queue])))
            }
            _ => Box::new(NoopMetricsRegistry),
        }
    }
}

impl CounterOps for Counter {
    fn increase(&self, by: u64) {
        self.0.inc_by(by);
    }
}
