//! SIGKILL in mid-rush, on real processes: what a buyer saw accepted ends, whatever died (I5, E16, E31).

use std::{collections::HashSet, sync::Arc, time::Duration};

use e2e::{
    Site, demand_clean,
    processes::{Process, free_address},
};
use mesh::testing::{eventually, server};
use proto::v1::OrderState;
use sea_orm::ConnectionTrait;
use seckill::{audit, config::StorageArgs};
use tokio::{sync::Mutex, task::JoinSet};
use uuid::Uuid;

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_e2e-seckill");
const WINDOW: Duration = Duration::from_secs(3);

/// The mesh's streams have fixed names, and the tests have one NATS: one mesh on it at a time.
pub static REAL_BACKENDS: Mutex<()> = Mutex::const_new(());

/// Buyers who keep coming, every third of them a payer, until told to stop. What they saw accepted is noted.
struct Crowd {
    visits: JoinSet<()>,
    accepted: Arc<Mutex<HashSet<(String, String)>>>,
    /// Why others were refused.
    refused: Arc<Mutex<HashSet<proto::Reason>>>,
}

impl Crowd {
    /// Buyers at this door, each with one unit to buy, some hundreds a second.
    fn gather(site: &Arc<Site>, sale: &str, buyers: usize) -> Self {
        let (accepted, refused) = (Arc::new(Mutex::new(HashSet::new())), Arc::new(Mutex::new(HashSet::new())));
        let mut visits = JoinSet::new();
        for lane in 0..16 {
            let (site, sale) = (site.clone(), sale.to_owned());
            let (accepted, refused) = (accepted.clone(), refused.clone());
            visits.spawn(async move {
                for i in (lane..buyers).step_by(16) {
                    let name = format!("buyer-{i}");
                    let order = match site.buyer(&name).place(&sale).await {
                        Ok(order) => order,
                        Err(error) => {
                            refused.lock().await.insert(error.reason);
                            continue;
                        }
                    };
                    accepted.lock().await.insert((name.clone(), order.name.clone()));
                    if i % 3 == 0 {
                        // Its outcome may be unknown: the audit knows.
                        let _ = site.buyer(&name).pay(&order.name, "sim_approve").await;
                    }
                }
            });
        }
        Self { visits, accepted, refused }
    }

    async fn so_far(&self) -> usize {
        self.accepted.lock().await.len()
    }

    /// Waits for everybody to have come, and for every order that was accepted to have ended.
    async fn ended(self, site: &Site) -> usize {
        self.visits.join_all().await;
        let accepted = Arc::into_inner(self.accepted).expect("all visits are over").into_inner();
        let operator = site.operator();
        for (buyer, order) in &accepted {
            eventually(&format!("{order} of {buyer} ends"), async || {
                let order = operator.order(order).await.ok()?;
                let open =
                    matches!(order.state(), OrderState::Placed | OrderState::AwaitingPayment | OrderState::Paying);
                (!open).then_some(())
            })
            .await;
        }
        accepted.len()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn e31_the_all_in_one_killed_in_mid_rush_loses_nothing_it_accepted() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let storage = StorageArgs { data_dir: dir.path().to_owned(), ..Default::default() };
    let mut mesh = Process::start(PROGRAM, vec!["--data-dir".into(), dir.path().display().to_string()]).await;
    let site = Arc::new(mesh.site());
    let sale = site.sale(300, WINDOW).await;
    let crowd = Crowd::gather(&site, &sale, 900);
    for kill in 1..=3 {
        eventually("the rush is on", async || (crowd.so_far().await >= kill * 50).then_some(())).await;
        mesh.kill();
        mesh.restart().await;
    }
    assert!(crowd.ended(&site).await >= 150);
    site.settled(&sale).await;
    // The streams are the process's own: stopped, so that they can be read, and nobody writes meanwhile.
    mesh.kill();
    demand_clean(&audit::Source::new(&storage, None).expect("the audit has sources")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn e16_asked_to_stop_in_mid_rush_it_stops_within_the_grace_and_loses_nothing() {
    const GRACE: Duration = Duration::from_secs(10);
    let dir = tempfile::tempdir().expect("a temporary folder");
    let data_dir = dir.path().display().to_string();
    let arguments = ["--data-dir", &data_dir, "--shutdown-grace", "10s"].map(str::to_owned).into();
    let mut mesh = Process::start(PROGRAM, arguments).await;
    let site = Arc::new(mesh.site());
    let sale = site.sale(300, WINDOW).await;
    let crowd = Crowd::gather(&site, &sale, 600);
    eventually("the rush is on", async || (crowd.so_far().await >= 50).then_some(())).await;
    let (status, after) = mesh.terminate().await;
    assert!(status.success(), "{status}");
    // With the grace used up it would have been dropped where it stood; the machine may be slow on top.
    assert!(after < GRACE, "stopped after {after:?}");
    mesh.restart().await;
    assert!(crowd.ended(&site).await >= 50);
    site.settled(&sale).await;
}

/// Five processes on the test servers.
struct Mesh {
    storage: StorageArgs,
    /// In the order of their start, the gateway last.
    roles: Vec<(&'static str, Process)>,
}

impl Mesh {
    /// One process a role, on fresh databases and streams. None when the servers are not there.
    async fn start(databases: &str) -> Option<Self> {
        let storage = fresh_storage(databases).await?;
        let mut arguments = vec![];
        for (flag, url) in [
            ("--stock-database-url", &storage.stock_database_url),
            ("--order-database-url", &storage.order_database_url),
            ("--payment-database-url", &storage.payment_database_url),
            ("--coordinator-database-url", &storage.coordinator_database_url),
            ("--redis-url", &storage.redis_url),
            ("--nats-url", &storage.nats_url),
        ] {
            arguments.extend([flag.to_owned(), url.clone().expect("set above")]);
        }
        let mut roles: Vec<(&'static str, Process)> = Vec::new();
        let names = ["stock", "order", "payment", "coordinator", "gateway"];
        for name in names {
            let mut own = vec![name.to_owned()];
            own.extend(arguments.iter().cloned());
            for (other, process) in &roles {
                own.extend([format!("--{other}-endpoints"), format!("http://{}", process.address)]);
            }
            roles.push((name, Process::start_at(PROGRAM, own, free_address()).await));
        }
        Some(Self { storage, roles })
    }

    fn site(&self) -> Site {
        self.roles.last().expect("five roles").1.site()
    }
}

/// Fresh databases and streams on the test servers. None when they are not there.
pub async fn fresh_storage(databases: &str) -> Option<StorageArgs> {
    let (base, redis, nats) = (server(databases)?, server("SECKILL_TEST_REDIS_URL")?, server("SECKILL_TEST_NATS_URL")?);
    let client = async_nats::connect(&nats).await.expect("NATS answers");
    let streams = async_nats::jetstream::new(client);
    for stream in ["ORDERS", "PAYMENTS", "EVENTS", "DEADLETTERS"] {
        // Of an earlier test, or not there.
        let _ = streams.delete_stream(stream).await;
    }
    let mut storage = StorageArgs { redis_url: Some(redis), nats_url: Some(nats), ..Default::default() };
    for (service, url) in [
        ("stock", &mut storage.stock_database_url),
        ("order", &mut storage.order_database_url),
        ("payment", &mut storage.payment_database_url),
        ("coordinator", &mut storage.coordinator_database_url),
    ] {
        *url = Some(fresh_database(&base, service).await);
    }
    Some(storage)
}

async fn fresh_database(base: &str, service: &str) -> String {
    let name = format!("e2e_{service}_{}", Uuid::new_v4().simple());
    let admin = mesh::sql::connect(base).await.expect("the database server answers");
    admin.execute_unprepared(&format!("CREATE DATABASE {name}")).await.expect("a database can be created");
    mesh::sql::with_database(base, &name)
}

async fn each_role_killed_in_mid_rush(databases: &str) {
    let _turn = REAL_BACKENDS.lock().await;
    let Some(mut mesh) = Mesh::start(databases).await else { return };
    let site = Arc::new(mesh.site());
    let sale = site.sale(600, WINDOW).await;
    let crowd = Crowd::gather(&site, &sale, 3000);
    for turn in 0..mesh.roles.len() {
        let target = (turn + 1) * 40;
        eventually("the rush is on", async || (crowd.so_far().await >= target).then_some(())).await;
        let (name, process) = &mut mesh.roles[turn];
        eprintln!("killing {name}");
        process.kill();
        process.restart().await;
    }
    assert!(crowd.ended(&site).await >= 200);
    site.settled(&sale).await;
    demand_clean(&audit::Source::new(&mesh.storage, None).expect("the audit has sources")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn e16_each_role_killed_in_mid_rush_on_postgres_loses_nothing() {
    each_role_killed_in_mid_rush("SECKILL_TEST_POSTGRES_URL").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn e16_each_role_killed_in_mid_rush_on_mariadb_loses_nothing() {
    each_role_killed_in_mid_rush("SECKILL_TEST_MYSQL_URL").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn e13_redis_emptied_in_mid_rush_is_never_sold_out_and_loses_nothing() {
    let _turn = REAL_BACKENDS.lock().await;
    let Some(mesh) = Mesh::start("SECKILL_TEST_POSTGRES_URL").await else { return };
    let site = Arc::new(mesh.site());
    let sale = site.sale(400, WINDOW).await;
    let crowd = Crowd::gather(&site, &sale, 1500);
    eventually("the rush is on", async || (crowd.so_far().await >= 60).then_some(())).await;
    use fred::prelude::ClientLike;
    let config = fred::prelude::Config::from_url(mesh.storage.redis_url.as_deref().expect("set")).expect("a URL");
    let redis = fred::prelude::Builder::from_config(config).build().expect("a client");
    redis.init().await.expect("Redis answers");
    // The test server's whole memory, which is this mesh's: no other test runs in this binary's turn.
    let _: () = redis.flushall(false).await.expect("flushed");
    let refused = crowd.refused.clone();
    assert!(crowd.ended(&site).await >= 60);
    // Two of three never pay, so that sold out it never is.
    let told = refused.lock().await.clone();
    assert!(!told.contains(&proto::Reason::SoldOut), "I8: {told:?}");
    site.settled(&sale).await;
    demand_clean(&audit::Source::new(&mesh.storage, None).expect("the audit has sources")).await;
}
