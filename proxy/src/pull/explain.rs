//! Explains how dray would serve a pull now, without pulling.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::Requester;
use super::cached_content::CachedContent;
use super::peer_routing::{PeerRouting, tag_key};
use crate::config::Credentials;
use crate::oci::{ImageName, Reference, Tag};
use crate::registries::{Registries, RepositoryRef, UpstreamTrust};
use crate::source::ServedFrom;
use crate::tags::Tags;
use crate::upstream::UpstreamClient;

/// How dray would serve an image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Explanation {
    pub registry: String,
    pub repository: String,
    pub reference: String,
    /// The pattern of the first rule that matches; `*`: the implicit last rule.
    pub rule: String,
    pub denied: bool,
    /// `shared` or `passthrough`.
    pub authorization: String,
    /// The kind of the rule's credentials, never the credentials.
    pub credentials: String,
    /// In order.
    pub upstreams: Vec<ExplainedUpstream>,
    /// The node that fetches it for all nodes. Null: it is not shared with peers.
    pub owner: Option<ExplainedOwner>,
    pub tag: Option<ExplainedTag>,
    /// Where this node has cached the manifest: `memory` or `disk`.
    pub cached: Option<String>,
    /// What would happen now, for operators.
    pub now: String,
}

/// An upstream that it would be fetched from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExplainedUpstream {
    pub url: String,
    pub repository: String,
    /// `configured`, or `derived` from the name: then only https to public addresses.
    pub trust: String,
    /// As in the status; null: no recent request.
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
    /// Since it was last revalidated.
    pub age_seconds: u64,
    /// Its TTL; null: it never expires.
    pub ttl_seconds: Option<u64>,
}

/// Whether the manifest is cached, and fresh.
#[derive(Clone, Copy)]
enum CachedManifest {
    Fresh(ServedFrom),
    Expired(ServedFrom),
    Nothing,
}

/// Collects explanations from the parts that would serve a pull.
pub(super) struct Explainer {
    pub(super) registries: Arc<Registries>,
    pub(super) tags: Arc<Tags>,
    pub(super) content: Arc<CachedContent>,
    pub(super) routing: Arc<PeerRouting>,
    pub(super) upstream: Arc<UpstreamClient>,
}

impl Explainer {
    pub(super) async fn explain(&self, image: &str) -> Result<Explanation, String> {
        let image: ImageName = image.parse()?;
        let (repo_ref, reference) = (self.registries.rules().of_image(&image), image.reference);
        let rule = &repo_ref.rule;
        let cached = match &reference {
            Reference::Tag(tag) => self.tags.resolution(&repo_ref, tag).await,
            Reference::Digest(_) => None,
        };
        let digest = match (&reference, &cached) {
            (Reference::Digest(digest), _) => Some(digest.clone()),
            (Reference::Tag(_), cached) => cached.as_ref().map(|cached| cached.digest.clone()),
        };
        // The operator may see everything, whatever the rule's authorization.
        let seen = RepositoryRef { principal: crate::principal::Principal::Anonymous, ..repo_ref.clone() };
        let kept = match &digest {
            Some(digest) => self.content.manifest(&seen, digest, Requester::Client).await.map(|(_, from)| from),
            None => None,
        };
        let now = SystemTime::now();
        let is_fresh = match (&reference, &cached) {
            (Reference::Digest(_), _) => true,
            (Reference::Tag(tag), Some(cached)) => cached.is_fresh(&repo_ref, tag, now),
            (Reference::Tag(_), None) => false,
        };
        let manifest = match kept {
            Some(from) if is_fresh => CachedManifest::Fresh(from),
            Some(from) => CachedManifest::Expired(from),
            None => CachedManifest::Nothing,
        };
        let owner = self.owner_of(&repo_ref, &reference);
        let tag = match (&reference, cached) {
            (Reference::Tag(tag), Some(cached)) => Some(ExplainedTag {
                digest: cached.digest.to_string(),
                age_seconds: cached.age(now).as_secs(),
                ttl_seconds: ttl_seconds(&repo_ref, tag),
            }),
            _ => None,
        };
        Ok(Explanation {
            registry: repo_ref.registry.to_string(),
            repository: repo_ref.repository.to_string(),
            reference: reference.to_string(),
            rule: rule.name().to_owned(),
            denied: rule.deny,
            authorization: if rule.is_passthrough() { "passthrough" } else { "shared" }.to_owned(),
            credentials: credentials(rule.credentials.as_ref()),
            upstreams: self.upstreams_of(&repo_ref),
            now: self.what_now(&repo_ref, manifest, owner.as_ref()),
            owner,
            tag,
            cached: kept.map(|from| from.as_str().to_owned()),
        })
    }

    fn upstreams_of(&self, repo_ref: &RepositoryRef) -> Vec<ExplainedUpstream> {
        let known = self.upstream.upstreams();
        let upstream = |(upstream, trust): (crate::config::Upstream, UpstreamTrust)| {
            let url = upstream.base();
            let is_this =
                |view: &&crate::upstream::UpstreamView| view.rule == repo_ref.rule.name() && view.upstream == url;
            ExplainedUpstream {
                repository: repo_ref.repository_at(&upstream),
                trust: if trust == UpstreamTrust::Configured { "configured" } else { "derived" }.to_owned(),
                state: known.iter().find(is_this).map(|view| view.state.clone()),
                url,
            }
        };
        repo_ref.rule.upstreams(&repo_ref.registry).into_iter().map(upstream).collect()
    }

    fn owner_of(&self, repo_ref: &RepositoryRef, reference: &Reference) -> Option<ExplainedOwner> {
        let peers = self.routing.peers_for(repo_ref)?;
        let in_ring = match reference {
            Reference::Digest(digest) => digest.clone(),
            Reference::Tag(tag) => {
                if !peers.are_authenticated() {
                    return None;
                }
                tag_key(repo_ref, tag)
            }
        };
        Some(peers.owner(&in_ring, self.routing.scope(repo_ref))).map(|(address, zone, is_this_node)| ExplainedOwner {
            address,
            zone,
            is_this_node,
        })
    }

    fn what_now(&self, repo_ref: &RepositoryRef, kept: CachedManifest, owner: Option<&ExplainedOwner>) -> String {
        if repo_ref.rule.deny {
            return "refused with 403: the rule denies it".to_owned();
        }
        let source = match owner {
            Some(owner) if !owner.is_this_node => {
                format!("requested from peer {}, which requests the upstream", owner.address)
            }
            _ => "requested from the upstream".to_owned(),
        };
        let condition = if repo_ref.rule.is_passthrough() { "if the upstream authorizes the client: " } else { "" };
        let outcome = match (kept, self.upstream.trouble(repo_ref)) {
            (CachedManifest::Fresh(from), _) => format!("served from {}", from.as_str()),
            _ if let Some(refusal) = self.upstream.refusal(repo_ref) => format!("refused with 403: {refusal}"),
            (CachedManifest::Expired(_), Some(trouble)) => format!("served stale from the cache: {trouble}"),
            (CachedManifest::Expired(from), None) => {
                format!("tag revalidated ({source}), then served from {}", from.as_str())
            }
            (CachedManifest::Nothing, Some(trouble)) if owner.is_some() => {
                format!("served if a peer has it, else refused with 503: {trouble}")
            }
            (CachedManifest::Nothing, Some(trouble)) => format!("refused with 503: {trouble}"),
            (CachedManifest::Nothing, None) => source,
        };
        format!("{condition}{outcome}")
    }
}

fn ttl_seconds(repo_ref: &RepositoryRef, tag: &Tag) -> Option<u64> {
    let ttl = repo_ref.rule.ttl_of(tag);
    (ttl != std::time::Duration::MAX).then_some(ttl.as_secs())
}

fn credentials(credentials: Option<&Credentials>) -> String {
    match credentials {
        None => "none".to_owned(),
        Some(Credentials::DockerConfig { file }) => format!("the Docker configuration {}", file.display()),
        Some(Credentials::Static { username, .. }) => format!("the user {username}"),
        Some(Credentials::Helper { name }) => format!("the credential helper docker-credential-{name}"),
        Some(Credentials::Provider { config, .. }) => {
            format!("the kubelet's credential plugins ({})", config.display())
        }
        Some(Credentials::Cloud(cloud)) => format!("the node's cloud identity ({cloud:?})").to_lowercase(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_explained_without_secrets() {
        let file = Credentials::DockerConfig { file: "/etc/c.json".into() };
        assert_eq!([credentials(None), credentials(Some(&file))], ["none", "the Docker configuration /etc/c.json"]);
    }
}
