//! What an image consists of, for the platforms that are wanted.

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

/// Everything that is to be fetched for an image.
#[derive(Clone, Debug, Default)]
pub struct ImagePlan {
    /// Manifests that have come already.
    pub manifests: usize,
    pub blobs: Vec<PlannedBlob>,
    /// Layers that the registry does not give out: runtimes have them from elsewhere.
    pub foreign: usize,
}

/// Which of an image's platforms are wanted.
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

/// As an index and the configuration of an image have it.
#[derive(Clone, Deserialize)]
struct Platform {
    os: String,
    architecture: String,
    variant: Option<String>,
}

/// Beyond these an image is somebody's trick.
const MAX_DEPTH: u32 = 3;
const MAX_MANIFESTS: usize = 200;
const MAX_BLOBS: usize = 5_000;
const MAX_CONFIG: u64 = 4 << 20;

/// Names of platforms that a message has.
const MAX_NAMES: usize = 20;

/// Looks an image up. Its manifests are warm afterwards.
pub(super) async fn make(
    door: &dyn ImageSource,
    image: &ImageName,
    platforms: &Platforms,
) -> Result<ImagePlan, String> {
    let mut making = PlanBuilder { door, image, plan: ImagePlan::default(), known: HashSet::new() };
    let top = making.read(&image.reference).await?;
    let Some(children) = &top.manifests else {
        making.has_one_of(&top, platforms).await?;
        making.take_blobs(&top)?;
        return Ok(making.plan);
    };
    let children = making.without_indexes(children).await?;
    for child in wanted(&children, platforms)? {
        let manifest = making.read(&Reference::Digest(digest_of(child)?)).await?;
        making.take_blobs(&manifest)?;
    }
    Ok(making.plan)
}

struct PlanBuilder<'a> {
    door: &'a dyn ImageSource,
    image: &'a ImageName,
    plan: ImagePlan,
    known: HashSet<Digest>,
}

impl PlanBuilder<'_> {
    async fn read(&mut self, reference: &Reference) -> Result<Manifest, String> {
        if self.plan.manifests == MAX_MANIFESTS {
            return Err(format!("it has more than {MAX_MANIFESTS} manifests"));
        }
        let bytes = fetch::manifest(self.door, self.image, reference).await?;
        self.plan.manifests += 1;
        let manifest: Manifest = serde_json::from_slice(&bytes).map_err(|_| not_understood(reference))?;
        match (&manifest.manifests, &manifest.config) {
            (Some(children), _) if children.is_empty() => Err(format!("the index {reference} has nothing in it")),
            (None, None) => Err(not_understood(reference)),
            _ => Ok(manifest),
        }
    }

    /// The images of an index, those of indexes in it as well.
    async fn without_indexes(&mut self, children: &[Descriptor]) -> Result<Vec<Descriptor>, String> {
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
                next.extend(index.manifests.ok_or_else(|| not_understood(&self.image.reference))?);
            }
            if !has_indexes {
                return Ok(next);
            }
            level = next;
        }
        Err(format!("its indexes are more than {MAX_DEPTH} deep"))
    }

    /// An image that is no index tells its platform in its configuration.
    async fn has_one_of(&self, manifest: &Manifest, platforms: &Platforms) -> Result<(), String> {
        let (Platforms::These(names), Some(config)) = (platforms, &manifest.config) else { return Ok(()) };
        // Other artifacts are for no platform.
        if !is_config(&config.media_type) || config.size > MAX_CONFIG {
            return Ok(());
        }
        let blob = PlannedBlob { image: self.image.clone(), digest: digest_of(config)?, size: config.size };
        let bytes = fetch::small_blob(self.door, &blob).await?;
        let Ok(platform) = serde_json::from_slice::<Platform>(&bytes) else { return Ok(()) };
        match names.iter().find(|name| !platform.is(name)) {
            Some(name) if !platform.os.is_empty() => {
                Err(format!("it has nothing for {name}, only for {}", platform.name()))
            }
            _ => Ok(()),
        }
    }

    fn take_blobs(&mut self, manifest: &Manifest) -> Result<(), String> {
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

fn wanted<'a>(children: &'a [Descriptor], platforms: &Platforms) -> Result<Vec<&'a Descriptor>, String> {
    let Platforms::These(names) = platforms else { return Ok(children.iter().collect()) };
    let mut wanted = Vec::new();
    for name in names {
        let before = wanted.len();
        wanted.extend(children.iter().filter(|child| child.platform.as_ref().is_some_and(|p| p.is(name))));
        if wanted.len() == before {
            return Err(format!("it has nothing for {name}, only for {}", list(children)));
        }
    }
    Ok(wanted)
}

fn digest_of(descriptor: &Descriptor) -> Result<Digest, String> {
    descriptor.digest.parse().map_err(|_| format!("{:?} is no digest", descriptor.digest))
}

fn not_understood(reference: &Reference) -> String {
    format!("{reference} is neither an image nor an index, or of a kind that is not understood")
}

fn is_index(media_type: &str) -> bool {
    matches!(media_type, INDEX_MEDIA_TYPE | "application/vnd.docker.distribution.manifest.list.v2+json")
}

fn is_config(media_type: &str) -> bool {
    matches!(media_type, "application/vnd.oci.image.config.v1+json" | "application/vnd.docker.container.image.v1+json")
}

/// A layer that comes from elsewhere, not from the registry.
fn is_foreign(media_type: &str) -> bool {
    media_type.contains(".nondistributable.") || media_type.contains(".foreign.")
}

impl Platforms {
    /// That of the machine this runs on.
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

    /// Without a variant, all of them are meant.
    fn is(&self, name: &str) -> bool {
        let mut parts = name.splitn(3, '/');
        parts.next() == Some(&self.os)
            && parts.next() == Some(&self.architecture)
            && parts.next().is_none_or(|variant| self.variant.as_deref() == Some(variant))
    }
}

/// Whatever an index says, a terminal shows it as text.
fn list(children: &[Descriptor]) -> String {
    let names: Vec<String> = children.iter().filter_map(|child| child.platform.as_ref().map(Platform::name)).collect();
    match names.len() {
        0 => "no platform in particular".to_owned(),
        count if count > MAX_NAMES => format!("{} and {} more", names[..MAX_NAMES].join(", "), count - MAX_NAMES),
        _ => names.join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_platform_without_a_variant_means_all() {
        let arm = Platform { os: "linux".into(), architecture: "arm".into(), variant: Some("v7".into()) };
        assert!(arm.is("linux/arm") && arm.is("linux/arm/v7"));
        assert!(!arm.is("linux/arm/v6") && !arm.is("linux/arm64") && !arm.is("linux") && !arm.is("windows/arm"));
    }
}
