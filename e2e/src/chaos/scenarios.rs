//! Measurements that are made by themselves: many orders and one fault.

use std::{
    collections::HashSet,
    fs::File,
    io::{ErrorKind, Write},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use migrations::Service;
use nix::mount::{MsFlags, mount, umount};
use sea_orm::{ConnectionTrait, DatabaseConnection, FromQueryResult, Statement};
use seckill::{audit, backends::open_database, config::StorageArgs};
use tokio::time::sleep;

use super::{Chaos, Load, Role, clean};
use crate::processes::{Process, free_address};

/// Placed at once. The coordinator paces them; more would only wait in the gateways.
const LANES: usize = 256;
/// The bound, for both.
const RESTART_BOUND: Duration = Duration::from_secs(5);
/// How long an order may outlive its deadline while all is healthy (I6).
const DEADLINE_BOUND_MS: i64 = 1000;

impl Chaos {
    /// Coordinators die twice with orders in flight, and each time all of those move within five seconds of the restart:
    /// first in the middle of a rush, with orders accepted and not yet locked, then with `count` of them coming due.
    pub async fn in_flight(&mut self, count: usize) -> Result<()> {
        let sagas = open_database(&self.storage, Service::Coordinator).await?;

        let rush = self.load.create_sale("rush", count as u64, Duration::from_secs(3600)).await?;
        let crowd = {
            let (load, rush) = (self.load.clone(), rush.clone());
            tokio::spawn(async move { load.crowd(&rush, count, LANES).await })
        };
        while self.load.accepted().len() < count / 2 {
            ensure!(!crowd.is_finished(), "the rush ended early");
            sleep(Duration::from_millis(5)).await;
        }
        let restarted = self.restart_coordinators(Duration::ZERO).await?;
        let accepted = self.load.accepted();
        let sagas = Sagas(sagas);
        let locked = async || Ok(accepted.difference(&sagas.of(&rush).await?).count());
        self.all_move("accepted", accepted.len(), restarted, locked).await?;
        crowd.await.context("the crowd")?;
        // They would end in an hour.
        self.load.forget();
        self.leaves_orders = true;

        let (sale, window) = self.fill(count).await?;
        let restarted = self.restart_coordinators(window).await?;
        self.all_move("due", count, restarted, async || sagas.awaiting(&sale).await).await
    }

    /// Kills all coordinators and, after a while without, starts them again. Answers when that was.
    async fn restart_coordinators(&mut self, without: Duration) -> Result<Instant> {
        let coordinators: Vec<usize> = self.fleet.of(Role::Coordinator).collect();
        for &index in &coordinators {
            self.fleet.kill(index);
        }
        sleep(without).await;
        let restarted = Instant::now();
        for &index in &coordinators {
            self.fleet.launch(index)?;
        }
        for &index in &coordinators {
            let ready = self.fleet.until_ready(index, restarted).await?;
            println!("{} ready {:.2} s after its restart", self.fleet.replicas[index].name, ready.as_secs_f64());
            if ready > RESTART_BOUND {
                self.load
                    .violation(format!("{} was ready {ready:?} after its restart", self.fleet.replicas[index].name));
            }
        }
        Ok(restarted)
    }

    /// Waits until none is `left` that has not moved since the restart.
    async fn all_move(
        &self,
        what: &str,
        count: usize,
        restarted: Instant,
        left: impl AsyncFn() -> Result<usize>,
    ) -> Result<()> {
        const LIMIT: Duration = Duration::from_secs(60);
        loop {
            let (left, after) = (left().await?, restarted.elapsed());
            println!(
                "  {:>5.2} s after the restart: {left} of {count} {what} orders have not moved",
                after.as_secs_f64()
            );
            if after > RESTART_BOUND && left > 0 {
                self.load
                    .violation(format!("{left} of {count} {what} orders have not moved {after:?} after the restart"));
            }
            if left == 0 || after > LIMIT {
                return Ok(());
            }
            sleep(Duration::from_millis(250)).await;
        }
    }

    /// `count` orders await payment, for longer than this takes. Coordinators that are restarted are ready within five
    /// seconds and lock new orders.
    pub async fn awaiting(&mut self, count: usize) -> Result<()> {
        let sale = self.load.create_sale("awaiting", count as u64, Duration::from_secs(3600)).await?;
        self.place(&sale, count).await?;
        let restarted = self.restart_coordinators(Duration::ZERO).await?;
        let sale = self.load.create_sale("after", 10, Duration::from_secs(2)).await?;
        let held = self.load.hold("somebody", &sale).await;
        ensure!(held.is_some(), "nothing is locked after the restart");
        println!("locking again {:.2} s after the restart", restarted.elapsed().as_secs_f64());
        // They would end in an hour; that they end is another scenario's to show.
        self.load.forget();
        self.leaves_orders = true;
        Ok(())
    }

    /// E19: `count` orders that nobody pays expire on time: none before its deadline, none more than a second after it.
    pub async fn expiry(&mut self, count: usize) -> Result<()> {
        let (sale, window) = self.fill(count).await?;
        println!("waiting {:.0} s for the last of them to be due", window.as_secs_f64());
        sleep(window).await;
        let db = open_database(&self.storage, Service::Order).await?;
        let limit = Instant::now() + Duration::from_secs(120);
        let lateness = loop {
            let lateness = Lateness::of(&db, &sale).await?;
            if lateness.expired == lateness.orders || Instant::now() > limit {
                break lateness;
            }
            sleep(Duration::from_millis(500)).await;
        };
        println!("{lateness}");
        if lateness.expired != lateness.orders || lateness.orders < count as i64 {
            self.load.violation(format!("E19: {lateness}"));
        }
        if lateness.earliest < 0 || lateness.latest > DEADLINE_BOUND_MS {
            self.load.violation(format!("I6: {lateness}"));
        }
        Ok(())
    }

    /// A sale with this many orders, all awaiting payment before the first of them is due. Answers how long after that
    /// the last will be.
    async fn fill(&mut self, count: usize) -> Result<(String, Duration)> {
        // A first thousand tell how fast this machine places them.
        let trial = self.load.create_sale("trial", 1000, Duration::from_secs(2)).await?;
        let rate = 1000.0 / self.place(&trial, 1000).await?.as_secs_f64();
        let window = Duration::from_secs_f64((count as f64 / rate * 2.0).max(10.0).ceil());
        let sale = self.load.create_sale("filled", count as u64, window).await?;
        let took = self.place(&sale, count).await?;
        ensure!(took < window, "the first orders were due before the last was placed, after {took:?}");
        Ok((sale, window))
    }

    async fn place(&self, sale: &str, count: usize) -> Result<Duration> {
        let began = Instant::now();
        let accepted = self.load.crowd(sale, count, LANES).await;
        let took = began.elapsed();
        println!("{accepted} orders accepted in {:.1} s", took.as_secs_f64());
        ensure!(accepted == count, "{accepted} of {count} orders were accepted");
        Ok(took)
    }
}

/// The coordinator's table.
struct Sagas(DatabaseConnection);

impl Sagas {
    /// The orders of a sale that have one, which is to say that they were locked or refused.
    async fn of(&self, sale: &str) -> Result<HashSet<String>> {
        self.ids(sale, "").await
    }

    /// How many of a sale await payment. The first thing a due one does is to leave that state.
    async fn awaiting(&self, sale: &str) -> Result<usize> {
        Ok(self.ids(sale, "AND state = 'AWAITING_PAYMENT'").await?.len())
    }

    async fn ids(&self, sale: &str, only: &str) -> Result<HashSet<String>> {
        let sql = format!("SELECT saga_id FROM coordinator_saga WHERE sale_id = '{sale}' {only}");
        let statement = Statement::from_string(self.0.get_database_backend(), sql);
        let rows = self.0.query_all_raw(statement).await.context("reading sagas")?;
        rows.iter().map(|row| Ok(row.try_get("", "saga_id")?)).collect()
    }
}

/// How long after their deadlines the orders of a sale were closed, in milliseconds.
#[derive(FromQueryResult)]
struct Lateness {
    orders: i64,
    expired: i64,
    earliest: i64,
    latest: i64,
    above_half: i64,
}

impl Lateness {
    async fn of(db: &DatabaseConnection, sale: &str) -> Result<Self> {
        let expired = i32::from(proto::v1::OrderState::Expired);
        let sql = format!(
            "SELECT COUNT(*) AS orders, COUNT(CASE WHEN state = {expired} THEN 1 END) AS expired,
             COALESCE(MIN(close_at - expire_at), 0) AS earliest, COALESCE(MAX(close_at - expire_at), 0) AS latest,
             COUNT(CASE WHEN close_at - expire_at > 500 THEN 1 END) AS above_half
             FROM order_record WHERE sale_id = '{sale}'"
        );
        let statement = Statement::from_string(db.get_database_backend(), sql);
        let found = Self::find_by_statement(statement).one(db).await.context("reading order records")?;
        found.context("a count is a row")
    }
}

impl std::fmt::Display for Lateness {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { orders, expired, earliest, latest, above_half } = self;
        write!(
            f,
            "{expired} of {orders} expired, {earliest} to {latest} ms after their deadline, {above_half} of them later than 500 ms"
        )
    }
}

/// The embedded mesh on a small file system that fills up while buyers come. What it says then is documented, what it
/// accepted ends, and it goes on once there is room.
pub async fn disk_full(program: &Path, logs: &Path, rate: f64, seed: u64) -> Result<bool> {
    let dir = tempfile::tempdir().context("a temporary folder")?;
    let Some(_disk) = Disk::mount(dir.path())? else { return Ok(true) };
    let storage = StorageArgs { data_dir: dir.path().join("data"), ..Default::default() };
    let arguments = vec!["--data-dir".to_owned(), storage.data_dir.display().to_string()];
    let address = free_address();
    let mut mesh = Process::spawn(program, arguments, address, Some(logs.join("mesh.log")))?;
    until_ready(&mut mesh).await?;
    let load = Load::at(&[address], seed)?;
    load.open().await?;
    let buyers = {
        let load = load.clone();
        tokio::spawn(async move { load.run(rate, sleep(Duration::from_secs(45))).await })
    };
    for round in 1..=3 {
        sleep(Duration::from_secs(3)).await;
        let ballast = fill_up(dir.path())?;
        println!("round {round}: the disk is full");
        sleep(Duration::from_secs(5)).await;
        drop(ballast);
        std::fs::remove_file(dir.path().join("ballast")).context("making room again")?;
        let lifted = Instant::now();
        // A process may end when its disk is full; whoever supervises it starts it again.
        if let Some(status) = mesh.exited()? {
            println!("  the mesh had ended: {status}");
            mesh.launch_again()?;
            until_ready(&mut mesh).await?;
        }
        match load.locks_again(lifted, Duration::from_secs(30)).await {
            Some(after) => println!("  locking again {:.2} s after there was room", after.as_secs_f64()),
            None => load.violation("nothing locked 30 s after there was room again".to_owned()),
        }
    }
    buyers.await.context("the buyers")?;
    let ends = load.all_end(Duration::from_secs(60)).await;
    load.sold_out_is_sold().await;
    mesh.stop(Duration::from_secs(25)).await.context("stopping the mesh")?;
    if let Err(last) = clean(&audit::Source::new(&storage, None)?, true).await? {
        load.violation(format!("the audit at rest is not clean:\n{last}"));
    }
    println!("{}\nended      {ends:?}", load.summary());
    let clean = load.violations().is_empty();
    println!("{}", if clean { "clean" } else { "VIOLATIONS, see above" });
    Ok(clean)
}

async fn until_ready(mesh: &mut Process) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !mesh.is_ready().await {
        ensure!(Instant::now() < deadline, "the mesh is not ready in time");
        sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// Takes every byte that is left.
fn fill_up(dir: &Path) -> Result<File> {
    let mut ballast = File::create(dir.join("ballast")).context("making a ballast")?;
    for size in [64 * 1024, 4096, 1] {
        let piece = vec![0; size];
        loop {
            match ballast.write_all(&piece) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::StorageFull => break,
                Err(error) => return Err(error).context("filling the disk"),
            }
        }
    }
    Ok(ballast)
}

/// A small file system of its own, where this user may mount one.
struct Disk<'a>(&'a Path);

impl<'a> Disk<'a> {
    fn mount(at: &'a Path) -> Result<Option<Self>> {
        match mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some("size=64m")) {
            Ok(()) => Ok(Some(Self(at))),
            Err(nix::errno::Errno::EPERM | nix::errno::Errno::EACCES) => {
                println!("disk-full: passed over, a small file system cannot be mounted here without more rights");
                Ok(None)
            }
            Err(error) => Err(error).context("mounting a small file system"),
        }
    }
}

impl Drop for Disk<'_> {
    fn drop(&mut self) {
        if let Err(error) = umount(self.0) {
            eprintln!("{} is still mounted: {error}", self.0.display());
        }
    }
}
