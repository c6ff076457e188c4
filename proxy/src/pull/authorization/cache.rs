//! What upstream registries decided about principals and objects, in memory.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use tokio::time::Instant;

use crate::lifetimes::{ByLifetime, Lifetime};
use crate::oci::{Digest, Registry, Repository};
use crate::principal::{Principal, PrincipalId};
use crate::registries::RepositoryRef;
use crate::source::SourceError;
use crate::times::{AUTHORIZATION_TTL, DEFAULT_TTL, HOUR};

/// What upstream registries decided about principals and digests.
pub(in crate::pull) struct AuthorizationCache {
    /// When the upstream was last requested and allowed it, by principal, repository and hash of the token. A new token
    /// is checked anew, because the right may have been revoked.
    authorized: moka::sync::Cache<(PrincipalId, String, u64), Instant>,
    /// Principals that were authorized within an hour, with any token.
    recent: moka::sync::Cache<(PrincipalId, String), ()>,
    /// When the upstream last denied something in a repository to a principal.
    denials: moka::sync::Cache<(PrincipalId, String), Instant>,
    hash_key: RandomState,
    /// Objects that the upstream denied to a principal or did not find.
    denied_objects: moka::sync::Cache<ObjectKey, CachedDenial>,
    proven: moka::sync::Cache<(String, Digest), ()>,
    /// Objects that the upstream sent whole from a repository, also if the cached copy came from elsewhere.
    sent: moka::sync::Cache<(String, Digest), ()>,
    /// Objects that the upstream claimed to hold in a repository, but of which it did not send the bytes.
    unproven: moka::sync::Cache<(String, Digest), ()>,
}

/// A principal, a repository's key and an object of it.
pub(super) type ObjectKey = (PrincipalId, String, String);

#[derive(Clone)]
struct CachedDenial {
    error: SourceError,
    life: Duration,
}

/// The cached decision about a principal in a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CachedAccess {
    /// The upstream allowed it within `AUTHORIZATION_TTL`.
    Authorized,
    /// The upstream allowed it within the last hour: sufficient during an outage.
    RecentlyAuthorized,
    Unknown,
}

impl AuthorizationCache {
    pub(in crate::pull) fn new() -> Self {
        let day = Duration::from_secs(24 * 3600);
        Self {
            authorized: moka::sync::Cache::builder().max_capacity(100_000).time_to_live(AUTHORIZATION_TTL).build(),
            recent: moka::sync::Cache::builder().max_capacity(100_000).time_to_live(HOUR).build(),
            denials: moka::sync::Cache::builder().max_capacity(100_000).time_to_live(AUTHORIZATION_TTL).build(),
            hash_key: RandomState::new(),
            denied_objects: moka::sync::Cache::builder().max_capacity(50_000).expire_after(ByLifetime).build(),
            proven: moka::sync::Cache::builder().max_capacity(100_000).time_to_idle(day).build(),
            unproven: moka::sync::Cache::builder().max_capacity(100_000).time_to_live(day).build(),
            sent: moka::sync::Cache::builder().max_capacity(100_000).time_to_idle(day).build(),
        }
    }

    /// Whether an object cached from `registry/repository` belongs to the requested repository. Only content of the
    /// same registry can: another registry could claim to hold private content.
    pub(in crate::pull) fn belongs_to(
        &self,
        repo_ref: &RepositoryRef,
        registry: &Registry,
        repository: &Repository,
        digest: &Digest,
    ) -> bool {
        repo_ref.principal.is_authorized()
            && *registry == repo_ref.registry
            && (*repository == repo_ref.repository || self.proven.contains_key(&(repo_ref.rule_key(), digest.clone())))
    }

    /// The upstream has proven that it holds the digest in this repository.
    pub(in crate::pull) fn record_proof(&self, repo_ref: &RepositoryRef, digest: &Digest) {
        self.proven.insert((repo_ref.rule_key(), digest.clone()), ());
    }

    /// The upstream claims to hold the digest in this repository, but did not prove it.
    pub(in crate::pull) fn record_failed_proof(&self, repo_ref: &RepositoryRef, digest: &Digest) {
        self.unproven.insert((repo_ref.rule_key(), digest.clone()), ());
    }

    pub(in crate::pull) fn has_failed_proof(&self, repo_ref: &RepositoryRef, digest: &Digest) -> bool {
        self.unproven.contains_key(&(repo_ref.rule_key(), digest.clone()))
    }

    /// The whole object came from this repository, and matched its digest.
    pub(in crate::pull) fn mark_sent(&self, repo_ref: &RepositoryRef, digest: &Digest) {
        if repo_ref.rule.is_passthrough() {
            self.sent.insert((repo_ref.rule_key(), digest.clone()), ());
        }
    }

    /// Whether the upstream has sent the whole object from this repository, whatever the cached copy's provenance.
    pub(in crate::pull) fn was_sent(&self, repo_ref: &RepositoryRef, digest: &Digest) -> bool {
        repo_ref.rule.is_passthrough()
            && repo_ref.principal.is_authorized()
            && self.sent.contains_key(&(repo_ref.rule_key(), digest.clone()))
    }

    pub(super) fn known(&self, repo_ref: &RepositoryRef) -> CachedAccess {
        let (principal_id, name) = (repo_ref.principal.principal_id(), repo_ref.rule_key());
        let authorized_at = self.authorized.get(&(principal_id, name.clone(), self.token_hash(repo_ref)));
        let denied_at = self.denials.get(&(principal_id, name.clone()));
        if authorized_at.is_some_and(|since| denied_at.is_none_or(|denied_at| denied_at < since)) {
            return CachedAccess::Authorized;
        }
        if self.recent.contains_key(&(principal_id, name)) {
            CachedAccess::RecentlyAuthorized
        } else {
            CachedAccess::Unknown
        }
    }

    /// The upstream allowed a request that was sent at `requested_at`.
    pub(super) fn mark_authorized(&self, repo_ref: &RepositoryRef, requested_at: Instant) {
        let (principal_id, name) = (repo_ref.principal.principal_id(), repo_ref.rule_key());
        let key = (principal_id, name.clone());
        // A denial of another request may have come since, and counts.
        if self.denials.get(&key).is_some_and(|denied_at| denied_at >= requested_at) {
            return;
        }
        self.authorized.insert((principal_id, name, self.token_hash(repo_ref)), requested_at);
        self.recent.insert(key, ());
    }

    pub(super) fn mark_denied(&self, repo_ref: &RepositoryRef) {
        let (principal_id, name) = (repo_ref.principal.principal_id(), repo_ref.rule_key());
        self.authorized.invalidate(&(principal_id, name.clone(), self.token_hash(repo_ref)));
        self.recent.invalidate(&(principal_id, name.clone()));
        self.denials.insert((principal_id, name), Instant::now());
    }

    /// The cached denial or absence of an object.
    pub(super) fn denied_object(&self, key: &ObjectKey) -> Option<SourceError> {
        self.denied_objects.get(key).map(|denial| denial.error)
    }

    /// Caches that the upstream denied an object or did not find it.
    pub(super) fn deny_object(&self, key: ObjectKey, repo_ref: &RepositoryRef, error: &SourceError) {
        let is_anonymous = error.is_denied() && repo_ref.principal == Principal::Anonymous;
        let life = if is_anonymous { DEFAULT_TTL } else { repo_ref.rule.negative_ttl };
        self.denied_objects.insert(key, CachedDenial { error: error.clone(), life });
    }

    /// A number for a digest that only this process can compute.
    pub(in crate::pull) fn keyed_hash(&self, digest: &Digest, nth: u32) -> u64 {
        self.hash_key.hash_one((digest, nth))
    }

    /// A keyed hash that distinguishes tokens without revealing them.
    fn token_hash(&self, repo_ref: &RepositoryRef) -> u64 {
        self.hash_key.hash_one(repo_ref.principal.authorization())
    }
}

impl Lifetime for CachedDenial {
    fn life(&self) -> Duration {
        self.life
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::config::Config;
    use crate::registries::Registries;

    fn repo_ref(authorization: &'static str) -> RepositoryRef {
        let config = "[[registry]]\nmatch = \"docker.io\"\nauthorization = \"passthrough\"\n";
        let config = Config::parse(config, "test").unwrap();
        let rule = Registries::new(&config).rule(&"docker.io".parse().unwrap(), &"a/b".parse().unwrap()).clone();
        let authorization = Some(http::HeaderValue::from_static(authorization));
        let principal = Principal::Verified(Arc::new(crate::principal::VerifiedPrincipal {
            id: PrincipalId([7; 16]),
            authorization,
        }));
        RepositoryRef { principal, ..RepositoryRef::new(rule, "docker.io".parse().unwrap(), "a/b".parse().unwrap()) }
    }

    #[test]
    fn authorization_ends_with_its_token_and_by_any_denial() {
        let (authorizations, first, second) = (AuthorizationCache::new(), repo_ref("Bearer 1"), repo_ref("Bearer 2"));
        let known = |repo_ref| authorizations.known(repo_ref);
        assert_eq!(known(&first), CachedAccess::Unknown);
        authorizations.mark_authorized(&first, Instant::now());
        assert_eq!([known(&first), known(&second)], [CachedAccess::Authorized, CachedAccess::RecentlyAuthorized]);
        authorizations.mark_authorized(&second, Instant::now());
        let requested_at = Instant::now();
        authorizations.mark_denied(&second);
        assert_eq!([known(&first), known(&second)], [CachedAccess::Unknown; 2], "a denial ends it for all tokens");
        authorizations.mark_authorized(&second, requested_at);
        assert_eq!(known(&second), CachedAccess::Unknown, "requested before the denial");
        authorizations.mark_authorized(&second, Instant::now() + Duration::from_millis(1));
        assert_eq!(known(&second), CachedAccess::Authorized);
    }
}
