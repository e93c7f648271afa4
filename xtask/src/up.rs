//! `cargo xtask up`: the mesh as it runs in production, on one machine: real servers and one process per role.
//!
//! Promises: it returns to the shell with nothing left running and, unless asked to keep it, nothing left on disk. A
//! process that dies is announced with the end of its log and, by default, started again on its address a second
//! later, so that `kill -9` of any of them can be watched. The others are left alone.

use std::{
    collections::BTreeSet,
    fs::{self, OpenOptions},
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use crate::{
    ci::{REQUIRE_SERVERS, cargo},
    process::{self, Daemon, Interrupt, daemon_command, free_port, run_quietly, tail, wait_until},
    servers::{Database, Durability, Kind, Servers},
    withhold_settings,
};

/// What tokens are signed with unless `SECKILL_AUTH_HS256_SECRET` says otherwise. Public, so for development only.
const DEVELOPMENT_SECRET: &str = "seckill-development-secret-not-for-production";

const SECRET_VARIABLE: &str = "SECKILL_AUTH_HS256_SECRET";

/// The order in which roles are listed; they stop in reverse, the door first.
const ROLES: [Role; 5] = [
    Role { name: "stock", has_database: true, uses_redis: true, calls: &[] },
    Role { name: "order", has_database: true, uses_redis: false, calls: &[] },
    Role { name: "payment", has_database: true, uses_redis: false, calls: &[] },
    Role { name: "coordinator", has_database: true, uses_redis: false, calls: &["stock", "order", "payment"] },
    Role {
        name: "gateway",
        has_database: false,
        uses_redis: false,
        calls: &["stock", "order", "payment", "coordinator"],
    },
];

/// What a role is given. A thing that it does not need is withheld, as it will be in production.
struct Role {
    name: &'static str,
    has_database: bool,
    uses_redis: bool,
    calls: &'static [&'static str],
}

#[derive(clap::Args)]
pub struct Args {
    /// The database of the four services that have one
    #[arg(long, value_enum, default_value = "postgres")]
    database: Database,
    /// Where the gateway listens
    #[arg(long, default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// Build and run without optimisation
    #[arg(long)]
    debug: bool,
    /// Do not start again what dies
    #[arg(long)]
    no_restart: bool,
    #[command(flatten)]
    data: DataArgs,
}

#[derive(clap::Args)]
pub struct ServersArgs {
    /// Only this database (default: both), and the services' databases in it
    #[arg(long, value_enum)]
    database: Option<Database>,
    #[command(flatten)]
    data: DataArgs,
}

#[derive(clap::Args)]
struct DataArgs {
    /// Keep the data and logs in this folder, and go on from what is there
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Do not remove the temporary folder
    #[arg(long, conflicts_with = "dir")]
    keep: bool,
}

/// The servers and the five roles, until a signal.
pub fn up(args: &Args, interrupt: &Interrupt) -> Result<ExitCode> {
    // Before minutes of building, not after.
    drop(TcpListener::bind(args.listen).with_context(|| format!("listening on {}", args.listen))?);
    let program = build(args.debug, interrupt)?;

    let kinds = BTreeSet::from([args.database.into(), Kind::Redis, Kind::Nats]);
    let servers = start_servers(&kinds, &args.data, interrupt)?;
    let settings = settings(&servers, args.database)?;
    let mut migrate = Command::new(&program);
    withhold_settings(&mut migrate).args(["migrate", "up"]).envs(settings.iter().map(|(name, value)| (name, value)));
    run_quietly(&mut migrate, &servers.dir().join("migrate.log"), interrupt).context("migrating the databases")?;

    let mut mesh = Mesh { roles: Vec::new(), servers, interrupt: interrupt.clone() };
    mesh.start_roles(&program, &settings, args.listen)?;
    mesh.wait_until_ready()?;
    let _env_file = EnvFile::write(&settings)?;
    mesh.print(&settings, args.listen);
    mesh.watch(!args.no_restart)?;
    eprintln!("stopping …");
    Ok(ExitCode::SUCCESS)
}

/// The servers alone, until a signal.
pub fn servers(args: &ServersArgs, interrupt: &Interrupt) -> Result<ExitCode> {
    let databases = args.database.map_or(vec![Kind::Postgres, Kind::MariaDb], |database| vec![database.into()]);
    let kinds = databases.into_iter().chain([Kind::Redis, Kind::Nats]).collect();
    let servers = start_servers(&kinds, &args.data, interrupt)?;
    print_exports(&settings(&servers, args.database.unwrap_or(Database::Postgres))?);
    println!("\n# for cargo test");
    for (kind, url) in servers.urls() {
        println!("export {}={url}", kind.test_variable());
    }
    if kinds.len() == Kind::ALL.len() {
        println!("export {REQUIRE_SERVERS}=1");
    }
    println!("\nCtrl-C stops them.");
    let mut mesh = Mesh { roles: Vec::new(), servers, interrupt: interrupt.clone() };
    mesh.watch(true)?;
    eprintln!("stopping …");
    Ok(ExitCode::SUCCESS)
}

fn start_servers(kinds: &BTreeSet<Kind>, data: &DataArgs, interrupt: &Interrupt) -> Result<Servers> {
    let mut servers = Servers::start(kinds, data.dir.as_deref(), Durability::Real, interrupt)?;
    if data.keep {
        servers.keep();
    }
    Ok(servers)
}

/// Builds the binary; answers where it is.
fn build(debug: bool, interrupt: &Interrupt) -> Result<PathBuf> {
    let mut build = cargo(&["build", "--locked", "--package", "seckill"]);
    if !debug {
        build.arg("--release");
    }
    let status = process::run(&mut build, interrupt)?;
    if !status.success() {
        bail!("building seckill failed");
    }
    Ok(crate::target_dir()?.join(if debug { "debug" } else { "release" }).join("seckill"))
}

/// What every tool needs to reach this mesh, as environment variables: also what `demo`, `audit` and `token` read.
/// Creates the databases it names.
pub fn settings(servers: &Servers, database: Database) -> Result<Vec<(String, String)>> {
    let secret = std::env::var(SECRET_VARIABLE).ok().filter(|secret| !secret.is_empty());
    let mut settings = vec![(SECRET_VARIABLE.to_owned(), secret.unwrap_or_else(|| DEVELOPMENT_SECRET.to_owned()))];
    for role in ROLES.iter().filter(|role| role.has_database) {
        let url = servers.create_database(database.into(), &format!("seckill_{}", role.name))?;
        settings.push((database_variable(role.name), url));
    }
    for (kind, variable) in [(Kind::Redis, "SECKILL_REDIS_URL"), (Kind::Nats, "SECKILL_NATS_URL")] {
        let url = servers.url(kind).with_context(|| format!("{kind} is not running"))?;
        settings.push((variable.to_owned(), url));
    }
    Ok(settings)
}

fn database_variable(role: &str) -> String {
    format!("SECKILL_{}_DATABASE_URL", role.to_uppercase())
}

/// One role's process.
struct Process {
    listen: SocketAddr,
    admin: SocketAddr,
    daemon: Daemon,
}

impl Process {
    fn is_ready(&self) -> bool {
        get(self.admin, "/readyz").is_some_and(|status| status == 200)
    }
}

/// The status of a plain GET; `None` when nobody answers in time.
fn get(address: SocketAddr, path: &str) -> Option<u16> {
    const LIMIT: Duration = Duration::from_secs(1);
    let mut stream = TcpStream::connect_timeout(&address, LIMIT).ok()?;
    stream.set_read_timeout(Some(LIMIT)).ok()?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").as_bytes()).ok()?;
    // "HTTP/1.1 200"
    let mut start = [0; 12];
    stream.read_exact(&mut start).ok()?;
    std::str::from_utf8(&start[9..]).ok()?.parse().ok()
}

/// Everything that runs. Stops the roles before the servers.
struct Mesh {
    roles: Vec<Process>,
    servers: Servers,
    interrupt: Interrupt,
}

impl Mesh {
    fn start_roles(&mut self, program: &Path, settings: &[(String, String)], gateway: SocketAddr) -> Result<()> {
        let local = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let mut addresses = Vec::new();
        for role in &ROLES {
            let listen = if role.name == "gateway" && gateway.port() != 0 { gateway } else { local(free_port()?) };
            addresses.push((role.name, listen, local(free_port()?)));
        }
        for (role, &(name, listen, admin)) in ROLES.iter().zip(&addresses) {
            let mut command = daemon_command(program, Signal::SIGTERM);
            command.args([name, "--listen", &listen.to_string(), "--admin-listen", &admin.to_string()]);
            // The rest by environment: it holds secrets, and arguments are for everybody to see.
            withhold_settings(&mut command);
            let own_database = database_variable(name);
            for (variable, value) in settings {
                let is_needed = if variable.ends_with("_DATABASE_URL") {
                    role.has_database && *variable == own_database
                } else {
                    variable != "SECKILL_REDIS_URL" || role.uses_redis
                };
                if is_needed {
                    command.env(variable, value);
                }
            }
            for (called, address, _) in addresses.iter().filter(|(other, ..)| role.calls.contains(other)) {
                command.env(format!("SECKILL_{}_ENDPOINTS", called.to_uppercase()), format!("http://{address}"));
            }
            let log = self.servers.dir().join(format!("{name}.log"));
            let daemon = Daemon::start(name, command, &log, Signal::SIGTERM, &self.interrupt)?;
            self.roles.push(Process { listen, admin, daemon });
        }
        Ok(())
    }

    /// They start together and find each other; the first one to give up ends the wait.
    fn wait_until_ready(&mut self) -> Result<()> {
        const LIMIT: Duration = Duration::from_secs(60);
        let roles = &mut self.roles;
        let ready = wait_until(LIMIT, &self.interrupt, || {
            for role in roles.iter_mut() {
                if let Some(status) = role.daemon.exited()? {
                    let log = tail(role.daemon.log(), 30);
                    bail!("{} ended with {status}:\n{log}", role.daemon.name());
                }
            }
            Ok(roles.iter().all(Process::is_ready))
        })?;
        if !ready {
            let waiting = self.roles.iter().filter(|role| !role.is_ready());
            let logs = waiting.map(|role| format!("{}:\n{}", role.daemon.name(), tail(role.daemon.log(), 30)));
            bail!("not ready within {LIMIT:?}: {}", logs.collect::<Vec<_>>().join("\n"));
        }
        Ok(())
    }

    fn print(&self, settings: &[(String, String)], gateway: SocketAddr) {
        println!("\n{:<12} {:<22} {:<22} {:>8}  log", "role", "address", "admin", "pid");
        for role in &self.roles {
            let (daemon, listen, admin) = (&role.daemon, role.listen.to_string(), role.admin.to_string());
            println!("{:<12} {listen:<22} {admin:<22} {:>8}  {}", daemon.name(), daemon.pid(), daemon.log().display());
        }
        println!();
        for (kind, url) in self.servers.urls() {
            println!("{kind:<12} {url}");
        }
        println!("\n# for seckill demo, audit and token; also in {ENV_FILE}, which they read when run from here");
        print_exports(settings);
        let gateway = self.roles.last().map_or(gateway, |role| role.listen);
        println!(
            "\ncargo run --release -- demo --gateway http://{gateway} --buyers 10000 --stock 100 --payment-window 5s --once"
        );
        println!("\nCtrl-C stops everything.");
    }

    /// Until a signal: says what dies and, if asked to, starts it again.
    fn watch(&mut self, restart: bool) -> Result<()> {
        let mut wards: Vec<Ward> = Vec::new();
        let daemons = self.servers.daemons().map(|daemon| (daemon, None));
        let roles = self.roles.iter_mut().map(|role| (&mut role.daemon, Some(role.admin)));
        for (daemon, admin) in daemons.chain(roles) {
            wards.push(Ward { daemon, admin, state: State::Up { since: Instant::now() }, pause: Duration::ZERO });
        }
        while !self.interrupt.is_pending() {
            for ward in &mut wards {
                ward.look(restart)?;
            }
            thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        // The door first, and each given time to finish what it began with the ones behind it.
        let deadline = Instant::now() + Duration::from_secs(30);
        while let Some(mut role) = self.roles.pop() {
            role.daemon.stop(deadline.saturating_duration_since(Instant::now()));
        }
    }
}

/// Long enough to see that it is gone, short enough to be what an orchestrator does.
const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// The pause after many deaths in a row.
const LAST_PAUSE: Duration = Duration::from_secs(16);

/// A process under watch.
struct Ward<'a> {
    daemon: &'a mut Daemon,
    admin: Option<SocketAddr>,
    state: State,
    pause: Duration,
}

enum State {
    Up {
        since: Instant,
    },
    Dead,
    RestartAt(Instant),
    /// Started again, not yet ready.
    Starting {
        since: Instant,
    },
}

impl Ward<'_> {
    fn look(&mut self, restart: bool) -> Result<()> {
        match self.state {
            State::Dead => {}
            State::RestartAt(at) => {
                if Instant::now() >= at {
                    self.daemon.restart()?;
                    eprintln!("{} started again, pid {}", self.daemon.name(), self.daemon.pid());
                    self.state = State::Starting { since: Instant::now() };
                }
            }
            State::Up { since } | State::Starting { since } => {
                if let Some(status) = self.daemon.exited()? {
                    let (name, pid, log) = (self.daemon.name(), self.daemon.pid(), self.daemon.log());
                    eprintln!("{name} (pid {pid}) ended: {status}. The end of {}:\n{}", log.display(), tail(log, 10));
                    // One that cannot live is not tried every second.
                    let lived = since.elapsed() > Duration::from_secs(10);
                    self.pause = if lived { FIRST_PAUSE } else { (self.pause * 2).clamp(FIRST_PAUSE, LAST_PAUSE) };
                    self.state = if restart { State::RestartAt(Instant::now() + self.pause) } else { State::Dead };
                } else if matches!(self.state, State::Starting { .. }) {
                    let is_ready = self.admin.is_none_or(|admin| get(admin, "/readyz") == Some(200));
                    if is_ready {
                        if self.admin.is_some() {
                            let took = since.elapsed().as_secs_f64();
                            eprintln!("{} is ready again, {took:.1} s after its start", self.daemon.name());
                        }
                        self.state = State::Up { since };
                    }
                }
            }
        }
        Ok(())
    }
}

fn print_exports(settings: &[(String, String)]) {
    for (name, value) in settings {
        // Quoted for a shell: a secret from the environment may hold anything.
        println!("export {name}='{}'", value.replace('\'', r"'\''"));
    }
}

/// Where `seckill demo`, `audit` and `token` look, from the workspace's root, for a mesh to talk to.
const ENV_FILE: &str = "target/up.env";

/// The settings as a file, while the mesh runs.
struct EnvFile {
    content: String,
}

impl EnvFile {
    fn write(settings: &[(String, String)]) -> Result<Self> {
        let content: String = settings.iter().map(|(name, value)| format!("{name}={value}\n")).collect();
        fs::create_dir_all("target").context("creating target")?;
        // Anew each time: an old file's mode would stay, and a secret is in it.
        if Path::new(ENV_FILE).exists() {
            fs::remove_file(ENV_FILE).with_context(|| format!("replacing {ENV_FILE}"))?;
        }
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(ENV_FILE);
        let written = file.and_then(|mut file| file.write_all(content.as_bytes()));
        written.with_context(|| format!("writing {ENV_FILE}"))?;
        Ok(Self { content })
    }
}

impl Drop for EnvFile {
    fn drop(&mut self) {
        // A second mesh, started since, has put its own in place.
        if fs::read_to_string(ENV_FILE).is_ok_and(|content| content == self.content)
            && let Err(error) = fs::remove_file(ENV_FILE)
        {
            eprintln!("{ENV_FILE} could not be removed: {error}");
        }
    }
}
