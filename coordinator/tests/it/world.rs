//! A coordinator among fake services, on a real store and a real embedded bus, in a runtime of its own: so that it can
//! be killed like a process, wherever it stands, and started again on what it left.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use coordinator::{Backends, Config, store::sql::SqlStore};
use mesh::{
    bus::{
        self, Bus, Consumer, ConsumerSpec, DeadLetter, Delivery, Message, Progress, Published, Settlement, SharedBus,
        StreamSpec, sqlite::SqliteBus,
    },
    clock::Clock,
    layers::{ClientConfig, ServerConfig},
    lifecycle::Lifecycle,
    link::Link,
    testing::{TestDatabase, eventually},
};
use proto::{
    BuyerId, Error, OrderId, RequestId,
    internal::{
        AcceptOrder, AcceptOrdersRequest, CancelOrderItem, CancelOrdersRequest, OrderResult, PayOrderItem,
        PayOrdersRequest, coordinator_client::CoordinatorClient, order_records_server::OrderRecordsServer,
        order_result, payments_server::PaymentsServer, stock_server::StockServer,
    },
    subjects,
    v1::{self, Order, OrderState},
};
use sea_orm::ConnectionTrait;
use tokio::{runtime::Runtime, sync::broadcast};
use tokio_util::task::TaskTracker;

use crate::fakes::{Fakes, Gate, Sale, When};

pub const SALE: &str = "spring";

/// What becomes of a publish to ORDERS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Publish {
    Works = 0,
    /// Stored, but nobody is told.
    Forgets = 1,
    /// Neither.
    Fails = 2,
    /// Stored again, though it is there: the window in which duplicates are found has passed.
    Repeats = 3,
}

/// The bus, with faults to be switched on.
#[derive(Debug)]
pub struct FaultyBus {
    inner: SharedBus,
    publish: AtomicU8,
    lanes_away: AtomicBool,
    gate: std::sync::OnceLock<Arc<Gate>>,
}

impl FaultyBus {
    pub fn publishing(&self, publish: Publish) {
        self.publish.store(publish as u8, Ordering::SeqCst);
    }

    pub fn take_lanes_away(&self) {
        self.lanes_away.store(true, Ordering::SeqCst);
    }

    async fn pass(&self, call: &'static str, when: When) {
        if let Some(gate) = self.gate.get() {
            gate.pass(call, when).await;
        }
    }
}

fn no_answer() -> bus::Error {
    bus::Error::Unavailable { operation: "publish", source: "switched off by the test".into() }
}

#[async_trait]
impl Bus for FaultyBus {
    async fn ensure_stream(&self, spec: &StreamSpec) -> Result<(), bus::Error> {
        self.inner.ensure_stream(spec).await
    }

    async fn publish(&self, stream: &'static str, mut messages: Vec<Message>) -> Vec<Result<Published, bus::Error>> {
        let count = messages.len();
        let fault = if stream == subjects::ORDERS { self.publish.load(Ordering::SeqCst) } else { 0 };
        if fault == Publish::Fails as u8 {
            return (0..count).map(|_| Err(no_answer())).collect();
        }
        if fault == Publish::Repeats as u8 {
            messages.iter_mut().for_each(|message| message.id = RequestId::random().to_string());
        }
        let call = match stream {
            subjects::ORDERS => "publish",
            subjects::EVENTS => "announce",
            _ => "",
        };
        self.pass(call, When::Before).await;
        let published = self.inner.publish(stream, messages).await;
        self.pass(call, When::After).await;
        if fault == Publish::Forgets as u8 { (0..count).map(|_| Err(no_answer())).collect() } else { published }
    }

    async fn consumer(&self, spec: ConsumerSpec) -> Result<Arc<dyn Consumer>, bus::Error> {
        if self.lanes_away.load(Ordering::SeqCst) && spec.name.starts_with("lane-") {
            return Ok(Arc::new(Silent));
        }
        self.inner.consumer(spec).await
    }

    async fn consumers(&self, stream: &'static str) -> Result<Vec<String>, bus::Error> {
        self.inner.consumers(stream).await
    }

    async fn progress(&self, stream: &'static str, consumer: &str) -> Result<Option<Progress>, bus::Error> {
        self.inner.progress(stream, consumer).await
    }

    async fn last_sequence(&self, stream: &'static str) -> Result<u64, bus::Error> {
        self.inner.last_sequence(stream).await
    }

    async fn read(&self, stream: &'static str, sequence: u64) -> Result<Option<Message>, bus::Error> {
        self.inner.read(stream, sequence).await
    }

    async fn dead_letters(&self, after: Option<&str>, limit: usize) -> Result<Vec<DeadLetter>, bus::Error> {
        self.inner.dead_letters(after, limit).await
    }

    async fn redrive(&self, id: &str) -> Result<Option<DeadLetter>, bus::Error> {
        self.inner.redrive(id).await
    }

    async fn signal(&self, subject: &'static str, payload: Bytes) -> Result<(), bus::Error> {
        self.inner.signal(subject, payload).await
    }

    async fn listen(&self, subject: &'static str) -> Result<broadcast::Receiver<Bytes>, bus::Error> {
        self.inner.listen(subject).await
    }
}

/// A consumer that never hears anything.
#[derive(Debug)]
struct Silent;

#[async_trait]
impl Consumer for Silent {
    async fn fetch(&self, _: usize, wait: Duration) -> Result<Vec<Delivery>, bus::Error> {
        tokio::time::sleep(wait).await;
        Ok(Vec::new())
    }

    async fn settle(&self, _: Vec<(Delivery, Settlement)>) -> Result<(), bus::Error> {
        Ok(())
    }
}

/// Quick in everything, so that tests are.
pub fn config() -> Config {
    Config {
        ack_wait_ms: 400,
        lane_refresh_ms: 100,
        deadline_sweep_ms: 50,
        deadline_grace_ms: 100,
        charge_timeout_ms: 300,
        settle_grace_ms: 100,
        saga_recovery_ms: 50,
        saga_lease_ms: 300,
        saga_retry_ms: 20,
        saga_retry_cap_ms: 100,
        funnel_retry_ms: 20,
        ..Config::default()
    }
}

pub struct World {
    pub fakes: Fakes,
    pub bus: Arc<FaultyBus>,
    pub clock: Clock,
    pub config: Config,
    db: TestDatabase,
    /// For looking at the tables.
    store: coordinator::store::SharedStore,
    running: Option<(Runtime, Lifecycle, CoordinatorClient<Link>)>,
}

impl Drop for World {
    fn drop(&mut self) {
        self.kill();
    }
}

impl World {
    /// A sale of ten units, one each, a minute to pay; the coordinator runs.
    pub async fn new() -> Self {
        Self::with(config()).await
    }

    pub async fn with(config: Config) -> Self {
        let mut world = Self::stopped(config).await;
        world.start().await;
        world
    }

    pub async fn stopped(config: Config) -> Self {
        let clock = Clock::system();
        let inner = SqliteBus::in_memory(clock.clone(), &TaskTracker::new()).await.unwrap();
        let bus = Arc::new(FaultyBus {
            inner: Arc::new(inner),
            publish: AtomicU8::new(0),
            lanes_away: AtomicBool::new(false),
            gate: Default::default(),
        });
        let fakes = Fakes::new(bus.inner.clone(), clock.clone());
        bus.gate.set(fakes.gate.clone()).unwrap();
        let db = mesh::testing::sqlite().await;
        migrations::up(migrations::Service::Coordinator, &db.connection).await.unwrap();
        let store = Arc::new(SqlStore::new(db.connection.clone()));
        let world = Self { fakes, bus, clock, config, db, store, running: None };
        world.sale(10, 1, 60_000);
        world
    }

    pub fn sale(&self, free: i64, limit: i64, window_ms: i64) {
        self.fakes.state().sales.insert(SALE.to_owned(), Sale { free, limit, window_ms, epoch: 1 });
    }

    /// Starts a coordinator, as a new process would: its own runtime, its own connections.
    pub async fn start(&mut self) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let (url, config, clock) = (self.db.url.clone(), self.config.clone(), self.clock.clone());
        let (fakes, bus) = (self.fakes.clone(), self.bus.clone());
        let life = Lifecycle::new();
        let living = life.clone();
        let client = runtime.spawn(async move {
            // Wait for a killed predecessor's connection to let go.
            let db = mesh::sql::connect(&url).await.unwrap();
            db.execute_unprepared("PRAGMA busy_timeout = 20000").await.unwrap();
            let backends = Backends {
                store: Arc::new(SqlStore::new(db)),
                bus,
                clock,
                stock: link(StockServer::new(fakes.clone())),
                order: link(OrderRecordsServer::new(fakes.clone())),
                payment: link(PaymentsServer::new(fakes)),
            };
            let routes = coordinator::start(config, backends, &living).await.unwrap();
            CoordinatorClient::new(link(routes.prepare()))
        });
        let client = client.await.unwrap();
        self.running = Some((runtime, life, client));
    }

    /// Ends the coordinator where it stands.
    pub fn kill(&mut self) {
        if let Some((runtime, ..)) = self.running.take() {
            runtime.shutdown_background();
        }
    }

    /// Ends the coordinator as SIGTERM does. Whether every task ended in time.
    pub async fn stop(&mut self) -> bool {
        let (runtime, life, client) = self.running.take().expect("the coordinator runs");
        drop(client);
        let in_time = life.stop(Duration::from_secs(5)).await;
        runtime.shutdown_background();
        in_time
    }

    pub async fn restart(&mut self) {
        self.kill();
        self.fakes.gate.disarm();
        self.start().await;
    }

    pub fn client(&self) -> CoordinatorClient<Link> {
        self.running.as_ref().expect("the coordinator runs").2.clone()
    }

    pub async fn accept(&self, buyer: &str, quantity: i64, request: &RequestId) -> Result<Order, Error> {
        self.accept_of(SALE, buyer, quantity, request).await
    }

    pub async fn accept_of(&self, sale: &str, buyer: &str, quantity: i64, request: &RequestId) -> Result<Order, Error> {
        let item = AcceptOrder {
            sale_id: sale.to_owned(),
            buyer: buyer.to_owned(),
            quantity,
            request_id: request.to_string(),
            traceparent: String::new(),
        };
        let answer = self.client().accept_orders(AcceptOrdersRequest { items: vec![item] }).await?;
        only(answer.into_inner().results)
    }

    /// A new order, held.
    pub async fn hold(&self, buyer: &str) -> OrderId {
        let request = RequestId::random();
        self.accept(buyer, 1, &request).await.unwrap();
        let id = order_id(buyer, &request);
        self.until(id, "AWAITING_PAYMENT").await;
        id
    }

    pub async fn pay(&self, buyer: &str, order: OrderId, method: &str) -> Result<Order, Error> {
        self.pay_as(buyer, order, method, &RequestId::random()).await
    }

    pub async fn pay_as(&self, buyer: &str, order: OrderId, method: &str, request: &RequestId) -> Result<Order, Error> {
        let item = PayOrderItem {
            order_id: order.to_string(),
            buyer: buyer.to_owned(),
            payment_method: method.to_owned(),
            request_id: request.to_string(),
            traceparent: String::new(),
        };
        let answer = self.client().pay_orders(PayOrdersRequest { items: vec![item] }).await?;
        only(answer.into_inner().results)
    }

    pub async fn cancel(&self, buyer: &str, order: OrderId) -> Result<Order, Error> {
        let item = CancelOrderItem { order_id: order.to_string(), buyer: buyer.to_owned(), traceparent: String::new() };
        let answer = self.client().cancel_orders(CancelOrdersRequest { items: vec![item] }).await?;
        only(answer.into_inner().results)
    }

    pub async fn saga(&self, id: OrderId) -> Option<v1::Saga> {
        self.client().get_saga(v1::GetSagaRequest { saga: id.to_string() }).await.ok().map(|s| s.into_inner())
    }

    /// The saga's row, also while no coordinator runs.
    pub async fn row(&self, id: OrderId) -> Option<coordinator::store::Row> {
        self.store.load(&[id]).await.unwrap().remove(&id)
    }

    /// Waits until the saga is in one of these states, separated by `|`.
    pub async fn until(&self, id: OrderId, states: &str) -> v1::Saga {
        let what = format!("saga {id} in {states}, it is {:?}", self.row(id).await.map(|r| r.state));
        eventually(&what, async || {
            let row = self.row(id).await?;
            if states.split('|').any(|state| state == row.state) { self.saga(id).await } else { None }
        })
        .await
    }

    /// Waits until the order's record says so too.
    pub async fn until_record(&self, id: OrderId, state: OrderState) {
        eventually(&format!("record {id} in {state:?}"), async || (self.record(id) == Some(state)).then_some(())).await;
    }

    pub fn record(&self, id: OrderId) -> Option<OrderState> {
        self.fakes.state().records.get(&id.to_string()).map(|record| record.state)
    }

    /// Free, granted, locked, sold.
    pub fn units(&self) -> (i64, i64, i64, i64) {
        self.fakes.state().units(SALE)
    }

    pub fn captures(&self, id: OrderId) -> u32 {
        self.fakes.state().captures.get(&id.to_string()).copied().unwrap_or(0)
    }

    pub fn refunds(&self, id: OrderId) -> u32 {
        self.fakes.state().refunds.get(&id.to_string()).copied().unwrap_or(0)
    }
}

fn link<S>(server: S) -> Link
where
    S: tower::Service<
            http::Request<tonic::body::Body>,
            Response = http::Response<tonic::body::Body>,
            Error = std::convert::Infallible,
        > + Clone
        + Send
        + Sync
        + 'static,
    S::Future: Send + 'static,
{
    // One attempt: a test that switches something off wants to see it.
    let config = ClientConfig { timeout: Duration::from_secs(20), attempts: 1 };
    Link::local(mesh::layers::server(server, ServerConfig::default()), config)
}

pub fn order_id(buyer: &str, request: &RequestId) -> OrderId {
    OrderId::derive(&BuyerId::parse(buyer).unwrap(), request)
}

fn only(mut results: Vec<OrderResult>) -> Result<Order, Error> {
    match results.pop().expect("one result").result.expect("not empty") {
        order_result::Result::Order(order) => Ok(order),
        order_result::Result::Refused(refusal) => Err(refusal.into()),
    }
}
