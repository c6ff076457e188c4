//! The artifacts that cached manifests name a subject for: a referrers response for outages.

use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;

use crate::blocking::parsed;
use crate::oci::{Digest, INDEX_MEDIA_TYPE, manifest};
use crate::registries::RepositoryRef;
use crate::store::{ReferrersRecord, Store};

pub(super) struct Referrers {
    store: Arc<Store>,
    /// Held while the referrers of a manifest are read, changed and written.
    changing: Arc<Mutex<()>>,
}

/// A referrers response that was built from cached artifacts.
pub(super) struct CachedReferrers {
    pub(super) index: Bytes,
    /// Whether the artifacts were filtered by `artifactType`.
    pub(super) is_filtered: bool,
}

/// Artifacts of one manifest that are remembered. More: larger records. Fewer: incomplete referrers during an outage.
const MAX_REFERRERS: usize = 100;

/// The query parameter, the field and the filter's name.
pub(super) const ARTIFACT_TYPE: &str = "artifactType";

impl Referrers {
    pub(super) fn new(store: Arc<Store>) -> Self {
        Self { store, changing: Arc::default() }
    }

    /// The cached artifacts of a manifest. None: none is known.
    pub(super) async fn of(
        &self,
        repo_ref: &RepositoryRef,
        digest: &Digest,
        query: Option<&str>,
    ) -> Option<CachedReferrers> {
        let (store, subject) = (self.store.clone(), subject_key(repo_ref, digest));
        let known = tokio::task::spawn_blocking(move || store.records.referrers(&subject)).await.ok()?;
        if known.is_empty() {
            return None;
        }
        let wanted = wanted_type(query);
        let is_wanted = |artifact: &serde_json::Value| {
            wanted.as_deref().is_none_or(|wanted| artifact[ARTIFACT_TYPE].as_str() == Some(wanted))
        };
        let manifests: Vec<_> = known.into_iter().filter(is_wanted).collect();
        let index = serde_json::json!({"schemaVersion": 2, "mediaType": INDEX_MEDIA_TYPE, "manifests": manifests});
        Some(CachedReferrers { index: index.to_string().into(), is_filtered: wanted.is_some() })
    }

    /// Remembers which manifest an artifact refers to, if any.
    pub(super) async fn remember(&self, repo_ref: &RepositoryRef, bytes: &Bytes, media_type: &str) {
        let media_type = media_type.to_owned();
        let refers = move |bytes: &[u8]| Some((manifest::subject(bytes)?, manifest::referrer(bytes, &media_type)?));
        let Some((subject, artifact)) = parsed(bytes, refers).await else { return };
        let (store, subject, turn) = (self.store.clone(), subject_key(repo_ref, &subject), self.changing.clone());
        let registry = repo_ref.registry.clone();
        tokio::task::spawn_blocking(move || {
            // Two artifacts of one manifest may come at the same time: none must be lost.
            let _turn = turn.lock();
            let mut referrers = store.records.referrers(&subject);
            if !referrers.contains(&artifact) && referrers.len() < MAX_REFERRERS {
                referrers.push(artifact);
                store.records.put_referrers(&ReferrersRecord { subject, referrers }, &registry);
            }
        });
    }
}

fn subject_key(repo_ref: &RepositoryRef, subject: &Digest) -> String {
    format!("{repo_ref}@{subject} {}", repo_ref.rule.fingerprint())
}

fn wanted_type(query: Option<&str>) -> Option<String> {
    let mut pairs = url::form_urlencoded::parse(query?.as_bytes());
    pairs.find(|(key, _)| key == ARTIFACT_TYPE).map(|(_, value)| value.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn artifact_type_is_parsed_from_the_query() {
        assert_eq!(wanted_type(Some("n=1&artifactType=a%2Fb")).as_deref(), Some("a/b"));
        assert_eq!((wanted_type(Some("n=1")), wanted_type(None)), (None, None));
    }
}
