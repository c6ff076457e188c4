//! Which requests share a flight, and its result: a result about one principal must not reach another one.

use crate::principal::PrincipalId;
use crate::registries::RepositoryRef;
use crate::source::SourceError;

/// Whether a result is about the rights or the rate limit of one principal: another principal may get more.
pub(super) fn is_personal<T>(repo_ref: &RepositoryRef, result: &Result<T, SourceError>) -> bool {
    let is_about_principal = |error: &SourceError| {
        matches!(
            error,
            SourceError::NotFound(_)
                | SourceError::Denied(_)
                | SourceError::Limited { .. }
                | SourceError::NoCredentials(_)
        )
    };
    repo_ref.rule.is_passthrough() && result.as_ref().err().is_some_and(is_about_principal)
}

/// The key of the flight that all principals share, and the key of the principal's own flight. A principal without a
/// credential for the upstream uses only its own: its failure must not reach others.
pub(super) fn flight_keys<K>(repo_ref: &RepositoryRef, key: impl Fn(Option<PrincipalId>) -> K) -> (K, K) {
    let own = Some(repo_ref.principal.principal_id());
    (key(own.filter(|_| repo_ref.principal.lacks_authorization())), key(own))
}

/// The result of a flight that panicked.
pub(super) fn fetch_ended<T>() -> Result<T, SourceError> {
    Err(SourceError::Unreachable("internal error: the task panicked, see dray's log".into()))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use http::HeaderValue;

    use super::*;
    use crate::config::Config;
    use crate::principal::{Principal, VerifiedPrincipal};
    use crate::registries::Registries;

    fn repo_ref(registry: &str, principal: Principal) -> RepositoryRef {
        let rules = "[[registry]]\nmatch = \"own.io\"\nauthorization = \"passthrough\"\n";
        let registries = Registries::new(&Config::parse(rules, "test").unwrap());
        let repo_ref = registries.repo_ref(registry.parse().unwrap(), "a/b".parse().unwrap());
        RepositoryRef { principal, ..repo_ref }
    }

    fn verified(id: u8, authorization: Option<&'static str>) -> Principal {
        let authorization = authorization.map(HeaderValue::from_static);
        Principal::Verified(Arc::new(VerifiedPrincipal { id: PrincipalId([id; 16]), authorization }))
    }

    #[test]
    fn principals_share_a_flight_unless_one_has_no_credential() {
        let keys = |principal| flight_keys(&repo_ref("own.io", principal), |id| id);
        let (first, second) = (keys(verified(1, Some("Bearer 1"))), keys(verified(2, Some("Bearer 2"))));
        assert_eq!((first.0, second.0), (None, None));
        assert_ne!(first.1, second.1);
        let without = keys(verified(3, None));
        assert_eq!(without.0, Some(PrincipalId([3; 16])), "its failure must not reach others");
    }

    #[test]
    fn only_results_about_rights_are_personal() {
        let (own, open) = (repo_ref("own.io", Principal::Anonymous), repo_ref("open.io", Principal::Shared));
        let personal = [SourceError::not_found(), SourceError::denied(), SourceError::Limited { again: None }];
        for error in personal {
            assert!(is_personal::<()>(&own, &Err(error.clone())) && !is_personal::<()>(&open, &Err(error)));
        }
        for result in [Ok(()), Err(SourceError::TimedOut), Err(SourceError::failed(500))] {
            assert!(!is_personal(&own, &result));
        }
    }
}
