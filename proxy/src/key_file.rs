//! A file with keys that several processes share, one a line. The first is used and all are accepted, so that a key can
//! be rotated without an outage.

#![allow(clippy::disallowed_methods, reason = "runs at the start, and on threads for blocking work")]

use std::path::Path;

/// A key file, and the configuration key that names it.
#[derive(Clone, Copy)]
pub struct KeyFile<'a> {
    pub key: &'static str,
    pub path: &'a Path,
}

/// Shortest key, in bytes. Smaller: keys that can be guessed are accepted.
const MIN_KEY_LENGTH: usize = 16;

impl KeyFile<'_> {
    /// The keys: at least one.
    pub fn lines(self) -> Result<Vec<String>, String> {
        let text = std::fs::read_to_string(self.path).map_err(|error| self.wrong(&error.to_string()))?;
        let lines: Vec<String> =
            text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect();
        if lines.is_empty() {
            return Err(self.wrong("is empty: write a random text of 32 characters or more into it"));
        }
        if lines.iter().any(|line| line.len() < MIN_KEY_LENGTH) {
            return Err(self.wrong(&format!(
                "contains a key of fewer than {MIN_KEY_LENGTH} characters, which can be guessed: use a random one of 32"
            )));
        }
        Ok(lines)
    }

    /// An error message about this file.
    pub fn wrong(self, why: &str) -> String {
        format!("{} = \"{}\": {why}", self.key, self.path.display())
    }
}
