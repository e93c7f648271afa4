//! The textbook design, on the same HTTP stack, Redis, JetStream and PostgreSQL, to be measured beside the mesh: a Lua
//! script checks and decrements, one message an order, one SQL transaction an order for each of lock and pay, INCR when
//! it expires. A fair and quick rendering of that design, nothing else: it keeps connections, pools and scripts warm and
//! does its work concurrently; it does not batch, because the design does not.

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::{Context, Result};
use bytes::Bytes;
use fred::{
    clients::Client,
    interfaces::{ClientLike, KeysInterface, LuaInterface},
};
use http::StatusCode;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use mesh::{
    bus::{Consumer, ConsumerSpec, Message, Settlement, SharedBus, StreamSpec, nats::NatsBus},
    clock::Clock,
    identity::{AuthArgs, Minter, Verifier},
    lifecycle::Lifecycle,
};
use sea_orm::{ConnectionTrait, DatabaseConnection, TransactionTrait};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::{
    load::{Load, Outcome, Pace, Visit, run},
    scenario::Extent,
    site::{BUYER, SECRET, Servers, bearer, free_address, minter},
    wire::{Connection, Request},
};

const STREAM: &str = "BASELINE";
/// Transactions at once, for as many connections as the pool has.
const WORKERS: usize = 16;
/// Takes a unit unless its buyer has one already or there is none: 1 taken, 0 had, -1 none.
const TAKE: &str = r"
if redis.call('SISMEMBER', KEYS[2], ARGV[1]) == 1 then return 0 end
if tonumber(redis.call('GET', KEYS[1]) or '0') < 1 then return -1 end
redis.call('DECR', KEYS[1])
redis.call('SADD', KEYS[2], ARGV[1])
return 1";

/// Its options.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Where it listens.
    #[arg(long)]
    listen: SocketAddr,
    /// Units for sale.
    #[arg(long)]
    stock: u64,
    /// How long an order may stay unpaid.
    #[arg(long, default_value = "900")]
    payment_window_s: u64,
    #[command(flatten)]
    servers: Servers,
    #[command(flatten)]
    auth: AuthArgs,
}

#[derive(Deserialize, Serialize)]
struct Order {
    id: String,
    buyer: String,
    placed_at_ms: i64,
}

struct Baseline {
    redis: Client,
    script: String,
    bus: SharedBus,
    db: DatabaseConnection,
    verifier: Arc<Verifier>,
    clock: Clock,
    window_ms: i64,
    locked: AtomicU64,
    paid: AtomicU64,
}

/// Serves until the process is told to stop. Empties Redis and the baseline's stream first.
pub async fn serve(args: Args) -> Result<()> {
    let life = Lifecycle::new();
    let clock = Clock::system();
    let missing = "the baseline needs --postgres, --redis and --nats";
    let nats = args.servers.nats.as_ref().context(missing)?;
    let redis = fred::prelude::Config::from_url(args.servers.redis.as_ref().context(missing)?)?;
    let redis = fred::prelude::Builder::from_config(redis).build()?;
    redis.init().await?;
    redis.flushall::<()>(false).await?;
    redis.set::<(), _, _>("stock", i64::try_from(args.stock)?, None, None, false).await?;
    // Of the run before, or not there.
    let _ = async_nats::jetstream::new(async_nats::connect(nats).await?).delete_stream(STREAM).await;
    let bus: SharedBus = Arc::new(NatsBus::connect(nats, life.tasks()).await?);
    let spec = StreamSpec { name: STREAM, subjects: vec!["baseline.>"], max_age: Duration::from_secs(3600) };
    bus.ensure_stream(&spec).await?;
    let baseline = Arc::new(Baseline {
        script: redis.script_load(TAKE).await?,
        redis,
        bus,
        db: database(args.servers.postgres.as_ref().context(missing)?, args.stock).await?,
        verifier: args.auth.load()?.verifier(clock.clone()).await?,
        clock,
        window_ms: i64::try_from(args.payment_window_s)? * 1000,
        locked: AtomicU64::new(0),
        paid: AtomicU64::new(0),
    });
    let consumer = |name: &str, max_pending| ConsumerSpec {
        stream: STREAM,
        name: name.to_owned(),
        filter: "baseline.>".to_owned(),
        ack_wait: Duration::from_secs(30),
        max_attempts: None,
        max_pending,
    };
    let locks = baseline.bus.consumer(consumer("locks", 1_024)).await?;
    let deadlines = baseline.bus.consumer(consumer("deadlines", 100_000)).await?;
    for _ in 0..WORKERS {
        let (baseline, locks) = (baseline.clone(), locks.clone());
        life.spawn_essential("locks", async move { baseline.lock_orders(&*locks).await });
    }
    let expiring = baseline.clone();
    life.spawn_essential("deadlines", async move { expiring.expire_orders(&*deadlines).await });
    let service = tower::service_fn(move |request| {
        let baseline = baseline.clone();
        async move { Ok::<_, Infallible>(baseline.answer(request).await) }
    });
    mesh::serve::serve("baseline", mesh::serve::bind(args.listen).await?, service, &life);
    let why = life.failed().await;
    anyhow::bail!("{why}")
}

type Response = http::Response<Full<Bytes>>;

fn response(status: StatusCode, body: String) -> Response {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response
}

impl Baseline {
    async fn answer(&self, request: http::Request<Incoming>) -> Response {
        let path = request.uri().path().to_owned();
        let answer = match (request.method().as_str(), path.as_str()) {
            ("GET", "/stats") => {
                let (locked, paid) = (self.locked.load(Relaxed), self.paid.load(Relaxed));
                Ok(response(StatusCode::OK, format!(r#"{{"locked":"{locked}","paid":"{paid}"}}"#)))
            }
            ("POST", "/v1/orders") => self.place(request).await,
            ("POST", path) => match path.strip_prefix("/v1/orders/").and_then(|rest| rest.strip_suffix(":pay")) {
                Some(id) => self.pay(id).await,
                None => Ok(response(StatusCode::NOT_FOUND, String::new())),
            },
            _ => Ok(response(StatusCode::NOT_FOUND, String::new())),
        };
        answer.unwrap_or_else(|error| response(StatusCode::SERVICE_UNAVAILABLE, format!("{error:#}")))
    }

    async fn place(&self, request: http::Request<Incoming>) -> Result<Response> {
        let authorization = request.headers().get(http::header::AUTHORIZATION).and_then(|v| v.to_str().ok());
        let Ok(identity) = self.verifier.verify(authorization.unwrap_or_default()) else {
            return Ok(response(StatusCode::UNAUTHORIZED, String::new()));
        };
        #[derive(Deserialize)]
        struct Wanted {
            quantity: i64,
        }
        let wanted: Wanted = serde_json::from_slice(&request.into_body().collect().await?.to_bytes())?;
        if wanted.quantity != 1 {
            return Ok(response(StatusCode::BAD_REQUEST, String::new()));
        }
        let buyer = identity.subject.to_string();
        let keys = vec!["stock", "buyers"];
        let taken: i64 = self.redis.evalsha(&self.script, keys, vec![buyer.clone()]).await?;
        if taken < 1 {
            return Ok(response(StatusCode::TOO_MANY_REQUESTS, format!(r#"{{"reason":"{taken}"}}"#)));
        }
        let order = Order { id: uuid::Uuid::now_v7().simple().to_string(), buyer, placed_at_ms: self.clock.now_ms() };
        let message = Message {
            subject: "baseline.placed".to_owned(),
            id: order.id.clone(),
            headers: Default::default(),
            payload: serde_json::to_vec(&order)?.into(),
        };
        for published in self.bus.publish(STREAM, vec![message]).await {
            published?;
        }
        Ok(response(StatusCode::ACCEPTED, format!(r#"{{"name":"orders/{}","state":"PLACED"}}"#, order.id)))
    }

    /// A transaction an order, as many at once as there are workers.
    async fn lock_orders(&self, consumer: &dyn Consumer) {
        loop {
            let fetched = consumer.fetch(8, Duration::from_secs(1)).await.unwrap_or_default();
            for delivery in fetched {
                let settlement = match serde_json::from_slice::<Order>(&delivery.payload) {
                    Err(error) => Settlement::DeadLetter(error.to_string()),
                    Ok(order) => match self.lock(&order).await {
                        Ok(()) => Settlement::Ack,
                        Err(_) => Settlement::Nak(Duration::from_millis(100)),
                    },
                };
                // Comes again where it did not get through; the insert is idempotent.
                let _ = consumer.settle(vec![(delivery, settlement)]).await;
            }
        }
    }

    async fn lock(&self, Order { id, buyer, placed_at_ms }: &Order) -> Result<()> {
        let tx = self.db.begin().await?;
        let inserted = tx
            .execute_unprepared(&format!(
                "INSERT INTO baseline_order VALUES ('{id}', '{}', 1, {placed_at_ms}) ON CONFLICT DO NOTHING",
                buyer.replace('\'', "''")
            ))
            .await?;
        if inserted.rows_affected() == 1 {
            tx.execute_unprepared(&format!("INSERT INTO baseline_hold VALUES ('{id}', 1, 1)")).await?;
            let sql =
                "UPDATE baseline_sale SET available = available - 1, held = held + 1 WHERE id = 1 AND available > 0";
            tx.execute_unprepared(sql).await?;
            tx.commit().await?;
            self.locked.fetch_add(1, Relaxed);
        }
        Ok(())
    }

    async fn pay(&self, id: &str) -> Result<Response> {
        anyhow::ensure!(id.bytes().all(|b| b.is_ascii_alphanumeric()), "no such order");
        match self.leave(id, 2).await? {
            true => {
                self.paid.fetch_add(1, Relaxed);
                Ok(response(StatusCode::OK, r#"{"state":"PAID"}"#.to_owned()))
            }
            // Not locked yet, or not any more.
            false => Ok(response(StatusCode::CONFLICT, r#"{"reason":"NOT_LOCKED"}"#.to_owned())),
        }
    }

    /// One transaction: the order is paid (2) or expired (3), its hold deducted or released.
    async fn leave(&self, id: &str, state: i32) -> Result<bool> {
        let tx = self.db.begin().await?;
        let sql = format!("UPDATE baseline_order SET state = {state} WHERE id = '{id}' AND state = 1");
        if tx.execute_unprepared(&sql).await?.rows_affected() == 0 {
            return Ok(false);
        }
        tx.execute_unprepared(&format!("UPDATE baseline_hold SET state = {state} WHERE id = '{id}'")).await?;
        let to = if state == 2 { "sold = sold + 1" } else { "available = available + 1" };
        tx.execute_unprepared(&format!("UPDATE baseline_sale SET held = held - 1, {to} WHERE id = 1")).await?;
        tx.commit().await?;
        Ok(true)
    }

    /// Delayed redelivery is the deadline; then a transaction an order, and INCR.
    async fn expire_orders(&self, consumer: &dyn Consumer) {
        loop {
            let fetched = consumer.fetch(500, Duration::from_secs(1)).await.unwrap_or_default();
            let mut settlements = Vec::with_capacity(fetched.len());
            for delivery in fetched {
                let settlement = match serde_json::from_slice::<Order>(&delivery.payload) {
                    Err(error) => Settlement::DeadLetter(error.to_string()),
                    Ok(order) => {
                        let left = order.placed_at_ms + self.window_ms - self.clock.now_ms();
                        match left {
                            1.. => Settlement::Nak(Duration::from_millis(left.unsigned_abs())),
                            _ if self.expire(&order.id).await.is_ok() => Settlement::Ack,
                            _ => Settlement::Nak(Duration::from_millis(100)),
                        }
                    }
                };
                settlements.push((delivery, settlement));
            }
            // Comes again where it did not get through; a second expiry changes nothing.
            let _ = consumer.settle(settlements).await;
        }
    }

    async fn expire(&self, id: &str) -> Result<()> {
        if self.leave(id, 3).await? {
            self.redis.incr::<(), _>("stock").await?;
        }
        Ok(())
    }
}

async fn database(url: &str, stock: u64) -> Result<DatabaseConnection> {
    let db = mesh::sql::connect(url).await?;
    for statement in [
        "DROP TABLE IF EXISTS baseline_order, baseline_hold, baseline_sale",
        "CREATE TABLE baseline_order (id TEXT PRIMARY KEY, buyer TEXT NOT NULL, state INTEGER NOT NULL, placed_at BIGINT NOT NULL)",
        "CREATE TABLE baseline_hold (id TEXT PRIMARY KEY, quantity BIGINT NOT NULL, state INTEGER NOT NULL)",
        "CREATE TABLE baseline_sale (id INTEGER PRIMARY KEY, available BIGINT NOT NULL, held BIGINT NOT NULL, sold BIGINT NOT NULL)",
        &format!("INSERT INTO baseline_sale VALUES (1, {stock}, 0, 0)"),
    ] {
        db.execute_unprepared(statement).await?;
    }
    Ok(db)
}

struct Buyers {
    minter: Minter,
}

impl Visit for Buyers {
    async fn visit(&self, connection: &mut Connection, n: u64) -> io::Result<Outcome> {
        let token = bearer(&self.minter, &format!("buyer-{n}"), BUYER).map_err(io::Error::other)?;
        let body = r#"{"sale":"baseline","quantity":1}"#;
        let place = Request { method: "POST", path: "/v1/orders", authorization: &token, body, ..Default::default() };
        let answer = connection.call(&place).await?;
        Ok(if answer.status == 202 { Outcome::Good } else { Outcome::Refused(answer.reason()) })
    }
}

/// Accepted and locked a second, in a process of its own, as the mesh is.
pub async fn measure(servers: &Servers, extent: Extent) -> Result<[f64; 2]> {
    let missing = "the baseline needs --postgres, --redis and --nats";
    let address = free_address()?;
    let mut process = tokio::process::Command::new(std::env::current_exe()?)
        .args(["baseline", "--listen", &address.to_string(), "--stock", "50000000"])
        .args(["--auth-hs256-secret", SECRET])
        .args(["--postgres", servers.postgres.as_ref().context(missing)?])
        .args(["--redis", servers.redis.as_ref().context(missing)?])
        .args(["--nats", servers.nats.as_ref().context(missing)?])
        .kill_on_drop(true)
        .spawn()?;
    let begun = Instant::now();
    let stats = async || -> Result<u64> {
        let mut connection = Connection::new(address);
        let answer = connection.call(&Request { method: "GET", path: "/stats", ..Default::default() }).await?;
        answer.text("locked").context("no count")?.parse().context("a count")
    };
    while stats().await.is_err() {
        anyhow::ensure!(begun.elapsed() < Duration::from_secs(30), "the baseline does not start");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let load = Load {
        pace: Pace::Saturating,
        connections: extent.connections,
        warm_up: Duration::from_secs(1),
        length: extent.length,
    };
    let (begun, before) = (Instant::now(), stats().await?);
    let counted = run(load, address, 1, Arc::new(Buyers { minter: minter()? })).await;
    let locked = (stats().await? - before) as f64 / begun.elapsed().as_secs_f64();
    process.kill().await?;
    Ok([counted.rate(), locked])
}
