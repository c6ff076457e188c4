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
//!   sent bytes of it from there (`pull/authorization/content_proof.rs`). A HEAD is not proof: a third party may control its
//!   response.
//! - An object that is cached from another repository of the registry needs a request in each state, also in an outage.
//! - Denied and missing objects are cached for `negative_ttl`; without a credential, denials for `DEFAULT_TTL`.

mod cache;
mod content_proof;

use std::sync::Arc;

use tokio::time::{Instant, timeout};

pub(super) use self::cache::AuthorizationCache;
use self::cache::CachedAccess;
use super::flights::fetch_ended;
use super::serve_policy::ServePolicy;
use super::slow_upstreams::SlowUpstreams;
use super::{PullError, Requester};
use crate::metrics::Metrics;
use crate::oci::{Digest, Endpoint, ErrorCode, Reference};
use crate::provenance::Provenance;
use crate::registries::RepositoryRef;
use crate::secret::Secret;
use crate::single_flight::SingleFlight;
use crate::source::SourceError;
use crate::store::{Found, SmallKind, Store};
use crate::times::{ALTERNATIVE_TIMEOUT, UPSTREAM_TIMEOUT};
use crate::upstream::{ExchangedSecret, UpstreamClient};

/// Authorizes principals before the pull policy runs.
pub struct Authorizer {
    cache: Arc<AuthorizationCache>,
    checks: SingleFlight<cache::ObjectKey, Result<(), SourceError>>,
    store: Arc<Store>,
    policy: Arc<ServePolicy>,
    upstream: Arc<UpstreamClient>,
    slow_upstreams: SlowUpstreams,
    metrics: Arc<Metrics>,
}

/// Why a principal is not authorized.
#[derive(Debug, thiserror::Error)]
pub enum AuthorizationError {
    /// The upstream responded with 401 or 403.
    #[error("the upstream denied it")]
    Denied,
    #[error("{0}")]
    Refused(PullError),
}

/// What shows that a principal may pull from a repository.
#[derive(Debug, PartialEq, Eq)]
enum Grounds {
    /// The upstream has just served this object to it.
    Response,
    /// An earlier decision.
    Cache,
}

impl Authorizer {
    pub(super) fn new(
        cache: Arc<AuthorizationCache>,
        store: Arc<Store>,
        policy: Arc<ServePolicy>,
        upstream: Arc<UpstreamClient>,
        slow_upstreams: SlowUpstreams,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { cache, checks: SingleFlight::default(), store, policy, upstream, slow_upstreams, metrics }
    }

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
        let known = self.cache.known(repo_ref);
        let check = match known {
            CachedAccess::Authorized => None,
            CachedAccess::RecentlyAuthorized => {
                // After the timeout the check continues; its late result counts for later requests.
                let check = timeout(ALTERNATIVE_TIMEOUT, self.check_upstream(repo_ref, endpoint, accept)).await.ok();
                if check.is_none() {
                    self.slow_upstreams.mark_slow(&repo_ref.registry);
                }
                check
            }
            CachedAccess::Unknown => Some(self.check_upstream(repo_ref, endpoint, accept).await),
        };
        let grounds = decide(known, check).map_err(|error| authorization_error(endpoint, &error))?;
        match digest_of(endpoint) {
            Some(digest) if grounds == Grounds::Cache => {
                self.authorize_content(repo_ref, digest, endpoint, accept).await
            }
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
        if self.of_other_repository(repo_ref, digest, kind_of(endpoint)).await.is_none() {
            return Ok(());
        }
        // "Not found" leaves the cached state as it is: it says nothing of other objects in this repository.
        self.check_upstream(repo_ref, endpoint, accept).await.map_err(|error| authorization_error(endpoint, &error))
    }

    /// Whether the principal was authorized within an hour, which suffices during an outage.
    pub fn was_authorized(&self, repo_ref: &RepositoryRef) -> bool {
        self.cache.known(repo_ref) != CachedAccess::Unknown
    }

    /// The upstream denied a request: earlier decisions end, also during an outage.
    pub fn revoke_authorization(&self, repo_ref: &RepositoryRef) {
        self.cache.mark_denied(repo_ref);
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
        if let Some(error) = self.cache.denied_object(&key) {
            return Err(error);
        }
        let result = self.checks.join(key.clone(), || {
            let (authorizer, repo_ref, endpoint, accept) =
                (self.clone(), repo_ref.clone(), endpoint.clone(), accept.to_owned());
            async move {
                let requested_at = Instant::now();
                let check = authorizer.request_upstream(&repo_ref, &endpoint, &accept).await;
                match &check {
                    Ok(()) => authorizer.cache.mark_authorized(&repo_ref, requested_at),
                    Err(SourceError::Denied(_)) => authorizer.cache.mark_denied(&repo_ref),
                    Err(_) => {}
                }
                if let Err(error @ (SourceError::Denied(_) | SourceError::NotFound(_))) = &check {
                    authorizer.cache.deny_object(key, &repo_ref, error);
                }
                check
            }
        });
        result.await.unwrap_or_else(fetch_ended)
    }

    async fn request_upstream(
        &self,
        repo_ref: &RepositoryRef,
        endpoint: &Endpoint,
        accept: &str,
    ) -> Result<(), SourceError> {
        // A response of another length is other content.
        let cached_length = self.length_of(endpoint).await;
        let deadline = Instant::now() + UPSTREAM_TIMEOUT;
        let check = self.upstream.check_access(repo_ref, endpoint, accept, cached_length, deadline).await;
        let outcome = match &check {
            Ok(()) => "allow",
            Err(SourceError::Denied(_)) => "deny",
            Err(error) => error.as_str(),
        };
        self.metrics.client_authorizations.with_label_values(&[repo_ref.rule.name(), outcome]).inc();
        if check.is_ok() {
            self.prove_content(repo_ref, endpoint, accept).await;
        }
        check
    }

    /// Content cached from another repository of the same registry, and not known to belong to this one.
    async fn of_other_repository(&self, repo_ref: &RepositoryRef, digest: &Digest, kind: SmallKind) -> Option<Found> {
        let found = self.store.find(digest, kind).await?;
        let is_same_registry =
            |from: &Provenance| from.registry == repo_ref.registry.as_str() && from.rule == repo_ref.rule.name();
        let may_belong = found.provenance().is_some_and(is_same_registry);
        let is_foreign = may_belong && !self.policy.allows(digest, found.provenance(), Requester::Client, repo_ref);
        is_foreign.then_some(found)
    }

    /// The length of the cached object that `endpoint` names, also if the principal may not have it.
    async fn length_of(&self, endpoint: &Endpoint) -> Option<u64> {
        match self.store.find(digest_of(endpoint)?, kind_of(endpoint)).await? {
            Found::Small { object, .. } => Some(object.bytes.len() as u64),
            Found::Large { blob, .. } => Some(blob.len),
        }
    }

    /// What the repository's registry returns for a credential.
    pub async fn exchange(&self, repo_ref: &RepositoryRef, secret: Secret) -> Result<ExchangedSecret, SourceError> {
        // No request to an upstream that is down. A rate limit may not apply to this credential, so it is tried.
        match self.upstream.trouble(repo_ref) {
            Some(trouble) if !matches!(trouble, SourceError::Limited { .. }) => Err(trouble),
            _ => self.upstream.exchange(repo_ref, secret, Instant::now() + UPSTREAM_TIMEOUT).await,
        }
    }
}

/// The table above. `check` is the upstream's response; None: it was not requested, or has not responded in time.
fn decide(known: CachedAccess, check: Option<Result<(), SourceError>>) -> Result<Grounds, SourceError> {
    match (known, check) {
        (_, Some(Ok(()))) => Ok(Grounds::Response),
        (CachedAccess::Authorized | CachedAccess::RecentlyAuthorized, None) => Ok(Grounds::Cache),
        (CachedAccess::RecentlyAuthorized, Some(Err(error))) if error.is_transient_outage() => Ok(Grounds::Cache),
        (_, Some(Err(error))) => Err(error),
        (CachedAccess::Unknown, None) => Err(SourceError::TimedOut),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decision_follows_from_cached_state_and_response() {
        use CachedAccess::{Authorized, RecentlyAuthorized, Unknown};
        let (denied, missing, down) = (SourceError::denied(), SourceError::not_found(), SourceError::TimedOut);
        let response = |result: Result<(), &SourceError>| Some(result.map_err(Clone::clone));
        let cases = [
            (Authorized, None, Ok(Grounds::Cache)),
            (Authorized, response(Err(&denied)), Err(&denied)),
            (RecentlyAuthorized, response(Ok(())), Ok(Grounds::Response)),
            (RecentlyAuthorized, response(Err(&denied)), Err(&denied)),
            (RecentlyAuthorized, response(Err(&missing)), Err(&missing)),
            (RecentlyAuthorized, response(Err(&down)), Ok(Grounds::Cache)),
            (RecentlyAuthorized, None, Ok(Grounds::Cache)),
            (Unknown, response(Ok(())), Ok(Grounds::Response)),
            (Unknown, response(Err(&denied)), Err(&denied)),
            (Unknown, response(Err(&down)), Err(&down)),
            (Unknown, None, Err(&SourceError::TimedOut)),
        ];
        for (known, check, want) in cases {
            let text = format!("{known:?} {check:?}");
            assert_eq!(decide(known, check), want.map_err(Clone::clone), "{text}");
        }
    }
}
