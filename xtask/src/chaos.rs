//! `cargo xtask chaos`: real servers, and a program that breaks a mesh on them.
//!
//! The program (`e2e-chaos`) owns the mesh's processes; the servers are this one's, which kills and restarts them when
//! asked to over a Unix socket: a line is a verb and a server, the answer a line, `ok` or what went wrong.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    io::{BufRead, BufReader, Write},
    os::unix::net::{UnixListener, UnixStream},
    process::{Command, ExitCode},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::{
    ci::cargo,
    process::{self, Interrupt},
    servers::{Database, Durability, Kind, Servers},
    up, withhold_settings,
};

const KEEPER: &str = "SECKILL_CHAOS_KEEPER";

#[derive(clap::Args)]
pub struct Args {
    /// The database of the four services that have one
    #[arg(long, value_enum, default_value = "postgres")]
    database: Database,
    /// Build and run with optimisation: for a hundred thousand orders and more
    #[arg(long)]
    release: bool,
    /// Do not remove the folder with the data and the logs. It stays whenever a run is not clean
    #[arg(long)]
    keep: bool,
    /// Passed on: --minutes, --scenario, --seed, --rate, --orders; `-- --help` tells
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<OsString>,
}

/// One run. Fails when something was violated.
pub fn chaos(args: &Args, interrupt: &Interrupt) -> Result<ExitCode> {
    let mut build = cargo(&["build", "--locked", "--package", "e2e", "--bins"]);
    if args.release {
        build.arg("--release");
    }
    if !process::run(&mut build, interrupt)?.success() {
        bail!("building the mesh and what breaks it failed");
    }
    let program = crate::target_dir()?.join(if args.release { "release" } else { "debug" }).join("e2e-chaos");
    let mut command = Command::new(program);
    withhold_settings(&mut command).args(&args.args);
    if args.args.iter().any(|arg| arg == "--help" || arg == "-h") {
        return Ok(process::exit_code(process::run(&mut command, interrupt)?));
    }

    let kinds = BTreeSet::from([args.database.into(), Kind::Redis, Kind::Nats]);
    let mut servers = Servers::start(&kinds, None, Durability::Real, interrupt)?;
    command.envs(up::settings(&servers, args.database)?);
    let socket = servers.dir().join("keeper.sock");
    let listener = UnixListener::bind(&socket).with_context(|| format!("listening on {}", socket.display()))?;
    listener.set_nonblocking(true).context("listening without waiting")?;
    command.env(KEEPER, &socket).arg("--logs").arg(servers.dir());
    let status = process::run_beside(&mut command, interrupt, || {
        if let Ok((stream, _)) = listener.accept() {
            answer(&stream, &mut servers, interrupt)?;
        }
        Ok(())
    })?;
    if args.keep || !status.success() {
        servers.keep();
        eprintln!("data and logs are in {}", servers.dir().display());
    }
    Ok(process::exit_code(status))
}

/// One request of the program's. What cannot be done is its trouble; a program that is gone is noticed elsewhere.
fn answer(mut stream: &UnixStream, servers: &mut Servers, interrupt: &Interrupt) -> Result<()> {
    let mut line = String::new();
    stream.set_nonblocking(false).context("talking to the program")?;
    stream.set_read_timeout(Some(Duration::from_secs(1))).context("talking to the program")?;
    if BufReader::new(stream).read_line(&mut line).is_err() {
        return Ok(());
    }
    let said = match obey(line.trim(), servers, interrupt) {
        Ok(()) => "ok".to_owned(),
        Err(error) => format!("{error:#}").replace('\n', " "),
    };
    interrupt.check()?;
    let _ = writeln!(stream, "{said}");
    Ok(())
}

fn obey(line: &str, servers: &mut Servers, interrupt: &Interrupt) -> Result<()> {
    let (verb, name) = line.split_once(' ').context("not a verb and a server")?;
    let kind = match name {
        "database" => {
            Database::value_variants().iter().map(|&database| database.into()).find(|&k| servers.url(k).is_some())
        }
        "redis" => Some(Kind::Redis),
        "nats" => Some(Kind::Nats),
        _ => None,
    };
    let kind = kind.with_context(|| format!("no server {name:?}"))?;
    match verb {
        "kill" => servers.kill(kind),
        "start" => servers.start_again(kind, interrupt),
        _ => bail!("no verb {verb:?}"),
    }
}
