//! dray: a stateless pull-through cache proxy for container registries.
//!
//! Modules are levels: imports only point down (see ARCHITECTURE.md, and `tests/levels.rs`).

pub mod config;
pub mod metrics;
pub mod oci;
pub mod registries;
pub mod store;
