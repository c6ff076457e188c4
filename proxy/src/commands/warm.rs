//! `dray warm IMAGE...`: pulls images through a dray before clients need them.

#![allow(clippy::disallowed_methods, reason = "a command has its thread for itself")]

use std::collections::HashMap;
use std::io::{IsTerminal, Read};
use std::path::PathBuf;
use std::time::Instant;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use clap::Args;
use dray::config::platform;
use dray::oci::{Digest, ImageName};
use dray::warm::{self, HttpSource, ImagePlan, PlannedBlob, Platforms, WarmObserver, WarmedBlob, images_in};
use http::HeaderValue;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use parking_lot::Mutex;

use super::table::bytes;
use super::{Failure, block_on, print};

/// Pull images through a running dray, so that later pulls are cache hits
///
/// Each layer is downloaded once and cached on the node that owns it, whichever node the requests go to. Checks that
/// every requested platform was downloaded completely. Exit code 0 if all images are warm, 1 if not.
#[derive(Args)]
pub(crate) struct Warm {
    /// The images, such as alpine, ghcr.io/team/app:1 or reg.corp:5000/app@sha256:...
    image: Vec<String>,
    /// A file with one image per line, or with Kubernetes manifests such as the output of `helm template`; - reads
    /// standard input
    #[arg(long, short, value_name = "FILE")]
    file: Vec<PathBuf>,
    /// The registry address of the dray to pull through: HOST:PORT or a URL such as http://127.0.0.1:5050
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:5050")]
    server: String,
    /// The platform to pull, such as linux/arm64 or linux/arm/v7; can be repeated. Default: the platform of this
    /// machine
    #[arg(long, value_name = "OS/ARCH", conflicts_with = "all_platforms", value_parser = platform)]
    platform: Vec<String>,
    /// Pull all platforms of each image
    #[arg(long)]
    all_platforms: bool,
    /// The number of blobs to download at the same time
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    parallel: u16,
    /// A file with user:password, if the dray or the registry requires authentication
    #[arg(long, value_name = "FILE")]
    login_file: Option<PathBuf>,
}

impl Warm {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let (images, invalid) = self.images()?;
        let platforms = match (self.all_platforms, self.platform.is_empty()) {
            (true, _) => Platforms::All,
            (false, true) => Platforms::of_this_machine(),
            (false, false) => Platforms::These(self.platform.clone()),
        };
        let authorization = self.login_file.as_ref().map(authorization).transpose()?;
        let progress = ProgressBars::new();
        let started = Instant::now();
        let summary = block_on(async {
            let source = HttpSource::new(&self.server, authorization).map_err(Failure::Usage)?;
            source.wait_until_reachable().await.map_err(|error| {
                Failure::Failed(format!("{error}: start dray, or pass its registry address with --server"))
            })?;
            Ok::<_, Failure>(warm::warm(&source, &images, &platforms, usize::from(self.parallel), &progress).await)
        })??;
        progress.end();
        for (image, problem) in &summary.failed {
            print(&format!("failed: {image}: {}", without_controls(problem)));
        }
        for problem in &invalid {
            print(&format!("failed: {problem}"));
        }
        if summary.foreign > 0 {
            print(&format!(
                "{} layers skipped: their registry does not distribute them, so runtimes get them elsewhere",
                summary.foreign
            ));
        }
        let took = started.elapsed();
        let rate = u128::from(summary.bytes) * 1000 / took.as_millis().max(1);
        let rate = bytes(u64::try_from(rate).unwrap_or(u64::MAX));
        let cached = match summary.cached_bytes {
            0 => String::new(),
            cached => format!(", of which {} were cached already", bytes(cached)),
        };
        print(&format!(
            "{} of {} images warm: {} manifests, {} blobs, {} in {:.1} s ({rate}/s){cached}",
            summary.images - summary.failed.len(),
            summary.images + invalid.len(),
            summary.manifests,
            summary.blobs,
            bytes(summary.bytes),
            took.as_secs_f64(),
        ));
        if summary.failed.is_empty() && invalid.is_empty() {
            Ok(())
        } else {
            Err(Failure::Failed("not all images are warm".into()))
        }
    }

    /// The images, and an error for each `image` value in manifests that is not a valid image name.
    fn images(&self) -> Result<(Vec<ImageName>, Vec<String>), Failure> {
        let mut images: Vec<ImageName> = Vec::new();
        let mut add = |image| {
            if !images.contains(&image) {
                images.push(image);
            }
        };
        for text in &self.image {
            add(text.parse().map_err(Failure::Usage)?);
        }
        let mut invalid = Vec::new();
        for file in &self.file {
            let name = file.display().to_string();
            let text = read(file).map_err(|error| Failure::Usage(format!("--file {name}: {error}")))?;
            let texts = images_in_file(&text).map_err(|problem| Failure::Usage(format!("--file {name}: {problem}")))?;
            for text in texts {
                match text.parse() {
                    Ok(image) => add(image),
                    Err(problem) => invalid.push(format!("--file {name}: {problem}")),
                }
            }
        }
        if images.is_empty() {
            let problem =
                invalid.first().map_or("no images given: pass image names, or --file with a list", String::as_str);
            return Err(Failure::Usage(problem.to_owned()));
        }
        Ok((images, invalid))
    }
}

fn read(file: &std::path::Path) -> std::io::Result<String> {
    if file.as_os_str() == "-" {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text)?;
        return Ok(text);
    }
    std::fs::read_to_string(file)
}

/// The images of a list or of manifests. A file that is neither, or is empty, is an error: most likely the command that
/// wrote it failed.
fn images_in_file(text: &str) -> Result<Vec<String>, String> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let lines = text.lines().enumerate().map(|(nth, line)| (nth + 1, without_comment(line)));
    let lines: Vec<(usize, &str)> = lines.filter(|(_, line)| !line.is_empty()).collect();
    let invalid = lines.iter().find(|(_, line)| line.parse::<ImageName>().is_err());
    let Some((nth, line)) = invalid else {
        let list: Vec<String> = lines.iter().map(|(_, line)| (*line).to_owned()).collect();
        return if list.is_empty() { Err("it does not name an image".to_owned()) } else { Ok(list) };
    };
    let is_list = lines.iter().any(|(_, line)| line.parse::<ImageName>().is_ok());
    match images_in(text) {
        Ok(images) if !images.is_empty() => Ok(images),
        Ok(_) if line.ends_with(':') || line.contains(": ") && !is_list => Err("it does not name an image".to_owned()),
        Err(problem) if !is_list => Err(problem),
        _ => Err(format!("line {nth}: {line:?} is not a valid image: expected [registry/]repository[:tag][@digest]")),
    }
}

fn without_comment(line: &str) -> &str {
    let line = line.trim();
    let line = if line.starts_with('#') { "" } else { line };
    line.split(" #").next().unwrap_or_default().trim_end()
}

/// A text from a server with control characters escaped: it must not control the terminal.
fn without_controls(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { c.escape_default().to_string() } else { c.to_string() }).collect()
}

fn authorization(file: &PathBuf) -> Result<HeaderValue, Failure> {
    let failure = |error: &str| Failure::Usage(format!("--login-file {}: {error}", file.display()));
    let text = std::fs::read_to_string(file).map_err(|error| failure(&error.to_string()))?;
    let login = text.trim();
    if !login.contains(':') {
        return Err(failure("expected user:password"));
    }
    let mut value = HeaderValue::from_str(&format!("Basic {}", STANDARD.encode(login)))
        .map_err(|_| failure("the login cannot be sent in a header"))?;
    value.set_sensitive(true);
    Ok(value)
}

/// Progress bars on a terminal, otherwise one line per image.
struct ProgressBars {
    bars: MultiProgress,
    all: ProgressBar,
    running: Mutex<HashMap<Digest, ProgressBar>>,
    is_terminal: bool,
}

const TOTAL_TEMPLATE: &str = "{prefix:>24} {bar:30} {bytes:>11} of {total_bytes:<11} {bytes_per_sec:>12} {eta:>5} left";
const BLOB_TEMPLATE: &str = "{prefix:>24} {bar:30} {bytes:>11} of {total_bytes:<11} {msg}";

impl ProgressBars {
    fn new() -> Self {
        let is_terminal = std::io::stderr().is_terminal();
        let target = if is_terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bars = MultiProgress::with_draw_target(target);
        let all = bars.add(ProgressBar::new(0).with_style(style(TOTAL_TEMPLATE)).with_prefix("all"));
        Self { bars, all, running: Mutex::default(), is_terminal }
    }

    fn end(&self) {
        self.all.finish_and_clear();
    }

    fn bar(&self, blob: &PlannedBlob) -> Option<ProgressBar> {
        self.running.lock().get(&blob.digest).cloned()
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

impl WarmObserver for ProgressBars {
    fn planned(&self, image: &ImageName, plan: &ImagePlan) {
        let size: u64 = plan.blobs.iter().map(|blob| blob.size).sum();
        self.all.inc_length(size);
        if !self.is_terminal {
            print(&format!("{image}: {} blobs, {}", plan.blobs.len(), bytes(size)));
        }
    }

    fn blob_started(&self, blob: &PlannedBlob) {
        let name = format!(
            "{} {}",
            blob.image.repository.as_str().rsplit('/').next().unwrap_or_default(),
            &blob.digest.hex()[..12]
        );
        let bar = ProgressBar::new(blob.size).with_style(style(BLOB_TEMPLATE)).with_prefix(name);
        let bar = self.bars.insert_before(&self.all, bar);
        self.running.lock().insert(blob.digest.clone(), bar);
    }

    fn blob_progressed(&self, blob: &PlannedBlob, bytes: u64) {
        self.all.inc(bytes);
        self.bar(blob).into_iter().for_each(|bar| bar.inc(bytes));
    }

    fn blob_finished(&self, blob: &PlannedBlob, result: &Result<WarmedBlob, String>) {
        let Some(bar) = self.bar(blob) else { return };
        self.running.lock().remove(&blob.digest);
        match result {
            Ok(_) => bar.finish_and_clear(),
            Err(problem) => bar.abandon_with_message(problem.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_file_is_a_list_or_yaml() {
        assert_eq!(images_in_file("# some\nalpine\n\n ghcr.io/a:1 \n").unwrap(), ["alpine", "ghcr.io/a:1"]);
        assert_eq!(images_in_file("spec:\n  containers:\n  - image: ghcr.io/a:1\n").unwrap(), ["ghcr.io/a:1"]);
        assert!(images_in_file("no image: [").is_err());
        assert_eq!(images_in_file("\u{feff}alpine # the base\n").unwrap(), ["alpine"]);
        assert!(images_in_file("alpine\nReg.test/A/Bad:1\n").unwrap_err().contains("line 2: \"Reg.test/A/Bad:1\""));
        for nothing in ["", "# none\n", "Error: chart not found\n", "kind: Namespace\nmetadata:\n  name: a\n"] {
            assert!(images_in_file(nothing).is_err(), "{nothing}");
        }
    }
}
