//! Registries that did not respond within `ALTERNATIVE_TIMEOUT` while a stale result was at hand.

use std::time::Duration;

use crate::oci::Registry;

/// Clones share their entries.
#[derive(Clone)]
pub(super) struct SlowUpstreams(moka::sync::Cache<Registry, ()>);

/// How long a slow upstream counts as slow, unless it responds earlier. Longer: stale tags are served for longer.
/// Shorter: more requests wait the full `ALTERNATIVE_TIMEOUT`.
const SLOW_UPSTREAM_TTL: Duration = Duration::from_secs(15);

const MAX_REGISTRIES: u64 = 10_000;

impl SlowUpstreams {
    pub(super) fn new() -> Self {
        Self(moka::sync::Cache::builder().max_capacity(MAX_REGISTRIES).time_to_live(SLOW_UPSTREAM_TTL).build())
    }

    pub(super) fn contains(&self, registry: &Registry) -> bool {
        self.0.contains_key(registry)
    }

    pub(super) fn mark_slow(&self, registry: &Registry) {
        self.0.insert(registry.clone(), ());
    }

    pub(super) fn mark_responsive(&self, registry: &Registry) {
        self.0.invalidate(registry);
    }
}
