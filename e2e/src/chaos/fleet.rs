//! The mesh as real processes, two of each role, with a proxy of ours on every wire: between roles, and between roles
//! and servers.
//!
//! Promises: a replica keeps its addresses however often it dies; nothing outlives the [`Fleet`].

use std::{
    fmt,
    net::{SocketAddr, ToSocketAddrs},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use migrations::Service;
use nix::sys::signal::Signal;
use seckill::{backends::open_database, config::StorageArgs};

use super::proxy::{Fault, Proxy};
use crate::processes::{Process, free_address};

/// How long a replica may take from its start to ready.
pub const READY_LIMIT: Duration = Duration::from_secs(30);

/// The roles, in the order in which they call each other, the door last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// stock-svc.
    Stock,
    /// order-svc.
    Order,
    /// payment-svc.
    Payment,
    /// The coordinator.
    Coordinator,
    /// The gateway.
    Gateway,
}

impl Role {
    /// All of them.
    pub const ALL: [Role; 5] = [Role::Stock, Role::Order, Role::Payment, Role::Coordinator, Role::Gateway];

    /// As the command line has it.
    pub fn name(self) -> &'static str {
        match self {
            Role::Stock => "stock",
            Role::Order => "order",
            Role::Payment => "payment",
            Role::Coordinator => "coordinator",
            Role::Gateway => "gateway",
        }
    }

    /// The roles that it calls.
    fn calls(self) -> &'static [Role] {
        match self {
            Role::Stock | Role::Order | Role::Payment => &[],
            Role::Coordinator => &Self::ALL[..3],
            Role::Gateway => &Self::ALL[..4],
        }
    }

    /// Its database; the gateway has none.
    fn service(self) -> Option<Service> {
        match self {
            Role::Stock => Some(Service::Stock),
            Role::Order => Some(Service::Order),
            Role::Payment => Some(Service::Payment),
            Role::Coordinator => Some(Service::Coordinator),
            Role::Gateway => None,
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What a wire can end at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Any replica of a role.
    Role(Role),
    /// The database server.
    Database,
    /// Redis.
    Redis,
    /// NATS.
    Nats,
}

/// One process of a role.
#[derive(Debug)]
pub struct Replica {
    /// What it is.
    pub role: Role,
    /// `stock-1`, for messages and its log.
    pub name: String,
    /// The process.
    pub process: Process,
    /// Whether it has been ready since it was started.
    was_ready: bool,
}

impl Replica {
    fn launch(&mut self) -> Result<()> {
        self.was_ready = false;
        self.process.launch_again().with_context(|| format!("starting {}", self.name))
    }
}

/// Somebody's end that was nobody's doing.
pub struct Death {
    /// Who, and how.
    pub what: String,
    /// Whether it had served: a fault of something that a role calls is no reason to end then. Who has not begun may.
    pub was_ready: bool,
}

/// A proxy between a replica and what it calls.
struct Wire {
    /// The replica, by its place in the fleet.
    from: usize,
    to: End,
    proxy: Proxy,
}

/// Everything that runs of the mesh.
pub struct Fleet {
    /// In the order of [`Role::ALL`].
    pub replicas: Vec<Replica>,
    wires: Vec<Wire>,
}

/// What a fleet is made of.
pub struct Plan<'a> {
    /// `seckill`.
    pub program: &'a Path,
    /// The real servers, which the processes reach through proxies only.
    pub storage: &'a StorageArgs,
    /// How many of each role.
    pub replicas: usize,
    /// Where logs go.
    pub logs: &'a Path,
}

impl Fleet {
    /// Brings the databases up to date, starts every process and waits until all are ready.
    pub async fn start(plan: Plan<'_>) -> Result<Self> {
        // Once, and before two replicas of a service would do it at the same time.
        for service in Service::ALL {
            let db = open_database(plan.storage, service).await?;
            migrations::up(service, &db).await.with_context(|| format!("migrating {}", service.name()))?;
            db.close().await?;
        }
        let mut fleet = Self { replicas: Vec::new(), wires: Vec::new() };
        let addresses: Vec<(Role, SocketAddr)> =
            Role::ALL.iter().flat_map(|&role| (0..plan.replicas).map(move |_| (role, free_address()))).collect();
        for (index, &(role, address)) in addresses.iter().enumerate() {
            let name = format!("{role}-{}", index % plan.replicas + 1);
            let arguments = fleet.arguments(index, role, &addresses, plan.storage).await?;
            let log: PathBuf = plan.logs.join(format!("{name}.log"));
            let process = Process::spawn(plan.program, arguments, address, Some(log))
                .with_context(|| format!("starting {name}"))?;
            fleet.replicas.push(Replica { role, name, process, was_ready: false });
        }
        let started = Instant::now();
        for index in 0..fleet.replicas.len() {
            fleet.until_ready(index, started).await?;
        }
        Ok(fleet)
    }

    /// How to start one replica, every address of it one of a proxy.
    async fn arguments(
        &mut self,
        from: usize,
        role: Role,
        addresses: &[(Role, SocketAddr)],
        storage: &StorageArgs,
    ) -> Result<Vec<String>> {
        let mut arguments = vec![role.name().to_owned()];
        for &called in role.calls() {
            let mut endpoints = Vec::new();
            for &(_, target) in addresses.iter().filter(|(other, _)| *other == called) {
                endpoints.push(format!("http://{}", self.wire(from, End::Role(called), target).await?));
            }
            arguments.extend([format!("--{called}-endpoints"), endpoints.join(",")]);
        }
        let mut servers = vec![("--nats-url".to_owned(), End::Nats, storage.nats_url.clone())];
        if role == Role::Stock {
            servers.push(("--redis-url".to_owned(), End::Redis, storage.redis_url.clone()));
        }
        if let Some(service) = role.service() {
            servers.push((format!("--{role}-database-url"), End::Database, Some(storage.database(service))));
        }
        for (flag, end, url) in servers {
            let url = url.with_context(|| format!("{flag} is needed"))?;
            arguments.extend([flag, self.through_proxy(from, end, &url).await?]);
        }
        Ok(arguments)
    }

    async fn wire(&mut self, from: usize, to: End, target: SocketAddr) -> Result<SocketAddr> {
        let proxy = Proxy::to(target).await.context("starting a proxy")?;
        let address = proxy.address;
        self.wires.push(Wire { from, to, proxy });
        Ok(address)
    }

    /// The same URL with a proxy's address in place of the server's.
    async fn through_proxy(&mut self, from: usize, to: End, url: &str) -> Result<String> {
        let parsed: http::Uri = url.parse().with_context(|| format!("reading the URL of {to:?}"))?;
        let authority = parsed.authority().context("a URL without a host")?.as_str();
        let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
        let target = host.to_socket_addrs().with_context(|| format!("looking up {host}"))?.next();
        let proxy = self.wire(from, to, target.with_context(|| format!("{host} has no address"))?).await?;
        Ok(url.replacen(host, &proxy.to_string(), 1))
    }

    /// The doors.
    pub fn doors(&self) -> Vec<SocketAddr> {
        self.of(Role::Gateway).map(|index| self.replicas[index].process.address).collect()
    }

    /// The replicas of a role, by their places.
    pub fn of(&self, role: Role) -> impl Iterator<Item = usize> {
        self.replicas.iter().enumerate().filter(move |(_, replica)| replica.role == role).map(|(index, _)| index)
    }

    /// SIGKILL.
    pub fn kill(&mut self, index: usize) {
        self.replicas[index].process.kill();
    }

    /// Starts a dead replica again and waits; answers how long it took to be ready.
    pub async fn restart(&mut self, index: usize) -> Result<Duration> {
        let started = Instant::now();
        self.launch(index)?;
        self.until_ready(index, started).await
    }

    /// Starts a dead replica again and does not wait.
    pub fn launch(&mut self, index: usize) -> Result<()> {
        self.replicas[index].launch()
    }

    /// Waits until a replica that was started then is ready. One that ends instead, because a server it needs is still
    /// coming back, is started again, as any supervisor would.
    pub async fn until_ready(&mut self, index: usize, started: Instant) -> Result<Duration> {
        loop {
            let replica = &mut self.replicas[index];
            if replica.process.exited()?.is_some() {
                replica.launch()?;
            }
            if replica.process.is_ready().await {
                replica.was_ready = true;
                return Ok(started.elapsed());
            }
            if started.elapsed() > READY_LIMIT {
                bail!("{} is not ready {READY_LIMIT:?} after its start", replica.name);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Starts again whoever has died by himself, and answers who.
    pub fn revive(&mut self) -> Result<Vec<Death>> {
        let mut died = Vec::new();
        for replica in &mut self.replicas {
            if let Some(status) = replica.process.exited()? {
                let what = format!("{} ended by itself: {status}", replica.name);
                died.push(Death { what, was_ready: replica.was_ready });
                replica.launch()?;
            }
        }
        Ok(died)
    }

    /// Stops a replica where it stands, or lets it go on.
    pub fn signal(&self, index: usize, signal: Signal) -> Result<()> {
        let Replica { name, process, .. } = &self.replicas[index];
        process.signal(signal).with_context(|| format!("{signal} to {name}"))
    }

    /// Puts a fault on every wire from a replica to this end, both replicas of it where it is a role.
    pub fn set(&self, from: usize, to: End, fault: Fault) {
        for wire in self.wires.iter().filter(|wire| wire.from == from && wire.to == to) {
            wire.proxy.set(fault);
        }
    }

    /// Every pair of a replica and something that it calls.
    pub fn pairs(&self) -> Vec<(usize, End)> {
        let mut pairs: Vec<(usize, End)> = self.wires.iter().map(|wire| (wire.from, wire.to)).collect();
        pairs.dedup();
        pairs
    }
}
