//! `[peers]`: who the other drays are, and how they know each other.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use serde::Deserialize;

use super::{KeyConflict, addresses, zones};

#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PeersConfig {
    /// Where other drays connect; without it this process keeps to itself.
    #[serde(deserialize_with = "addresses::optional")]
    pub listen: Option<SocketAddr>,
    /// The peer listeners of all drays, this one included.
    #[serde(rename = "static", deserialize_with = "zones::members")]
    pub members: Vec<(Zone, SocketAddr)>,
    /// Names whose addresses are those of all drays, such as a headless Service. Each listens on
    /// the port of `listen`.
    #[serde(deserialize_with = "zones::services")]
    pub service: Vec<(Zone, String)>,
    /// This process's own; without it, that of the name or list that has its address.
    #[serde(deserialize_with = "zones::zone")]
    pub zone: Zone,
    pub zones: Zones,
    /// A file with a secret that all drays share, one to a line: the first signs, all are believed.
    pub key_file: Option<PathBuf>,
    /// Certificates by which drays know each other.
    pub mtls: Option<Mtls>,
}

impl PeersConfig {
    /// Whether peers have to prove who they are.
    pub fn are_proven(&self) -> bool {
        self.key_file.is_some() || self.mtls.is_some()
    }

    /// Whether it makes sense as a whole.
    pub(super) fn check(&self) -> Result<(), KeyConflict> {
        let has_members = !self.members.is_empty() || !self.service.is_empty();
        if has_members && self.listen.is_none() {
            return Err(KeyConflict::new("peers.listen", "is needed, so that the others can ask back"));
        }
        let useless = [
            ("peers.key_file", "(or --peers-key-file, DRAY_PEERS_KEY_FILE) ", self.key_file.is_some()),
            ("peers.mtls", "", self.mtls.is_some()),
            ("peers.zone", "(or --zone, DRAY_ZONE) ", self.zone.is_some()),
            ("peers.zones", "", self.zones != Zones::default()),
        ];
        let set = useless.into_iter().find(|(_, _, is_set)| *is_set && self.listen.is_none());
        if let Some((key, or, _)) = set {
            let problem =
                "is of no use without peers.listen (or --peers-service, DRAY_PEERS_SERVICE): there are no peers";
            return Err(KeyConflict::new(key, format!("{or}{problem}")));
        }
        if self.key_file.is_some() && self.mtls.is_some() {
            return Err(KeyConflict::new("peers.key_file", "is not needed beside mtls: choose one of them"));
        }
        let mut zones = self.members.iter().map(|(zone, _)| zone).chain(self.service.iter().map(|(zone, _)| zone));
        if self.zone.is_some() && has_members && !zones.any(Option::is_some) {
            let problem =
                "is of no use while the others have none: write service = { a = \"...\" } or static = { a = [...] }";
            return Err(KeyConflict::new("peers.zone", problem));
        }
        Ok(())
    }
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mtls {
    /// Certificate chain, PEM. Peers have to have one for the same name.
    pub cert: PathBuf,
    pub key: PathBuf,
    /// Who issues the peers' certificates, PEM.
    pub ca: PathBuf,
}

/// A zone's name; None: no zone that anybody knows.
pub type Zone = Option<Arc<str>>;

/// What zones mean for who asks whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Zones {
    /// The owner in the zone is asked, and it asks the owner in all zones.
    #[default]
    Prefer,
    /// Nobody in another zone is asked: each zone fetches from the origin for itself.
    Isolate,
    /// There are none.
    Ignore,
}
