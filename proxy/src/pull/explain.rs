//! What would become of a pull now, without doing it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::{Pull, Requester};
use crate::config::Credentials;
use crate::oci::route::Names;
use crate::oci::{ImageName, Reference, Tag};
use crate::registries::{RepositoryRef, UpstreamTrust};
use crate::source::ServedFrom;

/// The way of an image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Explanation {
    pub registry: String,
    pub repository: String,
    pub reference: String,
    /// The pattern of the first rule that matches; `*`: none of the file does.
    pub rule: String,
    pub denied: bool,
    /// `shared` or `client`
    pub access: String,
    /// What kind of credentials the rule has: never the credentials.
    pub credentials: String,
    /// In order.
    pub upstreams: Vec<ExplainedUpstream>,
    /// Who fetches it for all nodes. Null: this node keeps to itself.
    pub owner: Option<ExplainedOwner>,
    /// What is known of the tag.
    pub tag: Option<ExplainedTag>,
    /// Whether the manifest is kept here, and where: `memory` or `disk`.
    pub kept: Option<String>,
    /// What would happen now, in words.
    pub now: String,
}

/// Where it would be fetched.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExplainedUpstream {
    pub url: String,
    pub repository: String,
    /// `written` in the configuration, or `derived` from the name: then only by https at public addresses.
    pub trust: String,
    /// As in the status; null: it was not asked lately.
    pub state: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExplainedOwner {
    pub address: SocketAddr,
    pub zone: String,
    pub is_this_node: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExplainedTag {
    pub digest: String,
    /// Since its registry was asked.
    pub age_seconds: u64,
    /// For how long it is believed without asking; null: for ever.
    pub believed_seconds: Option<u64>,
}

/// Whether the manifest is here, and may be served without asking.
#[derive(Clone, Copy)]
enum CachedManifest {
    Fresh(ServedFrom),
    Expired(ServedFrom),
    Nothing,
}

impl Pull {
    /// Explains a name as people write it: `alpine`, `ghcr.io/team/app:1`, `reg.corp:5000/app@sha256:...`.
    pub async fn explain(self: &Arc<Self>, image: &str) -> Result<Explanation, String> {
        let (place, reference) = self.parse(image)?;
        let rule = &place.rule;
        let lease = match &reference {
            Reference::Tag(tag) => self.tags.lease(&place, tag).await,
            Reference::Digest(_) => None,
        };
        let digest = match (&reference, &lease) {
            (Reference::Digest(digest), _) => Some(digest.clone()),
            (Reference::Tag(_), lease) => lease.as_ref().map(|lease| lease.digest.clone()),
        };
        // As the operator, who may see everything.
        let seen = RepositoryRef { caller: crate::principal::Principal::Anonymous, ..place.clone() };
        let kept = match &digest {
            Some(digest) => self.kept_manifest(&seen, digest, Requester::Client).await.map(|(_, from)| from),
            None => None,
        };
        let now = SystemTime::now();
        let is_fresh = match (&reference, &lease) {
            (Reference::Digest(_), _) => true,
            (Reference::Tag(tag), Some(lease)) => lease.is_fresh(&place, tag, now),
            (Reference::Tag(_), None) => false,
        };
        let is_here = match kept {
            Some(from) if is_fresh => CachedManifest::Fresh(from),
            Some(from) => CachedManifest::Expired(from),
            None => CachedManifest::Nothing,
        };
        let owner = self.owner_of(&place, &reference);
        let tag = match (&reference, lease) {
            (Reference::Tag(tag), Some(lease)) => Some(ExplainedTag {
                digest: lease.digest.to_string(),
                age_seconds: lease.age(now).as_secs(),
                believed_seconds: believed(&place, tag),
            }),
            _ => None,
        };
        Ok(Explanation {
            registry: place.registry.to_string(),
            repository: place.repository.to_string(),
            reference: reference.to_string(),
            rule: rule.name().to_owned(),
            denied: rule.deny,
            access: if rule.asks_who() { "client" } else { "shared" }.to_owned(),
            credentials: credentials(rule.credentials.as_ref()),
            upstreams: self.upstreams_of(&place),
            now: self.what_now(&place, is_here, owner.as_ref()),
            owner,
            tag,
            kept: kept.map(|from| from.as_str().to_owned()),
        })
    }

    fn parse(&self, image: &str) -> Result<(RepositoryRef, Reference), String> {
        let ImageName { registry, repository, reference } = image.parse()?;
        // The first part may stand for a registry.
        let alias = repository.as_str().split_once('/').filter(|_| registry.is_docker_hub());
        let aliased = alias.and_then(|(first, rest)| Some((self.registries.alias(first)?, rest.parse().ok()?)));
        let (registry, repository) = aliased.unwrap_or((registry, repository));
        Ok((self.place(registry, repository), reference))
    }

    fn upstreams_of(&self, place: &RepositoryRef) -> Vec<ExplainedUpstream> {
        let known = self.upstream.upstreams();
        let upstream = |(upstream, trust): (crate::config::Upstream, UpstreamTrust)| {
            let url = upstream.base();
            let is_this =
                |view: &&crate::upstream::UpstreamView| view.rule == place.rule.name() && view.upstream == url;
            ExplainedUpstream {
                repository: place.repository_at(&upstream),
                trust: if trust == UpstreamTrust::Written { "written" } else { "derived" }.to_owned(),
                state: known.iter().find(is_this).map(|view| view.state.clone()),
                url,
            }
        };
        place.rule.upstreams(&place.registry).into_iter().map(upstream).collect()
    }

    fn owner_of(&self, place: &RepositoryRef, reference: &Reference) -> Option<ExplainedOwner> {
        let peers = self.peers_for(place)?;
        let in_ring = match reference {
            Reference::Digest(digest) => digest.clone(),
            Reference::Tag(tag) => {
                if !peers.are_proven() {
                    return None;
                }
                super::tag::in_ring(place, tag)
            }
        };
        Some(peers.owner(&in_ring, self.scope(place))).map(|(address, zone, is_this_node)| ExplainedOwner {
            address,
            zone,
            is_this_node,
        })
    }

    fn what_now(&self, place: &RepositoryRef, kept: CachedManifest, owner: Option<&ExplainedOwner>) -> String {
        if place.rule.deny {
            return "refused with 403: the rule denies it".to_owned();
        }
        let asked = match owner {
            Some(owner) if !owner.is_this_node => format!("{} is asked, which asks the registry", owner.address),
            _ => "the registry is asked".to_owned(),
        };
        let who = if place.rule.asks_who() { "to those whom the registry lets pull it: " } else { "" };
        let what = match (kept, self.upstream.trouble(place)) {
            (CachedManifest::Fresh(from), _) => format!("served from {}", from.as_str()),
            _ if let Some(refusal) = self.upstream.refusal(place) => format!("refused with 403: {refusal}"),
            (CachedManifest::Expired(_), Some(trouble)) => format!("served stale from here: {trouble}"),
            (CachedManifest::Expired(from), None) => {
                format!("{asked} whether the tag has changed, then it is served from {}", from.as_str())
            }
            (CachedManifest::Nothing, Some(trouble)) => format!("asked of peers, or refused with 503: {trouble}"),
            (CachedManifest::Nothing, None) => asked,
        };
        format!("{who}{what}")
    }
}

fn believed(place: &RepositoryRef, tag: &Tag) -> Option<u64> {
    let lease = place.rule.lease_of(tag);
    (lease != std::time::Duration::MAX).then_some(lease.as_secs())
}

fn credentials(credentials: Option<&Credentials>) -> String {
    match credentials {
        None => "none".to_owned(),
        Some(Credentials::DockerConfig { file }) => format!("the Docker configuration {}", file.display()),
        Some(Credentials::Static { username, .. }) => format!("the user {username}"),
        Some(Credentials::Helper { name }) => format!("the helper docker-credential-{name}"),
        Some(Credentials::Provider { config, .. }) => format!("the kubelet's plugins by {}", config.display()),
        Some(Credentials::Cloud(cloud)) => format!("who this is at the cloud ({cloud:?})").to_lowercase(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_named_not_told() {
        let file = Credentials::DockerConfig { file: "/etc/c.json".into() };
        assert_eq!([credentials(None), credentials(Some(&file))], ["none", "the Docker configuration /etc/c.json"]);
    }
}
