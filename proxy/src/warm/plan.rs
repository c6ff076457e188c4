//! The manifests and blobs of an image for the requested platforms.

use std::collections::HashSet;

use serde::Deserialize;

use super::fetch;
use super::source::ImageSource;
use crate::oci::{Digest, INDEX_MEDIA_TYPE, ImageName, Reference};

/// A blob that an image needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedBlob {
    pub image: ImageName,
    pub digest: Digest,
    pub size: u64,
}

/// The blobs to download for an image.
#[derive(Clone, Debug, Default)]
pub struct ImagePlan {
    /// Manifests that were downloaded to make the plan.
    pub manifests: usize,
    pub blobs: Vec<PlannedBlob>,
    /// Layers that the registry does not distribute: runtimes get them elsewhere.
    pub foreign: usize,
}

/// The requested platforms of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Platforms {
    All,
    /// `os/architecture[/variant]`
    These(Vec<String>),
}

#[derive(Deserialize)]
struct Manifest {
    manifests: Option<Vec<Descriptor>>,
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Vec<Descriptor>,
}

#[derive(Clone, Deserialize)]
struct Descriptor {
    #[serde(default, rename = "mediaType")]
    media_type: String,
    digest: String,
    size: u64,
    platform: Option<Platform>,
}

/// The platform in an index or in an image configuration.
#[derive(Clone, Deserialize)]
struct Platform {
    os: String,
    architecture: String,
    variant: Option<String>,
}

/// Bounds for hostile or broken images: without them, one image could make dray send any number of requests. Images
/// that exceed a bound cannot be warmed.
const MAX_DEPTH: u32 = 3;
const MAX_MANIFESTS: usize = 200;
const MAX_BLOBS: usize = 5_000;

/// Size of an image configuration. The platform of an image with a larger one is not checked, because the configuration
/// is read into memory.
const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// Platforms in an error message; an index may have 200.
const MAX_LISTED_PLATFORMS: usize = 20;

/// Makes the plan for an image. Its manifests are warm afterwards.
pub(super) async fn make(
    source: &dyn ImageSource,
    image: &ImageName,
    platforms: &Platforms,
) -> Result<ImagePlan, String> {
    let mut builder = PlanBuilder { source, image, plan: ImagePlan::default(), known: HashSet::new() };
    let top = builder.read(&image.reference).await?;
    let Some(children) = &top.manifests else {
        builder.check_platform(&top, platforms).await?;
        builder.add_blobs(&top)?;
        return Ok(builder.plan);
    };
    let children = builder.flatten_indexes(children).await?;
    for child in of_platforms(&children, platforms)? {
        let manifest = builder.read(&Reference::Digest(digest_of(child)?)).await?;
        builder.add_blobs(&manifest)?;
    }
    Ok(builder.plan)
}

struct PlanBuilder<'a> {
    source: &'a dyn ImageSource,
    image: &'a ImageName,
    plan: ImagePlan,
    known: HashSet<Digest>,
}

impl PlanBuilder<'_> {
    async fn read(&mut self, reference: &Reference) -> Result<Manifest, String> {
        if self.plan.manifests == MAX_MANIFESTS {
            return Err(format!("it has more than {MAX_MANIFESTS} manifests"));
        }
        let bytes = fetch::manifest(self.source, self.image, reference).await?;
        self.plan.manifests += 1;
        let manifest: Manifest = serde_json::from_slice(&bytes).map_err(|_| unsupported(reference))?;
        match (&manifest.manifests, &manifest.config) {
            (Some(children), _) if children.is_empty() => Err(format!("the index {reference} is empty")),
            (None, None) => Err(unsupported(reference)),
            _ => Ok(manifest),
        }
    }

    /// The images of an index and of the indexes in it.
    async fn flatten_indexes(&mut self, children: &[Descriptor]) -> Result<Vec<Descriptor>, String> {
        let mut level = children.to_vec();
        for _ in 0..MAX_DEPTH {
            let mut next = Vec::new();
            let mut has_indexes = false;
            for child in level {
                if !is_index(&child.media_type) {
                    next.push(child);
                    continue;
                }
                has_indexes = true;
                let index = self.read(&Reference::Digest(digest_of(&child)?)).await?;
                next.extend(index.manifests.ok_or_else(|| unsupported(&self.image.reference))?);
            }
            if !has_indexes {
                return Ok(next);
            }
            level = next;
        }
        Err(format!("its indexes are nested more than {MAX_DEPTH} deep"))
    }

    /// Fails if an image without an index is for another platform. Its configuration names the platform.
    async fn check_platform(&self, manifest: &Manifest, platforms: &Platforms) -> Result<(), String> {
        let (Platforms::These(names), Some(config)) = (platforms, &manifest.config) else { return Ok(()) };
        // Artifacts other than images do not have a platform.
        if !is_config(&config.media_type) || config.size > MAX_CONFIG_BYTES {
            return Ok(());
        }
        let blob = PlannedBlob { image: self.image.clone(), digest: digest_of(config)?, size: config.size };
        let bytes = fetch::small_blob(self.source, &blob).await?;
        let Ok(platform) = serde_json::from_slice::<Platform>(&bytes) else { return Ok(()) };
        match names.iter().find(|name| !platform.matches(name)) {
            Some(name) if !platform.os.is_empty() => {
                Err(format!("it has no image for {name}, only for {}", platform.name()))
            }
            _ => Ok(()),
        }
    }

    fn add_blobs(&mut self, manifest: &Manifest) -> Result<(), String> {
        for descriptor in manifest.config.iter().chain(&manifest.layers) {
            if is_foreign(&descriptor.media_type) {
                self.plan.foreign += 1;
                continue;
            }
            let digest = digest_of(descriptor)?;
            if self.known.insert(digest.clone()) {
                self.plan.blobs.push(PlannedBlob { image: self.image.clone(), digest, size: descriptor.size });
            }
            if self.plan.blobs.len() > MAX_BLOBS {
                return Err(format!("it has more than {MAX_BLOBS} blobs"));
            }
        }
        Ok(())
    }
}

fn of_platforms<'a>(children: &'a [Descriptor], platforms: &Platforms) -> Result<Vec<&'a Descriptor>, String> {
    let Platforms::These(names) = platforms else { return Ok(children.iter().collect()) };
    // An index of artifacts, such as the files of a model, does not name platforms.
    if children.iter().all(|child| child.platform.is_none()) {
        return Ok(children.iter().collect());
    }
    let mut wanted = Vec::new();
    for name in names {
        let before = wanted.len();
        wanted.extend(children.iter().filter(|child| child.platform.as_ref().is_some_and(|p| p.matches(name))));
        if wanted.len() == before {
            return Err(format!("it has no image for {name}, only for {}", list(children)));
        }
    }
    Ok(wanted)
}

fn digest_of(descriptor: &Descriptor) -> Result<Digest, String> {
    descriptor.digest.parse().map_err(|_| format!("{:?} is not a valid digest", descriptor.digest))
}

fn unsupported(reference: &Reference) -> String {
    format!("{reference} is neither an image nor an index of a supported media type")
}

fn is_index(media_type: &str) -> bool {
    matches!(media_type, INDEX_MEDIA_TYPE | "application/vnd.docker.distribution.manifest.list.v2+json")
}

fn is_config(media_type: &str) -> bool {
    matches!(media_type, "application/vnd.oci.image.config.v1+json" | "application/vnd.docker.container.image.v1+json")
}

/// Whether a layer is non-distributable (OCI) or foreign (Docker): registries do not serve it.
fn is_foreign(media_type: &str) -> bool {
    media_type.contains(".nondistributable.") || media_type.contains(".foreign.")
}

impl Platforms {
    /// The platform of the machine that runs this process.
    pub fn of_this_machine() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Self::These(vec![format!("linux/{architecture}")])
    }
}

impl Platform {
    fn name(&self) -> String {
        let variant = self.variant.as_ref().map(|variant| format!("/{variant}")).unwrap_or_default();
        let name: String = format!("{}/{}{variant}", self.os, self.architecture).chars().take(100).collect();
        name.escape_debug().to_string()
    }

    /// Whether a name matches; a name without a variant matches every variant.
    fn matches(&self, name: &str) -> bool {
        let mut parts = name.splitn(3, '/');
        parts.next() == Some(&self.os)
            && parts.next() == Some(&self.architecture)
            && parts.next().is_none_or(|variant| self.variant.as_deref() == Some(variant))
    }
}

/// The platforms of an index, for an error message.
fn list(children: &[Descriptor]) -> String {
    let names: Vec<String> = children.iter().filter_map(|child| child.platform.as_ref().map(Platform::name)).collect();
    match names.len() {
        0 => "unnamed platforms".to_owned(),
        count if count > MAX_LISTED_PLATFORMS => {
            format!("{} and {} more", names[..MAX_LISTED_PLATFORMS].join(", "), count - MAX_LISTED_PLATFORMS)
        }
        _ => names.join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn index_without_platforms_is_wanted_whole() {
        let children = |json: &str| serde_json::from_str::<Vec<Descriptor>>(json).unwrap();
        let artifacts =
            children(r#"[{"mediaType": "a", "digest": "d", "size": 1}, {"mediaType": "a", "digest": "e", "size": 1}]"#);
        let linux = Platforms::These(vec!["linux/amd64".into()]);
        assert_eq!(of_platforms(&artifacts, &linux).unwrap().len(), 2);
        let mixed = children(
            r#"[{"mediaType": "a", "digest": "d", "size": 1, "platform": {"os": "linux", "architecture": "amd64"}},
                {"mediaType": "a", "digest": "e", "size": 1}]"#,
        );
        assert_eq!(of_platforms(&mixed, &linux).unwrap().len(), 1);
    }

    #[test]
    fn platform_without_variant_matches_every_variant() {
        let arm = Platform { os: "linux".into(), architecture: "arm".into(), variant: Some("v7".into()) };
        assert!(arm.matches("linux/arm") && arm.matches("linux/arm/v7"));
        assert!(
            !arm.matches("linux/arm/v6")
                && !arm.matches("linux/arm64")
                && !arm.matches("linux")
                && !arm.matches("windows/arm")
        );
    }
}
