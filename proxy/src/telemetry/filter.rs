//! The log filter, as operators write it: `info`, or `warn,access=info`.

use std::str::FromStr;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

/// A valid filter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter(String);

/// Targets that have log lines, and may be named without a level.
const TARGETS: [&str; 2] = ["access", "dray"];

/// Pingora logs each early close of a client as an error, and the TLS verifier each rejected certificate. dray logs
/// both itself.
const MUTED: &str = "pingora_core=off,foyer=error,foyer_storage=error,rustls_platform_verifier=off,\
                     hickory_resolver=error,hickory_net=error";

impl Filter {
    pub(super) fn directives(&self) -> EnvFilter {
        EnvFilter::new(format!("{},{MUTED}", self.0))
    }
}

impl Default for Filter {
    fn default() -> Self {
        Self("info".to_owned())
    }
}

impl FromStr for Filter {
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
            assert_eq!(text.parse::<Filter>(), Ok(Filter(text.to_owned())), "{text}");
        }
        for text in ["warning", "debgu", "info,acess", "dray=debgu", "access = debgu"] {
            let problem = text.parse::<Filter>().unwrap_err();
            assert!(problem.contains(text) && problem.contains("warn,access=info"), "{problem}");
        }
    }
}
