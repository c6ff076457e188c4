//! Sizes and durations with units.

use std::fmt;
use std::time::Duration;

use serde::de::{Deserialize, Deserializer, Error, Visitor};

use super::lists::list;

/// A number of bytes, written with a binary unit: `"20GiB"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

/// A share of a disk: a number of bytes, or percent of its file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskShare {
    Size(Size),
    /// From 1 to 100.
    Percent(u8),
}

/// A number of bytes a second: `"200MiB/s"`. At least [`MIN_RATE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteRate(Size);

/// The smallest rate. Smaller: peers and clients take their connections for stalled.
const MIN_RATE: Size = Size(64 << 10);

/// A duration with its unit: `"90s"`, `"5m"`, `"1h 30m"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConfigDuration(pub Duration);

const UNITS: [(&str, u32); 5] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10), ("B", 0)];

// === impl Size ===

impl std::str::FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (unit, shift) = UNITS.iter().find(|(unit, _)| text.ends_with(unit))?;
            let digits = text.strip_suffix(unit)?.trim_end();
            let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
            let count: u64 = plain.then(|| digits.parse().ok()).flatten()?;
            count.checked_shl(*shift).filter(|bytes| bytes >> shift == count)
        };
        parse().map(Self).ok_or_else(|| {
            format!("\"{text}\" is not a valid size: expected a whole number with B, KiB, MiB, GiB or TiB, such as \"20GiB\"")
        })
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(UnitText(SIZE))?.parse().map_err(D::Error::custom)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, shift) = UNITS
            .iter()
            .find(|(_, shift)| self.0 >> shift > 0 && self.0.trailing_zeros() >= *shift)
            .unwrap_or(&UNITS[4]);
        write!(f, "{}{unit}", self.0 >> shift)
    }
}

// === impl ByteRate ===

impl ByteRate {
    pub fn bytes_per_second(self) -> u64 {
        self.0.0
    }
}

impl std::str::FromStr for ByteRate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let size = text.strip_suffix("/s").and_then(|size| size.trim_end().parse::<Size>().ok());
        let size = size.ok_or_else(|| {
            format!("\"{text}\" is not a valid rate: expected a size per second, such as \"200MiB/s\"")
        })?;
        if size < MIN_RATE {
            return Err(format!("\"{text}\" is too small: at least {MIN_RATE}/s is needed"));
        }
        Ok(Self(size))
    }
}

impl<'de> Deserialize<'de> for ByteRate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(UnitText(RATE))?.parse().map_err(D::Error::custom)
    }
}

impl fmt::Display for ByteRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/s", self.0)
    }
}

// === impl DiskShare ===

impl DiskShare {
    /// Whether it is less than a number of bytes on every disk.
    pub fn is_below(self, least: Size) -> bool {
        matches!(self, Self::Size(size) if size < least)
    }

    /// In bytes, for a disk of `total` bytes.
    pub fn of(self, total: u64) -> u64 {
        match self {
            Self::Size(size) => size.0,
            Self::Percent(percent) => total / 100 * u64::from(percent),
        }
    }
}

impl std::str::FromStr for DiskShare {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some(digits) = text.strip_suffix('%') else {
            return text.parse().map(Self::Size).map_err(|error| format!("{error}, or percent such as \"50%\""));
        };
        let percent = digits.trim_end().parse().ok().filter(|percent| (1..=100).contains(percent));
        percent.map(Self::Percent).ok_or_else(|| format!("\"{text}\" is not a valid share: expected 1% to 100%"))
    }
}

impl<'de> Deserialize<'de> for DiskShare {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(UnitText(SIZE))?.parse().map_err(D::Error::custom)
    }
}

impl fmt::Display for DiskShare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Size(size) => size.fmt(f),
            Self::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

// === impl ConfigDuration ===

impl ConfigDuration {
    pub(super) const fn seconds(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }
}

impl<'de> Deserialize<'de> for ConfigDuration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = deserializer.deserialize_str(UnitText(DURATION))?;
        humantime::parse_duration(&text).map(Self).map_err(|_| {
            D::Error::custom(format!(
                "\"{text}\" is not a valid duration: expected a number with a unit, such as \"90s\" or \"5m\""
            ))
        })
    }
}

/// A text with a number and a unit. For a plain number the error says what to write.
struct UnitText(fn(i64) -> String);

const RATE: fn(i64) -> String = |_| "a rate such as \"200MiB/s\"".to_owned();
const SIZE: fn(i64) -> String = |_| "a size such as \"20GiB\"".to_owned();
const DURATION: fn(i64) -> String = |number| format!("\"{number}s\"");

impl Visitor<'_> for UnitText {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0(90))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<String, E> {
        Ok(text.to_owned())
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<String, E> {
        Err(E::custom(format!("{number} has no unit: write {}", self.0(number))))
    }
}

/// The version that a file is written for.
pub(super) fn version<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    match u64::deserialize(deserializer)? {
        super::VERSION => Ok(super::VERSION),
        later if later > super::VERSION => {
            let known = super::VERSION;
            Err(D::Error::custom(format!("version {later} is for a newer dray: this one knows version {known}")))
        }
        _ => Err(D::Error::custom(format!("the first version is {}", super::VERSION))),
    }
}

/// A pattern that matches a whole tag or not at all.
pub fn whole_tag(pattern: &str) -> Result<regex::Regex, regex::Error> {
    regex::Regex::new(&format!("^(?:{pattern})$"))
}

/// A list of regular expressions that compile, each taken to match a whole tag.
pub(super) fn regexes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let patterns = list::<_, String>(deserializer)?;
    for pattern in &patterns {
        whole_tag(pattern).map_err(|e| D::Error::custom(format!("\"{pattern}\": {e}")))?;
    }
    Ok(patterns)
}

/// One regular expression that compiles, taken to match a whole tag.
pub(super) fn regex<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let pattern = String::deserialize(deserializer)?;
    whole_tag(&pattern).map_err(|e| D::Error::custom(format!("\"{pattern}\": {e}")))?;
    Ok(pattern)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [("20GiB", 20 << 30), ("1 MiB", 1 << 20), ("7B", 7), ("0B", 0), ("3TiB", 3 << 40)] {
            assert_eq!(text.parse::<Size>().unwrap().0, bytes, "{text}");
        }
        for text in ["20GB", "20", "GiB", "-1MiB", "1.5GiB", "99999999999TiB", "20gib", ""] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
        assert_eq!(Size(20 << 30).to_string(), "20GiB");
        assert_eq!(Size((1 << 20) + 1).to_string(), "1048577B");
        assert_eq!(Size(0).to_string(), "0B");
    }

    #[test]
    fn rates() {
        for (text, rate) in [("200MiB/s", 200 << 20), ("64 KiB/s", 64 << 10), ("1GiB /s", 1 << 30)] {
            assert_eq!(text.parse::<ByteRate>().unwrap().bytes_per_second(), rate, "{text}");
        }
        for (text, problem) in [("200MiB", "not a valid rate"), ("1B/s", "at least 64KiB/s"), ("200Mbit/s", "such as")]
        {
            assert!(text.parse::<ByteRate>().unwrap_err().contains(problem), "{text}");
        }
        assert_eq!("200MiB/s".parse::<ByteRate>().unwrap().to_string(), "200MiB/s");
    }
}
