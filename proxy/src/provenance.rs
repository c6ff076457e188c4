//! Where a cached object came from.

use serde::{Deserialize, Serialize};

/// By which rule and from which repository an object was first fetched. A digest opens nothing by
/// itself: the rules are held against this record whenever it is given out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provenance {
    pub rule: String,
    pub registry: String,
    pub repository: String,
}
