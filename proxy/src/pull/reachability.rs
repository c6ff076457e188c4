//! Checks whether the blobs of a repository can be downloaded, when its manifest is requested.
//!
//! podman, CRI-O, buildah and skopeo try another mirror only until they have a manifest. If dray will not get the
//! blobs, the manifest request has to fail: for example if the egress policy blocks the object store of the redirects.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, timeout};

use crate::blocking::parsed;
use crate::lifetimes::{ByLifetime, Lifetime};
use crate::oci::{Digest, manifest};
use crate::registries::RepositoryRef;
use crate::source::SourceError;
use crate::times::{DEFAULT_TTL, OBSERVATION_TTL, REACH_TIMEOUT};
use crate::upstream::UpstreamClient;

/// The results by [`RepositoryRef::rule_key`].
pub(super) struct Reachability(moka::sync::Cache<String, Verdict>);

/// None: its blobs can be downloaded.
#[derive(Clone)]
struct Verdict(Option<SourceError>);

impl Reachability {
    pub(super) fn new() -> Self {
        Self(moka::sync::Cache::builder().max_capacity(50_000).expire_after(ByLifetime).build())
    }

    /// Sends a HEAD for a manifest's first layer, once for a repository. An error: dray will not get its blobs.
    pub(super) async fn check(
        &self,
        upstream: &Arc<UpstreamClient>,
        repo_ref: &RepositoryRef,
        bytes: &Bytes,
    ) -> Result<(), SourceError> {
        // With upstream authorization, each client's own check has shown it.
        if repo_ref.rule.is_passthrough() {
            return Ok(());
        }
        let key = repo_ref.rule_key();
        if let Some(Verdict(known)) = self.0.get(&key) {
            return known.map_or(Ok(()), Err);
        }
        let Some(blob) = parsed(bytes, first_blob).await else { return Ok(()) };
        let head = upstream.blob_head(repo_ref, &blob, Instant::now() + REACH_TIMEOUT);
        let error = timeout(REACH_TIMEOUT, head).await.ok().and_then(Result::err).filter(is_final);
        self.0.insert(key, Verdict(error.clone()));
        error.map_or(Ok(()), Err)
    }
}

/// The first layer, or else the configuration. None: an index, whose manifests are checked instead.
fn first_blob(bytes: &[u8]) -> Option<Digest> {
    if manifest::is_index(bytes) {
        return None;
    }
    let mut named = manifest::named(bytes).into_iter().map(|(digest, _)| digest);
    let config = named.next()?;
    Some(named.next().unwrap_or(config))
}

/// Whether a GET would fail in the same way. Signed URLs are often valid for GET only, and respond to a HEAD with 403.
fn is_final(error: &SourceError) -> bool {
    match error {
        SourceError::Blocked(_) => true,
        SourceError::Denied(error) => error.status == 401,
        _ => false,
    }
}

impl Lifetime for Verdict {
    fn life(&self) -> Duration {
        if self.0.is_some() { DEFAULT_TTL } else { OBSERVATION_TTL }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::UpstreamError;

    #[test]
    fn first_blob_is_the_first_layer_or_the_config() {
        let [config, layer] = ["config", "layer"].map(|text| Digest::of(text.as_bytes()));
        let of = |json: serde_json::Value| first_blob(json.to_string().as_bytes());
        let (config_json, layer_json) =
            (serde_json::json!({"digest": config.as_str()}), serde_json::json!({"digest": layer.as_str()}));
        assert_eq!(of(serde_json::json!({"config": config_json, "layers": [layer_json]})), Some(layer.clone()));
        assert_eq!(of(serde_json::json!({"config": config_json, "layers": []})), Some(config));
        assert_eq!(of(serde_json::json!({"manifests": [layer_json]})), None);
    }

    #[test]
    fn head_error_is_final_only_if_a_get_fails_too() {
        assert!(is_final(&SourceError::Blocked("10.0.0.1".into())));
        assert!(is_final(&SourceError::Denied(UpstreamError::of_status(401))));
        for error in [SourceError::denied(), SourceError::not_found(), SourceError::TimedOut, SourceError::failed(405)]
        {
            assert!(!is_final(&error), "{error}");
        }
    }
}
