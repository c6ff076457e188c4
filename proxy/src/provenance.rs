//! Where a cached object came from.

use serde::{Deserialize, Serialize};

/// The rule and the repository that an object was first fetched by. A digest alone grants no access: this record is
/// checked against the rules each time the object is served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provenance {
    pub rule: String,
    pub registry: String,
    pub repository: String,
}
