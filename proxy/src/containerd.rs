//! Points containerd at dray, says whether and why that works, and takes it back.
//!
//! `hosts_dir` changes the files by which containerd finds mirrors, `daemon` reads what its own configuration
//! makes of them, and `diagnosis` says what is wrong, and what to do.

pub mod daemon;
pub mod diagnosis;
pub mod hosts_dir;
pub mod hosts_toml;
pub mod keeping;
pub mod patch;
pub mod places;
pub mod proof;
mod tree;
