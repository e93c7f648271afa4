//! What the machine's own building blocks do, in the same run: every figure of the mesh is told as a ratio to one of
//! these, so that a slower or noisier machine does not matter.

use std::{future::ready, io, path::Path, sync::Arc, time::Duration};

use anyhow::{Context, Result};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use http_body_util::{BodyExt, Full};
use mesh::{
    bus::{Message, SharedBus, StreamSpec, nats::NatsBus, sqlite::SqliteBus},
    clock::Clock,
    identity::Minter,
    lifecycle::Lifecycle,
};
use proto::{BuyerId, OrderId, RequestId, SaleId};
use sea_orm::{ConnectionTrait, DatabaseConnection, TransactionTrait};
use stock_svc::{
    domain::{
        permits::{Acquire, Facts, Opening},
        sale::Verb,
    },
    permits::{SharedPermits, memory::Memory, redis::Redis},
};
use tokio::time::Instant;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::{
    load::{Load, Outcome, Pace, Visit, run},
    site::{BUYER, Servers, bearer, free_address, minter},
    wire::{Connection, Request},
};

/// As an answer to an order has it, in size.
const ANSWER: &[u8] = br#"{"name":"orders/0123456789abcdef0123456789abcdef","sale":"sales/spring","buyer":"buyer-1","quantity":"1","amount":{"currencyCode":"EUR","units":"19","nanos":990000000},"state":"PLACED","createTime":"2026-01-01T00:00:00.000Z","expireTime":"2026-01-01T00:15:00.000Z","etag":"0"}"#;
const ORDER: &str = r#"{"sale":"spring","quantity":1}"#;

/// Calls in flight towards a backend.
const IN_FLIGHT: usize = 256;
/// Orders in one transaction of the batched ceiling.
const BATCH: usize = 512;
/// How long each backend's ceiling is measured.
const LENGTH: Duration = Duration::from_secs(4);

/// One ceiling.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Ceiling {
    /// Of what.
    pub name: &'static str,
    /// A second.
    pub rate: f64,
}

/// Serves the echoes until the process is told to stop: HTTP on the stack the gateway's door uses, and a bare tonic
/// service (health) beside it. In a process of their own, as the mesh is.
pub async fn serve_echo(listen: std::net::SocketAddr) -> Result<()> {
    let life = Lifecycle::new();
    let listener = mesh::serve::bind(listen).await?;
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_service_status("", tonic_health::ServingStatus::Serving).await;
    let rpcs = tonic::service::Routes::new(health);
    let service = tower::service_fn(move |request: http::Request<hyper::body::Incoming>| {
        let rpcs = rpcs.clone();
        async move {
            let is_rpc = request.headers().get(http::header::CONTENT_TYPE).is_some_and(|v| v == "application/grpc");
            let answer = if is_rpc {
                use tower::ServiceExt;
                rpcs.oneshot(request.map(tonic::body::Body::new)).await?
            } else {
                let asked = request.into_body().collect().await;
                let status = if asked.is_ok() { http::StatusCode::ACCEPTED } else { http::StatusCode::BAD_REQUEST };
                let mut answer = http::Response::new(tonic::body::Body::new(Full::new(Bytes::from_static(ANSWER))));
                *answer.status_mut() = status;
                answer
            };
            Ok::<_, std::convert::Infallible>(answer)
        }
    });
    mesh::serve::serve("echo", listener, service, &life);
    life.failed().await;
    Ok(())
}

/// Asks for the very thing that the mesh is asked for, with a token of its own for every visitor: what the load spends
/// on a request, and what the stack spends on reading one, is the same on both sides of a ratio.
struct HttpEcho(Minter);

impl Visit for HttpEcho {
    async fn visit(&self, connection: &mut Connection, n: u64) -> io::Result<Outcome> {
        let token = bearer(&self.0, &format!("buyer-{n}"), BUYER).map_err(io::Error::other)?;
        let key = uuid::Uuid::now_v7().to_string();
        let request = Request { method: "POST", path: "/v1/orders", authorization: &token, key: &key, body: ORDER };
        let answer = connection.call(&request).await?;
        Ok(if answer.status == 202 { Outcome::Good } else { Outcome::Refused(answer.reason()) })
    }
}

/// The echoes, served by a process of their own for as long as this is kept.
#[derive(Debug)]
pub struct Echo {
    address: std::net::SocketAddr,
    /// Killed with it.
    _server: tokio::process::Child,
}

impl Echo {
    /// Starts them.
    pub async fn start() -> Result<Self> {
        let address = free_address()?;
        let program = std::env::current_exe().context("finding this program")?;
        let server = tokio::process::Command::new(program)
            .args(["echo", "--listen", &address.to_string()])
            .kill_on_drop(true)
            .spawn()
            .context("starting the echo")?;
        while tokio::net::TcpStream::connect(address).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(Self { address, _server: server })
    }

    /// HTTP echoes a second, on so many connections. Cheap enough to be repeated before what it is a ceiling of: a
    /// machine is not as fast at one minute as at another.
    pub async fn http(&self, connections: usize, length: Duration) -> Result<f64> {
        let load = Load { pace: Pace::Saturating, connections, warm_up: Duration::from_secs(1), length };
        Ok(run(load, self.address, 0, Arc::new(HttpEcho(minter()?))).await.rate())
    }

    /// Unary calls a second on four connections.
    pub async fn grpc(&self, length: Duration) -> Result<f64> {
        let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", self.address))?;
        let channels: Vec<_> = (0..4).map(|_| endpoint.connect_lazy()).collect();
        saturate(length, move |n| {
            let mut client = HealthClient::new(channels[n % 4].clone());
            async move { Ok(client.check(HealthCheckRequest::default()).await.map(|_| ())?) }
        })
        .await
    }
}

/// Calls a second with [`IN_FLIGHT`] of them at any time.
pub async fn saturate<F>(length: Duration, call: impl Fn(usize) -> F) -> Result<f64>
where
    F: Future<Output = Result<()>>,
{
    let begun = Instant::now();
    let calls = stream::iter(0..).take_while(|_| ready(begun.elapsed() < length)).map(call);
    let done = calls.buffer_unordered(IN_FLIGHT).try_fold(0u64, |done, ()| ready(Ok(done + 1))).await?;
    Ok(done as f64 / begun.elapsed().as_secs_f64())
}

/// The ceilings of the embedded backends.
pub async fn embedded(dir: &Path) -> Result<Vec<Ceiling>> {
    let life = Lifecycle::new();
    let bus = SqliteBus::open(&dir.join("ceiling-bus.db"), Clock::system(), life.tasks()).await?;
    let db = mesh::sql::connect(&format!("sqlite://{}", dir.join("ceiling.db").display())).await?;
    let ceilings = vec![
        Ceiling { name: "permit in process, one a call", rate: permits(Arc::new(Memory::new())).await? },
        Ceiling { name: "SQLite stream, publish acknowledged", rate: publishes(Arc::new(bus)).await? },
        Ceiling { name: "SQLite, a transaction an order", rate: single(&db).await? },
        Ceiling { name: "SQLite, 512 orders a transaction", rate: batched(&db).await? },
    ];
    life.kill();
    Ok(ceilings)
}

/// The ceilings of the real servers.
pub async fn real(servers: &Servers) -> Result<Vec<Ceiling>> {
    let missing = "real backends need --postgres, --redis and --nats";
    let life = Lifecycle::new();
    let redis = Redis::connect(servers.redis.as_ref().context(missing)?).await?;
    let bus = NatsBus::connect(servers.nats.as_ref().context(missing)?, life.tasks()).await?;
    let base = servers.postgres.as_ref().context(missing)?;
    let admin = mesh::sql::connect(base).await?;
    let name = format!("ceiling_{}", uuid::Uuid::new_v4().simple());
    admin.execute_unprepared(&format!("CREATE DATABASE {name}")).await?;
    let db = mesh::sql::connect(&mesh::sql::with_database(base, &name)).await?;
    let ceilings = vec![
        Ceiling { name: "Redis, EVALSHA of the permit script, one a call", rate: permits(Arc::new(redis)).await? },
        Ceiling { name: "JetStream, publish acknowledged", rate: publishes(Arc::new(bus)).await? },
        Ceiling { name: "PostgreSQL, a transaction an order", rate: single(&db).await? },
        Ceiling { name: "PostgreSQL, 512 orders a transaction", rate: batched(&db).await? },
    ];
    db.close().await?;
    admin.execute_unprepared(&format!("DROP DATABASE {name}")).await?;
    life.kill();
    Ok(ceilings)
}

async fn permits(permits: SharedPermits) -> Result<f64> {
    let sale = SaleId::parse("sale", "ceiling")?;
    let many = i64::from(u32::MAX);
    let facts = Facts { version: 1, verb: Verb::Open, start_at: 0, end_at: i64::MAX, limit: 1, total: many, sold: 0 };
    permits.claim(&sale, 1, &facts, &permits.fingerprint().await?).await?;
    permits.open(&sale, &Opening { epoch: 1, available: many, snapshot_seq: 0, facts }).await?;
    let (permits, sale) = (&permits, &sale);
    saturate(LENGTH, |n| async move {
        let buyer = BuyerId::parse(&format!("buyer-{n}"))?;
        let hold = OrderId::derive(&buyer, &RequestId::random());
        permits.acquire(sale, 1, vec![Acquire { hold, buyer, quantity: 1 }]).await?;
        Ok(())
    })
    .await
}

async fn publishes(bus: SharedBus) -> Result<f64> {
    const STREAM: &str = "CEILING";
    let spec = StreamSpec { name: STREAM, subjects: vec!["ceiling.>"], max_age: Duration::from_secs(3600) };
    bus.ensure_stream(&spec).await?;
    let bus = &bus;
    saturate(LENGTH, |_| async move {
        let message = Message {
            subject: "ceiling.order".to_owned(),
            id: uuid::Uuid::now_v7().to_string(),
            headers: Default::default(),
            payload: Bytes::from_static(ANSWER),
        };
        for result in bus.publish(STREAM, vec![message]).await {
            result?;
        }
        Ok(())
    })
    .await
}

/// Order, hold and hot row, the least that any design writes.
async fn tables(db: &DatabaseConnection) -> Result<()> {
    for statement in [
        "DROP TABLE IF EXISTS ceiling_order",
        "DROP TABLE IF EXISTS ceiling_hold",
        "DROP TABLE IF EXISTS ceiling_sale",
        "CREATE TABLE ceiling_order (id VARCHAR(36) PRIMARY KEY, buyer VARCHAR(64) NOT NULL, state INTEGER NOT NULL)",
        "CREATE TABLE ceiling_hold (id VARCHAR(36) PRIMARY KEY, quantity BIGINT NOT NULL, state INTEGER NOT NULL)",
        "CREATE TABLE ceiling_sale (id INTEGER PRIMARY KEY, available BIGINT NOT NULL, held BIGINT NOT NULL)",
        "INSERT INTO ceiling_sale VALUES (1, 1000000000, 0)",
    ] {
        db.execute_unprepared(statement).await?;
    }
    Ok(())
}

async fn orders(db: &DatabaseConnection, count: usize) -> Result<()> {
    let ids: Vec<String> = (0..count).map(|_| uuid::Uuid::now_v7().to_string()).collect();
    let rows = |row: &dyn Fn(&String) -> String| ids.iter().map(row).collect::<Vec<_>>().join(",");
    let tx = db.begin().await?;
    let order = rows(&|id| format!("('{id}','buyer-{id}',1)"));
    tx.execute_unprepared(&format!("INSERT INTO ceiling_order VALUES {order}")).await?;
    let hold = rows(&|id| format!("('{id}',1,1)"));
    tx.execute_unprepared(&format!("INSERT INTO ceiling_hold VALUES {hold}")).await?;
    let taken = format!("UPDATE ceiling_sale SET available = available - {count}, held = held + {count} WHERE id = 1");
    tx.execute_unprepared(&taken).await?;
    tx.commit().await?;
    Ok(())
}

async fn single(db: &DatabaseConnection) -> Result<f64> {
    tables(db).await?;
    saturate(LENGTH, |_| orders(db, 1)).await
}

async fn batched(db: &DatabaseConnection) -> Result<f64> {
    tables(db).await?;
    let begun = Instant::now();
    let mut done = 0;
    while begun.elapsed() < LENGTH {
        orders(db, BATCH).await?;
        done += BATCH;
    }
    Ok(done as f64 / begun.elapsed().as_secs_f64())
}
