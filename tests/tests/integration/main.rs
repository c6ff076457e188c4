//! Everything that needs a running dray.

mod auth;
mod cache;
mod cli;
mod clients;
mod faults;
mod fills;
mod peers;
mod public;
mod ranges;
mod routing;
mod tags;
