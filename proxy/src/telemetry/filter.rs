//! Which lines are logged, as people write it: `info`, or `warn,access=info`.

use std::str::FromStr;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

/// A filter that is understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter(String);

/// Parts that have lines, and may stand without a level.
const PARTS: [&str; 2] = ["access", "dray"];

/// Pingora reports each early close of a client as an error, the TLS verifier each refused certificate: both stand in our
/// own lines already.
const QUIET: &str = "pingora_core=off,foyer=error,foyer_storage=error,rustls_platform_verifier=off,\
                     hickory_resolver=error,hickory_net=error";

impl Filter {
    pub(super) fn directives(&self) -> EnvFilter {
        EnvFilter::new(format!("{},{QUIET}", self.0))
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
        // A lone word that is no level would be a part of which everything is logged, and nothing of all others.
        let is_known = |word: &str| {
            let is_plain = word.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'));
            !is_plain || PARTS.contains(&word) || word.parse::<LevelFilter>().is_ok()
        };
        if text.split(',').map(str::trim).all(is_known) && EnvFilter::try_new(text).is_ok() {
            return Ok(Self(text.to_owned()));
        }
        Err(format!(
            "log filter \"{text}\": write error, warn, info or debug, or PART=LEVEL, where PART is access or dray, such as \
             \"warn,access=info\""
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_that_is_neither_a_level_nor_a_part_is_refused() {
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
