//! Throughput of all connections of a blob together.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use parking_lot::Mutex;

use crate::fill::pace::Pace;

/// Counters that all connections of a blob share.
#[derive(Default)]
pub(super) struct Meter {
    pub(super) bytes: AtomicU64,
    /// Connections that have sent a byte and are not done.
    pub(super) busy: AtomicUsize,
    /// Bytes from the upstream.
    pub(super) of_upstream: AtomicU64,
    /// The busy connections among those to the upstream.
    pub(super) busy_with_upstream: AtomicUsize,
    /// Throughput of the connections to peers.
    pub(super) pace: Mutex<Pace>,
    /// More connections are allowed than there are ranges left to request.
    pub(super) has_idle_capacity: AtomicBool,
}

/// Counts a connection as busy until dropped.
pub(super) struct Busy<'a>(&'a AtomicUsize);

impl<'a> Busy<'a> {
    pub(super) fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
