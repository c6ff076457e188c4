//! dray: a stateless pull-through cache proxy for container registries.
//!
//! Modules form levels and import only from lower ones; `tests/levels.rs` enforces it.

#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "tests may block"))]

pub mod access_log;
pub mod activity;
pub mod admin;
pub mod bandwidth;
pub mod blocking;
pub mod config;
pub mod confirmed_at;
pub mod connections;
pub mod containerd;
pub mod dns;
pub mod fill;
pub mod identity;
pub mod key_file;
pub mod lifetimes;
pub mod memory;
pub mod metrics;
pub mod oci;
pub mod peers;
pub mod prefetch;
pub mod principal;
pub mod probe_image;
pub mod provenance;
pub mod proxy;
pub mod pull;
pub mod readiness;
pub mod registries;
pub mod respond;
pub mod role;
pub mod runtimes;
pub mod sealing;
pub mod secret;
pub mod server;
pub mod shares;
pub mod single_flight;
pub mod source;
pub mod status;
pub mod store;
pub mod tags;
pub mod telemetry;
pub mod times;
pub mod token_issuer;
pub mod trace;
pub mod upstream;
pub mod warm;
pub mod worker_watch;
