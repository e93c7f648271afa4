//! A coordinator among fake services, on a real store and a real embedded bus, in a runtime of its own: so that it can
//! be killed like a process, wherever it stands, and started again on what it left. Or, where time must stand still, in
//! the test's own runtime, on a store and a bus in memory and on ports that a proof has made faulty.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use coordinator::{
    Backends, Config, Plans,
    store::{SharedStore, sql::SqlStore},
};
use mesh::{
    bus::{
        self, Bus, Consumer, ConsumerSpec, DeadLetter, Delivery, Message, Progress, Published, Settlement, SharedBus,
        StreamSpec, memory::MemoryBus, sqlite::SqliteBus,
    },
    clock::Clock,
    layers::{ClientConfig, ServerConfig},
    lifecycle::Lifecycle,
    link::Link,
    testing::{TestDatabase, at_once, eventually},
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

use crate::{
    fakes::{Fakes, Gate, Sale, When},
    proof::faults::Faults,
};

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
    /// Those of the coordinator that opens consumers now.
    faults: Mutex<Option<Faults>>,
}

impl FaultyBus {
    fn on(inner: SharedBus) -> Arc<Self> {
        Arc::new(Self {
            inner,
            publish: AtomicU8::new(0),
            lanes_away: AtomicBool::new(false),
            gate: Default::default(),
            faults: Mutex::default(),
        })
    }

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
        let name = spec.name.clone();
        let consumer = self.inner.consumer(spec).await?;
        let faults = self.faults.lock().unwrap().clone();
        Ok(faults.map_or(consumer.clone(), |faults| faults.consumer(&name, consumer)))
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
    /// For looking at the tables.
    pub store: SharedStore,
    /// None where it is in memory.
    db: Option<TestDatabase>,
    running: Option<Running>,
}

/// A coordinator.
struct Running {
    /// Where it does not run in the test's own.
    runtime: Option<Runtime>,
    life: Lifecycle,
    door: Door,
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
        let bus = SqliteBus::in_memory(clock.clone(), &TaskTracker::new()).await.unwrap();
        let db = mesh::testing::sqlite().await;
        migrations::up(migrations::Service::Coordinator, &db.connection).await.unwrap();
        let store = Arc::new(SqlStore::new(db.connection.clone()));
        Self::on(config, clock, Arc::new(bus), store, Some(db))
    }

    /// On tokio's time, which may be paused; nothing runs yet.
    pub fn on_paused_time(config: Config) -> Self {
        let clock = Clock::tokio();
        let bus = MemoryBus::new(clock.clone());
        let db = at_once(async {
            let db = mesh::sql::connect("sqlite::memory:").await.unwrap();
            migrations::up(migrations::Service::Coordinator, &db).await.unwrap();
            db
        });
        let store = Faults::none().store(Arc::new(SqlStore::new(db)));
        Self::on(config, clock, Arc::new(bus), store, None)
    }

    fn on(config: Config, clock: Clock, bus: SharedBus, store: SharedStore, db: Option<TestDatabase>) -> Self {
        let fakes = Fakes::new(bus.clone(), clock.clone());
        let bus = FaultyBus::on(bus);
        bus.gate.set(fakes.gate.clone()).unwrap();
        let world = Self { fakes, bus, clock, config, store, db, running: None };
        world.sale(10, 1, 60_000);
        world
    }

    pub fn sale(&self, free: i64, limit: i64, window_ms: i64) {
        self.fakes.state().sales.insert(SALE.to_owned(), Sale { free, limit, window_ms, epoch: 1 });
    }

    fn backends(&self, store: SharedStore, faults: &Faults) -> Backends {
        Backends {
            store,
            bus: self.bus.clone(),
            clock: self.clock.clone(),
            stock: link(faults.server(StockServer::new(self.fakes.clone()))),
            order: link(faults.server(OrderRecordsServer::new(self.fakes.clone()))),
            payment: link(faults.server(PaymentsServer::new(self.fakes.clone()))),
        }
    }

    /// Starts a coordinator, as a new process would: its own runtime, its own connections.
    pub async fn start(&mut self) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let url = self.db.as_ref().expect("a database in a file").url.clone();
        let (config, life) = (self.config.clone(), Lifecycle::new());
        let (backends, living) = (self.backends(self.store.clone(), &Faults::none()), life.clone());
        let door = runtime.spawn(async move {
            // Wait for a killed predecessor's connection to let go.
            let db = mesh::sql::connect(&url).await.unwrap();
            db.execute_unprepared("PRAGMA busy_timeout = 20000").await.unwrap();
            let backends = Backends { store: Arc::new(SqlStore::new(db)), ..backends };
            Door::to(coordinator::start(config, backends, &living).await.unwrap())
        });
        let door = door.await.unwrap();
        self.running = Some(Running { runtime: Some(runtime), life, door });
    }

    /// Starts a coordinator in this runtime, with these faults. One that runs already stays as it is, and is not asked
    /// any more.
    pub async fn start_here(&mut self, faults: &Faults) {
        *self.bus.faults.lock().unwrap() = Some(faults.clone());
        let backends = self.backends(faults.store(self.store.clone()), faults);
        let Plans { orders, refunds } = Plans::new(&self.config);
        let plans = Plans { orders: faults.plan(orders), refunds: faults.plan(refunds) };
        let life = Lifecycle::new();
        let routes = coordinator::start_with(plans, self.config.clone(), backends, &life).await.unwrap();
        self.running = Some(Running { runtime: None, life, door: Door::to(routes) });
    }

    /// Ends the coordinator where it stands.
    pub fn kill(&mut self) {
        if let Some(runtime) = self.running.take().and_then(|running| running.runtime) {
            runtime.shutdown_background();
        }
    }

    /// Ends the coordinator as SIGTERM does. Whether every task ended in time.
    pub async fn stop(&mut self) -> bool {
        let Running { runtime, life, door } = self.running.take().expect("the coordinator runs");
        drop(door);
        let in_time = life.stop(Duration::from_secs(5)).await;
        runtime.into_iter().for_each(Runtime::shutdown_background);
        in_time
    }

    pub async fn restart(&mut self) {
        self.kill();
        self.fakes.gate.disarm();
        self.start().await;
    }

    pub fn door(&self) -> Door {
        self.running.as_ref().expect("the coordinator runs").door.clone()
    }

    pub fn client(&self) -> CoordinatorClient<Link> {
        self.door().0
    }

    pub async fn accept(&self, buyer: &str, quantity: i64, request: &RequestId) -> Result<Order, Error> {
        self.accept_of(SALE, buyer, quantity, request).await
    }

    pub async fn accept_of(&self, sale: &str, buyer: &str, quantity: i64, request: &RequestId) -> Result<Order, Error> {
        self.door().accept(sale, buyer, quantity, request).await
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
        self.door().pay(buyer, order, method, request).await
    }

    pub async fn cancel(&self, buyer: &str, order: OrderId) -> Result<Order, Error> {
        self.door().cancel(buyer, order).await
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

/// A coordinator as the gateway calls it. Cheap to clone.
#[derive(Clone)]
pub struct Door(CoordinatorClient<Link>);

impl Door {
    fn to(routes: tonic::service::Routes) -> Self {
        Self(CoordinatorClient::new(link(routes.prepare())))
    }

    pub async fn accept(mut self, sale: &str, buyer: &str, quantity: i64, request: &RequestId) -> Result<Order, Error> {
        let item = AcceptOrder {
            sale_id: sale.to_owned(),
            buyer: buyer.to_owned(),
            quantity,
            request_id: request.to_string(),
            traceparent: String::new(),
        };
        let answer = self.0.accept_orders(AcceptOrdersRequest { items: vec![item] }).await?;
        only(answer.into_inner().results)
    }

    pub async fn pay(mut self, buyer: &str, order: OrderId, method: &str, request: &RequestId) -> Result<Order, Error> {
        let item = PayOrderItem {
            order_id: order.to_string(),
            buyer: buyer.to_owned(),
            payment_method: method.to_owned(),
            request_id: request.to_string(),
            traceparent: String::new(),
        };
        let answer = self.0.pay_orders(PayOrdersRequest { items: vec![item] }).await?;
        only(answer.into_inner().results)
    }

    pub async fn cancel(mut self, buyer: &str, order: OrderId) -> Result<Order, Error> {
        let item = CancelOrderItem { order_id: order.to_string(), buyer: buyer.to_owned(), traceparent: String::new() };
        let answer = self.0.cancel_orders(CancelOrdersRequest { items: vec![item] }).await?;
        only(answer.into_inner().results)
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
