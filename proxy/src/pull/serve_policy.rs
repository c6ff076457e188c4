//! Decides whether a cached object may be served, by the rule of the registry that it came from.

use std::sync::Arc;

use super::Requester;
use super::authorization::AuthorizationCache;
use crate::oci::{Digest, Registry, Repository};
use crate::provenance::Provenance;
use crate::registries::{Registries, RepositoryRef};

pub(super) struct ServePolicy {
    registries: Arc<Registries>,
    authorizations: Arc<AuthorizationCache>,
}

impl ServePolicy {
    pub(super) fn new(registries: Arc<Registries>, authorizations: Arc<AuthorizationCache>) -> Self {
        Self { registries, authorizations }
    }

    /// Whether the rule of the registry that a cached object came from allows to serve it. An object that may not be
    /// served counts as a cache miss: the requested upstream decides.
    ///
    /// A peer's rules were compared only for the registry that it requested from.
    pub(super) fn allows(
        &self,
        digest: &Digest,
        provenance: Option<&Provenance>,
        requester: Requester,
        repo_ref: &RepositoryRef,
    ) -> bool {
        let from = |provenance: &Provenance| -> Option<(Registry, Repository)> {
            Some((provenance.registry.parse().ok()?, provenance.repository.parse().ok()?))
        };
        // Two registries may hold the same layer, and its provenance names only one of them.
        if requester.is_trusted() && !repo_ref.rule.deny && self.authorizations.was_sent(repo_ref, digest) {
            return true;
        }
        // Fast path: most objects came from the requested repository.
        let is_from_repository = provenance.is_some_and(|from| repo_ref.is_source_of(from));
        if requester == Requester::Client && !repo_ref.rule.is_passthrough() && is_from_repository {
            return !repo_ref.rule.deny;
        }
        match provenance.and_then(from) {
            Some((registry, repository)) => {
                // A request in progress judges its own repository by the rule that it began with.
                let is_own = registry == repo_ref.registry && repository == repo_ref.repository;
                let current = || self.registries.rule(&registry, &repository);
                let rule = if is_own { repo_ref.rule.clone() } else { current() };
                let is_known =
                    requester == Requester::Client || (requester.is_trusted() && rule.id == repo_ref.rule.id);
                // Rules may route repositories of one registry to different upstreams. Rights at one are not rights at
                // another.
                let belongs = !rule.is_passthrough()
                    || (rule.id == repo_ref.rule.id
                        && self.authorizations.belongs_to(repo_ref, &registry, &repository, digest));
                !rule.deny && belongs && (is_known || !rule.is_private())
            }
            // The provenance is lost: it is served to clients only if no rule needs authorization by the upstream.
            None => requester == Requester::Client && !self.registries.any_passthrough(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::peers::PeerTrust;
    use crate::principal::Principal;

    const RULES: &str = "[[registry]]\nmatch = \"denied.io\"\ndeny = true\n\
        [[registry]]\nmatch = \"private.io\"\ncredentials = { username = \"u\", password_file = \"/p\" }\n\
        [[registry]]\nmatch = \"own.io\"\nauthorization = \"passthrough\"\n";

    const CLIENT: Requester = Requester::Client;
    const TRUSTED: Requester = Requester::Peer(PeerTrust::Authenticated);
    const STRANGER: Requester = Requester::Peer(PeerTrust::Unauthenticated);

    struct Case {
        policy: ServePolicy,
        registries: Arc<Registries>,
    }

    impl Case {
        fn new(rules: &str) -> Self {
            let registries = Arc::new(Registries::new(&Config::parse(rules, "test").unwrap()));
            let policy = ServePolicy::new(registries.clone(), Arc::new(AuthorizationCache::new()));
            Self { policy, registries }
        }

        fn repo_ref(&self, name: &str) -> RepositoryRef {
            let (registry, repository) = name.split_once('/').unwrap();
            let repo_ref = self.registries.repo_ref(registry.parse().unwrap(), repository.parse().unwrap());
            // As after the authorization by the upstream.
            match repo_ref.principal {
                Principal::Unauthorized => RepositoryRef { principal: Principal::Anonymous, ..repo_ref },
                _ => repo_ref,
            }
        }

        /// Whether the client, an authenticated and an unauthenticated peer get from `requested` what came from `from`.
        fn allows(&self, from: &str, requested: &str) -> [bool; 3] {
            let (provenance, repo_ref) = (self.repo_ref(from).provenance(), self.repo_ref(requested));
            let digest = Digest::of(b"x");
            [CLIENT, TRUSTED, STRANGER]
                .map(|requester| self.policy.allows(&digest, Some(&provenance), requester, &repo_ref))
        }
    }

    #[test]
    fn cached_object_is_served_by_the_rule_of_its_registry() {
        let case = Case::new(RULES);
        let cases = [
            ("open.io/a", "open.io/a", [true, true, true]),
            ("open.io/a", "other.io/b", [true, true, true]),
            ("denied.io/a", "open.io/a", [false, false, false]),
            ("private.io/a", "private.io/a", [true, true, false]),
            // A peer's rules were compared for the requested registry only.
            ("private.io/a", "open.io/a", [true, false, false]),
            ("own.io/a", "own.io/a", [true, true, false]),
            ("own.io/a", "own.io/b", [false, false, false]),
            ("own.io/a", "open.io/a", [false, false, false]),
            ("open.io/a", "own.io/a", [true, true, true]),
        ];
        for (from, requested, want) in cases {
            assert_eq!(case.allows(from, requested), want, "from {from}, requested as {requested}");
        }
    }

    #[test]
    fn proof_or_whole_content_adds_an_object_to_a_repository() {
        let (case, digest) = (Case::new(RULES), Digest::of(b"x"));
        let [a, b, c] = ["own.io/a", "own.io/b", "own.io/c"].map(|name| case.repo_ref(name));
        case.policy.authorizations.record_proof(&b, &digest);
        case.policy.authorizations.mark_sent(&c, &digest);
        let allows =
            |from: &RepositoryRef, requested| case.policy.allows(&digest, Some(&from.provenance()), CLIENT, requested);
        assert!(allows(&a, &b) && allows(&a, &c) && !allows(&b, &a));
        let elsewhere = case.repo_ref("open.io/a");
        assert!(allows(&elsewhere, &c), "the registry has sent it, whatever the copy's provenance");
    }

    #[test]
    fn object_without_provenance_is_served_without_upstream_authorization_only() {
        for (rules, want) in [("", true), (RULES, false)] {
            let case = Case::new(rules);
            let repo_ref = case.repo_ref("open.io/a");
            let allows = |requester| case.policy.allows(&Digest::of(b"x"), None, requester, &repo_ref);
            assert_eq!([CLIENT, TRUSTED, STRANGER].map(allows), [want, false, false]);
        }
    }
}
