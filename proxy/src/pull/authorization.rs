//! Who may have what, where a rule leaves that to the registry (`access = "client"`): a caller is let into a
//! repository when the registry gives it something there, and gets what belongs to that repository.
//!
//! A digest opens nothing by itself. It belongs to a repository if it was fetched from there, or if the registry has shown
//! that it holds the bytes there (`pull/content_proof.rs`): somebody else may decide what a HEAD of it says.

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
use crate::times::{ALTERNATIVE_TIMEOUT, DEFAULT_TTL, HOUR, RIGHTS_TTL, UPSTREAM_TIMEOUT};

/// What registries have said of callers, and of digests.
pub(super) struct AuthorizationCache {
    /// Since when somebody is let into a repository, with what it shows. The registry may give another token and take
    /// back the right: with that one it is asked anew.
    let_in: moka::sync::Cache<(PrincipalId, String, u64), Instant>,
    /// When that was last so, with whatever.
    lately: moka::sync::Cache<(PrincipalId, String), ()>,
    /// When the registry last refused somebody something there.
    noes: moka::sync::Cache<(PrincipalId, String), Instant>,
    telling: RandomState,
    /// What somebody was refused there.
    refused: moka::sync::Cache<(PrincipalId, String, String), CachedDenial>,
    belonging: moka::sync::Cache<(String, Digest), ()>,
    /// What the registry has sent from a repository, whole: it has that, whoever sent what is kept now.
    sent: moka::sync::Cache<(String, Digest), ()>,
    /// What the registry said to have there, and did not send.
    not_shown: moka::sync::Cache<(String, Digest), ()>,
    proofs: SingleFlight<(PrincipalId, String, String), Result<(), SourceError>>,
}

#[derive(Clone)]
struct CachedDenial {
    error: SourceError,
    life: Duration,
}

/// What is known of a caller in a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CachedAccess {
    /// The registry has just said so.
    LetIn,
    /// It did, some time ago: enough while it is in trouble.
    Lately,
    Nothing,
}

/// Why a caller is not let in.
#[derive(Debug)]
pub enum AuthorizationError {
    /// The registry does not give this caller what is asked for, or does not say that it has it.
    Denied,
    Refused(PullError),
}

impl AuthorizationCache {
    pub(super) fn new() -> Self {
        let day = Duration::from_secs(24 * 3600);
        Self {
            let_in: moka::sync::Cache::builder().max_capacity(100_000).time_to_live(RIGHTS_TTL).build(),
            lately: moka::sync::Cache::builder().max_capacity(100_000).time_to_live(HOUR).build(),
            noes: moka::sync::Cache::builder().max_capacity(100_000).time_to_live(RIGHTS_TTL).build(),
            telling: RandomState::new(),
            refused: moka::sync::Cache::builder().max_capacity(50_000).expire_after(ByLifetime).build(),
            belonging: moka::sync::Cache::builder().max_capacity(100_000).time_to_idle(day).build(),
            not_shown: moka::sync::Cache::builder().max_capacity(100_000).time_to_live(day).build(),
            sent: moka::sync::Cache::builder().max_capacity(100_000).time_to_idle(day).build(),
            proofs: SingleFlight::default(),
        }
    }

    /// Whether what came from there may be given out at a place. Registries are only believed in what they say of
    /// their own: one of them could claim to have what another one hides.
    pub(super) fn belongs(
        &self,
        place: &RepositoryRef,
        registry: &Registry,
        repository: &Repository,
        digest: &Digest,
    ) -> bool {
        place.caller.is_let_in()
            && *registry == place.registry
            && (*repository == place.repository || self.belonging.contains_key(&(place.to_string(), digest.clone())))
    }

    /// The registry has shown that it holds it there.
    pub(super) fn took(&self, place: &RepositoryRef, digest: &Digest) {
        self.belonging.insert((place.to_string(), digest.clone()), ());
    }

    /// The registry says that it has it there, and does not have its bytes.
    pub(super) fn failed_to_show(&self, place: &RepositoryRef, digest: &Digest) {
        self.not_shown.insert((place.to_string(), digest.clone()), ());
    }

    pub(super) fn has_failed_to_show(&self, place: &RepositoryRef, digest: &Digest) -> bool {
        self.not_shown.contains_key(&(place.to_string(), digest.clone()))
    }

    /// All of it came from there, and matched its digest.
    pub(super) fn was_sent(&self, place: &RepositoryRef, digest: &Digest) {
        if place.rule.asks_who() {
            self.sent.insert((place.to_string(), digest.clone()), ());
        }
    }

    /// Whether it may be given out at a place whatever is known of what is kept.
    pub(super) fn has_sent(&self, place: &RepositoryRef, digest: &Digest) -> bool {
        place.rule.asks_who()
            && place.caller.is_let_in()
            && self.sent.contains_key(&(place.to_string(), digest.clone()))
    }

    fn known(&self, place: &RepositoryRef) -> CachedAccess {
        let (who, name) = (place.caller.who(), place.to_string());
        let let_in = self.let_in.get(&(who, name.clone(), self.shown(place)));
        let no = self.noes.get(&(who, name.clone()));
        if let_in.is_some_and(|since| no.is_none_or(|no| no < since)) {
            return CachedAccess::LetIn;
        }
        if self.lately.contains_key(&(who, name)) { CachedAccess::Lately } else { CachedAccess::Nothing }
    }

    /// The registry, asked then, gives a caller something.
    fn let_in(&self, place: &RepositoryRef, asked: Instant) {
        let (who, name) = (place.caller.who(), place.to_string());
        let key = (who, name.clone());
        // It may have said no to something else since.
        if self.noes.get(&key).is_some_and(|no| no >= asked) {
            return;
        }
        self.let_in.insert((who, name, self.shown(place)), asked);
        self.lately.insert(key, ());
    }

    fn shut_out(&self, place: &RepositoryRef) {
        let (who, name) = (place.caller.who(), place.to_string());
        self.let_in.invalidate(&(who, name.clone(), self.shown(place)));
        self.lately.invalidate(&(who, name.clone()));
        self.noes.insert((who, name), Instant::now());
    }

    /// A number for a digest, which nobody outside can tell.
    pub(super) fn secret_of(&self, digest: &Digest, nth: u32) -> u64 {
        self.telling.hash_one((digest, nth))
    }

    /// Tells apart what a caller shows, and tells nobody what it is.
    fn shown(&self, place: &RepositoryRef) -> u64 {
        self.telling.hash_one(place.caller.authorization())
    }
}

impl Pull {
    /// Lets a caller in, or not.
    pub async fn let_in(
        self: &Arc<Self>,
        place: &RepositoryRef,
        endpoint: &Endpoint,
        accept: &str,
    ) -> Result<(), AuthorizationError> {
        // These are always the registry's own answers to this caller, and say nothing of the rest.
        if matches!(endpoint, Endpoint::Tags | Endpoint::Referrers(_) | Endpoint::Catalog) {
            return Ok(());
        }
        let proven = match self.entitlements.known(place) {
            CachedAccess::LetIn => false,
            CachedAccess::Lately => match timeout(ALTERNATIVE_TIMEOUT, self.prove(place, endpoint, accept)).await {
                Ok(Ok(())) => true,
                Ok(Err(error)) if !error.is_passing_outage() => return Err(refused(endpoint, &error)),
                Ok(Err(_)) => false,
                // What it says in the end holds from then on.
                Err(_) => {
                    self.slow.insert(place.registry.clone(), ());
                    false
                }
            },
            CachedAccess::Nothing => match self.prove(place, endpoint, accept).await {
                Ok(()) => true,
                Err(error) => return Err(refused(endpoint, &error)),
            },
        };
        match digest_of(endpoint) {
            Some(digest) if !proven => self.bring_in(place, digest, endpoint, accept).await,
            _ => Ok(()),
        }
    }

    /// What belongs to another repository of the same registry may belong to this one as well.
    pub async fn bring_in(
        self: &Arc<Self>,
        place: &RepositoryRef,
        digest: &Digest,
        endpoint: &Endpoint,
        accept: &str,
    ) -> Result<(), AuthorizationError> {
        if self.foreign(place, digest, kind_of(endpoint)).await.is_none() {
            return Ok(());
        }
        // That this is not there says nothing of the rest.
        self.prove(place, endpoint, accept).await.map_err(|error| refused(endpoint, &error))
    }

    /// What is kept of another repository of the same registry, and not known to belong to this one.
    pub(super) async fn foreign(&self, place: &RepositoryRef, digest: &Digest, kind: SmallKind) -> Option<Found> {
        let found = self.store.find(digest, kind).await?;
        let is_of_same = |from: &Provenance| from.registry == place.registry.as_str() && from.rule == place.rule.name();
        let may_be_brought = found.provenance().is_some_and(is_of_same);
        let is_foreign = may_be_brought && !self.may_give(digest, found.provenance(), super::Requester::Client, place);
        is_foreign.then_some(found)
    }

    /// Whether somebody was let in lately, so that they can be while the registry is in trouble.
    pub fn was_let_in(&self, place: &RepositoryRef) -> bool {
        self.entitlements.known(place) != CachedAccess::Nothing
    }

    /// How long something is that is kept here: whatever else the registry sends is something else.
    async fn kept_length(&self, endpoint: &Endpoint) -> Option<u64> {
        match self.store.find(digest_of(endpoint)?, kind_of(endpoint)).await? {
            Found::Small { object, .. } => Some(object.bytes.len() as u64),
            Found::Large { blob, .. } => Some(blob.len),
        }
    }

    /// The registry has said that a caller may not: what it said before holds no longer, also while it is in trouble.
    pub fn shut_out(&self, place: &RepositoryRef) {
        self.entitlements.shut_out(place);
    }

    /// Asks the registry whether it gives something to a caller, once for all who ask with the same secret.
    async fn prove(
        self: &Arc<Self>,
        place: &RepositoryRef,
        endpoint: &Endpoint,
        accept: &str,
    ) -> Result<(), SourceError> {
        let path = match endpoint {
            Endpoint::Manifest(reference) => format!("manifests/{reference}"),
            Endpoint::Blob(digest) => format!("blobs/{digest}"),
            Endpoint::Tags | Endpoint::Referrers(_) | Endpoint::Catalog => return Err(SourceError::denied()),
        };
        let key = (place.caller.who(), place.to_string(), path);
        if let Some(refused) = self.entitlements.refused.get(&key) {
            return Err(refused.error);
        }
        let under = key.clone();
        let landed = self.entitlements.proofs.join(key, || {
            let (pull, place, endpoint, accept) = (self.clone(), place.clone(), endpoint.clone(), accept.to_owned());
            async move {
                let asked = Instant::now();
                let kept = pull.kept_length(&endpoint).await;
                let given =
                    pull.upstream.gives(&place, &endpoint, &accept, kept, Instant::now() + UPSTREAM_TIMEOUT).await;
                let outcome = given.as_ref().map_or_else(SourceError::as_str, |()| "let");
                pull.metrics.client_checks.with_label_values(&[place.rule.name(), outcome]).inc();
                if given.is_ok() {
                    pull.bring_in_proven(&place, &endpoint, &accept).await;
                }
                match &given {
                    Ok(()) => pull.entitlements.let_in(&place, asked),
                    Err(SourceError::Denied(_)) => pull.shut_out(&place),
                    Err(_) => {}
                }
                if let Err(error @ (SourceError::Denied(_) | SourceError::NotFound(_))) = &given {
                    let is_strangers = error.is_denied() && place.caller == Principal::Anonymous;
                    let life = if is_strangers { DEFAULT_TTL } else { place.rule.negative_ttl };
                    pull.entitlements.refused.insert(under, CachedDenial { error: error.clone(), life });
                }
                given
            }
        });
        landed.await.unwrap_or_else(fetch_ended)
    }
}

fn refused(endpoint: &Endpoint, error: &SourceError) -> AuthorizationError {
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

    fn place(authorization: &'static str) -> RepositoryRef {
        let config = "[[registry]]\nmatch = \"docker.io\"\naccess = \"client\"\n";
        let config = Config::parse(config, "test").unwrap();
        let rule = Registries::new(&config).rule(&"docker.io".parse().unwrap(), &"a/b".parse().unwrap()).clone();
        let authorization = Some(http::HeaderValue::from_static(authorization));
        let caller = Principal::Holder(Arc::new(crate::principal::VerifiedPrincipal {
            who: PrincipalId([7; 16]),
            authorization,
        }));
        RepositoryRef { caller, ..RepositoryRef::new(rule, "docker.io".parse().unwrap(), "a/b".parse().unwrap()) }
    }

    #[test]
    fn a_right_ends_with_what_showed_it_and_by_any_no() {
        let (entitlements, first, second) = (AuthorizationCache::new(), place("Bearer 1"), place("Bearer 2"));
        let known = |place| entitlements.known(place);
        assert_eq!(known(&first), CachedAccess::Nothing);
        entitlements.let_in(&first, Instant::now());
        assert_eq!([known(&first), known(&second)], [CachedAccess::LetIn, CachedAccess::Lately]);
        entitlements.let_in(&second, Instant::now());
        let asked = Instant::now();
        entitlements.shut_out(&second);
        assert_eq!([known(&first), known(&second)], [CachedAccess::Nothing; 2], "whatever showed it");
        entitlements.let_in(&second, asked);
        assert_eq!(known(&second), CachedAccess::Nothing, "it was asked before the no");
        entitlements.let_in(&second, Instant::now() + Duration::from_millis(1));
        assert_eq!(known(&second), CachedAccess::LetIn);
    }
}
