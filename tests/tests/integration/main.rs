//! Everything that needs a running dray.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod authorization;
mod browsers;
mod cache;
mod cli;
mod clients;
mod cluster;
mod conformance;
mod connections;
mod containerd;
mod containerd_config;
mod credentials;
mod engine;
mod faults;
mod fills;
mod hostile;
mod hotpaths;
mod interop;
mod isolation;
mod k8s;
mod kubernetes;
mod lazy;
mod load;
mod monitoring;
mod node;
mod outage;
mod peer_auth;
mod peer_fallback;
mod peers;
mod public;
mod ranges;
mod reference;
mod registry_hints;
mod reload;
mod retries;
mod routing;
mod sendfile;
mod soak;
mod stalled_peers;
mod status;
mod tags;
mod tracing;
mod upgrade;
mod upstream_auth;
mod warm;
