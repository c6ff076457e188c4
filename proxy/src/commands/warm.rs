//! `dray warm IMAGE...`: pull images through a dray before somebody needs them.

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
use super::{Failure, block_on, say};

/// Pull images through a running dray, so that they are there when a runtime asks
///
/// Each layer comes once, to the node that owns it, whoever is asked. Checks that every platform asked for has come
/// whole. Exit code 0 if all images are warm, 1 if not.
#[derive(Args)]
pub(crate) struct Warm {
    /// Such as alpine, ghcr.io/team/app:1 or reg.corp:5000/app@sha256:...
    image: Vec<String>,
    /// A file with an image a line, or with manifests of Kubernetes, such as what `helm template` prints; - is the
    /// standard input
    #[arg(long, short, value_name = "FILE")]
    file: Vec<PathBuf>,
    /// Where the dray is
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:5050")]
    via: String,
    /// Only for this platform, such as linux/arm64 or linux/arm/v7; several are several. Default: this machine's
    #[arg(long, value_name = "OS/ARCH", conflicts_with = "all_platforms", value_parser = platform)]
    platform: Vec<String>,
    /// For all platforms that an image has
    #[arg(long)]
    all_platforms: bool,
    /// Blobs at a time
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    parallel: u16,
    /// A file with user:password, where the dray or the registry asks who it is
    #[arg(long, value_name = "FILE")]
    login_file: Option<PathBuf>,
}

impl Warm {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let (images, wrong) = self.images()?;
        let platforms = match (self.all_platforms, self.platform.is_empty()) {
            (true, _) => Platforms::All,
            (false, true) => Platforms::of_this_machine(),
            (false, false) => Platforms::These(self.platform.clone()),
        };
        let authorization = self.login_file.as_ref().map(authorization).transpose()?;
        let watching = Watching::new();
        let begun = Instant::now();
        let summary = block_on(async {
            let door = HttpSource::new(&self.via, authorization).map_err(Failure::Usage)?;
            door.is_there()
                .await
                .map_err(|why| Failure::Failed(format!("{why}: start it, or say with --via where it is")))?;
            Ok::<_, Failure>(warm::warm(&door, &images, &platforms, usize::from(self.parallel), &watching).await)
        })??;
        watching.end();
        for (image, problem) in &summary.failed {
            say(&format!("failed: {image}: {}", plain(problem)));
        }
        for problem in &wrong {
            say(&format!("failed: {problem}"));
        }
        if summary.foreign > 0 {
            say(&format!(
                "{} layers are not given out by their registry: runtimes have them from elsewhere",
                summary.foreign
            ));
        }
        let took = begun.elapsed();
        let rate = u128::from(summary.bytes) * 1000 / took.as_millis().max(1);
        let rate = bytes(u64::try_from(rate).unwrap_or(u64::MAX));
        let kept = match summary.kept_bytes {
            0 => String::new(),
            kept => format!(", of which {} were there already", bytes(kept)),
        };
        say(&format!(
            "{} of {} images warm: {} manifests, {} blobs, {} in {:.1} s ({rate}/s){kept}",
            summary.images - summary.failed.len(),
            summary.images + wrong.len(),
            summary.manifests,
            summary.blobs,
            bytes(summary.bytes),
            took.as_secs_f64(),
        ));
        if summary.failed.is_empty() && wrong.is_empty() {
            Ok(())
        } else {
            Err(Failure::Failed("not all images are warm".into()))
        }
    }

    /// The images, and what is wrong with those that manifests name and that are none.
    fn images(&self) -> Result<(Vec<ImageName>, Vec<String>), Failure> {
        let mut images: Vec<ImageName> = Vec::new();
        let mut take = |image| {
            if !images.contains(&image) {
                images.push(image);
            }
        };
        for text in &self.image {
            take(text.parse().map_err(Failure::Usage)?);
        }
        let mut wrong = Vec::new();
        for file in &self.file {
            let name = file.display().to_string();
            let text = read(file).map_err(|error| Failure::Usage(format!("--file {name}: {error}")))?;
            let texts = in_file(&text).map_err(|problem| Failure::Usage(format!("--file {name}: {problem}")))?;
            for text in texts {
                match text.parse() {
                    Ok(image) => take(image),
                    Err(problem) => wrong.push(format!("--file {name}: {problem}")),
                }
            }
        }
        if images.is_empty() {
            let problem = wrong.first().map_or("no image: name some, or give a --file that does", String::as_str);
            return Err(Failure::Usage(problem.to_owned()));
        }
        Ok((images, wrong))
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

/// A list, or manifests: what is neither is nobody's list of nothing.
fn in_file(text: &str) -> Result<Vec<String>, String> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let lines = text.lines().enumerate().map(|(nth, line)| (nth + 1, without_comment(line)));
    let lines: Vec<(usize, &str)> = lines.filter(|(_, line)| !line.is_empty()).collect();
    let wrong = lines.iter().find(|(_, line)| line.parse::<ImageName>().is_err());
    let Some((nth, line)) = wrong else {
        let list: Vec<String> = lines.iter().map(|(_, line)| (*line).to_owned()).collect();
        return if list.is_empty() { Err("it names no image".to_owned()) } else { Ok(list) };
    };
    let is_list = lines.iter().any(|(_, line)| line.parse::<ImageName>().is_ok());
    match images_in(text) {
        Ok(images) if !images.is_empty() => Ok(images),
        Ok(_) if line.ends_with(':') || line.contains(": ") && !is_list => Err("it names no image".to_owned()),
        Err(problem) if !is_list => Err(problem),
        _ => Err(format!("line {nth}: {line:?} is no image: write [registry/]repository[:tag][@digest]")),
    }
}

fn without_comment(line: &str) -> &str {
    let line = line.trim();
    let line = if line.starts_with('#') { "" } else { line };
    line.split(" #").next().unwrap_or_default().trim_end()
}

/// What others say, so that a terminal shows it and does nothing else.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { c.escape_default().to_string() } else { c.to_string() }).collect()
}

fn authorization(file: &PathBuf) -> Result<HeaderValue, Failure> {
    let wrong = |why: &str| Failure::Usage(format!("--login-file {}: {why}", file.display()));
    let text = std::fs::read_to_string(file).map_err(|error| wrong(&error.to_string()))?;
    let login = text.trim();
    if !login.contains(':') {
        return Err(wrong("expected user:password"));
    }
    let mut value =
        HeaderValue::from_str(&format!("Basic {}", STANDARD.encode(login))).map_err(|_| wrong("it fits no header"))?;
    value.set_sensitive(true);
    Ok(value)
}

/// Bars at a terminal, otherwise a line an image.
struct Watching {
    bars: MultiProgress,
    all: ProgressBar,
    running: Mutex<HashMap<Digest, ProgressBar>>,
    is_terminal: bool,
}

const OF_ALL: &str = "{prefix:>24} {bar:30} {bytes:>11} of {total_bytes:<11} {bytes_per_sec:>12} {eta:>5} left";
const OF_ONE: &str = "{prefix:>24} {bar:30} {bytes:>11} of {total_bytes:<11} {msg}";

impl Watching {
    fn new() -> Self {
        let is_terminal = std::io::stderr().is_terminal();
        let target = if is_terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bars = MultiProgress::with_draw_target(target);
        let all = bars.add(ProgressBar::new(0).with_style(style(OF_ALL)).with_prefix("all"));
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

impl WarmObserver for Watching {
    fn planned(&self, image: &ImageName, plan: &ImagePlan) {
        let size: u64 = plan.blobs.iter().map(|blob| blob.size).sum();
        self.all.inc_length(size);
        if !self.is_terminal {
            say(&format!("{image}: {} blobs, {}", plan.blobs.len(), bytes(size)));
        }
    }

    fn began(&self, blob: &PlannedBlob) {
        let name = format!(
            "{} {}",
            blob.image.repository.as_str().rsplit('/').next().unwrap_or_default(),
            &blob.digest.hex()[..12]
        );
        let bar = ProgressBar::new(blob.size).with_style(style(OF_ONE)).with_prefix(name);
        let bar = self.bars.insert_before(&self.all, bar);
        self.running.lock().insert(blob.digest.clone(), bar);
    }

    fn came(&self, blob: &PlannedBlob, bytes: u64) {
        self.all.inc(bytes);
        self.bar(blob).into_iter().for_each(|bar| bar.inc(bytes));
    }

    fn ended(&self, blob: &PlannedBlob, fetched: &Result<WarmedBlob, String>) {
        let Some(bar) = self.bar(blob) else { return };
        self.running.lock().remove(&blob.digest);
        match fetched {
            Ok(_) => bar.finish_and_clear(),
            Err(problem) => bar.abandon_with_message(problem.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_a_list_or_yaml() {
        assert_eq!(in_file("# some\nalpine\n\n ghcr.io/a:1 \n").unwrap(), ["alpine", "ghcr.io/a:1"]);
        assert_eq!(in_file("spec:\n  containers:\n  - image: ghcr.io/a:1\n").unwrap(), ["ghcr.io/a:1"]);
        assert!(in_file("no image: [").is_err());
        assert_eq!(in_file("\u{feff}alpine # the base\n").unwrap(), ["alpine"]);
        assert!(in_file("alpine\nReg.test/A/Bad:1\n").unwrap_err().contains("line 2: \"Reg.test/A/Bad:1\""));
        for nothing in ["", "# none\n", "Error: chart not found\n", "kind: Namespace\nmetadata:\n  name: a\n"] {
            assert!(in_file(nothing).is_err(), "{nothing}");
        }
    }
}
