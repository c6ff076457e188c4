//! Cached values with a TTL of their own.

use std::time::{Duration, Instant};

use moka::Expiry;

/// A value with a TTL of its own.
pub trait Lifetime {
    /// Its TTL, from its insertion into a cache.
    fn life(&self) -> Duration;
}

/// Makes a cache remove each value at the end of its TTL. An insertion under the same key starts a new TTL, which moka
/// does not do by default.
pub struct ByLifetime;

impl<K, V: Lifetime> Expiry<K, V> for ByLifetime {
    fn expire_after_create(&self, _: &K, value: &V, _: Instant) -> Option<Duration> {
        Some(value.life())
    }

    fn expire_after_update(&self, _: &K, value: &V, _: Instant, _: Option<Duration>) -> Option<Duration> {
        Some(value.life())
    }
}
