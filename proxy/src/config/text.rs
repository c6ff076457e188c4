//! The text of a configuration file, and the lines of its keys.

#![allow(clippy::disallowed_methods, reason = "runs at the start, and on threads for blocking work")]

use std::fmt;
use std::path::Path;

use super::{Config, ConfigError};

/// The text of a file before it is parsed.
#[derive(Debug)]
pub struct SourceText {
    file: String,
    text: String,
}

/// A key that contradicts another one, and the problem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyConflict {
    /// The first byte of the rule that contains it.
    pub(super) rule: Option<usize>,
    /// With its table, such as `cache.disk`.
    pub(super) key: &'static str,
    pub(super) problem: String,
}

// === impl SourceText ===

impl SourceText {
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let file = path.display().to_string();
        match std::fs::read_to_string(path) {
            Ok(text) => Ok(Self { file, text }),
            Err(source) => Err(ConfigError::Unreadable { file, source }),
        }
    }

    /// `file` is only for messages.
    pub fn new(text: &str, file: &str) -> Self {
        Self { file: file.to_owned(), text: text.to_owned() }
    }

    pub fn as_str(&self) -> &str {
        &self.text
    }

    pub fn file(&self) -> &str {
        &self.file
    }

    /// Parses and checks it.
    pub fn parse(&self) -> Result<Config, ConfigError> {
        let mut config: Config = toml::from_str(&self.text)
            .map_err(|error| ConfigError::Syntax { file: self.file.clone(), error: Box::new(error) })?;
        config.deny_on_every_port();
        config.check(self).map_err(|wrong| self.locate(wrong))?;
        Ok(config)
    }

    /// Adds the file, and the line if the file contains the key.
    pub fn locate(&self, wrong: KeyConflict) -> ConfigError {
        let Some(line) = self.line_of(&wrong) else {
            // It comes from a flag or an environment variable.
            return ConfigError::Invalid { place: self.file.clone(), wrong, written: String::new() };
        };
        let written = self.text.lines().nth(line - 1).unwrap_or_default();
        ConfigError::Invalid {
            place: format!("{}:{line}", self.file),
            wrong,
            written: format!("\n  {line} | {}", written.trim()),
        }
    }

    /// The number of the line that has a byte.
    pub(super) fn line_at(&self, offset: usize) -> usize {
        self.text.bytes().take(offset).filter(|byte| *byte == b'\n').count() + 1
    }

    /// The line of a key, otherwise of its table.
    fn line_of(&self, wrong: &KeyConflict) -> Option<usize> {
        let (table, key) = wrong.key.rsplit_once('.').unwrap_or(("", wrong.key));
        let lines: Vec<&str> = self.text.lines().map(str::trim_start).collect();
        let head = match wrong.rule {
            Some(start) => Some(self.line_at(start) - 1),
            None => lines.iter().position(|line| opens(line) == Some(table)),
        };
        let is_inside = |line: &str| opens(line).is_none_or(|name| name.starts_with(wrong.key));
        let body = if head.is_none() && !table.is_empty() { lines.len() } else { head.map_or(0, |head| head + 1) };
        let inside = (body..lines.len()).take_while(|nth| is_inside(lines[*nth]));
        let in_table = inside.into_iter().find(|nth| says(lines[*nth], key) || opens(lines[*nth]) == Some(wrong.key));
        let anywhere = || lines.iter().position(|line| says(line, wrong.key) || opens(line) == Some(wrong.key));
        in_table.or(head).or_else(anywhere).map(|nth| nth + 1)
    }
}

/// The name of the table that a line opens.
fn opens(line: &str) -> Option<&str> {
    let (name, _) = line.strip_prefix('[')?.trim_start_matches('[').split_once(']')?;
    let name = name.trim();
    // An array may span several lines.
    name.starts_with(|c: char| c.is_ascii_lowercase()).then_some(name)
}

/// Whether a line sets a key or one below it.
fn says(line: &str, key: &str) -> bool {
    line.strip_prefix(key).is_some_and(|rest| rest.trim_start().starts_with(['=', '.']))
}

// === impl KeyConflict ===

impl KeyConflict {
    pub(super) fn new(key: &'static str, problem: impl Into<String>) -> Self {
        Self { rule: None, key, problem: problem.into() }
    }

    /// For a key of the rule that begins at a byte.
    pub fn of_rule(rule: usize, key: &'static str, problem: impl Into<String>) -> Self {
        Self { rule: Some(rule), key, problem: problem.into() }
    }
}

impl fmt::Display for KeyConflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.key, self.problem)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
# [cache] disk = 1
admin = \"127.0.0.1:1\"
cache.disk = \"1GiB\"
[tls]
cert = \"c\"
[[registry]]
match = \"a.io\"
upstreams = [
  \"https://a\",
]
[registry.credentials]
file = \"f\"
[[registry]]
match = \"b.io\"
deny = true
";

    #[test]
    fn key_is_located_otherwise_its_table() {
        let text = SourceText::new(TEXT, "x");
        let rules: Vec<usize> = TEXT.match_indices("[[registry]]").map(|(at, _)| at).collect();
        for (rule, key, line) in [
            (None, "admin", Some(2)),
            (None, "cache.disk", Some(3)),
            (None, "tls", Some(4)),
            (None, "tls.cert", Some(5)),
            (None, "tls.key", Some(4)),
            (Some(rules[0]), "registry.upstreams", Some(8)),
            (Some(rules[0]), "registry.credentials", Some(11)),
            (Some(rules[0]), "registry.deny", Some(6)),
            (Some(rules[1]), "registry.deny", Some(15)),
            (None, "listen", None),
            (None, "peers.listen", None),
        ] {
            let wrong = KeyConflict { rule, key, problem: String::new() };
            assert_eq!(text.line_of(&wrong), line, "{key}");
        }
    }

    #[test]
    fn located_error_shows_the_line() {
        let error = SourceText::new(TEXT, "x.toml").locate(KeyConflict::new("tls.cert", "is nothing"));
        assert_eq!(error.to_string(), "x.toml:5: tls.cert: is nothing\n  5 | cert = \"c\"");
        let error = SourceText::new(TEXT, "x.toml").locate(KeyConflict::new("peers.listen", "is nothing"));
        assert_eq!(error.to_string(), "x.toml: peers.listen: is nothing");
    }
}
