//! What an image consists of, for the platforms that are wanted.

use serde::Deserialize;

use super::door::Door;
use super::fetch;
use crate::oci::{Digest, ImageName, Reference};

/// A blob that an image needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blob {
    pub image: ImageName,
    pub digest: Digest,
    pub size: u64,
}

/// Everything that is to be fetched for an image.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Manifests that have come already.
    pub manifests: usize,
    pub blobs: Vec<Blob>,
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
    #[serde(default)]
    manifests: Vec<Descriptor>,
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Descriptor {
    digest: String,
    size: u64,
    platform: Option<Platform>,
    /// A foreign layer comes from there, not from the registry.
    #[serde(default)]
    urls: Vec<String>,
}

#[derive(Deserialize)]
struct Platform {
    os: String,
    architecture: String,
    variant: Option<String>,
}

/// Looks an image up. Its manifests are warm afterwards.
pub(super) async fn make(door: &dyn Door, image: &ImageName, platforms: &Platforms) -> Result<Plan, String> {
    let mut plan = Plan::default();
    let top = read(door, image, &image.reference, &mut plan).await?;
    if top.manifests.is_empty() {
        take_blobs(image, &top, &mut plan)?;
        return Ok(plan);
    }
    let wanted: Vec<&Descriptor> = match platforms {
        Platforms::All => top.manifests.iter().collect(),
        Platforms::These(names) => {
            let mut wanted = Vec::new();
            for name in names {
                let matching = top.manifests.iter().filter(|child| child.platform.as_ref().is_some_and(|p| p.is(name)));
                let before = wanted.len();
                wanted.extend(matching);
                if wanted.len() == before {
                    return Err(format!("it has nothing for {name}, only for {}", list(&top.manifests)));
                }
            }
            wanted
        }
    };
    for child in wanted {
        let digest: Digest = child.digest.parse().map_err(|_| format!("{:?} is no digest", child.digest))?;
        let manifest = read(door, image, &Reference::Digest(digest), &mut plan).await?;
        take_blobs(image, &manifest, &mut plan)?;
    }
    Ok(plan)
}

async fn read(door: &dyn Door, image: &ImageName, reference: &Reference, plan: &mut Plan) -> Result<Manifest, String> {
    let bytes = fetch::manifest(door, image, reference).await?;
    plan.manifests += 1;
    serde_json::from_slice(&bytes).map_err(|_| format!("the manifest {reference} is not understood"))
}

fn take_blobs(image: &ImageName, manifest: &Manifest, plan: &mut Plan) -> Result<(), String> {
    for descriptor in manifest.config.iter().chain(&manifest.layers).filter(|descriptor| descriptor.urls.is_empty()) {
        let digest: Digest = descriptor.digest.parse().map_err(|_| format!("{:?} is no digest", descriptor.digest))?;
        if !plan.blobs.iter().any(|blob| blob.digest == digest) {
            plan.blobs.push(Blob { image: image.clone(), digest, size: descriptor.size });
        }
    }
    Ok(())
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
    /// Without a variant, all of them are meant.
    fn is(&self, name: &str) -> bool {
        let mut parts = name.splitn(3, '/');
        parts.next() == Some(&self.os)
            && parts.next() == Some(&self.architecture)
            && parts.next().is_none_or(|variant| self.variant.as_deref() == Some(variant))
    }
}

fn list(children: &[Descriptor]) -> String {
    let name = |platform: &Platform| match &platform.variant {
        Some(variant) => format!("{}/{}/{variant}", platform.os, platform.architecture),
        None => format!("{}/{}", platform.os, platform.architecture),
    };
    let names: Vec<String> = children.iter().filter_map(|child| child.platform.as_ref().map(name)).collect();
    if names.is_empty() { "no platform in particular".to_owned() } else { names.join(", ") }
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
