//! Writes, checks and removes containerd's mirror configuration.
//!
//! `hosts_dir` changes the files in which containerd finds mirrors. `daemon` reads the effective configuration of
//! containerd. `diagnosis` finds problems in both, with a remedy for each.

pub mod daemon;
pub mod diagnosis;
pub mod distributions;
pub mod hosts_dir;
pub mod hosts_toml;
pub mod patch;
pub mod proof;
pub mod reconciler;
mod tree;
