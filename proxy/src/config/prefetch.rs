//! `[[prefetch]]`: images that are kept fresh, and when. `[[pin]]`: images that stay in the cache.

use std::str::FromStr;
use std::time::Duration;

use chrono::{DateTime, Utc};
use croner::Cron;
use serde::Deserialize;
use serde::de::{Deserializer, Error};

use super::lists::list;
use crate::oci::ImageName;

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prefetch {
    #[serde(deserialize_with = "images")]
    pub images: Vec<ImageName>,
    pub schedule: Schedule,
    /// `os/architecture`; empty: that of this machine.
    #[serde(default, deserialize_with = "platforms")]
    pub platforms: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pin {
    #[serde(deserialize_with = "images")]
    pub images: Vec<ImageName>,
    /// As in [`Prefetch`].
    #[serde(default, deserialize_with = "platforms")]
    pub platforms: Vec<String>,
}

/// A schedule in the format of cron, in UTC.
#[derive(Debug, Clone)]
pub struct Schedule {
    text: String,
    cron: Cron,
}

impl Schedule {
    /// Whether it has seconds: such a schedule is for tests and demonstrations, so no random delay is added.
    pub fn is_by_the_second(&self) -> bool {
        self.text.split_whitespace().count() > 5
    }

    /// The time until the next run; None: there is none.
    pub fn next(&self, now: DateTime<Utc>) -> Option<Duration> {
        let next = self.cron.find_next_occurrence(&now, false).ok()?;
        (next - now).to_std().ok()
    }
}

impl PartialEq for Schedule {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl<'de> Deserialize<'de> for Schedule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let cron = Cron::from_str(&text).map_err(|error| {
            D::Error::custom(format!(
                "schedule \"{text}\": {error}; write minute, hour, day of the month, month, day of the week, in UTC, \
                 such as \"0 3 * * *\""
            ))
        })?;
        Ok(Self { text, cron })
    }
}

fn images<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<ImageName>, D::Error> {
    let texts = list::<_, String>(deserializer)?;
    texts.iter().map(|text| text.parse().map_err(D::Error::custom)).collect()
}

fn platforms<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let texts = list::<_, String>(deserializer)?;
    texts.iter().map(|text| platform(text).map_err(D::Error::custom)).collect()
}

/// `os/architecture`, or with a variant. An error says how to write it.
pub fn platform(text: &str) -> Result<String, String> {
    let parts: Vec<&str> = text.split('/').collect();
    if (2..=3).contains(&parts.len()) && parts.iter().all(|part| !part.is_empty()) {
        return Ok(text.to_owned());
    }
    let example = if parts.len() == 1 && !text.is_empty() { format!("linux/{text}") } else { "linux/amd64".to_owned() };
    Err(format!("\"{text}\" is not a valid platform: expected os/arch, such as \"{example}\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_platform_has_a_system_and_an_architecture() {
        for text in ["linux/amd64", "linux/arm/v7", "windows/amd64"] {
            assert_eq!(platform(text).as_deref(), Ok(text));
        }
        for (text, example) in [("arm64", "linux/arm64"), ("", "linux/amd64"), ("linux/", "linux/amd64")] {
            let problem = platform(text).unwrap_err();
            assert!(problem.contains(example), "{problem}");
        }
        let pin = toml::from_str::<Pin>("images = [\"alpine\"]\nplatforms = [\"amd64\"]").unwrap_err().to_string();
        assert!(pin.contains("line 2") && pin.contains("linux/amd64"), "{pin}");
    }

    #[test]
    fn a_schedule_is_as_cron_has_it() {
        let prefetch: Prefetch = toml::from_str("images = [\"alpine\"]\nschedule = \"30 3 * * *\"").unwrap();
        let now: DateTime<Utc> = "2026-11-26T03:00:00Z".parse().unwrap();
        assert_eq!(prefetch.schedule.next(now), Some(Duration::from_secs(1800)));
        assert_eq!(prefetch.images[0].to_string(), "docker.io/library/alpine:latest");
        for (text, says) in [
            ("images = [\"UPPER\"]\nschedule = \"0 3 * * *\"", "is not a valid image name"),
            ("images = []\nschedule = \"daily at three\"", "0 3 * * *"),
            ("images = []\nschedule = \"61 3 * * *\"", "in UTC"),
        ] {
            let message = toml::from_str::<Prefetch>(text).unwrap_err().to_string();
            assert!(message.contains(says), "{message}");
        }
    }
}
