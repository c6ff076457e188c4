//! Points containerd at dray, says whether and why that works, and takes it back.
//!
//! `hosts_dir` changes the files by which containerd finds mirrors, `daemon` reads what its own configuration
//! makes of them, and `diagnosis` says what is wrong, and what to do.

pub mod daemon;
pub mod diagnosis;
pub mod distributions;
pub mod hosts_dir;
pub mod hosts_toml;
pub mod patch;
pub mod proof;
pub mod reconciler;
mod tree;
