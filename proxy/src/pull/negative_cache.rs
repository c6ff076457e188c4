//! Caches errors of upstreams for seconds, so that a burst of requests does not reach the upstream.

use std::time::Duration;

use crate::lifetimes::{ByLifetime, Lifetime};
use crate::oci::Tag;
use crate::registries::RepositoryRef;
use crate::source::SourceError;

/// Errors of upstreams, by repository and reference. A repository has one rule and so one credential. Errors of
/// principals with own credentials are not cached: they must not reach other principals.
pub(super) struct NegativeCache {
    errors: moka::sync::Cache<(String, NegativeKind, String), Negative>,
}

/// What was requested: a missing manifest says nothing of a blob with the same digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum NegativeKind {
    Manifest,
    Blob,
}

/// Memory of all cached errors, in bytes. More: clients that request random names fill more memory. Less: more repeated
/// requests reach the upstream.
const MAX_BYTES: u64 = 16 * 1024 * 1024;

/// Memory that each entry takes beside its texts, in bytes.
const ENTRY_OVERHEAD: usize = 200;

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
                .weigher(|(repo_ref, _, reference): &(String, NegativeKind, String), negative: &Negative| {
                    let bytes = repo_ref.len() + reference.len() + negative.error.body_len() + ENTRY_OVERHEAD;
                    u32::try_from(bytes).unwrap_or(u32::MAX)
                })
                .expire_after(ByLifetime)
                .build(),
        }
    }

    pub(super) fn get(&self, repo_ref: &RepositoryRef, endpoint: NegativeKind, reference: &str) -> Option<SourceError> {
        repo_ref.principal.holder().is_none().then_some(())?;
        self.errors.get(&(repo_ref.rule_key(), endpoint, reference.to_owned())).map(|negative| negative.error)
    }

    pub(super) fn put(&self, repo_ref: &RepositoryRef, endpoint: NegativeKind, reference: &str, error: &SourceError) {
        self.put_for(repo_ref.rule.negative_ttl, repo_ref, endpoint, reference, error);
    }

    /// A missing tag may be pushed at any moment: its error is cached no longer than the tag's TTL.
    pub(super) fn put_tag(&self, repo_ref: &RepositoryRef, tag: &Tag, error: &SourceError) {
        let life = repo_ref.rule.negative_ttl;
        let life = if error.is_not_found() { life.min(repo_ref.rule.ttl_of(tag)) } else { life };
        self.put_for(life, repo_ref, NegativeKind::Manifest, tag.as_str(), error);
    }

    fn put_for(
        &self,
        life: Duration,
        repo_ref: &RepositoryRef,
        endpoint: NegativeKind,
        reference: &str,
        error: &SourceError,
    ) {
        if repo_ref.principal.holder().is_some() {
            return;
        }
        let negative = Negative { error: error.clone(), life };
        self.errors.insert((repo_ref.rule_key(), endpoint, reference.to_owned()), negative);
    }
}

impl Lifetime for Negative {
    fn life(&self) -> Duration {
        self.life
    }
}
