//! Cached values that know how long they are good for.

use std::time::{Duration, Instant};

use moka::Expiry;

/// A value with a life of its own.
pub trait Lifetime {
    /// How long it is good for, from when it is put into a cache.
    fn life(&self) -> Duration;
}

/// Lets a cache drop each value at the end of its life. A value that is put in again begins a new
/// one, which is not what moka does by itself.
pub struct ByLifetime;

impl<K, V: Lifetime> Expiry<K, V> for ByLifetime {
    fn expire_after_create(&self, _: &K, value: &V, _: Instant) -> Option<Duration> {
        Some(value.life())
    }

    fn expire_after_update(&self, _: &K, value: &V, _: Instant, _: Option<Duration>) -> Option<Duration> {
        Some(value.life())
    }
}
