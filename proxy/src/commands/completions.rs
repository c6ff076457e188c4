//! `dray completions SHELL`.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::Failure;
use crate::Cli;

#[derive(Args)]
pub(crate) struct Completions {
    /// The shell
    shell: Shell,
}

impl Completions {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "dray", &mut script);
        super::print(String::from_utf8_lossy(&script).trim_end());
        Ok(())
    }
}
