//! Addresses and networks, as numbers.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::de::{Deserialize, Deserializer, Error};

use super::lists::list;
use crate::oci::Registry;

/// Where somebody listens. An error says how it is written.
pub fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| {
        format!("\"{text}\" is no address: write IP:PORT, such as \"127.0.0.1:5050\" (a name only in peers.service)")
    })
}

fn network(text: &str) -> Result<IpNet, String> {
    text.parse().map_err(|_| match text.parse::<IpAddr>() {
        Ok(one) => format!("\"{text}\" is an address: write a network, \"{}\"", IpNet::from(one)),
        Err(_) => format!("\"{text}\" is no network: write one such as \"10.0.0.0/8\""),
    })
}

pub(super) fn one<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SocketAddr, D::Error> {
    address(&String::deserialize(deserializer)?).map_err(D::Error::custom)
}

pub(super) fn optional<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<SocketAddr>, D::Error> {
    one(deserializer).map(Some)
}

pub(super) fn many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<SocketAddr>, D::Error> {
    let texts: Vec<String> = list(deserializer)?;
    texts.iter().map(|text| address(text).map_err(D::Error::custom)).collect()
}

fn host(text: &str) -> Result<String, String> {
    match text.parse::<Registry>() {
        Ok(name) if name.port().is_none() => Ok(text.to_owned()),
        _ => Err(format!("\"{text}\" is no host name: write it without scheme, port and path")),
    }
}

pub(super) fn hosts<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let texts: Vec<String> = list(deserializer)?;
    texts.iter().map(|text| host(text).map_err(D::Error::custom)).collect()
}

pub(super) fn networks<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<IpNet>, D::Error> {
    let texts: Vec<String> = list(deserializer)?;
    texts.iter().map(|text| network(text).map_err(D::Error::custom)).collect()
}
