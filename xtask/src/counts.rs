//! `cargo xtask counts`: instructions of the hot paths, held to their budget.

use std::{ffi::OsString, process::ExitCode};

use anyhow::{Result, bail};

use crate::{
    ci::cargo,
    process::{self, Interrupt},
    servers::find_or_install_valgrind,
};

#[derive(clap::Args)]
pub struct Args {
    /// Passed to `seckill-bench counts`; `-- --help` tells
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub args: Vec<OsString>,
}

/// Builds what is measured as it is released, and what measures it as the tests have built it already.
pub fn counts(args: &Args, interrupt: &Interrupt) -> Result<ExitCode> {
    find_or_install_valgrind(interrupt)?;
    let build = ["build", "--locked", "--release", "--package", "seckill"];
    if !process::run(&mut cargo(&build), interrupt)?.success() {
        bail!("building failed");
    }
    let program = crate::target_dir()?.join("release").join("seckill");
    let mut counts = cargo(&["run", "--quiet", "--locked", "--package", "bench", "--", "counts", "--program"]);
    counts.arg(program).args(&args.args);
    Ok(process::exit_code(process::run(&mut counts, interrupt)?))
}
