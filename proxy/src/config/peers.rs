//! `[peers]`: the other instances, and how they authenticate each other.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use serde::Deserialize;

use super::{KeyConflict, addresses, zones};

#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PeersConfig {
    /// The peer port; without it this process uses no peers.
    #[serde(deserialize_with = "addresses::optional")]
    pub listen: Option<SocketAddr>,
    /// The peer ports of all instances, this one included.
    #[serde(rename = "static", deserialize_with = "zones::members")]
    pub members: Vec<(Zone, SocketAddr)>,
    /// DNS names that list the addresses of all instances, such as a headless Service. Each listens on
    /// the port of `listen`.
    #[serde(deserialize_with = "zones::services")]
    pub service: Vec<(Zone, String)>,
    /// The zone of this process; without it, that of the name or list that contains its address.
    #[serde(deserialize_with = "zones::zone")]
    pub zone: Zone,
    pub zones: Zones,
    /// A file with secrets that all instances share, one a line: the first signs, all are accepted.
    pub key_file: Option<PathBuf>,
    /// Certificates with which instances authenticate each other.
    pub mtls: Option<Mtls>,
}

impl PeersConfig {
    /// Whether peers authenticate each other.
    pub fn are_authenticated(&self) -> bool {
        self.key_file.is_some() || self.mtls.is_some()
    }

    /// Checks the keys against each other.
    pub(super) fn check(&self) -> Result<(), KeyConflict> {
        let has_members = !self.members.is_empty() || !self.service.is_empty();
        if has_members && self.listen.is_none() {
            return Err(KeyConflict::new(
                "peers.listen",
                "is required with peers.service or peers.static: peers connect to it",
            ));
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
                "has no effect without peers.listen (or --peers-service, DRAY_PEERS_SERVICE): there are no peers";
            return Err(KeyConflict::new(key, format!("{or}{problem}")));
        }
        if self.key_file.is_some() && self.mtls.is_some() {
            return Err(KeyConflict::new("peers.key_file", "cannot be combined with mtls: choose one of them"));
        }
        let mut zones = self.members.iter().map(|(zone, _)| zone).chain(self.service.iter().map(|(zone, _)| zone));
        if self.zone.is_some() && has_members && !zones.any(Option::is_some) {
            let problem = "has no effect, because service and static have no zones: write service = { a = \"...\" } or static = { a = [...] }";
            return Err(KeyConflict::new("peers.zone", problem));
        }
        Ok(())
    }
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mtls {
    /// Certificate chain, PEM. The certificates of all peers have one DNS name in common.
    pub cert: PathBuf,
    pub key: PathBuf,
    /// The authority of the peers' certificates, PEM.
    pub ca: PathBuf,
}

/// A zone's name; None: the zone is unknown.
pub type Zone = Option<Arc<str>>;

/// The effect of zones on requests between peers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Zones {
    /// Requests go to the owner in the zone, and from it to the owner over all zones.
    #[default]
    Prefer,
    /// No requests between zones: each zone downloads from the upstream for itself.
    Isolate,
    /// Zones have no effect.
    Ignore,
}
