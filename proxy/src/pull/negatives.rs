//! Errors believed for seconds, so that a storm of requests is not passed on.

use std::time::{Duration, Instant};

use moka::Expiry;

use crate::registries::Place;
use crate::source::SourceError;

/// What an origin lately refused, by place and reference. A place has one rule and so one
/// credential: nobody learns from another's refusal.
pub(super) struct Negatives {
    errors: moka::sync::Cache<(String, String), Negative>,
}

#[derive(Clone)]
struct Negative {
    error: SourceError,
    life: Duration,
}

impl Negatives {
    pub(super) fn new() -> Self {
        Self { errors: moka::sync::Cache::builder().max_capacity(50_000).expire_after(ByLife).build() }
    }

    pub(super) fn get(&self, place: &Place, reference: &str) -> Option<SourceError> {
        self.errors.get(&(place.to_string(), reference.to_owned())).map(|negative| negative.error)
    }

    pub(super) fn put(&self, place: &Place, reference: &str, error: &SourceError) {
        let life = place.rule.negative_ttl;
        self.errors.insert((place.to_string(), reference.to_owned()), Negative { error: error.clone(), life });
    }
}

struct ByLife;

impl Expiry<(String, String), Negative> for ByLife {
    fn expire_after_create(&self, _: &(String, String), negative: &Negative, _: Instant) -> Option<Duration> {
        Some(negative.life)
    }

    fn expire_after_update(
        &self,
        _: &(String, String),
        negative: &Negative,
        _: Instant,
        _: Option<Duration>,
    ) -> Option<Duration> {
        Some(negative.life)
    }
}
