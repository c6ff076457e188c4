//! Zones, and lists by zone.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use serde::de::{Deserialize, Deserializer, Error};

use super::{Zone, addresses};

/// A DNS name that lists the addresses of all instances. An error says how to write it.
pub fn service_name(text: &str) -> Result<String, String> {
    if text.contains(':') && text.parse::<IpAddr>().is_err() {
        return Err(format!("\"{text}\": write a name without a port: peers use the port of peers.listen"));
    }
    Ok(text.to_owned())
}

pub(super) fn zone<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Zone, D::Error> {
    String::deserialize(deserializer).map(|name| Some(name.into()))
}

pub(super) fn members<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<(Zone, SocketAddr)>, D::Error> {
    by_zone(deserializer, addresses::address)
}

pub(super) fn services<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<(Zone, String)>, D::Error> {
    by_zone(deserializer, service_name)
}

/// A value, a list, or for each zone a value or a list.
fn by_zone<'de, D, T>(deserializer: D, parse: fn(&str) -> Result<T, String>) -> Result<Vec<(Zone, T)>, D::Error>
where
    D: Deserializer<'de>,
{
    #[derive(serde::Deserialize)]
    #[serde(untagged)]
    enum Texts {
        One(String),
        Many(Vec<String>),
    }
    #[derive(serde::Deserialize)]
    #[serde(untagged)]
    enum ByZone {
        All(Texts),
        Each(BTreeMap<String, Texts>),
    }
    let wrong = |_| D::Error::custom("expected a text, a list of texts, or a table of these by zone");
    let by_zone = match ByZone::deserialize(deserializer).map_err(wrong)? {
        ByZone::All(texts) => vec![(None, texts)],
        ByZone::Each(zones) => zones.into_iter().map(|(zone, texts)| (Some(zone.into()), texts)).collect(),
    };
    let mut found = Vec::new();
    for (zone, texts) in by_zone {
        let texts = match texts {
            Texts::One(text) => vec![text],
            Texts::Many(texts) => texts,
        };
        for text in texts {
            found.push((zone.clone(), parse(&text).map_err(D::Error::custom)?));
        }
    }
    Ok(found)
}
