//! Real PostgreSQL, MariaDB, Redis and NATS servers for tests and for `cargo xtask up`.
//!
//! Promises: what is missing is installed where that is possible (Debian, as root) without leaving anything running;
//! every server listens on 127.0.0.1 only, on a free port, with its data in one folder; [`Servers::start`] returns
//! when all of them answer; dropping [`Servers`] stops them and removes the folder unless it was asked to be kept.

mod install;
mod mariadb;
mod nats;
mod postgres;
mod redis;

pub use install::find_or_install_valgrind;

use std::{
    collections::BTreeSet,
    fmt, fs,
    net::{Ipv4Addr, TcpStream},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use clap::ValueEnum;
use nix::{
    sys::signal::Signal,
    unistd::{User, geteuid},
};
use tempfile::TempDir;

use crate::process::{Daemon, Interrupt, free_port, tail, wait_until};

/// The servers there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Postgres,
    MariaDb,
    Redis,
    Nats,
}

impl Kind {
    pub const ALL: [Kind; 4] = [Kind::Postgres, Kind::MariaDb, Kind::Redis, Kind::Nats];

    /// Short, for folders and messages.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Postgres => "postgres",
            Kind::MariaDb => "mariadb",
            Kind::Redis => "redis",
            Kind::Nats => "nats",
        }
    }

    /// The variable that tells tests where it is.
    pub fn test_variable(self) -> &'static str {
        match self {
            Kind::Postgres => "SECKILL_TEST_POSTGRES_URL",
            Kind::MariaDb => "SECKILL_TEST_MYSQL_URL",
            Kind::Redis => "SECKILL_TEST_REDIS_URL",
            Kind::Nats => "SECKILL_TEST_NATS_URL",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The databases to choose from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Database {
    Postgres,
    Mariadb,
}

impl From<Database> for Kind {
    fn from(database: Database) -> Self {
        match database {
            Database::Postgres => Kind::Postgres,
            Database::Mariadb => Kind::MariaDb,
        }
    }
}

/// What a commit means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// On disk, as in production: what is measured or killed must run with this.
    Real,
    /// In the system's cache. Right for tests, whose databases do not outlive them.
    Relaxed,
}

/// One kind of server as found on this machine.
trait Server: Send + Sync {
    fn kind(&self) -> Kind;

    /// What `--version` says.
    fn version(&self) -> String;

    /// Makes `home` ready for [`Server::command`]; keeps data that is already there.
    fn prepare(&self, home: &Path, interrupt: &Interrupt) -> Result<()>;

    /// The server in the foreground, on this port of 127.0.0.1.
    fn command(&self, home: &Path, port: u16, durability: Durability) -> Command;

    /// It answers its own protocol, not just a connect.
    fn is_ready(&self, port: u16) -> bool;

    /// Where clients find it, with full rights.
    fn url(&self, port: u16) -> String;

    /// The signal that ends it at once but cleanly.
    fn stop_with(&self) -> Signal {
        Signal::SIGTERM
    }

    /// Creates a database unless it exists; answers its URL. Only SQL servers can.
    fn create_database(&self, port: u16, name: &str) -> Result<String> {
        Err(anyhow!("{} has no databases to create: {name} on port {port}", self.kind()))
    }
}

struct Running {
    server: Box<dyn Server>,
    port: u16,
    daemon: Daemon,
}

/// Running servers.
pub struct Servers {
    running: Vec<Running>,
    dir: Dir,
}

/// Where the data is. Declared after the servers in [`Servers`], so that it goes after them.
enum Dir {
    Temporary(TempDir),
    Kept(PathBuf),
}

impl Dir {
    fn path(&self) -> &Path {
        match self {
            Dir::Temporary(dir) => dir.path(),
            Dir::Kept(dir) => dir,
        }
    }
}

impl Servers {
    /// Finds or installs these servers and starts them, with their data in `keep` or in a temporary folder.
    ///
    /// Call it on the main thread (see [`crate::process::daemon_command`]).
    pub fn start(
        kinds: &BTreeSet<Kind>,
        keep: Option<&Path>,
        durability: Durability,
        interrupt: &Interrupt,
    ) -> Result<Self> {
        let found = install::find_or_install(kinds, interrupt)?;
        let started = Instant::now();
        let dir = match keep {
            Some(dir) => Dir::Kept(kept_dir(dir)?),
            None => Dir::Temporary(temporary_dir()?),
        };
        let mut servers = Self { running: Vec::new(), dir };
        prepare(&found, servers.dir(), interrupt)?;
        for server in found {
            let (port, daemon) = spawn(server.as_ref(), servers.dir(), durability, interrupt)?;
            servers.running.push(Running { server, port, daemon });
        }
        for index in 0..servers.running.len() {
            servers.wait_until_ready(index, durability, interrupt)?;
        }
        eprintln!("servers ready after {:.1} s, data in {}", started.elapsed().as_secs_f64(), servers.dir().display());
        for running in &servers.running {
            eprintln!("  {:<9} {:<40} {}", running.server.kind(), running.url(), running.server.version());
        }
        Ok(servers)
    }

    /// The folder with everything in it. Other processes may put their logs here.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Every server and where it is.
    pub fn urls(&self) -> impl Iterator<Item = (Kind, String)> {
        self.running.iter().map(|running| (running.server.kind(), running.url()))
    }

    /// Where this one is, if it was asked for.
    pub fn url(&self, kind: Kind) -> Option<String> {
        self.urls().find_map(|(other, url)| (other == kind).then_some(url))
    }

    /// Creates a database unless it exists; answers its URL.
    pub fn create_database(&self, kind: Kind, name: &str) -> Result<String> {
        let running = self.running.iter().find(|running| running.server.kind() == kind);
        let running = running.with_context(|| format!("{kind} is not running"))?;
        running.server.create_database(running.port, name)
    }

    /// The processes, for whoever watches over them.
    pub fn daemons(&mut self) -> impl Iterator<Item = &mut Daemon> {
        self.running.iter_mut().map(|running| &mut running.daemon)
    }

    /// SIGKILL.
    pub fn kill(&mut self, kind: Kind) -> Result<()> {
        self.running_mut(kind)?.daemon.kill()
    }

    /// Starts a dead server again on its port and data, and waits until it answers. A database that was killed may have
    /// left processes that keep the next one from starting for a moment: it is tried again.
    pub fn start_again(&mut self, kind: Kind, interrupt: &Interrupt) -> Result<()> {
        const LIMIT: Duration = Duration::from_secs(60);
        let Running { server, port, daemon } = self.running_mut(kind)?;
        daemon.restart()?;
        let answered = wait_until(LIMIT, interrupt, || {
            if daemon.exited()?.is_some() {
                daemon.restart()?;
            }
            Ok(server.is_ready(*port))
        })?;
        if !answered {
            bail!("{kind} did not answer within {LIMIT:?}:\n{}", tail(daemon.log(), 30));
        }
        Ok(())
    }

    fn running_mut(&mut self, kind: Kind) -> Result<&mut Running> {
        let running = self.running.iter_mut().find(|running| running.server.kind() == kind);
        running.with_context(|| format!("{kind} is not running"))
    }

    /// Leaves the folder where it is when the servers stop.
    pub fn keep(&mut self) {
        if let Dir::Temporary(dir) = &mut self.dir {
            dir.disable_cleanup(true);
        }
    }

    /// Waits for one server. A port can be taken between the look and the bind: a server that ends is given another.
    fn wait_until_ready(&mut self, index: usize, durability: Durability, interrupt: &Interrupt) -> Result<()> {
        const ATTEMPTS: usize = 3;
        const LIMIT: Duration = Duration::from_secs(60);
        for attempt in 1.. {
            let Running { server, port, daemon } = &mut self.running[index];
            let mut ended = None;
            let answered = wait_until(LIMIT, interrupt, || {
                ended = daemon.exited()?;
                Ok(ended.is_some() || server.is_ready(*port))
            })?;
            match (answered, ended) {
                (true, None) => return Ok(()),
                (true, Some(_)) if attempt < ATTEMPTS => {
                    let dir = self.dir.path();
                    let running = &mut self.running[index];
                    (running.port, running.daemon) = spawn(running.server.as_ref(), dir, durability, interrupt)?;
                }
                (true, Some(status)) => bail!("{} ended with {status}:\n{}", server.kind(), tail(daemon.log(), 30)),
                (false, _) => {
                    bail!("{} did not answer within {LIMIT:?}:\n{}", server.kind(), tail(daemon.log(), 30))
                }
            }
        }
        unreachable!("the last attempt returns")
    }
}

impl Running {
    fn url(&self) -> String {
        self.server.url(self.port)
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        // All are asked first, then each is waited for: they take as long as the slowest, not as long as the sum.
        for running in &mut self.running {
            running.daemon.ask_to_stop();
        }
        self.running.clear();
    }
}

fn spawn(server: &dyn Server, dir: &Path, durability: Durability, interrupt: &Interrupt) -> Result<(u16, Daemon)> {
    let port = free_port()?;
    let name = server.kind().name();
    let command = server.command(&dir.join(name), port, durability);
    let daemon = Daemon::start(name, command, &dir.join(format!("{name}.log")), server.stop_with(), interrupt)?;
    Ok((port, daemon))
}

/// All at once: a new data folder takes a database seconds to write.
fn prepare(servers: &[Box<dyn Server>], dir: &Path, interrupt: &Interrupt) -> Result<()> {
    thread::scope(|scope| {
        let prepare = |server: &dyn Server| {
            let home = dir.join(server.kind().name());
            fs::create_dir_all(&home).with_context(|| format!("creating {}", home.display()))?;
            server.prepare(&home, interrupt).with_context(|| format!("preparing {}", server.kind()))
        };
        let threads: Vec<_> = servers.iter().map(|server| scope.spawn(move || prepare(server.as_ref()))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("preparing a server does not panic"))
    })
}

/// A temporary folder that the users the servers run as may pass through.
fn temporary_dir() -> Result<TempDir> {
    let dir = tempfile::Builder::new().prefix("seckill-").tempdir().context("making a temporary folder")?;
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).context("opening up the temporary folder")?;
    Ok(dir)
}

fn kept_dir(dir: &Path) -> Result<PathBuf> {
    fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    dir.canonicalize().with_context(|| format!("finding {}", dir.display()))
}

/// The user a database server runs as: its own, where xtask runs as root, since such servers refuse to be root.
fn account(name: &str) -> Result<Option<User>> {
    if !geteuid().is_root() {
        return Ok(None);
    }
    for candidate in [name, "nobody"] {
        if let Some(user) = User::from_name(candidate).with_context(|| format!("looking up the user {candidate}"))? {
            return Ok(Some(user));
        }
    }
    bail!("there is neither a user {name} nor nobody to run the server as")
}

/// Lets a command run as this user, in a folder that the user can enter.
fn run_as(command: &mut Command, user: Option<&User>, home: &Path) {
    use std::os::unix::process::CommandExt;
    command.current_dir(home);
    if let Some(user) = user {
        command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
    }
}

/// Connects to a port of this machine and lets `check` talk; no answer in time is a no.
fn probe(port: u16, check: impl FnOnce(&mut TcpStream) -> std::io::Result<bool>) -> bool {
    const LIMIT: Duration = Duration::from_secs(1);
    let talk = || {
        let mut stream = TcpStream::connect_timeout(&(Ipv4Addr::LOCALHOST, port).into(), LIMIT)?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
        check(&mut stream)
    };
    talk().unwrap_or(false)
}

/// Gives a folder to the user who will write in it.
fn give_to(user: Option<&User>, dir: &Path) -> Result<()> {
    let Some(user) = user else { return Ok(()) };
    std::os::unix::fs::chown(dir, Some(user.uid.as_raw()), Some(user.gid.as_raw()))
        .with_context(|| format!("giving {} to {}", dir.display(), user.name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::which;

    #[test]
    fn a_server_answers_until_dropped_and_leaves_nothing() {
        if which("redis-server").is_none() {
            assert!(std::env::var("SECKILL_TEST_REQUIRE_SERVERS").is_err(), "redis-server is required and not there");
            eprintln!("redis-server is not installed: passed over");
            return;
        }
        let kinds = BTreeSet::from([Kind::Redis]);
        let servers = Servers::start(&kinds, None, Durability::Relaxed, &Interrupt::default()).unwrap();
        let dir = servers.dir().to_owned();
        let url = servers.url(Kind::Redis).unwrap();
        let address = url.strip_prefix("redis://").unwrap().to_owned();
        assert!(dir.exists());
        assert!(std::net::TcpStream::connect(&address).is_ok());
        drop(servers);
        assert!(!dir.exists());
        assert!(std::net::TcpStream::connect(&address).is_err());
    }
}
