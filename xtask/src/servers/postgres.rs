//! PostgreSQL, run from its own binaries: no system cluster, no system service.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};
use nix::{sys::signal::Signal, unistd::User};

use super::{Durability, Kind, Server, account, give_to, run_as};
use crate::process::{Interrupt, daemon_command, run_quietly, stdout_of, which};

/// The superuser. It needs no password: the server is reachable from this machine only and holds nothing of worth.
const USER: &str = "seckill";

pub struct Postgres {
    bin: PathBuf,
    user: Option<User>,
}

impl Postgres {
    /// Debian keeps the servers out of PATH, one folder per major version: the newest wins, 15 before all others
    /// because it is what the project is tested against.
    pub fn find() -> Result<Option<Self>> {
        let mut debian: Vec<(bool, u32, PathBuf)> = Vec::new();
        for entry in fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten() {
            if let Some(version) = entry.file_name().to_str().and_then(|name| name.parse().ok()) {
                debian.push((version == 15, version, entry.path().join("bin")));
            }
        }
        debian.sort();
        // A link in PATH is followed: the server's other programs are beside the real one.
        let in_path = which("postgres").and_then(|file| file.canonicalize().ok());
        let in_path = in_path.and_then(|file| Some(file.parent()?.to_owned()));
        let complete =
            |bin: &PathBuf| ["postgres", "initdb", "pg_isready", "psql"].iter().all(|p| bin.join(p).is_file());
        let bin = debian.into_iter().rev().map(|(_, _, bin)| bin).chain(in_path).find(complete);
        bin.map(|bin| Ok(Self { bin, user: account("postgres")? })).transpose()
    }
}

impl Server for Postgres {
    fn kind(&self) -> Kind {
        Kind::Postgres
    }

    fn version(&self) -> String {
        stdout_of(Command::new(self.bin.join("postgres")).arg("--version")).unwrap_or_default()
    }

    fn prepare(&self, home: &Path, interrupt: &Interrupt) -> Result<()> {
        let data = home.join("data");
        if data.exists() {
            return Ok(());
        }
        give_to(self.user.as_ref(), home)?;
        // Made beside its place and moved there when complete, so that an interrupted start leaves no half of one.
        let new = home.join("data.new");
        if new.exists() {
            fs::remove_dir_all(&new).context("clearing an unfinished data folder")?;
        }
        let mut initdb = Command::new(self.bin.join("initdb"));
        initdb.args(["--username", USER, "--auth", "trust", "--encoding", "UTF8", "--locale", "C", "--no-sync"]);
        initdb.arg("--pgdata").arg(&new);
        run_as(&mut initdb, self.user.as_ref(), home);
        run_quietly(&mut initdb, &home.with_extension("init.log"), interrupt)?;
        fs::rename(&new, &data).context("putting the data folder in place")
    }

    fn command(&self, home: &Path, port: u16, durability: Durability) -> Command {
        let mut command = daemon_command(&self.bin.join("postgres"), self.stop_with());
        command.arg("-D").arg(home.join("data"));
        let mut set = |setting: &str| {
            command.args(["-c", setting]);
        };
        set("listen_addresses=127.0.0.1");
        set(&format!("port={port}"));
        // A socket's path has a length limit that a temporary folder may exceed; TCP is what the project uses.
        set("unix_socket_directories=");
        set("max_connections=200");
        set("shared_buffers=256MB");
        set("timezone=UTC");
        set("log_timezone=UTC");
        if durability == Durability::Relaxed {
            set("fsync=off");
            set("full_page_writes=off");
        }
        run_as(&mut command, self.user.as_ref(), home);
        command
    }

    fn is_ready(&self, port: u16) -> bool {
        let mut probe = Command::new(self.bin.join("pg_isready"));
        probe.args(["--quiet", "--host", "127.0.0.1", "--port", &port.to_string(), "--dbname", "postgres"]);
        stdout_of(probe.args(["--username", USER])).is_some()
    }

    fn url(&self, port: u16) -> String {
        format!("postgres://{USER}:{USER}@127.0.0.1:{port}/postgres")
    }

    /// SIGTERM would wait for every client to leave; SIGINT rolls them back and shuts down.
    fn stop_with(&self) -> Signal {
        Signal::SIGINT
    }

    fn create_database(&self, port: u16, name: &str) -> Result<String> {
        let psql = |sql: String| {
            let mut psql = Command::new(self.bin.join("psql"));
            psql.args(["--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--set", "ON_ERROR_STOP=1"]);
            psql.arg(self.url(port)).args(["--command", &sql]).stdin(Stdio::null());
            psql.output().context("running psql")
        };
        let existing = psql(format!("SELECT 1 FROM pg_database WHERE datname = '{name}'"))?;
        if !existing.status.success() || existing.stdout.is_empty() {
            let created = psql(format!("CREATE DATABASE {name}"))?;
            if !created.status.success() {
                bail!("creating the database {name}: {}", String::from_utf8_lossy(&created.stderr).trim());
            }
        }
        Ok(format!("postgres://{USER}:{USER}@127.0.0.1:{port}/{name}"))
    }
}
