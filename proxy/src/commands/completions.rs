//! `dray completions SHELL`.

use clap::{Args, Command};
use clap_complete::Shell;

use super::Failure;

#[derive(Args)]
pub(crate) struct Completions {
    /// The shell
    shell: Shell,
}

impl Completions {
    /// `program`: the whole command line.
    pub(crate) fn run(&self, mut program: Command) -> Result<(), Failure> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut program, "dray", &mut script);
        super::print(String::from_utf8_lossy(&script).trim_end());
        Ok(())
    }
}
