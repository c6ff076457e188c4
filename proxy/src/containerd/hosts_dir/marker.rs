//! What stands in dray's file in a directory: whose it was.

use std::path::Path;

use super::{HostsError, readable};
use crate::containerd::tree::FileOwner;

/// Its name.
pub(super) const MARKER: &str = ".dray";

/// What dray knows of a directory that it made or was handed: stands in a file in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Marker {
    /// Whose it was before. None: dray made it.
    pub(super) before: Option<FileOwner>,
    /// It belongs to the user that dray runs as until it is given back.
    pub(super) handed_over: bool,
}

impl Marker {
    pub(super) fn of(dir: &Path) -> Result<Option<Self>, HostsError> {
        Ok(readable(&dir.join(MARKER))?.and_then(|text| Self::parse(&text)))
    }

    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split_whitespace();
        let before = match words.next()? {
            "made" => None,
            "was" => Some(read_owner(&mut words)?),
            _ => return None,
        };
        Some(Self { before, handed_over: words.next() == Some("handed-over") })
    }

    pub(super) fn to_text(self) -> String {
        let of = |owner: FileOwner| format!("{} {} {:04o}", owner.uid, owner.gid, owner.mode);
        let before = self.before.map_or_else(|| "made".to_owned(), |owner| format!("was {}", of(owner)));
        format!("{before}{}\n", if self.handed_over { " handed-over" } else { "" })
    }
}

fn read_owner<'a>(words: &mut impl Iterator<Item = &'a str>) -> Option<FileOwner> {
    let mut number = |radix| u32::from_str_radix(words.next()?, radix).ok();
    Some(FileOwner { uid: number(10)?, gid: number(10)?, mode: number(8)? })
}
