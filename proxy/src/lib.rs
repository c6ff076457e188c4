//! dray: a stateless pull-through cache proxy for container registries.
//!
//! Modules stand in levels and import only downwards; `tests/levels.rs` holds them to it.

#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "tests may block"))]

pub mod access_log;
pub mod activity;
pub mod admin;
pub mod blocking;
pub mod caller;
pub mod config;
pub mod connections;
pub mod containerd;
pub mod dns;
pub mod fill;
pub mod flights;
pub mod grants;
pub mod identity;
pub mod key_file;
pub mod last_word;
pub mod lifetimes;
pub mod memory;
pub mod metrics;
pub mod oci;
pub mod origin;
pub mod peers;
pub mod prefetch;
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
pub mod sentinel;
pub mod server;
pub mod shares;
pub mod source;
pub mod status;
pub mod store;
pub mod tags;
pub mod telemetry;
pub mod times;
pub mod trace;
pub mod warm;
pub mod worker_watch;
