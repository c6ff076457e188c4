//! Decides whether a principal may pull from a repository, for rules that leave this to the upstream registry. If the
//! registry serves one object of the repository to a principal, the principal may pull all content of it.
//!
//! | cached state | upstream's response | decision | next state |
//! |---|---|---|---|
//! | `Authorized`: allowed within `AUTHORIZATION_TTL`, with the same token | no request | allow | unchanged |
//! | `RecentlyAuthorized`: allowed within an hour, with any token | allowed | allow | `Authorized` |
//! | | 401, 403 | deny | `Unknown` |
//! | | another error that is not an outage | return the error | unchanged |
//! | | outage, or none within `ALTERNATIVE_TIMEOUT` | allow | set by the late response |
//! | `Unknown` | allowed | allow | `Authorized` |
//! | | 401, 403 | deny | unchanged |
//! | | any other error, also an outage | return the error | unchanged |
//!
//! - A 401 or 403 ends the states of all tokens of the principal in this repository.
//! - Lists need no decision: the upstream responds to each client itself.
//! - A digest alone grants no access. It belongs to a repository if it was fetched from there, or if the registry has
//!   sent bytes of it from there (`pull/content_proof.rs`). A HEAD is not proof: a third party may control its
//!   response.
//! - An object that is cached from another repository of the registry needs a request in each state, also in an outage.
//! - Denied and missing objects are cached for `negative_ttl`; without a credential, denials for `DEFAULT_TTL`.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::{Pull, PullError, fetch_ended};
use crate::lifetimes::{ByLifetime, Lifetime};
use crate::oci::{Digest, Endpoint, ErrorCode, Reference, Registry, Repository};
use crate::principal::{Principal, PrincipalId};
use crate::provenance::Provenance;
use crate::registries::RepositoryRef;
use crate::single_flight::SingleFlight;
use crate::source::SourceError;
use crate::store::{Found, SmallKind};
use crate::times::{ALTERNATIVE_TIMEOUT, AUTHORIZATION_TTL, DEFAULT_TTL, HOUR, UPSTREAM_TIMEOUT};

/// What upstream registries decided about principals and digests.
pub(super) struct AuthorizationCache {
    /// When the upstream was last requested and allowed it, by principal, repository and hash of the token. A new token
    /// is checked anew, because the right may have been revoked.
    authorized: moka::sync::Cache<(PrincipalId, String, u64), Instant>,
    /// Principals that were authorized within an hour, with any token.
    recent: moka::sync::Cache<(PrincipalId, String), ()>,
    /// When the upstream last denied something in a repository to a principal.
    denials: moka::sync::Cache<(PrincipalId, String), Instant>,
    hash_key: RandomState,
    /// Objects that the upstream denied to a principal or did not find.
    denied_objects: moka::sync::Cache<(PrincipalId, String, String), CachedDenial>,
    proven: moka::sync::Cache<(String, Digest), ()>,
    /// Objects that the upstream sent whole from a repository, also if the cached copy came from elsewhere.
    sent: moka::sync::Cache<(String, Digest), ()>,
    /// Objects that the upstream claimed to hold in a repository, but of which it did not send the bytes.
    unproven: moka::sync::Cache<(String, Digest), ()>,
    checks: SingleFlight<(PrincipalId, String, String), Result<(), SourceError>>,
}

#[derive(Clone)]
struct CachedDenial {
    error: SourceError,
    life: Duration,
}

/// The cached decision about a principal in a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CachedAccess {
    /// The upstream allowed it within `AUTHORIZATION_TTL`.
    Authorized,
    /// The upstream allowed it within the last hour: sufficient during an outage.
    RecentlyAuthorized,
    Unknown,
}

/// Why a principal is not authorized.
#[derive(Debug)]
pub enum AuthorizationError {
    /// The upstream responded with 401 or 403.
    Denied,
    Refused(PullError),
}

impl AuthorizationCache {
    pub(super) fn new() -> Self {
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
            checks: SingleFlight::default(),
        }
    }

    /// Whether an object cached from `registry/repository` belongs to the requested repository. Only content of the
    /// same registry can: another registry could claim to hold private content.
    pub(super) fn belongs_to(
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
    pub(super) fn record_proof(&self, repo_ref: &RepositoryRef, digest: &Digest) {
        self.proven.insert((repo_ref.rule_key(), digest.clone()), ());
    }

    /// The upstream claims to hold the digest in this repository, but did not prove it.
    pub(super) fn record_failed_proof(&self, repo_ref: &RepositoryRef, digest: &Digest) {
        self.unproven.insert((repo_ref.rule_key(), digest.clone()), ());
    }

    pub(super) fn has_failed_proof(&self, repo_ref: &RepositoryRef, digest: &Digest) -> bool {
        self.unproven.contains_key(&(repo_ref.rule_key(), digest.clone()))
    }

    /// The whole object came from this repository, and matched its digest.
    pub(super) fn mark_sent(&self, repo_ref: &RepositoryRef, digest: &Digest) {
        if repo_ref.rule.is_passthrough() {
            self.sent.insert((repo_ref.rule_key(), digest.clone()), ());
        }
    }

    /// Whether the upstream has sent the whole object from this repository, whatever the cached copy's provenance.
    pub(super) fn was_sent(&self, repo_ref: &RepositoryRef, digest: &Digest) -> bool {
        repo_ref.rule.is_passthrough()
            && repo_ref.principal.is_authorized()
            && self.sent.contains_key(&(repo_ref.rule_key(), digest.clone()))
    }

    fn known(&self, repo_ref: &RepositoryRef) -> CachedAccess {
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
    fn mark_authorized(&self, repo_ref: &RepositoryRef, requested_at: Instant) {
        let (principal_id, name) = (repo_ref.principal.principal_id(), repo_ref.rule_key());
        let key = (principal_id, name.clone());
        // A denial of another request may have come since, and counts.
        if self.denials.get(&key).is_some_and(|denied_at| denied_at >= requested_at) {
            return;
        }
        self.authorized.insert((principal_id, name, self.token_hash(repo_ref)), requested_at);
        self.recent.insert(key, ());
    }

    fn mark_denied(&self, repo_ref: &RepositoryRef) {
        let (principal_id, name) = (repo_ref.principal.principal_id(), repo_ref.rule_key());
        self.authorized.invalidate(&(principal_id, name.clone(), self.token_hash(repo_ref)));
        self.recent.invalidate(&(principal_id, name.clone()));
        self.denials.insert((principal_id, name), Instant::now());
    }

    /// A number for a digest that only this process can compute.
    pub(super) fn keyed_hash(&self, digest: &Digest, nth: u32) -> u64 {
        self.hash_key.hash_one((digest, nth))
    }

    /// A keyed hash that distinguishes tokens without revealing them.
    fn token_hash(&self, repo_ref: &RepositoryRef) -> u64 {
        self.hash_key.hash_one(repo_ref.principal.authorization())
    }
}

impl Pull {
    /// Decides whether the principal may have what `endpoint` names; see the table above.
    pub async fn authorize(
        self: &Arc<Self>,
        repo_ref: &RepositoryRef,
        endpoint: &Endpoint,
        accept: &str,
    ) -> Result<(), AuthorizationError> {
        // The upstream responds to each client itself, and allowing a list does not allow a pull.
        if matches!(endpoint, Endpoint::Tags | Endpoint::Referrers(_) | Endpoint::Catalog) {
            return Ok(());
        }
        let proven = match self.authorizations.known(repo_ref) {
            CachedAccess::Authorized => false,
            CachedAccess::RecentlyAuthorized => {
                match timeout(ALTERNATIVE_TIMEOUT, self.check_upstream(repo_ref, endpoint, accept)).await {
                    Ok(Ok(())) => true,
                    Ok(Err(error)) if !error.is_transient_outage() => {
                        return Err(authorization_error(endpoint, &error));
                    }
                    Ok(Err(_)) => false,
                    // The check continues; its late result counts for later requests.
                    Err(_) => {
                        self.slow_upstreams.insert(repo_ref.registry.clone(), ());
                        false
                    }
                }
            }
            CachedAccess::Unknown => match self.check_upstream(repo_ref, endpoint, accept).await {
                Ok(()) => true,
                Err(error) => return Err(authorization_error(endpoint, &error)),
            },
        };
        match digest_of(endpoint) {
            Some(digest) if !proven => self.authorize_content(repo_ref, digest, endpoint, accept).await,
            _ => Ok(()),
        }
    }

    /// Checks whether content cached from another repository of the same registry belongs to this one as well.
    pub async fn authorize_content(
        self: &Arc<Self>,
        repo_ref: &RepositoryRef,
        digest: &Digest,
        endpoint: &Endpoint,
        accept: &str,
    ) -> Result<(), AuthorizationError> {
        if self.cached_from_other_repository(repo_ref, digest, kind_of(endpoint)).await.is_none() {
            return Ok(());
        }
        // "Not found" leaves the cached state as it is: it says nothing of other objects in this repository.
        self.check_upstream(repo_ref, endpoint, accept).await.map_err(|error| authorization_error(endpoint, &error))
    }

    /// Content cached from another repository of the same registry, and not known to belong to this one.
    pub(super) async fn cached_from_other_repository(
        &self,
        repo_ref: &RepositoryRef,
        digest: &Digest,
        kind: SmallKind,
    ) -> Option<Found> {
        let found = self.store.find(digest, kind).await?;
        let is_same_registry =
            |from: &Provenance| from.registry == repo_ref.registry.as_str() && from.rule == repo_ref.rule.name();
        let may_belong = found.provenance().is_some_and(is_same_registry);
        let is_foreign = may_belong && !self.may_serve(digest, found.provenance(), super::Requester::Client, repo_ref);
        is_foreign.then_some(found)
    }

    /// Whether the principal was authorized within an hour, which suffices during an outage.
    pub fn was_authorized(&self, repo_ref: &RepositoryRef) -> bool {
        self.authorizations.known(repo_ref) != CachedAccess::Unknown
    }

    /// The length of the cached copy: a response of another length is other content.
    async fn cached_length(&self, endpoint: &Endpoint) -> Option<u64> {
        match self.store.find(digest_of(endpoint)?, kind_of(endpoint)).await? {
            Found::Small { object, .. } => Some(object.bytes.len() as u64),
            Found::Large { blob, .. } => Some(blob.len),
        }
    }

    /// The upstream denied a request: earlier decisions end, also during an outage.
    pub fn revoke_authorization(&self, repo_ref: &RepositoryRef) {
        self.authorizations.mark_denied(repo_ref);
    }

    /// Checks at the upstream whether the principal may have an object. Concurrent checks of one principal share a
    /// request.
    async fn check_upstream(
        self: &Arc<Self>,
        repo_ref: &RepositoryRef,
        endpoint: &Endpoint,
        accept: &str,
    ) -> Result<(), SourceError> {
        let path = match endpoint {
            Endpoint::Manifest(reference) => format!("manifests/{reference}"),
            Endpoint::Blob(digest) => format!("blobs/{digest}"),
            Endpoint::Tags | Endpoint::Referrers(_) | Endpoint::Catalog => return Err(SourceError::denied()),
        };
        let key = (repo_ref.principal.principal_id(), repo_ref.rule_key(), path);
        if let Some(denial) = self.authorizations.denied_objects.get(&key) {
            return Err(denial.error);
        }
        let under = key.clone();
        let result = self.authorizations.checks.join(key, || {
            let (pull, repo_ref, endpoint, accept) =
                (self.clone(), repo_ref.clone(), endpoint.clone(), accept.to_owned());
            async move {
                let requested_at = Instant::now();
                let kept = pull.cached_length(&endpoint).await;
                let check = pull
                    .upstream
                    .check_access(&repo_ref, &endpoint, &accept, kept, Instant::now() + UPSTREAM_TIMEOUT)
                    .await;
                let outcome = match &check {
                    Ok(()) => "allow",
                    Err(SourceError::Denied(_)) => "deny",
                    Err(error) => error.as_str(),
                };
                pull.metrics.client_authorizations.with_label_values(&[repo_ref.rule.name(), outcome]).inc();
                if check.is_ok() {
                    pull.prove_content(&repo_ref, &endpoint, &accept).await;
                }
                match &check {
                    Ok(()) => pull.authorizations.mark_authorized(&repo_ref, requested_at),
                    Err(SourceError::Denied(_)) => pull.revoke_authorization(&repo_ref),
                    Err(_) => {}
                }
                if let Err(error @ (SourceError::Denied(_) | SourceError::NotFound(_))) = &check {
                    let is_anonymous = error.is_denied() && repo_ref.principal == Principal::Anonymous;
                    let life = if is_anonymous { DEFAULT_TTL } else { repo_ref.rule.negative_ttl };
                    pull.authorizations.denied_objects.insert(under, CachedDenial { error: error.clone(), life });
                }
                check
            }
        });
        result.await.unwrap_or_else(fetch_ended)
    }
}

fn authorization_error(endpoint: &Endpoint, error: &SourceError) -> AuthorizationError {
    let is_blob = matches!(endpoint, Endpoint::Blob(_));
    let missing = if is_blob { ErrorCode::BlobUnknown } else { ErrorCode::ManifestUnknown };
    match error {
        SourceError::Denied(_) => AuthorizationError::Denied,
        error => AuthorizationError::Refused(PullError::of(error, missing)),
    }
}

pub(super) fn kind_of(endpoint: &Endpoint) -> SmallKind {
    if matches!(endpoint, Endpoint::Manifest(_)) { SmallKind::Manifest } else { SmallKind::Blob }
}

pub(super) fn digest_of(endpoint: &Endpoint) -> Option<&Digest> {
    match endpoint {
        Endpoint::Manifest(Reference::Digest(digest)) | Endpoint::Blob(digest) => Some(digest),
        Endpoint::Manifest(Reference::Tag(_)) | Endpoint::Tags | Endpoint::Referrers(_) | Endpoint::Catalog => None,
    }
}

impl Lifetime for CachedDenial {
    fn life(&self) -> Duration {
        self.life
    }
}

#[cfg(test)]
mod tests {
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
