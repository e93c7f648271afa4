//! The service on real stores, permits and a bus of its own, and everything a test does to it.

use std::{sync::Arc, time::Duration};

use fred::interfaces::{ClientLike, KeysInterface};
use mesh::{
    bus::{Consumer, ConsumerSpec, Message, Settlement, SharedBus, sqlite::SqliteBus},
    clock::Clock,
    lifecycle::Lifecycle,
    testing::{TestDatabase, eventually},
};
use prost::Message as _;
use proto::{
    BuyerId, OrderId, Reason, RequestId, SaleId,
    internal::{
        AcquirePermit, AcquirePermitsRequest, DeductItem, DeductStockRequest, Grant, LockItem, LockStockRequest,
        OrderPlaced, ReleaseItem, ReleaseStockRequest, acquire_result, item_result, lock_result,
        stock_client::StockClient,
    },
    subjects, v1,
};
use sea_orm::DatabaseConnection;
use stock_svc::{
    Backends, Config,
    permits::{SharedPermits, memory::Memory, redis::Redis},
    store::{Standing, Store, sql::SqlStore},
};
use tonic::service::Routes;

pub type Client = StockClient<Routes>;

/// Where permits are kept, and how to lose them.
#[derive(Clone)]
enum Keeper {
    Memory(Arc<Memory>),
    Redis(Arc<Redis>, fred::clients::Client),
}

/// One service and what it stands on.
pub struct World {
    pub name: String,
    pub client: Client,
    pub bus: SharedBus,
    pub clock: Clock,
    pub config: Config,
    pub life: Lifecycle,
    database: TestDatabase,
    pub connection: DatabaseConnection,
    keeper: Keeper,
}

/// Quick to sweep and to take over.
pub fn impatient() -> Config {
    Config { grant_grace: Duration::from_millis(300), rebuild_takeover: Duration::from_secs(1), ..Config::default() }
}

/// A world on every database, with permits in memory and, where there is one, in Redis.
pub async fn worlds() -> Vec<World> {
    worlds_with(impatient(), Clock::system()).await
}

pub async fn worlds_with(config: Config, clock: Clock) -> Vec<World> {
    let mut worlds = Vec::new();
    for database in mesh::testing::databases().await {
        migrations::up(migrations::Service::Stock, &database.connection).await.expect("the schema is made");
        // One of each is enough: SQLite with memory as embedded, and every server with Redis.
        let keeper = match mesh::testing::server("SECKILL_TEST_REDIS_URL") {
            Some(url) if database.kind != "sqlite" => {
                let client = fred::types::Builder::from_config(fred::types::config::Config::from_url(&url).unwrap());
                let client = client.build().unwrap();
                client.init().await.expect("redis answers");
                Keeper::Redis(Arc::new(Redis::connect(&url).await.expect("redis answers")), client)
            }
            _ => Keeper::Memory(Arc::new(Memory::new())),
        };
        worlds.push(World::start(database, keeper, config.clone(), clock.clone()).await);
    }
    worlds
}

impl World {
    async fn start(database: TestDatabase, keeper: Keeper, config: Config, clock: Clock) -> Self {
        let life = Lifecycle::new();
        // A tracker of its own: the bus outlives the service.
        let bus = SqliteBus::in_memory(clock.clone(), Lifecycle::new().tasks()).await.expect("a bus");
        let bus: SharedBus = Arc::new(bus);
        let name = match &keeper {
            Keeper::Memory(_) => format!("{} and memory", database.kind),
            Keeper::Redis(..) => format!("{} and redis", database.kind),
        };
        let connection = database.connection.clone();
        let backends = backends(&connection, &keeper, &bus, &clock);
        let routes = stock_svc::start(config.clone(), backends, &life).await.expect("the service starts");
        Self { name, client: StockClient::new(routes), bus, clock, config, life, database, connection, keeper }
    }

    /// Kills the service where it stands and starts another on the same store. Permits in memory die with it.
    pub async fn restart(&mut self) {
        self.life.kill();
        if let Keeper::Memory(_) = self.keeper {
            self.keeper = Keeper::Memory(Arc::new(Memory::new()));
        }
        (self.client, self.life) = self.another().await;
    }

    /// A further process on the same store, permits and bus.
    pub async fn another(&self) -> (Client, Lifecycle) {
        let life = Lifecycle::new();
        let backends = backends(&self.connection, &self.keeper, &self.bus, &self.clock);
        let routes = stock_svc::start(self.config.clone(), backends, &life).await.expect("the service starts");
        (StockClient::new(routes), life)
    }

    pub fn permits(&self) -> SharedPermits {
        match &self.keeper {
            Keeper::Memory(memory) => memory.clone(),
            Keeper::Redis(redis, _) => redis.clone(),
        }
    }

    pub fn store(&self) -> SqlStore {
        SqlStore::new(self.connection.clone())
    }

    /// Loses a sale's permits.
    pub async fn lose_permits(&self, sale: &SaleId) {
        match &self.keeper {
            Keeper::Memory(memory) => memory.wipe(sale),
            Keeper::Redis(_, client) => {
                let keys = ["permits", "grants", "done", "buyers", "pending"].map(|key| format!("{{{sale}}}:{key}"));
                let _: i64 = client.del(keys.to_vec()).await.unwrap();
            }
        }
    }

    /// A running sale.
    pub async fn sale(&self, stock: i64, limit: i64) -> SaleId {
        self.create(v1::CreateSaleRequest { per_buyer_limit: limit, ..create_request(stock) }).await
    }

    pub async fn create(&self, request: v1::CreateSaleRequest) -> SaleId {
        let sale = self.client.clone().create_sale(request).await.expect("the sale is created").into_inner();
        SaleId::parse("sale", &sale.name).unwrap()
    }

    pub async fn standing(&self, sale: &SaleId) -> Standing {
        self.store().standing(sale).await.unwrap()
    }

    /// Waits for a rebuild that was to come.
    pub async fn permits_are_back(&self, sale: &SaleId) {
        eventually("the permits are back", async || {
            (self.report(sale).await.state() == v1::PermitState::Open).then_some(())
        })
        .await;
    }

    pub async fn report(&self, sale: &SaleId) -> v1::StockReport {
        self.client.clone().get_stock(v1::GetStockRequest { sale: sale.to_string() }).await.unwrap().into_inner()
    }

    /// Waits until nothing is on its way: open, an empty outbox, R = A.
    pub async fn at_rest(&self, sale: &SaleId) -> v1::StockReport {
        eventually(&format!("R = A on {}", self.name), async || {
            let report = self.report(sale).await;
            let is_open = report.state() == v1::PermitState::Open && report.unpersisted_grants == 0;
            let settled = report.permits == report.available && self.standing(sale).await.outbox_is_empty;
            (is_open && settled).then_some(report)
        })
        .await
    }

    /// What step 3 of an order does: the coordinator's consumer, as far as stock is concerned.
    pub async fn funnel(&self) -> Funnel {
        let spec = ConsumerSpec {
            stream: subjects::ORDERS,
            name: subjects::FUNNEL.to_owned(),
            filter: subjects::ORDERS_PLACED_ALL.to_owned(),
            ack_wait: Duration::from_secs(5),
            max_attempts: None,
            max_pending: 10_000,
        };
        Funnel { consumer: self.bus.consumer(spec).await.unwrap(), client: self.client.clone() }
    }

    /// Acquires and publishes, as accepting an order does. None when it was refused.
    pub async fn place(&self, wanted: &Wanted) -> Option<Grant> {
        let Got::Granted(grant) = acquire(&self.client, wanted).await else { return None };
        self.publish(wanted, &grant).await;
        Some(grant)
    }

    /// Puts a granted order in the stream.
    pub async fn publish(&self, wanted: &Wanted, grant: &Grant) {
        let order = OrderPlaced {
            order_id: wanted.hold.to_string(),
            sale_id: wanted.sale.to_string(),
            buyer: wanted.buyer.to_string(),
            quantity: wanted.quantity,
            amount: grant.amount.clone(),
            grant_epoch: grant.epoch,
            create_at_ms: grant.granted_at_ms,
            expire_at_ms: grant.granted_at_ms + grant.payment_window_ms,
        };
        let message = Message {
            subject: subjects::orders_placed(Duration::from_millis(grant.payment_window_ms.unsigned_abs())),
            id: order.order_id.clone(),
            headers: Default::default(),
            payload: order.encode_to_vec().into(),
        };
        self.bus.publish(subjects::ORDERS, vec![message]).await.remove(0).unwrap();
    }

    /// Closes the database under the service.
    pub async fn lose_database(&self) {
        self.connection.clone().close().await.unwrap();
    }

    /// Finds it again; the service does at its next [`World::restart`].
    pub async fn find_database(&mut self) {
        self.connection = mesh::sql::connect(&self.database.url).await.unwrap();
    }
}

impl Drop for World {
    /// Its loops end with it, and do not run beside the next world's.
    fn drop(&mut self) {
        self.life.kill();
    }
}

fn backends(db: &DatabaseConnection, keeper: &Keeper, bus: &SharedBus, clock: &Clock) -> Backends {
    let permits: SharedPermits = match keeper {
        Keeper::Memory(memory) => memory.clone(),
        Keeper::Redis(redis, _) => redis.clone(),
    };
    Backends { store: Arc::new(SqlStore::new(db.clone())), permits, bus: bus.clone(), clock: clock.clone() }
}

pub fn create_request(stock: i64) -> v1::CreateSaleRequest {
    v1::CreateSaleRequest {
        request_id: RequestId::random().to_string(),
        title: "A thing".to_owned(),
        price: Some(proto::WireMoney { currency_code: "EUR".to_owned(), units: 19, nanos: 990_000_000 }),
        stock,
        ..Default::default()
    }
}

/// What one buyer wants by one request.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub hold: OrderId,
    pub sale: SaleId,
    pub buyer: BuyerId,
    pub quantity: i64,
}

pub fn wanted(sale: &SaleId, buyer: &str, quantity: i64) -> Wanted {
    let buyer = BuyerId::parse(buyer).unwrap();
    Wanted { hold: OrderId::derive(&buyer, &RequestId::random()), sale: sale.clone(), buyer, quantity }
}

#[derive(Clone, Debug, PartialEq)]
pub enum Got {
    Granted(Grant),
    Released,
    AtLimit(String),
    Refused(Reason),
}

pub async fn acquire_all(client: &Client, wanted: &[Wanted]) -> Vec<Got> {
    let items = wanted.iter().map(|wanted| AcquirePermit {
        hold_id: wanted.hold.to_string(),
        sale_id: wanted.sale.to_string(),
        buyer: wanted.buyer.to_string(),
        quantity: wanted.quantity,
    });
    let request = AcquirePermitsRequest { items: items.collect() };
    let answer = client.clone().acquire_permits(request).await.unwrap().into_inner();
    let results = answer.results.into_iter().map(|result| match result.result.unwrap() {
        acquire_result::Result::Granted(grant) => Got::Granted(grant),
        acquire_result::Result::Released(()) => Got::Released,
        acquire_result::Result::LimitReached(limit) => Got::AtLimit(limit.last_hold_id),
        acquire_result::Result::Refused(refusal) => Got::Refused(refusal.reason()),
    });
    results.collect()
}

pub async fn acquire(client: &Client, wanted: &Wanted) -> Got {
    acquire_all(client, std::slice::from_ref(wanted)).await.remove(0)
}

/// Acquires what must be granted.
pub async fn granted(client: &Client, wanted: &Wanted) -> Grant {
    match acquire(client, wanted).await {
        Got::Granted(grant) => grant,
        other => panic!("not granted: {other:?}"),
    }
}

pub fn lock_item(wanted: &Wanted, grant: &Grant) -> LockItem {
    LockItem {
        hold_id: wanted.hold.to_string(),
        order_id: wanted.hold.to_string(),
        sale_id: wanted.sale.to_string(),
        buyer: wanted.buyer.to_string(),
        quantity: wanted.quantity,
        grant_epoch: grant.epoch,
        expire_at_ms: grant.granted_at_ms + grant.payment_window_ms,
        refusal: Reason::Unspecified.into(),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockedAs {
    Locked,
    Stale,
    Refused(Reason),
}

pub async fn lock_all(client: &Client, items: Vec<LockItem>) -> Vec<LockedAs> {
    let answer = client.clone().lock_stock(LockStockRequest { items }).await.unwrap().into_inner();
    let results = answer.results.into_iter().map(|result| match result.result.unwrap() {
        lock_result::Result::Locked(()) => LockedAs::Locked,
        lock_result::Result::StaleEpoch(()) => LockedAs::Stale,
        lock_result::Result::Refused(refusal) => LockedAs::Refused(refusal.reason()),
    });
    results.collect()
}

pub async fn lock(client: &Client, wanted: &Wanted, grant: &Grant) -> LockedAs {
    lock_all(client, vec![lock_item(wanted, grant)]).await[0]
}

pub async fn hold(client: &Client, wanted: &Wanted) -> Grant {
    let grant = granted(client, wanted).await;
    assert_eq!(lock(client, wanted, &grant).await, LockedAs::Locked);
    grant
}

pub fn release_item(wanted: &Wanted) -> ReleaseItem {
    ReleaseItem {
        hold_id: wanted.hold.to_string(),
        order_id: wanted.hold.to_string(),
        sale_id: wanted.sale.to_string(),
        buyer: wanted.buyer.to_string(),
    }
}

pub async fn release_all(client: &Client, items: Vec<ReleaseItem>) -> Vec<Result<(), Reason>> {
    let answer = client.clone().release_stock(ReleaseStockRequest { items }).await.unwrap().into_inner();
    answer.results.into_iter().map(|result| done(result.result)).collect()
}

pub async fn release(client: &Client, wanted: &Wanted) -> Result<(), Reason> {
    release_all(client, vec![release_item(wanted)]).await.remove(0)
}

pub async fn deduct(client: &Client, wanted: &Wanted) -> Result<(), Reason> {
    let item = DeductItem { hold_id: wanted.hold.to_string(), sale_id: wanted.sale.to_string() };
    let answer = client.clone().deduct_stock(DeductStockRequest { items: vec![item] }).await.unwrap().into_inner();
    done(answer.results.into_iter().next().unwrap().result)
}

fn done(result: Option<item_result::Result>) -> Result<(), Reason> {
    match result.unwrap() {
        item_result::Result::Done(()) => Ok(()),
        item_result::Result::Refused(refusal) => Err(refusal.reason()),
    }
}

/// The coordinator's consumer of accepted orders.
pub struct Funnel {
    pub consumer: Arc<dyn Consumer>,
    client: Client,
}

impl Funnel {
    /// Locks whatever waits. How many were locked.
    pub async fn run(&self) -> usize {
        let mut locked = 0;
        loop {
            let deliveries = self.consumer.fetch(500, Duration::from_millis(20)).await.unwrap();
            if deliveries.is_empty() {
                return locked;
            }
            let mut settlements = Vec::new();
            for delivery in deliveries {
                let order = OrderPlaced::decode(delivery.payload.clone()).unwrap();
                locked += usize::from(self.lock(&order).await == LockedAs::Locked);
                settlements.push((delivery, Settlement::Ack));
            }
            self.consumer.settle(settlements).await.unwrap();
        }
    }

    /// A stale grant is acquired anew, until that says what becomes of the order.
    async fn lock(&self, order: &OrderPlaced) -> LockedAs {
        let wanted = Wanted {
            hold: order.order_id.parse().unwrap(),
            sale: SaleId::parse("sale", &order.sale_id).unwrap(),
            buyer: BuyerId::parse(&order.buyer).unwrap(),
            quantity: order.quantity,
        };
        let mut epoch = order.grant_epoch;
        loop {
            let item = LockItem { grant_epoch: epoch, ..lock_item(&wanted, &Grant::default()) };
            let item = LockItem { expire_at_ms: order.expire_at_ms, ..item };
            match lock_all(&self.client, vec![item]).await[0] {
                LockedAs::Stale => match acquire(&self.client, &wanted).await {
                    Got::Granted(grant) => epoch = grant.epoch,
                    Got::Refused(Reason::StockRebuilding) => tokio::time::sleep(Duration::from_millis(20)).await,
                    _ => return LockedAs::Refused(Reason::PermitLapsed),
                },
                answer => return answer,
            }
        }
    }
}
