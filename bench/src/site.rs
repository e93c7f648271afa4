//! The mesh under load: its processes, its operator, what its metrics say, what it costs the machine.

use std::{
    collections::HashMap,
    ffi::OsString,
    fs, io,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use mesh::{
    clock::Clock,
    identity::{AuthArgs, Minter, Scopes, Secret},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use proto::BuyerId;

use crate::wire::{Answer, Connection, Request};

/// What tokens are signed with.
pub const SECRET: &str = "a-secret-for-the-bench-that-is-long-enough";
/// What a buyer's token may do.
pub const BUYER: Scopes = Scopes { buyer: true, operator: false };
/// Of a whole mesh on real servers, on a machine that is still busy with the last one's end.
const START_LIMIT: Duration = Duration::from_secs(60);
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// How the mesh is wired.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Wiring {
    /// One process on embedded backends.
    Embedded,
    /// One process on PostgreSQL, Redis and NATS.
    Real,
    /// A process a role, on PostgreSQL, Redis and NATS.
    Five,
}

/// The servers' URLs.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct Servers {
    /// PostgreSQL: a database for administration, in which others may be created.
    #[arg(long, env = "SECKILL_TEST_POSTGRES_URL", value_name = "URL", hide_env_values = true)]
    pub postgres: Option<String>,
    /// Redis; it is emptied.
    #[arg(long, env = "SECKILL_TEST_REDIS_URL", value_name = "URL", hide_env_values = true)]
    pub redis: Option<String>,
    /// NATS with JetStream; the mesh's streams are deleted.
    #[arg(long, env = "SECKILL_TEST_NATS_URL", value_name = "URL", hide_env_values = true)]
    pub nats: Option<String>,
}

/// How its processes are run.
#[derive(Clone, Debug, Default)]
pub struct Manner {
    /// Another program that runs them, with its arguments.
    pub under: Vec<OsString>,
    /// Further settings.
    pub settings: Vec<(OsString, OsString)>,
}

/// A running mesh.
#[derive(Debug)]
pub struct Site {
    program: PathBuf,
    under: Vec<OsString>,
    settings: Vec<(OsString, OsString)>,
    processes: Vec<Process>,
    minter: Minter,
    operator: String,
    dir: tempfile::TempDir,
    /// Where the gateway is.
    pub address: SocketAddr,
}

#[derive(Debug)]
struct Process {
    name: &'static str,
    admin: SocketAddr,
    child: Child,
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Site {
    /// Starts a mesh on fresh backends.
    pub async fn start(program: &Path, wiring: Wiring, servers: &Servers) -> Result<Self> {
        Self::start_as(Manner::default(), program, wiring, servers).await
    }

    /// The same, run in this manner.
    pub async fn start_as(manner: Manner, program: &Path, wiring: Wiring, servers: &Servers) -> Result<Self> {
        let Manner { under, settings: further } = manner;
        let dir = tempfile::tempdir()?;
        let mut settings: Vec<(OsString, OsString)> = vec![
            ("SECKILL_AUTH_HS256_SECRET".into(), SECRET.into()),
            ("SECKILL_DATA_DIR".into(), dir.path().join("data").into()),
        ];
        settings.extend(further);
        if wiring != Wiring::Embedded {
            settings.extend(fresh(servers).await?);
        }
        let minter = minter()?;
        let operator = bearer(&minter, "olga", Scopes { buyer: false, operator: true })?;
        let address = free_address()?;
        let program = program.to_owned();
        let mut site = Self { program, under, settings, processes: Vec::new(), minter, operator, dir, address };
        if wiring == Wiring::Five {
            let mut endpoints = Vec::new();
            for role in ["stock", "order", "payment", "coordinator", "gateway"] {
                let listen = if role == "gateway" { address } else { free_address()? };
                site.spawn(role, &[role], listen, &endpoints).await?;
                endpoints.push((format!("SECKILL_{}_ENDPOINTS", role.to_uppercase()), format!("http://{listen}")));
            }
        } else {
            site.spawn("seckill", &[], address, &[]).await?;
        }
        Ok(site)
    }

    async fn spawn(
        &mut self,
        name: &'static str,
        verb: &[&str],
        listen: SocketAddr,
        endpoints: &[(String, String)],
    ) -> Result<()> {
        let admin = free_address()?;
        let log = fs::File::create(self.dir.path().join(format!("{name}.log")))?;
        let mut command = match self.under.split_first() {
            Some((under, arguments)) => {
                let mut command = Command::new(under);
                command
                    .args(arguments)
                    .arg(&self.program)
                    .envs(self.settings.iter().map(|(name, value)| (name, value)));
                command
            }
            None => self.command(),
        };
        let child = command
            .args(verb)
            .args(["--listen", &listen.to_string(), "--admin-listen", &admin.to_string()])
            .envs(endpoints.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .with_context(|| format!("starting {}", self.program.display()))?;
        self.processes.push(Process { name, admin, child });
        ready(admin).await.with_context(|| format!("{name} does not become ready"))
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.envs(self.settings.iter().map(|(name, value)| (name, value)));
        command
    }

    /// The `n`th buyer's token, as its header has it.
    pub fn buyer(&self, n: u64) -> io::Result<String> {
        bearer(&self.minter, &format!("buyer-{n}"), BUYER).map_err(io::Error::other)
    }

    /// Creates a sale that is open now, and waits until its permits are.
    pub async fn sale(&self, id: &str, stock: u64, window: Duration) -> Result<()> {
        let body = format!(
            r#"{{"saleId":"{id}","title":"{id}","stock":"{stock}","perBuyerLimit":"1","paymentWindow":"{}s","price":{{"currencyCode":"EUR","units":"19"}}}}"#,
            window.as_secs()
        );
        let status = self.operate("POST", "/v1/sales", &body, |answer| (answer.status, answer.reason())).await?;
        ensure!(status.0 == 200, "the sale was refused: {} {}", status.0, status.1);
        let begun = Instant::now();
        while self.stock(id).await?.permits != stock as i64 {
            ensure!(begun.elapsed() < START_LIMIT, "the permits of {id} do not open");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// A sale's ledger beside its permits.
    pub async fn stock(&self, sale: &str) -> Result<Stock> {
        let path = format!("/v1/sales/{sale}/stock");
        let read = |answer: Answer<'_>| {
            ensure!(answer.status == 200, "stock was refused: {}", answer.reason());
            let number = |key| answer.text(key).unwrap_or("0").parse().context("a count");
            Ok(Stock { held: number("held")?, sold: number("sold")?, permits: number("permits")? })
        };
        self.operate("GET", &path, "", read).await?
    }

    async fn operate<T>(
        &self,
        method: &'static str,
        path: &str,
        body: &str,
        read: impl FnOnce(Answer<'_>) -> T,
    ) -> Result<T> {
        let mut connection = Connection::new(self.address);
        let request = Request { method, path, authorization: &self.operator, key: "", body };
        Ok(read(connection.call(&request).await.with_context(|| format!("{method} {path}"))?))
    }

    /// What all its processes have counted by now.
    pub async fn metrics(&self) -> Result<Metrics> {
        let mut sum = Metrics::default();
        for process in &self.processes {
            let mut connection = Connection::new(process.admin);
            let answer = connection.call(&Request { method: "GET", path: "/metrics", ..Default::default() }).await?;
            sum.add(std::str::from_utf8(answer.body)?);
        }
        Ok(sum)
    }

    /// The largest resident size of any of its processes so far, in MiB, summed.
    pub fn peak_mib(&self) -> Result<f64> {
        let mut sum = 0.0;
        for process in &self.processes {
            let status = fs::read_to_string(format!("/proc/{}/status", process.child.id()))?;
            let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
            let kib: f64 = peak.and_then(|text| text.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0.0);
            sum += kib / 1024.0;
        }
        Ok(sum)
    }

    /// CPU time its processes have used.
    pub fn cpu(&self) -> Result<Duration> {
        self.processes.iter().map(|process| cpu_of(&process.child.id().to_string())).sum()
    }

    /// Stops it, and audits what it left. Answers whether that is clean, and what the audit printed.
    pub fn stop_and_audit(mut self) -> Result<(bool, String)> {
        self.end()?;
        let audit = self.command().arg("audit").output().context("running the audit")?;
        let told = String::from_utf8_lossy(&audit.stdout).into_owned() + &String::from_utf8_lossy(&audit.stderr);
        Ok((audit.status.success(), told))
    }

    /// Stops it.
    pub fn stop(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        // The door first, as the mesh itself stops.
        for process in self.processes.iter_mut().rev() {
            kill(Pid::from_raw(process.child.id().try_into()?), Signal::SIGTERM)?;
            let asked = Instant::now();
            while process.child.try_wait()?.is_none() {
                if asked.elapsed() > STOP_LIMIT {
                    bail!("{} does not stop", process.name);
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        Ok(())
    }
}

/// A sale's counts.
#[derive(Clone, Copy, Debug)]
pub struct Stock {
    /// Held for orders.
    pub held: i64,
    /// Sold.
    pub sold: i64,
    /// Free permits.
    pub permits: i64,
}

/// Counters and buckets of a process.
#[derive(Clone, Debug, Default)]
pub struct Metrics(HashMap<String, f64>);

impl Metrics {
    fn add(&mut self, text: &str) {
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            if let Some((name, Ok(value))) = line.rsplit_once(' ').map(|(name, value)| (name, value.parse::<f64>())) {
                *self.0.entry(name.to_owned()).or_default() += value;
            }
        }
    }

    /// What a counter has come to; nothing where it is not known yet.
    pub fn total(&self, name: &str) -> f64 {
        self.0.get(name).copied().unwrap_or(0.0)
    }

    /// How much a counter has grown since.
    pub fn grown(&self, since: &Metrics, name: &str) -> f64 {
        self.total(name) - since.total(name)
    }

    /// An upper bound of a quantile of what a histogram has counted since, in its unit; none where it has counted nothing.
    pub fn quantile(&self, since: &Metrics, name: &str, quantile: f64) -> Option<f64> {
        let prefix = format!("{name}_bucket{{le=\"");
        let mut buckets: Vec<(f64, f64)> = self
            .0
            .keys()
            .filter_map(|key| Some((key.strip_prefix(&prefix)?.strip_suffix("\"}")?.parse().ok()?, key)))
            .map(|(bound, key)| (bound, self.grown(since, key)))
            .collect();
        buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
        let all = buckets.last().filter(|(_, count)| *count > 0.0)?.1;
        buckets.iter().find(|(_, count)| *count >= quantile * all).map(|(bound, _)| *bound)
    }
}

/// CPU time of a process, `self` for this one.
pub fn cpu_of(process: &str) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
    // After the name, which may hold anything, in brackets.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks: u64 = fields.get(11..13).context("a stat line")?.iter().map(|f| f.parse().unwrap_or(0)).sum();
    // USER_HZ is 100 on every Linux that Rust runs on.
    Ok(Duration::from_millis(ticks * 10))
}

/// Mints tokens of [`SECRET`].
pub fn minter() -> Result<Minter> {
    let secret: Secret = SECRET.parse().map_err(anyhow::Error::msg)?;
    let auth = AuthArgs { auth_hs256_secret: Some(secret), ..Default::default() };
    auth.load()?.minter(Clock::system()).context("a secret mints")
}

/// An `Authorization` header, whole.
pub fn bearer(minter: &Minter, subject: &str, scopes: Scopes) -> Result<String> {
    let token = minter.mint(&BuyerId::parse(subject)?, scopes, Duration::from_secs(24 * 3600))?;
    Ok(format!("Bearer {token}"))
}

/// An address that is free now.
pub fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

/// Waits until an admin port says that its process is ready.
async fn ready(admin: SocketAddr) -> Result<()> {
    let begun = Instant::now();
    loop {
        let mut connection = Connection::new(admin);
        let answer = connection.call(&Request { method: "GET", path: "/readyz", ..Default::default() }).await;
        if answer.is_ok_and(|answer| answer.status == 200) {
            return Ok(());
        }
        ensure!(begun.elapsed() < START_LIMIT, "not ready after {START_LIMIT:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Fresh databases, an empty Redis, no streams.
async fn fresh(servers: &Servers) -> Result<Vec<(OsString, OsString)>> {
    use fred::interfaces::ClientLike;
    use sea_orm::ConnectionTrait;
    let missing = "real backends need --postgres, --redis and --nats";
    let postgres = servers.postgres.as_ref().context(missing)?;
    let redis = servers.redis.as_ref().context(missing)?;
    let nats = servers.nats.as_ref().context(missing)?;
    let client = fred::prelude::Builder::from_config(fred::prelude::Config::from_url(redis)?).build()?;
    client.init().await?;
    client.flushall::<()>(false).await?;
    client.quit().await?;
    let streams = async_nats::jetstream::new(async_nats::connect(nats).await?);
    for stream in ["ORDERS", "PAYMENTS", "EVENTS", "DEADLETTERS"] {
        // Of the mesh before, or not there.
        let _ = streams.delete_stream(stream).await;
    }
    let admin = mesh::sql::connect(postgres).await?;
    let mut settings: Vec<(OsString, OsString)> =
        vec![("SECKILL_REDIS_URL".into(), redis.into()), ("SECKILL_NATS_URL".into(), nats.into())];
    for service in ["stock", "order", "payment", "coordinator"] {
        let name = format!("bench_{service}_{}", uuid::Uuid::new_v4().simple());
        admin.execute_unprepared(&format!("CREATE DATABASE {name}")).await?;
        let variable = format!("SECKILL_{}_DATABASE_URL", service.to_uppercase());
        settings.push((variable.into(), mesh::sql::with_database(postgres, &name).into()));
    }
    Ok(settings)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_come_from_what_was_counted_since() {
        let text = |a, b, all| {
            format!(
                "x_bucket{{le=\"0.1\"}} {a}\nx_bucket{{le=\"1\"}} {b}\nx_bucket{{le=\"+Inf\"}} {all}\nx_count {all}\n"
            )
        };
        let (mut before, mut after) = (Metrics::default(), Metrics::default());
        before.add(&text(100, 100, 100));
        // Two processes of one mesh.
        after.add(&text(98, 98, 98));
        after.add(&text(100, 101, 102));
        assert_eq!(after.grown(&before, "x_count"), 100.0);
        assert_eq!(after.quantile(&before, "x", 0.98), Some(0.1));
        assert_eq!(after.quantile(&before, "x", 0.99), Some(1.0));
        assert_eq!(after.quantile(&after, "x", 0.5), None);
    }

    #[test]
    fn this_process_has_used_some_cpu() {
        let begun = Instant::now();
        while cpu_of("self").unwrap().is_zero() {
            assert!(begun.elapsed() < Duration::from_secs(10), "no CPU time is counted");
        }
    }
}
