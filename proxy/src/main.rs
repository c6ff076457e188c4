//! The command line. Exit codes: 0 done, 1 failed, 2 wrong usage or configuration.

mod commands;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use self::commands::Failure;
use self::commands::containerd::ContainerdCommand;
use self::commands::explain::Explain;
use self::commands::hand_over::HandOver;
use self::commands::runtime::RuntimeCommand;
use self::commands::serve::Serve;
use self::commands::status::StatusCommand;
use self::commands::warm::Warm;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// A stateless pull-through cache proxy for container registries.
///
/// Point every container runtime at it once; from then on any image of any registry is fetched
/// once, verified by digest, and served from here. Without a command it serves; options stand
/// before or after that, but not before another command.
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: Serve,
}

#[derive(Subcommand)]
enum Command {
    /// Serve registry clients (the default)
    Serve(Serve),
    /// Check a configuration file and say what is wrong with it
    ///
    /// Opens none of the files that it names, so that it can be checked anywhere; with --here it does.
    CheckConfig {
        /// The file
        file: PathBuf,
        /// Also check what this machine has to have for it: certificates, keys and other files that it names, credentials, an address
        /// among peers.static, containerd's hosts directory. DRAY_... variables hold as they do at the start
        #[arg(long)]
        here: bool,
    },
    /// Point containerd at dray, find out whether that works, or take it back
    #[command(subcommand)]
    Containerd(ContainerdCommand),
    /// Print what points another runtime at dray: the very file, and where it goes
    Runtime(RuntimeCommand),
    /// Pull images through a running dray, so that they are there when a runtime asks
    Warm(Warm),
    /// Show what a running dray does: answers by source, fills, registries, peers, disk
    Status(StatusCommand),
    /// Tell how a running dray routes an image, and what would happen now
    Explain(Explain),
    /// Give directories to the user that dray runs as, who then needs no other right
    HandOver(HandOver),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.command.unwrap_or(Command::Serve(cli.serve)) {
        Command::Serve(serve) => serve.run(),
        Command::CheckConfig { file, here: false } => commands::check_config(&file),
        Command::CheckConfig { file, here: true } => commands::check_config_here(&file),
        Command::Containerd(command) => command.run(),
        Command::Runtime(runtime) => runtime.run(),
        Command::Warm(warm) => warm.run(),
        Command::Status(status) => status.run(),
        Command::Explain(explain) => explain.run(),
        Command::HandOver(hand_over) => hand_over.run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Usage(message)) => fail(&message, 2),
        Err(Failure::Failed(message)) => fail(&message, 1),
    }
}

fn fail(message: &str, code: u8) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "dray: {message}");
    ExitCode::from(code)
}
