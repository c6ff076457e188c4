//! What all connections of a blob bring together.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use parking_lot::Mutex;

use crate::fill::pace::Pace;

/// What all connections of a blob have brought.
#[derive(Default)]
pub(super) struct Meter {
    pub(super) bytes: AtomicU64,
    /// Connections that are bringing bytes now.
    pub(super) busy: AtomicUsize,
    /// The same of those to the origin.
    pub(super) of_upstream: AtomicU64,
    pub(super) busy_with_upstream: AtomicUsize,
    /// Of those that come from peers.
    pub(super) pace: Mutex<Pace>,
    /// More could be fetched at a time than there is to fetch.
    pub(super) idles: AtomicBool,
}

/// Counts a connection as busy for as long as it is held.
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
