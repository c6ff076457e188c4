//! Errors believed for seconds, so that a storm of requests is not passed on.

use std::time::Duration;

use crate::lifetimes::{ByLifetime, Lifetime};
use crate::oci::Tag;
use crate::registries::RepositoryRef;
use crate::source::SourceError;

/// What an origin lately refused, by place and reference. A place has one rule and so one
/// credential: nobody learns from another's refusal. Callers with rights of their own are refused their own.
pub(super) struct NegativeCache {
    errors: moka::sync::Cache<(String, NegativeKind, String), Negative>,
}

/// What was asked for: that there is no manifest of a digest says nothing of a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum NegativeKind {
    Manifest,
    Blob,
}

/// All of them together, and what each takes beside its texts, in bytes.
const MAX_BYTES: u64 = 16 * 1024 * 1024;
const OVERHEAD: usize = 200;

#[derive(Clone)]
struct Negative {
    error: SourceError,
    life: Duration,
}

impl NegativeCache {
    pub(super) fn new() -> Self {
        Self {
            errors: moka::sync::Cache::builder()
                .max_capacity(MAX_BYTES)
                .weigher(|(place, _, reference): &(String, NegativeKind, String), negative: &Negative| {
                    let bytes = place.len() + reference.len() + negative.error.body_len() + OVERHEAD;
                    u32::try_from(bytes).unwrap_or(u32::MAX)
                })
                .expire_after(ByLifetime)
                .build(),
        }
    }

    pub(super) fn get(&self, place: &RepositoryRef, endpoint: NegativeKind, reference: &str) -> Option<SourceError> {
        place.caller.holder().is_none().then_some(())?;
        self.errors.get(&(place.to_string(), endpoint, reference.to_owned())).map(|negative| negative.error)
    }

    pub(super) fn put(&self, place: &RepositoryRef, endpoint: NegativeKind, reference: &str, error: &SourceError) {
        self.put_for(place.rule.negative_ttl, place, endpoint, reference, error);
    }

    /// A tag that may be pushed at any moment is not missing for longer than it would be believed.
    pub(super) fn put_tag(&self, place: &RepositoryRef, tag: &Tag, error: &SourceError) {
        let life = place.rule.negative_ttl;
        let life = if error.is_not_found() { life.min(place.rule.lease_of(tag)) } else { life };
        self.put_for(life, place, NegativeKind::Manifest, tag.as_str(), error);
    }

    fn put_for(
        &self,
        life: Duration,
        place: &RepositoryRef,
        endpoint: NegativeKind,
        reference: &str,
        error: &SourceError,
    ) {
        if place.caller.holder().is_some() {
            return;
        }
        let negative = Negative { error: error.clone(), life };
        self.errors.insert((place.to_string(), endpoint, reference.to_owned()), negative);
    }
}

impl Lifetime for Negative {
    fn life(&self) -> Duration {
        self.life
    }
}
