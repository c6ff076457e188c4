//! What a rule denies, whatever the upstream says.

use super::{PullError, Requester};
use crate::registries::RepositoryRef;

/// Denies what the rule forbids, unauthorized clients, and private content to unauthenticated peers.
pub fn check_rule(repo_ref: &RepositoryRef, requester: Requester) -> Result<(), PullError> {
    let registry = &repo_ref.registry;
    if repo_ref.rule.deny {
        return Err(PullError::Denied(format!("{registry} is denied by rule \"{}\"", repo_ref.rule.name())));
    }
    if !repo_ref.principal.is_authorized() {
        return Err(PullError::Denied(format!(
            "{registry} needs authorization: log in with an account that may pull from it"
        )));
    }
    if !requester.is_trusted() && repo_ref.rule.is_private() {
        return Err(PullError::Denied(format!(
            "{registry} needs credentials: it is shared only with authenticated peers"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::peers::PeerTrust;
    use crate::principal::Principal;
    use crate::registries::Registries;

    #[test]
    fn rule_denies_by_requester_and_principal() {
        let rules = "[[registry]]\nmatch = \"denied.io\"\ndeny = true\n\
            [[registry]]\nmatch = \"private.io\"\ncredentials = { username = \"u\", password_file = \"/p\" }\n\
            [[registry]]\nmatch = \"own.io\"\nauthorization = \"passthrough\"\n";
        let registries = Registries::new(&Config::parse(rules, "test").unwrap());
        let [trusted, stranger] = [PeerTrust::Authenticated, PeerTrust::Unauthenticated].map(Requester::Peer);
        let cases = [
            ("open.io", [true, true, true]),
            ("denied.io", [false, false, false]),
            ("private.io", [true, true, false]),
            // No principal is set yet.
            ("own.io", [false, false, false]),
        ];
        for (registry, want) in cases {
            let repo_ref = registries.repo_ref(registry.parse().unwrap(), "a/b".parse().unwrap());
            let permitted =
                [Requester::Client, trusted, stranger].map(|requester| check_rule(&repo_ref, requester).is_ok());
            assert_eq!(permitted, want, "{registry}");
        }
        let repo_ref = registries.repo_ref("own.io".parse().unwrap(), "a/b".parse().unwrap());
        let anonymous = RepositoryRef { principal: Principal::Anonymous, ..repo_ref };
        let permitted =
            [Requester::Client, trusted, stranger].map(|requester| check_rule(&anonymous, requester).is_ok());
        assert_eq!(permitted, [true, true, false], "an authorized anonymous principal");
    }
}
