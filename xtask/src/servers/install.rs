//! Finding the servers, and installing what is missing on Debian.
//!
//! Installing needs root and never happens behind a user's back otherwise: without root the packages are named and
//! the verb fails. Nothing that is installed is started: `policy-rc.d`, Debian's own switch for that, says no while
//! apt runs, unless the machine has such a policy already.

use std::{
    collections::BTreeSet,
    fs::{self, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::Path,
    process::Command,
};

use anyhow::{Context, Result, bail};
use nix::unistd::geteuid;

use super::{Kind, Server, mariadb::MariaDb, nats::Nats, postgres::Postgres, redis::Redis};
use crate::process::{Interrupt, run_quietly, stdout_of, which};

const POLICY: &str = "/usr/sbin/policy-rc.d";

/// Every one of `kinds`, installed first if it must be.
pub fn find_or_install(kinds: &BTreeSet<Kind>, interrupt: &Interrupt) -> Result<Vec<Box<dyn Server>>> {
    let mut found = Vec::new();
    let mut missing = BTreeSet::new();
    for &kind in kinds {
        match find(kind, interrupt)? {
            Some(server) => found.push(server),
            None => drop(missing.insert(kind)),
        }
    }
    if missing.is_empty() {
        return Ok(found);
    }
    install(&missing, interrupt)?;
    for &kind in &missing {
        match find(kind, interrupt)? {
            Some(server) => found.push(server),
            None => bail!("{kind} was installed and still cannot be found"),
        }
    }
    Ok(found)
}

fn find(kind: Kind, interrupt: &Interrupt) -> Result<Option<Box<dyn Server>>> {
    Ok(match kind {
        Kind::Postgres => Postgres::find()?.map(|server| Box::new(server) as _),
        Kind::MariaDb => MariaDb::find()?.map(|server| Box::new(server) as _),
        Kind::Redis => Redis::find().map(|server| Box::new(server) as _),
        Kind::Nats => Nats::find(interrupt)?.map(|server| Box::new(server) as _),
    })
}

fn install(missing: &BTreeSet<Kind>, interrupt: &Interrupt) -> Result<()> {
    let wanted: Vec<_> = missing.iter().map(|&kind| default_package(kind)).collect();
    let packages = || missing.iter().map(|&kind| package(kind)).collect();
    install_packages(&names(missing), &wanted, packages, interrupt)
}

/// valgrind, installed first if it must be.
pub fn find_or_install_valgrind(interrupt: &Interrupt) -> Result<()> {
    match which("valgrind") {
        Some(_) => Ok(()),
        None => install_packages("valgrind", &["valgrind"], || vec!["valgrind"], interrupt),
    }
}

/// Installs what is missing: packages by their usual names, as this release's lists have them.
fn install_packages(
    missing: &str,
    wanted: &[&str],
    packages: impl FnOnce() -> Vec<&'static str>,
    interrupt: &Interrupt,
) -> Result<()> {
    let by_hand = format!("apt-get install --no-install-recommends {}", wanted.join(" "));
    let Some(apt_get) = which("apt-get") else {
        bail!("not installed, and this is no Debian to install it on: {missing}");
    };
    if !geteuid().is_root() {
        bail!("not installed: {missing}. As root: {by_hand}");
    }
    let logs = tempfile::tempdir().context("making a folder for apt's log")?;
    let log = logs.path().join("apt.log");
    let _policy = Policy::forbid_starting()?;
    let apt = |args: &[&str]| {
        let mut apt = Command::new(&apt_get);
        apt.args(["-y", "-o", "DPkg::Lock::Timeout=600"]).args(args);
        // RUNLEVEL=1: maintainer scripts that ask the run level instead of the policy start nothing either.
        apt.env("DEBIAN_FRONTEND", "noninteractive").env("RUNLEVEL", "1");
        run_quietly(&mut apt, &log, interrupt)
    };
    eprintln!("installing {} (apt-get) …", wanted.join(" "));
    apt(&["update"])?;
    let mut args = vec!["install", "--no-install-recommends"];
    args.extend(packages());
    apt(&args).with_context(|| format!("installing; by hand: {by_hand}"))
}

fn names(kinds: &BTreeSet<Kind>) -> String {
    kinds.iter().map(|kind| kind.name()).collect::<Vec<_>>().join(", ")
}

fn default_package(kind: Kind) -> &'static str {
    match kind {
        Kind::Postgres => "postgresql-15",
        Kind::MariaDb => "mariadb-server",
        Kind::Redis => "redis-server",
        Kind::Nats => "nats-server",
    }
}

/// Debian 12 has PostgreSQL 15; a release without it has another as `postgresql`.
fn package(kind: Kind) -> &'static str {
    let default = default_package(kind);
    let known = || stdout_of(Command::new("apt-cache").args(["show", default])).is_some_and(|text| !text.is_empty());
    if kind == Kind::Postgres && !known() { "postgresql" } else { default }
}

/// While it lives, packages being installed do not start their services.
struct Policy {
    ours: bool,
}

impl Policy {
    fn forbid_starting() -> Result<Self> {
        // A policy that is there is the machine's owner's, and stays as it is.
        if Path::new(POLICY).exists() {
            return Ok(Self { ours: false });
        }
        let file = OpenOptions::new().write(true).create_new(true).mode(0o755).open(POLICY);
        let mut file = file.with_context(|| format!("creating {POLICY}"))?;
        let policy = Self { ours: true };
        // 101: the action is forbidden.
        file.write_all(b"#!/bin/sh\nexit 101\n").with_context(|| format!("writing {POLICY}"))?;
        Ok(policy)
    }
}

impl Drop for Policy {
    fn drop(&mut self) {
        if self.ours
            && let Err(error) = fs::remove_file(POLICY)
        {
            eprintln!("{POLICY} keeps services from starting and could not be removed: {error}");
        }
    }
}
