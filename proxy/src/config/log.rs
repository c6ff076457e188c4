//! `[log]`: which events are logged.

use std::str::FromStr;

use serde::Deserialize;
use serde::de::{Deserializer, Error};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    pub filter: LogFilter,
}

/// A valid filter, as operators write it: `info`, or `warn,access=info`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogFilter(String);

/// Targets that have log lines, and may be named without a level.
const TARGETS: [&str; 2] = ["access", "dray"];

impl LogFilter {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for LogFilter {
    fn default() -> Self {
        Self("info".to_owned())
    }
}

impl FromStr for LogFilter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // `EnvFilter` takes a lone word that is not a level as a target: it would log all lines of this target, and no
        // others.
        let is_known = |word: &str| {
            let is_plain = word.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'));
            !is_plain || TARGETS.contains(&word) || word.parse::<LevelFilter>().is_ok()
        };
        if text.split(',').map(str::trim).all(is_known) && EnvFilter::try_new(text).is_ok() {
            return Ok(Self(text.to_owned()));
        }
        Err(format!(
            "log filter \"{text}\" is not valid: expected error, warn, info or debug, or TARGET=LEVEL, where TARGET is \
             access or dray, such as \"warn,access=info\""
        ))
    }
}

impl<'de> Deserialize<'de> for LogFilter {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_level_or_target_is_refused() {
        for text in [
            "info",
            "WARN",
            "off",
            "warn,access=info",
            "warn, access",
            "dray::pull=debug,warn",
            "hyper=trace",
            "dray",
            "",
        ] {
            assert_eq!(text.parse::<LogFilter>(), Ok(LogFilter(text.to_owned())), "{text}");
        }
        for text in ["warning", "debgu", "info,acess", "dray=debgu", "access = debgu"] {
            let problem = text.parse::<LogFilter>().unwrap_err();
            assert!(problem.contains(text) && problem.contains("warn,access=info"), "{problem}");
        }
    }
}
