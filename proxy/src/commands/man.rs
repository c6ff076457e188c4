//! `dray man DIR`.

use std::path::PathBuf;

use clap::{Args, CommandFactory};

use super::Failure;
use crate::Cli;

#[derive(Args)]
pub(crate) struct Man {
    /// An existing directory
    dir: PathBuf,
}

impl Man {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let failed = |error| Failure::Failed(format!("{}: {error}", self.dir.display()));
        clap_mangen::generate_to(Cli::command(), &self.dir).map_err(failed)
    }
}
