//! `dray man DIR`.

use std::path::PathBuf;

use clap::{Args, Command};

use super::Failure;

#[derive(Args)]
pub(crate) struct Man {
    /// An existing directory
    dir: PathBuf,
}

impl Man {
    /// `program`: the whole command line.
    pub(crate) fn run(&self, program: Command) -> Result<(), Failure> {
        let failed = |error| Failure::Failed(format!("{}: {error}", self.dir.display()));
        clap_mangen::generate_to(program, &self.dir).map_err(failed)
    }
}
