//! `[[prefetch]]`: which images are kept fresh, and when. `[[pin]]`: which stay.

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
    /// `os/architecture`; empty: this machine's.
    #[serde(default)]
    pub platforms: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pin {
    #[serde(deserialize_with = "images")]
    pub images: Vec<ImageName>,
    /// As of [`Prefetch`].
    #[serde(default)]
    pub platforms: Vec<String>,
}

/// A time as cron has it, in UTC.
#[derive(Debug, Clone)]
pub struct Schedule {
    text: String,
    cron: Cron,
}

impl Schedule {
    /// Whether it says seconds as well: then somebody watches, and nothing is to be put off.
    pub fn is_by_the_second(&self) -> bool {
        self.text.split_whitespace().count() > 5
    }

    /// From now to the next time; None: there is none.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schedule_is_as_cron_has_it() {
        let prefetch: Prefetch = toml::from_str("images = [\"alpine\"]\nschedule = \"30 3 * * *\"").unwrap();
        let now: DateTime<Utc> = "2026-11-26T03:00:00Z".parse().unwrap();
        assert_eq!(prefetch.schedule.next(now), Some(Duration::from_secs(1800)));
        assert_eq!(prefetch.images[0].to_string(), "docker.io/library/alpine:latest");
        for (text, says) in [
            ("images = [\"UPPER\"]\nschedule = \"0 3 * * *\"", "is no image"),
            ("images = []\nschedule = \"daily at three\"", "0 3 * * *"),
            ("images = []\nschedule = \"61 3 * * *\"", "in UTC"),
        ] {
            let message = toml::from_str::<Prefetch>(text).unwrap_err().to_string();
            assert!(message.contains(says), "{message}");
        }
    }
}
