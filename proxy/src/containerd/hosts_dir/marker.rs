//! The marker file of a directory that dray created or prepared: its previous owner.
//!
//! Its text is `created` or `owner UID GID MODE`, followed by ` prepared` after `prepare`.

use std::path::Path;

use super::{HostsError, read_if_text};
use crate::containerd::tree::FileOwner;

/// The name of the marker file.
pub(super) const MARKER_FILE: &str = ".dray";

/// The content of the marker file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Marker {
    /// The previous owner. None: dray created the directory.
    pub(super) before: Option<FileOwner>,
    /// The directory belongs to the user that dray runs as until `uninstall`.
    pub(super) is_prepared: bool,
}

impl Marker {
    pub(super) fn of(dir: &Path) -> Result<Option<Self>, HostsError> {
        Ok(read_if_text(&dir.join(MARKER_FILE))?.and_then(|text| Self::parse(&text)))
    }

    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split_whitespace();
        let before = match words.next()? {
            "created" => None,
            "owner" => Some(read_owner(&mut words)?),
            _ => return None,
        };
        Some(Self { before, is_prepared: words.next() == Some("prepared") })
    }

    pub(super) fn to_text(self) -> String {
        let of = |owner: FileOwner| format!("{} {} {:04o}", owner.uid, owner.gid, owner.mode);
        let before = self.before.map_or_else(|| "created".to_owned(), |owner| format!("owner {}", of(owner)));
        format!("{before}{}\n", if self.is_prepared { " prepared" } else { "" })
    }
}

fn read_owner<'a>(words: &mut impl Iterator<Item = &'a str>) -> Option<FileOwner> {
    let mut number = |radix| u32::from_str_radix(words.next()?, radix).ok();
    Some(FileOwner { uid: number(10)?, gid: number(10)?, mode: number(8)? })
}
