//! A file with a key that several processes share: the first line is used, all are believed, so that a key can be changed
//! without a gap.

#![allow(clippy::disallowed_methods, reason = "runs at the start, and on threads for blocking work")]

use std::path::Path;

/// A file, and the key of the configuration that names it.
#[derive(Clone, Copy)]
pub struct KeyFile<'a> {
    pub key: &'static str,
    pub path: &'a Path,
}

/// A key of fewer characters can be guessed.
const MIN_KEY: usize = 16;

impl KeyFile<'_> {
    /// Its lines, of which there is at least one.
    pub fn lines(self) -> Result<Vec<String>, String> {
        let text = std::fs::read_to_string(self.path).map_err(|error| self.wrong(&error.to_string()))?;
        let lines: Vec<String> =
            text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect();
        if lines.is_empty() {
            return Err(self.wrong("is empty: write a random text of 32 characters or more"));
        }
        if lines.iter().any(|line| line.len() < MIN_KEY) {
            return Err(self.wrong(&format!(
                "holds a key of fewer than {MIN_KEY} characters, which can be guessed: write a random text of 32 or more"
            )));
        }
        Ok(lines)
    }

    /// Says which file is wrong, and why.
    pub fn wrong(self, why: &str) -> String {
        format!("{} = \"{}\": {why}", self.key, self.path.display())
    }
}
