//! `cargo xtask`: the project's few verbs, the same for developers and for CI.
//!
//! Everything a verb starts, it stops again, whichever way it ends: by return, error, panic or Ctrl-C. Nothing here
//! exits the process while a child lives; `main` returns an exit code after every value has been dropped.

mod bench;
mod chaos;
mod ci;
mod counts;
mod process;
mod servers;
mod up;

use std::{
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use process::{Interrupt, Interrupted};

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "Tests, checks and runs the seckill mesh")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Run every test; PostgreSQL, MariaDB, Redis and NATS are found or installed, started, and stopped again
    Test(ci::TestArgs),
    /// What has to hold for a change to land: format, clippy, tests, the demo, the instruction counts
    Ci,
    /// Search every interleaving of the stock protocol and of an order's saga; `-- --help` for bounds of your own
    Model(ci::ModelArgs),
    /// Run the whole mesh from seeds, with faults at every port, and check what became of it; `--help` for more
    Sim(ci::SimArgs),
    /// Break a mesh of real processes on real servers, under load, and audit it; `-- --help` for scenarios and bounds
    Chaos(chaos::Args),
    /// Measure the mesh beside the machine's own ceilings and the textbook design; `-- --help` for scenarios
    Bench(bench::Args),
    /// Count what an order costs in instructions, and hold it to the budget; `-- --write` makes a new one
    Counts(counts::Args),
    /// Run the mesh as five processes on real servers until Ctrl-C
    Up(up::Args),
    /// Run only the servers until Ctrl-C, and print what to export to use them
    #[command(hide = true)]
    Servers(up::ServersArgs),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(code) => code,
        // As a shell reports it: 128 plus SIGINT.
        Err(error) if error.is::<Interrupted>() => {
            eprintln!("xtask: interrupted");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    let interrupt = Interrupt::watch()?;
    // Cargo's alias may be used from any folder of the workspace; everything below is relative to its root.
    std::env::set_current_dir(root()).context("entering the workspace's root")?;
    match cli.verb {
        Verb::Test(args) => ci::test(&args, &interrupt),
        Verb::Ci => ci::ci(&interrupt),
        Verb::Model(args) => ci::model(&args, &interrupt),
        Verb::Sim(args) => ci::sim(&args, &interrupt),
        Verb::Chaos(args) => chaos::chaos(&args, &interrupt),
        Verb::Bench(args) => bench::bench(&args, &interrupt),
        Verb::Counts(args) => counts::counts(&args, &interrupt),
        Verb::Up(args) => up::up(&args, &interrupt),
        Verb::Servers(args) => up::servers(&args, &interrupt),
    }
}

/// The workspace's root.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is a folder of the workspace")
}

/// Cargo's target folder, wherever the user's configuration puts it: this program is `<target>/<profile>/xtask`.
fn target_dir() -> Result<PathBuf> {
    let program = std::env::current_exe().context("finding this program")?;
    Ok(program.ancestors().nth(2).context("this program is not in a target folder")?.to_owned())
}

/// Keeps from a child what this terminal may have exported to reach some mesh or server. Tuning stays.
fn withhold_settings(command: &mut Command) -> &mut Command {
    for (name, _) in std::env::vars_os() {
        let Some(text) = name.to_str() else { continue };
        let addresses = ["_URL", "_ENDPOINTS", "_LISTEN", "_DATA_DIR"];
        if text.starts_with("SECKILL_") && addresses.iter().any(|ending| text.ends_with(ending)) {
            command.env_remove(&name);
        }
    }
    command
}
