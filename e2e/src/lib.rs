//! A whole mesh for tests, in one line: started by the same assembly as in production, on a free port, in a temporary
//! folder, and visited through its public gRPC door. [`World`] is a mesh in this process, [`processes`] are real ones.
//!
//! Tests read as scripts: a [`Site`] has sales, buyers and an operator; each buyer's verbs answer an order or a
//! reason. At the end [`World::rest`] waits until nothing moves and demands a clean audit.

#![deny(missing_docs)]

pub mod chaos;
pub mod processes;

use std::{net::SocketAddr, ops::Deref, time::Duration};

use mesh::{
    clock::Clock,
    identity::{AuthArgs, Minter, Secret},
    lifecycle::Lifecycle,
    testing::eventually,
};
use proto::{
    Error, Reason, WireMoney,
    v1::{
        AdjustStockRequest, CancelOrderRequest, CloseSaleRequest, CreateSaleRequest, GetOrderRequest, GetSaleRequest,
        GetStockRequest, ListOrdersRequest, OpenSaleRequest, Order, OrderState, PauseSaleRequest, PayOrderRequest,
        PlaceOrderRequest, RebuildStockRequest, Sale, StockReport, WatchOrderRequest,
        operations_client::OperationsClient, orders_client::OrdersClient, sales_client::SalesClient,
    },
};
use seckill::{
    assembly::{Mesh, Options},
    audit,
    config::{CommonArgs, RoleConfigs, StorageArgs},
    ops::Bearer,
    tools,
};
use tonic::{
    service::interceptor::InterceptedService,
    transport::{Channel, Endpoint},
};
use uuid::Uuid;

/// The key that every mesh of the tests takes.
pub const SECRET: &str = "a-secret-of-the-tests-that-is-long-enough";

/// A mesh's public door, and everybody who comes to it.
#[derive(Debug)]
pub struct Site {
    channel: Channel,
    minter: Minter,
}

impl Site {
    /// The gateway at this address, which takes tokens of [`SECRET`].
    pub fn at(address: SocketAddr) -> Self {
        let channel = Endpoint::from_shared(format!("http://{address}")).expect("an address").connect_lazy();
        let auth = AuthArgs { auth_hs256_secret: Some(secret()), ..Default::default() };
        let minter = auth.load().expect("a key").minter(Clock::system()).expect("a secret mints");
        Self { channel, minter }
    }

    /// Somebody with a buyer's token.
    pub fn buyer(&self, name: &str) -> Client {
        Client::new(self.channel.clone(), &self.token(name, "buyer"))
    }

    /// Somebody with an operator's token.
    pub fn operator(&self) -> Client {
        Client::new(self.channel.clone(), &self.token("olga", "operator"))
    }

    /// A token that the gateway takes.
    pub fn token(&self, sub: &str, scope: &str) -> String {
        tools::mint(&self.minter, sub, scope, Duration::from_secs(3600)).expect("a token can be minted")
    }

    /// A sale that is open now, one unit a buyer.
    pub async fn sale(&self, stock: i64, window: Duration) -> String {
        self.sale_with(stock, window, |_| {}).await
    }

    /// A sale, changed before it is created.
    pub async fn sale_with(&self, stock: i64, window: Duration, change: impl FnOnce(&mut CreateSaleRequest)) -> String {
        let mut request = CreateSaleRequest {
            request_id: Uuid::new_v4().to_string(),
            title: "a test".into(),
            price: Some(WireMoney { currency_code: "EUR".into(), units: 19, nanos: 990_000_000 }),
            stock,
            per_buyer_limit: 1,
            payment_window: prost_types::Duration::try_from(window).ok(),
            ..Default::default()
        };
        change(&mut request);
        let sale =
            eventually("the sale is created", async || self.operator().create_sale(request.clone()).await.ok()).await;
        let id = sale.name.trim_start_matches("sales/").to_owned();
        // Permits are opened in the background; a sale without them says "try again".
        eventually("the sale's permits open", async || {
            let report = self.operator().stock(&id).await.ok()?;
            (report.permits == report.available).then_some(())
        })
        .await;
        id
    }

    /// Waits until nothing is held and every permit is back.
    pub async fn settled(&self, sale: &str) -> StockReport {
        let operator = self.operator();
        eventually("nothing held and R = A", async || {
            let report = operator.stock(sale).await.ok()?;
            let rests = report.held == 0 && report.permits == report.available && report.unpersisted_grants == 0;
            rests.then_some(report)
        })
        .await
    }
}

/// [`SECRET`] as configuration has it.
pub fn secret() -> Secret {
    SECRET.parse().expect("long enough")
}

/// Demands a clean audit at rest.
pub async fn demand_clean(source: &audit::Source) {
    let mut last = String::new();
    eventually("a clean audit", async || {
        let report = audit::run(source, true).await.expect("the audit runs");
        last = report.to_string();
        if !report.is_clean() {
            eprintln!("{last}");
        }
        report.is_clean().then_some(())
    })
    .await;
}

/// A mesh in this process, all five roles.
#[derive(Debug)]
pub struct World {
    /// The mesh itself.
    pub mesh: Mesh,
    /// Its life.
    pub life: Lifecycle,
    site: Site,
    storage: StorageArgs,
    roles: RoleConfigs,
    dir: Option<tempfile::TempDir>,
}

impl Deref for World {
    type Target = Site;

    fn deref(&self) -> &Site {
        &self.site
    }
}

impl World {
    /// On embedded backends in a temporary folder.
    pub async fn embedded() -> Self {
        Self::embedded_as(RoleConfigs::default()).await
    }

    /// The same, with other settings.
    pub async fn embedded_as(roles: RoleConfigs) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let storage = StorageArgs { data_dir: dir.path().to_owned(), ..Default::default() };
        let mut world = Self::on(storage, roles).await;
        world.dir = Some(dir);
        world
    }

    /// On these backends.
    pub async fn on(storage: StorageArgs, roles: RoleConfigs) -> Self {
        let life = Lifecycle::new();
        let listen = ([127, 0, 0, 1], 0).into();
        let mut common = CommonArgs::for_storage(storage.clone());
        common.auth.auth_hs256_secret = Some(secret());
        let options = Options { common, listen, admin_listen: None, roles: roles.clone() };
        let mesh = Mesh::start(options, &life).await.expect("the mesh starts");
        let site = Site::at(mesh.address);
        Self { mesh, life, site, storage, roles, dir: None }
    }

    /// Drops everything where it stands, as a crash would, and starts again on the same backends.
    pub async fn crash_and_restart(self) -> Self {
        let Self { mesh, life, storage, roles, dir, .. } = self;
        life.kill();
        // The embedded files' locks go with the last task that holds them.
        mesh.stop(Duration::from_millis(500)).await;
        let mut world = Self::on(storage, roles).await;
        world.dir = dir;
        world
    }

    /// Waits until nothing is held and every permit is back, and demands a clean audit at rest.
    pub async fn rest(&self, sale: &str) -> StockReport {
        let report = self.settled(sale).await;
        self.audit().await;
        report
    }

    /// Demands a clean audit at rest.
    pub async fn audit(&self) {
        demand_clean(&audit::Source::new(&self.storage, Some(&self.mesh)).expect("the audit has sources")).await;
    }
}

type Door = InterceptedService<Channel, Bearer>;

/// Somebody at the door. Verbs answer what the API answers, or the reason it gave.
#[derive(Clone, Debug)]
pub struct Client {
    sales: SalesClient<Door>,
    orders: OrdersClient<Door>,
    operations: OperationsClient<Door>,
}

type Answer<T> = Result<T, Error>;

impl Client {
    fn new(channel: Channel, token: &str) -> Self {
        let bearer = Bearer::new(token).expect("a token is a header's value");
        let door = |channel| InterceptedService::new(channel, bearer.clone());
        Self {
            sales: SalesClient::new(door(channel.clone())),
            orders: OrdersClient::new(door(channel.clone())),
            operations: OperationsClient::new(door(channel)),
        }
    }

    /// Buys one unit with a key of its own.
    pub async fn place(&self, sale: &str) -> Answer<Order> {
        self.place_as(sale, 1, &Uuid::new_v4().to_string()).await
    }

    /// Buys with this key.
    pub async fn place_as(&self, sale: &str, quantity: i64, request_id: &str) -> Answer<Order> {
        let request = PlaceOrderRequest { sale: sale.into(), quantity, request_id: request_id.into() };
        Ok(self.orders.clone().place_order(request).await?.into_inner())
    }

    /// Buys one unit and waits until it is held; tries again while the answer says that it may help.
    pub async fn hold(&self, sale: &str) -> Answer<Order> {
        let key = Uuid::new_v4().to_string();
        let placed =
            eventually("an order is accepted or refused for good", async || match self.place_as(sale, 1, &key).await {
                Err(error) if error.reason.retryable() => None,
                answer => Some(answer),
            })
            .await?;
        Ok(self.leaves(&placed.name, OrderState::Placed).await)
    }

    /// The order once it has left this state.
    pub async fn leaves(&self, order: &str, state: OrderState) -> Order {
        eventually(&format!("{order} leaves {state:?}"), async || {
            let order = self.order(order).await.ok()?;
            (order.state() != state).then_some(order)
        })
        .await
    }

    /// The order once it is in this state.
    pub async fn becomes(&self, order: &str, state: OrderState) -> Order {
        eventually(&format!("{order} becomes {state:?}"), async || {
            let order = self.order(order).await.ok()?;
            (order.state() == state).then_some(order)
        })
        .await
    }

    /// Reads an order.
    pub async fn order(&self, order: &str) -> Answer<Order> {
        let request = GetOrderRequest { order: order.into(), wait: None };
        Ok(self.orders.clone().get_order(request).await?.into_inner())
    }

    /// Own orders of a sale.
    pub async fn orders(&self, sale: &str) -> Answer<Vec<Order>> {
        let request = ListOrdersRequest { sale: sale.into(), ..Default::default() };
        Ok(self.orders.clone().list_orders(request).await?.into_inner().orders)
    }

    /// Pays with a key of its own.
    pub async fn pay(&self, order: &str, method: &str) -> Answer<Order> {
        self.pay_as(order, method, &Uuid::new_v4().to_string()).await
    }

    /// Pays with this key.
    pub async fn pay_as(&self, order: &str, method: &str, request_id: &str) -> Answer<Order> {
        let request =
            PayOrderRequest { order: order.into(), payment_method: method.into(), request_id: request_id.into() };
        Ok(self.orders.clone().pay_order(request).await?.into_inner())
    }

    /// Gives an unpaid order back.
    pub async fn cancel(&self, order: &str) -> Answer<Order> {
        Ok(self.orders.clone().cancel_order(CancelOrderRequest { order: order.into() }).await?.into_inner())
    }

    /// Every state that a watcher sees, to the end of the stream.
    pub async fn watch(&self, order: &str) -> Answer<Vec<OrderState>> {
        let request = WatchOrderRequest { order: order.into() };
        let mut stream = self.orders.clone().watch_order(request).await?.into_inner();
        let mut seen = Vec::new();
        while let Some(order) = stream.message().await? {
            seen.push(order.state());
        }
        Ok(seen)
    }

    /// Creates a sale.
    pub async fn create_sale(&self, request: CreateSaleRequest) -> Answer<Sale> {
        Ok(self.sales.clone().create_sale(request).await?.into_inner())
    }

    /// Reads a sale.
    pub async fn sale(&self, sale: &str) -> Answer<Sale> {
        Ok(self.sales.clone().get_sale(GetSaleRequest { sale: sale.into() }).await?.into_inner())
    }

    /// Lets a paused sale go on.
    pub async fn open(&self, sale: &str) -> Answer<Sale> {
        Ok(self
            .sales
            .clone()
            .open_sale(OpenSaleRequest { sale: sale.into(), ..Default::default() })
            .await?
            .into_inner())
    }

    /// Pauses a sale.
    pub async fn pause(&self, sale: &str) -> Answer<Sale> {
        Ok(self
            .sales
            .clone()
            .pause_sale(PauseSaleRequest { sale: sale.into(), ..Default::default() })
            .await?
            .into_inner())
    }

    /// Ends a sale.
    pub async fn close(&self, sale: &str) -> Answer<Sale> {
        Ok(self
            .sales
            .clone()
            .close_sale(CloseSaleRequest { sale: sale.into(), ..Default::default() })
            .await?
            .into_inner())
    }

    /// Raises or lowers the stock.
    pub async fn adjust(&self, sale: &str, delta: i64) -> Answer<StockReport> {
        let request = AdjustStockRequest {
            sale: sale.into(),
            delta,
            request_id: Uuid::new_v4().to_string(),
            ..Default::default()
        };
        Ok(self.sales.clone().adjust_stock(request).await?.into_inner())
    }

    /// The ledger beside the permits.
    pub async fn stock(&self, sale: &str) -> Answer<StockReport> {
        Ok(self.sales.clone().get_stock(GetStockRequest { sale: sale.into() }).await?.into_inner())
    }

    /// Rebuilds a sale's permits.
    pub async fn rebuild(&self, sale: &str) -> Answer<StockReport> {
        Ok(self
            .operations
            .clone()
            .rebuild_stock(RebuildStockRequest { sale: sale.into(), ..Default::default() })
            .await?
            .into_inner())
    }
}

/// The reason of a refusal.
pub fn reason<T: std::fmt::Debug>(answer: Answer<T>) -> Reason {
    answer.expect_err("a refusal").reason
}
