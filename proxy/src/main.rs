//! The command line. Exit codes: 0 success, 1 failure, 2 invalid usage or configuration.

mod commands;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::LazyLock;

use clap::{CommandFactory, Parser, Subcommand};

use self::commands::Failure;
use self::commands::cache::CacheCommand;
use self::commands::completions::Completions;
use self::commands::containerd::ContainerdCommand;
use self::commands::explain::Explain;
use self::commands::man::Man;
use self::commands::runtime::RuntimeConfig;
use self::commands::serve::Serve;
use self::commands::status::StatusCommand;
use self::commands::warm::Warm;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// A stateless pull-through cache proxy for container registries.
///
/// Configure dray as the mirror of every container runtime once. dray then downloads each image of any
/// registry once, verifies it by digest, and serves it from its cache. Without a command, dray runs
/// `serve`; the options of `serve` are not valid before another command.
#[derive(Parser)]
#[command(version, long_version = LONG_VERSION.as_str(), args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: Serve,
}

#[derive(Subcommand)]
enum Command {
    /// Serve registry clients; this is the default command
    Serve(Serve),
    /// Check a configuration file and print its errors
    ///
    /// Does not open the files that the configuration names, so it runs on any machine. With --check-files it opens
    /// them.
    CheckConfig {
        /// The configuration file
        file: PathBuf,
        /// Also check this machine: the certificates, keys and other files that the configuration names, its
        /// credentials, that peers.static has an address of this machine, and containerd's hosts directory.
        /// DRAY_... variables apply as for `serve`
        #[arg(long)]
        check_files: bool,
    },
    /// Write, check, synchronize or remove containerd's mirror configuration
    #[command(subcommand)]
    Containerd(ContainerdCommand),
    /// Print the mirror configuration of another container runtime, and where to save it
    RuntimeConfig(RuntimeConfig),
    /// Pull images through a running dray, so that later pulls are cache hits
    Warm(Warm),
    /// Show the state of a running dray: requests by source, downloads, upstreams, peers, disk
    Status(StatusCommand),
    /// Show how a running dray routes an image, and what it would do with a request now
    Explain(Explain),
    /// List what a running dray has cached, purge content, or end the TTL of a tag
    #[command(subcommand)]
    Cache(CacheCommand),
    /// Print the completions of a shell
    Completions(Completions),
    /// Write the manual pages of dray and its commands into a directory
    Man(Man),
}

/// What `--version` prints: also how this program was built.
static LONG_VERSION: LazyLock<String> = LazyLock::new(|| {
    let features = [("aws", cfg!(feature = "aws")), ("otlp", cfg!(feature = "otlp"))];
    let features: Vec<&str> = features.iter().filter(|(_, is_built)| *is_built).map(|(name, _)| *name).collect();
    format!(
        "{}\ncommit: {}\narchitecture: {}\nfeatures: {}",
        env!("CARGO_PKG_VERSION"),
        option_env!("DRAY_COMMIT").unwrap_or("unknown"),
        std::env::consts::ARCH,
        if features.is_empty() { "none".to_owned() } else { features.join(", ") }
    )
});

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command.unwrap_or(Command::Serve(cli.serve)) {
        Command::Serve(serve) => serve.run(),
        Command::CheckConfig { file, check_files: false } => commands::check_config(&file),
        Command::CheckConfig { file, check_files: true } => commands::check_config_files(&file),
        Command::Containerd(command) => command.run(),
        Command::RuntimeConfig(runtime) => runtime.run(),
        Command::Warm(warm) => warm.run(),
        Command::Status(status) => status.run(),
        Command::Explain(explain) => explain.run(),
        Command::Cache(command) => command.run(),
        Command::Completions(completions) => completions.run(Cli::command()),
        Command::Man(man) => man.run(Cli::command()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Usage(message)) => fail(&message, 2),
        Err(Failure::Failed(message)) => fail(&message, 1),
    }
}

fn fail(message: &str, code: u8) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "dray: {message}");
    ExitCode::from(code)
}
