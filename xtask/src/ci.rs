//! `cargo xtask test`, `ci`, `model` and `sim`: what must pass, in one order, with its times.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use anyhow::Result;

use crate::{
    counts::{self, counts},
    process::{self, Interrupt},
    servers::{Durability, Kind, Servers},
    withhold_settings,
};

/// Tests that need a server fail without it instead of being passed over.
pub const REQUIRE_SERVERS: &str = "SECKILL_TEST_REQUIRE_SERVERS";

#[derive(clap::Args)]
pub struct TestArgs {
    /// Start no servers: only what runs with nothing installed
    #[arg(long)]
    embedded: bool,
    /// Passed to `cargo test`, in place of `--workspace` where they choose packages themselves
    #[arg(last = true)]
    args: Vec<OsString>,
}

/// The tests.
pub fn test(args: &TestArgs, interrupt: &Interrupt) -> Result<ExitCode> {
    let chooses_packages = args.args.iter().take_while(|arg| *arg != "--").any(|arg| {
        let arg = arg.to_string_lossy();
        arg == "--workspace" || arg == "--all" || arg.starts_with("-p") || arg.starts_with("--package")
    });
    let mut tests = cargo(&["test", "--locked"]);
    if !chooses_packages {
        tests.arg("--workspace");
    }
    tests.args(&args.args);
    tests.env_remove(REQUIRE_SERVERS);
    let _servers = if args.embedded {
        None
    } else {
        let servers = Servers::start(&BTreeSet::from(Kind::ALL), None, Durability::Relaxed, interrupt)?;
        tests.envs(servers.urls().map(|(kind, url)| (kind.test_variable(), url))).env(REQUIRE_SERVERS, "1");
        Some(servers)
    };
    Ok(process::exit_code(process::run(&mut tests, interrupt)?))
}

#[derive(clap::Args)]
pub struct ModelArgs {
    /// Passed to the checker
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<OsString>,
}

/// The checks by themselves, with what they find. The tests run the same ones.
pub fn model(args: &ModelArgs, interrupt: &Interrupt) -> Result<ExitCode> {
    let mut model = cargo(&["run", "--quiet", "--locked", "--package", "model", "--"]);
    model.args(&args.args);
    Ok(process::exit_code(process::run(&mut model, interrupt)?))
}

#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub struct SimArgs {
    /// Passed to the simulation
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<OsString>,
}

/// Seeds by themselves, with what went wrong in them. The tests run a few of the same.
pub fn sim(args: &SimArgs, interrupt: &Interrupt) -> Result<ExitCode> {
    let mut sim = cargo(&["run", "--quiet", "--locked", "--profile", "sim", "--package", "sim", "--"]);
    sim.args(&args.args);
    Ok(process::exit_code(process::run(&mut sim, interrupt)?))
}

/// Everything that must pass for a change to land. The first failure ends it with its exit code.
pub fn ci(interrupt: &Interrupt) -> Result<ExitCode> {
    let mut steps = Steps { done: Vec::new() };
    let result = run_steps(&mut steps, interrupt);
    steps.print_summary();
    result
}

fn run_steps(steps: &mut Steps, interrupt: &Interrupt) -> Result<ExitCode> {
    let command = |args: &[&str]| Ok(process::exit_code(process::run(&mut cargo(args), interrupt)?));
    let clippy = ["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"];
    let demo = "run --release --locked -- demo --buyers 10000 --stock 100 --payment-window 5s --once";
    let demo: Vec<_> = demo.split(' ').collect();

    let mut code = steps.run("format", || command(&["fmt", "--all", "--check"]))?;
    if code == ExitCode::SUCCESS {
        code = steps.run("clippy", || command(&clippy))?;
    }
    if code == ExitCode::SUCCESS {
        code = steps.run("test", || test(&TestArgs { embedded: false, args: Vec::new() }, interrupt))?;
    }
    if code == ExitCode::SUCCESS {
        code = steps.run("demo", || command(&demo))?;
    }
    if code == ExitCode::SUCCESS {
        // Another processor takes other ways through the C library: what a change cost is told on one machine.
        let args = counts::Args { args: ["--allow", "20"].map(OsString::from).into() };
        code = steps.run("counts", || counts(&args, interrupt))?;
    }
    Ok(code)
}

struct Step {
    name: &'static str,
    took: Duration,
    passed: bool,
}

struct Steps {
    done: Vec<Step>,
}

impl Steps {
    fn run(&mut self, name: &'static str, step: impl FnOnce() -> Result<ExitCode>) -> Result<ExitCode> {
        println!("==> {name}");
        let started = Instant::now();
        let result = step();
        let (took, passed) = (started.elapsed(), matches!(result, Ok(ExitCode::SUCCESS)));
        println!("<== {name} {} after {}", verdict(passed), seconds(took));
        self.done.push(Step { name, took, passed });
        result
    }

    fn print_summary(&self) {
        println!();
        for step in &self.done {
            println!("{:<8} {:>9}  {}", step.name, seconds(step.took), verdict(step.passed));
        }
        let total: Duration = self.done.iter().map(|step| step.took).sum();
        println!("{:<8} {:>9}  {}", "total", seconds(total), verdict(self.done.iter().all(|step| step.passed)));
    }
}

fn verdict(passed: bool) -> &'static str {
    if passed { "ok" } else { "FAILED" }
}

fn seconds(took: Duration) -> String {
    format!("{:.1} s", took.as_secs_f64())
}

/// The cargo that runs this program, without what it told this program about its own package: build scripts that look
/// at such a variable would run again, and everything above them be built again, on each change between it and a shell.
pub fn cargo(args: &[&str]) -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")) {
            cargo.env_remove(name);
        }
    }
    withhold_settings(&mut cargo);
    cargo.args(args);
    cargo
}
