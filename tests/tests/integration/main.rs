//! Everything that needs a running dray.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod access;
mod auth;
mod browsers;
mod cache;
mod cli;
mod clients;
mod cluster;
mod conformance;
mod connections;
mod containerd;
mod engine;
mod faults;
mod fills;
mod homes;
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
mod peers;
mod proof;
mod public;
mod ranges;
mod retries;
mod routing;
mod secrets;
mod sendfile;
mod shapes;
mod silence;
mod soak;
mod status;
mod tags;
mod tracing;
mod upgrade;
mod warm;
mod ways;
