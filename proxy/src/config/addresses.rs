//! Addresses and networks, as numbers.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::de::{Deserialize, Deserializer, Error};

use super::lists::list;
use crate::oci::Registry;

/// The address of a listener. An error says how to write it.
pub fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| {
        format!("\"{text}\" is not a valid address: expected IP:PORT, such as \"127.0.0.1:5050\" (a name only in peers.service)")
    })
}

fn network(text: &str) -> Result<IpNet, String> {
    text.parse().map_err(|_| match text.parse::<IpAddr>() {
        Ok(one) => format!("\"{text}\" is an address: write a network, \"{}\"", IpNet::from(one)),
        Err(_) => format!("\"{text}\" is not a valid network: expected one such as \"10.0.0.0/8\""),
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
        _ => Err(format!("\"{text}\" is not a valid host name: write it without scheme, port and path")),
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
