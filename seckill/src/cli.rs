//! Reads the command line, starts what it says, stops on a signal, and answers with an exit code:
//! 0 done, 1 something that must hold did not, 2 it could not start.

use std::process::ExitCode;

use crate::{
    assembly::{self, Mesh, Options, Role},
    audit, banner,
    config::{Cli, Command, CommonArgs, RoleArgs, UpArgs, parse},
    demo, ops, tools,
};
use anyhow::Context;
use clap::Args;
use mesh::{
    lifecycle::{Lifecycle, stop_signal},
    telemetry::{self, TelemetryArgs},
};

/// The whole program.
pub fn main() -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("seckill: no runtime: {error}");
            return ExitCode::from(2);
        }
    };
    match runtime.block_on(run(parse())) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("seckill: {error:#}");
            ExitCode::from(2)
        }
    }
}

async fn run(cli: Cli) -> anyhow::Result<bool> {
    match cli.command.unwrap_or(Command::Up(cli.up)) {
        Command::Up(args) => up(*args).await,
        Command::Gateway(args) => role(*args).await,
        Command::Coordinator(args) => role(*args).await,
        Command::Order(args) => role(*args).await,
        Command::Stock(args) => match args.verb {
            Some(verb) => ops::stock::run(verb).await,
            None => role(args.role).await,
        },
        Command::Payment(args) => role(*args).await,
        Command::Demo(mut args) => {
            // A demo's terminal is for its story; what its mesh logs is for who asks.
            if args.common.telemetry.log == TelemetryArgs::default().log {
                args.common.telemetry.log = "warn".into();
            }
            let telemetry = telemetry::init(&args.common.telemetry, "seckill")?;
            let life = stopping_on_signal();
            let clean = demo::run(*args, &life).await;
            telemetry.shutdown().await;
            clean
        }
        Command::Audit(args) => {
            let report = audit::run(&audit::Source::new(&args.storage, None)?, args.at_rest).await?;
            println!("{report}");
            Ok(report.is_clean())
        }
        Command::Token(args) => tools::token(&args),
        Command::Migrate(args) => tools::migrate(&args).await,
        Command::Saga(args) => ops::saga::run(args).await,
        Command::DeadLetter(args) => ops::dead_letter::run(args).await,
        Command::Actions(args) => ops::actions::run(args).await,
    }
}

async fn up(args: UpArgs) -> anyhow::Result<bool> {
    let UpArgs { common, listen, roles } = args;
    let options = Options { common: common.clone(), listen, admin_listen: Some(common.admin_listen), roles };
    until_stopped(&common, "seckill", async |life| {
        let mesh = Mesh::start(options.clone(), life).await?;
        banner::print(&mesh, &common.storage);
        Ok(mesh)
    })
    .await
}

async fn role<R: Role + Clone>(args: RoleArgs<R>) -> anyhow::Result<bool>
where
    RoleArgs<R>: Args,
{
    let common = args.common.clone();
    until_stopped(&common, R::NAME, async |life| {
        let mesh = assembly::start_role(args.clone(), life).await?;
        tracing::info!(role = R::NAME, address = %mesh.address, "serving");
        Ok(mesh)
    })
    .await
}

/// Runs a process of the mesh until a signal, or until something that must not end has ended; then stops it
/// gracefully. A second signal ends the waiting. Telemetry is flushed on every path.
async fn until_stopped(
    common: &CommonArgs,
    name: &'static str,
    start: impl AsyncFn(&Lifecycle) -> anyhow::Result<Mesh>,
) -> anyhow::Result<bool> {
    let telemetry = telemetry::init(&common.telemetry, name)?;
    let life = Lifecycle::new();
    let mesh = match start(&life).await {
        Ok(mesh) => mesh,
        Err(error) => {
            life.kill();
            telemetry.shutdown().await;
            return Err(error);
        }
    };
    let outcome = tokio::select! {
        signal = stop_signal() => signal.context("no signals").map(|()| true),
        why = life.failed() => Err(anyhow::anyhow!("{why}")),
    };
    tracing::info!("stopping");
    tokio::select! {
        () = mesh.stop(common.shutdown_grace) => {}
        _ = stop_signal() => tracing::warn!("second signal: stopping at once"),
    }
    life.kill();
    telemetry.shutdown().await;
    outcome
}

/// A life that a signal stops.
fn stopping_on_signal() -> Lifecycle {
    let life = Lifecycle::new();
    let stop = life.clone();
    tokio::spawn(async move {
        if stop_signal().await.is_ok() {
            stop.soft_token().cancel();
        }
    });
    life
}
