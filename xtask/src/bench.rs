//! `cargo xtask bench`: the benchmark on release builds and real servers, in one command.

use std::{collections::BTreeSet, ffi::OsString, process::ExitCode};

use anyhow::{Result, bail};

use crate::{
    ci::cargo,
    process::{self, Interrupt},
    servers::{Durability, Kind, Servers},
    withhold_settings,
};

#[derive(clap::Args)]
pub struct Args {
    /// Passed to `seckill-bench run`; `--help` there tells of scenarios and wirings
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<OsString>,
}

/// Builds, starts the servers, measures, stops them again. The report is in `target/bench`.
pub fn bench(args: &Args, interrupt: &Interrupt) -> Result<ExitCode> {
    let build = ["build", "--locked", "--release", "--package", "seckill", "--package", "bench"];
    if !process::run(&mut cargo(&build), interrupt)?.success() {
        bail!("building failed");
    }
    let kinds = BTreeSet::from([Kind::Postgres, Kind::Redis, Kind::Nats]);
    let servers = Servers::start(&kinds, None, Durability::Real, interrupt)?;
    let release = crate::target_dir()?.join("release");
    // `cargo run` would look for changes once more, and be one process more between the interrupt and its end.
    let mut bench = std::process::Command::new(release.join("seckill-bench"));
    // The programs that are measured get addresses from the benchmark alone.
    withhold_settings(&mut bench).arg("run").arg("--program").arg(release.join("seckill")).args(&args.args);
    bench.envs(servers.urls().map(|(kind, url)| (kind.test_variable(), url)));
    Ok(process::exit_code(process::run(&mut bench, interrupt)?))
}
