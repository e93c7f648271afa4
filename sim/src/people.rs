//! Who comes to the sale: buyers who are patient or not, who pay, change their minds or vanish, and an operator.
//!
//! Each remembers what it was told: that is what must have been true in the end.

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use mesh::{identity::Scopes, link::Link};
use proto::{
    BuyerId, Error, OrderId, Reason, RequestId, WireMoney,
    v1::{
        AdjustStockRequest, CancelOrderRequest, CloseSaleRequest, CreateSaleRequest, GetOrderRequest, OpenSaleRequest,
        Order, OrderState, PauseSaleRequest, PayOrderRequest, PlaceOrderRequest, RebuildStockRequest,
        operations_client::OperationsClient, orders_client::OrdersClient, sales_client::SalesClient,
    },
};
use rand::{Rng, SeedableRng, rngs::SmallRng, seq::IndexedRandom};
use tokio::time::{Instant, sleep};
use tonic::{Code, Request, metadata::MetadataValue};
use uuid::Uuid;

use crate::{
    bank::METHODS,
    faults::Hands,
    net::Role,
    plan::{Plan, Verb},
    world::World,
};

/// The sale's id.
pub const SALE: &str = "sale";

/// What people were told.
#[derive(Debug, Default)]
pub struct Told {
    /// Every order that somebody has seen accepted, and the states that it was said to be in, in order.
    pub orders: Mutex<Vec<(String, OrderState)>>,
    /// The orders that were asked for, each known by its request: there may be no other.
    pub asked: Mutex<BTreeSet<String>>,
    /// The orders that were answered as placed to the very request they are of. (At the limit another one is answered.)
    pub placed: Mutex<BTreeSet<String>>,
    /// The fewest units that somebody was told are sold out.
    pub sold_out: Mutex<Option<i64>>,
    /// Whether the stock may have been raised.
    pub raised: AtomicBool,
}

impl Told {
    fn order(&self, order: &Order) {
        let id = order.name.trim_start_matches("orders/").to_owned();
        self.orders.lock().unwrap_or_else(PoisonError::into_inner).push((id, order.state()));
    }
}

/// Somebody at the door.
struct Person {
    hands: Hands,
    token: MetadataValue<tonic::metadata::Ascii>,
    orders: OrdersClient<Link>,
    told: Arc<Told>,
    permits_go_back: bool,
    rng: SmallRng,
}

impl Person {
    fn with<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("authorization", self.token.clone());
        request
    }

    async fn wait(&mut self, least: u64, most: u64) {
        let ms = self.rng.random_range(least..=most);
        sleep(Duration::from_millis(ms)).await;
    }

    fn uuid(&mut self) -> String {
        Uuid::from_u128(self.rng.random::<u128>() | 1).to_string()
    }

    fn hear(&self, what: &str, answer: &Result<Order, Error>) {
        match answer {
            Ok(order) => {
                self.told.order(order);
                self.hands.note(|| format!("{what}: {} is {}", order.name, order.state().as_str_name()));
            }
            Err(error) => {
                if error.reason == Reason::Internal {
                    self.hands.run().alarm(format!("{} was told of a bug: {error}", self.hands.who()));
                }
                self.hands.note(|| format!("{what}: {error}"));
            }
        }
    }

    async fn place(&mut self, quantity: i64, request_id: &str) -> Result<Order, Error> {
        let message = PlaceOrderRequest { sale: SALE.into(), quantity, request_id: request_id.to_owned() };
        let own = self.own(request_id)?;
        self.told.asked.lock().unwrap_or_else(PoisonError::into_inner).insert(own.to_string());
        let request = self.with(message);
        let answer = self.orders.place_order(request).await.map(|r| r.into_inner()).map_err(Error::from);
        self.hear("place", &answer);
        if let Ok(order) = &answer
            && order.state() == OrderState::Placed
            && order.name == own.name()
        {
            self.told.placed.lock().unwrap_or_else(PoisonError::into_inner).insert(own.to_string());
        }
        if answer.as_ref().is_err_and(|error| error.reason == Reason::SoldOut) {
            let mut sold_out = self.told.sold_out.lock().unwrap_or_else(PoisonError::into_inner);
            *sold_out = Some(sold_out.map_or(quantity, |fewest| fewest.min(quantity)));
        }
        answer
    }

    /// The order that a request of this buyer is.
    fn own(&self, request_id: &str) -> Result<OrderId, Error> {
        let request = RequestId::parse("request_id", request_id)?;
        Ok(OrderId::derive(&BuyerId::parse(self.hands.who())?, &request))
    }

    async fn get(&mut self, order: &str) -> Result<Order, Error> {
        let wait = Some(prost_types::Duration { seconds: 1, nanos: 0 });
        let request = self.with(GetOrderRequest { order: order.to_owned(), wait });
        let answer = self.orders.get_order(request).await.map(|r| r.into_inner()).map_err(Error::from);
        self.hear("get", &answer);
        if let Err(error) = &answer
            && error.reason == Reason::NotFound
            // Permits of before know nothing of an order that was placed since, until they are found out.
            && !self.permits_go_back
        {
            self.hands.run().alarm(format!("{} was told NOT_FOUND of its own order {order}", self.hands.who()));
        }
        answer
    }

    async fn pay(&mut self, order: &str, method: &str, request_id: &str) -> Result<Order, Error> {
        let message = PayOrderRequest {
            order: order.to_owned(),
            payment_method: method.to_owned(),
            request_id: request_id.to_owned(),
        };
        let request = self.with(message);
        let answer = self.orders.pay_order(request).await.map(|r| r.into_inner()).map_err(Error::from);
        self.hear("pay", &answer);
        answer
    }

    async fn cancel(&mut self, order: &str) -> Result<Order, Error> {
        let request = self.with(CancelOrderRequest { order: order.to_owned() });
        let answer = self.orders.cancel_order(request).await.map(|r| r.into_inner()).map_err(Error::from);
        self.hear("cancel", &answer);
        answer
    }

    /// One wish to buy, from the click to whatever its buyer has patience for.
    async fn buy(&mut self, quantity: i64, window: Duration) {
        let request_id = self.uuid();
        let mut patience = self.rng.random_range(1..=8);
        let order = loop {
            // Sometimes two clicks.
            if self.rng.random_range(0..5) == 0 {
                let (mut other, id) = (self.twin(), request_id.clone());
                tokio::spawn(async move { drop(other.place(quantity, &id).await) });
            }
            match self.place(quantity, &request_id).await {
                Ok(order) => break order,
                Err(error) if error.reason.retryable() && patience > 0 => {
                    patience -= 1;
                    self.wait(50, 1_500).await;
                }
                Err(_) => return,
            }
        };
        let name = order.name.clone();
        match self.rng.random_range(0..10) {
            // Vanishes.
            0 => {}
            // Changes its mind.
            1 | 2 => {
                self.wait(0, 2_000).await;
                for _ in 0..3 {
                    match self.cancel(&name).await {
                        Err(error) if error.reason.retryable() => self.wait(50, 1_000).await,
                        _ => break,
                    }
                }
            }
            // Pays, in time or not.
            choice => {
                if choice < 6 {
                    let _ = self.get(&name).await;
                }
                let latest = window.as_millis() as u64 * 5 / 4;
                let most = *[50, 500, latest].choose(&mut self.rng).expect("a choice");
                self.wait(0, most).await;
                let mut payment = self.uuid();
                let mut method = self.method();
                for _ in 0..self.rng.random_range(1..=6) {
                    if self.rng.random_range(0..5) == 0 {
                        let (mut other, name) = (self.twin(), name.clone());
                        let (id, method) = match self.rng.random_range(0..2) {
                            0 => (payment.clone(), method),
                            _ => (self.uuid(), self.method()),
                        };
                        tokio::spawn(async move { drop(other.pay(&name, method, &id).await) });
                    }
                    match self.pay(&name, method, &payment).await {
                        Err(error) if error.reason == Reason::PaymentDeclined => {
                            payment = self.uuid();
                            method = self.method();
                        }
                        Err(error) if error.reason.retryable() => self.wait(50, 1_000).await,
                        Ok(order) if order.state() == OrderState::Paying => self.wait(200, 2_000).await,
                        _ => break,
                    }
                }
                if self.rng.random_range(0..6) == 0 {
                    let _ = self.cancel(&name).await;
                }
            }
        }
        if self.rng.random() {
            let _ = self.get(&name).await;
        }
    }

    fn method(&mut self) -> &'static str {
        // Most cards are good.
        let choices = ["good", "good", "good", METHODS[1], METHODS[2], METHODS[3], METHODS[4]];
        choices.choose(&mut self.rng).expect("a choice")
    }

    /// The same person in another window.
    fn twin(&mut self) -> Self {
        Self {
            hands: self.hands.clone(),
            token: self.token.clone(),
            orders: self.orders.clone(),
            told: self.told.clone(),
            permits_go_back: self.permits_go_back,
            rng: SmallRng::seed_from_u64(self.rng.random()),
        }
    }
}

fn person(world: &Arc<World>, told: &Arc<Told>, name: &str, scopes: Scopes, seed: u64) -> Person {
    let hands = Hands::new(world.run.clone(), name);
    let subject = BuyerId::parse(name).expect("a name");
    Person {
        token: world.token(&subject, scopes).parse().expect("a token is ASCII"),
        orders: OrdersClient::new(world.net.link(&hands, Role::Gateway)),
        hands,
        told: told.clone(),
        permits_go_back: world.plan.sets_permits_back(),
        rng: SmallRng::seed_from_u64(seed),
    }
}

/// One buyer, from when it comes to when it has had enough.
pub async fn buyer(world: Arc<World>, told: Arc<Told>, number: usize, seed: u64) {
    let scopes = Scopes { buyer: true, operator: false };
    let mut person = person(&world, &told, &format!("buyer-{number}"), scopes, seed);
    let Plan { rush, limit, window, .. } = world.plan;
    person.wait(0, rush.as_millis() as u64).await;
    for _ in 0..person.rng.random_range(1..=3) {
        let quantity = person.rng.random_range(1..=limit);
        person.buy(quantity, window).await;
        person.wait(0, 3_000).await;
    }
}

/// Makes the sale.
pub async fn open_sale(world: &Arc<World>, told: &Arc<Told>) {
    let operator = operator(world, told);
    let mut sales = SalesClient::new(world.net.link(&operator.hands, Role::Gateway));
    let Plan { stock, limit, window, .. } = world.plan;
    let request = CreateSaleRequest {
        sale_id: SALE.into(),
        request_id: Uuid::from_u128(1).to_string(),
        title: "A thing".into(),
        price: Some(WireMoney { currency_code: "EUR".into(), units: 19, nanos: 990_000_000 }),
        stock,
        per_buyer_limit: limit,
        payment_window: Some(window.try_into().expect("a short time")),
        ..Default::default()
    };
    loop {
        match sales.create_sale(operator.with(request.clone())).await {
            Ok(_) => return,
            Err(status) => {
                operator.hands.note(|| format!("create: {status}"));
                if !matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded) {
                    return world.run.alarm(format!("the sale could not be made: {status}"));
                }
                sleep(Duration::from_millis(200)).await;
            }
        }
    }
}

fn operator(world: &Arc<World>, told: &Arc<Told>) -> Person {
    person(world, told, "operator", Scopes { buyer: false, operator: true }, 0)
}

/// Does what the plan says. A verb that gets no answer is repeated, as its request is.
pub async fn operate(world: Arc<World>, told: Arc<Told>) {
    let mut operator = operator(&world, &told);
    let link = world.net.link(&operator.hands, Role::Gateway);
    let (mut sales, mut operations) = (SalesClient::new(link.clone()), OperationsClient::new(link));
    let started = Instant::now();
    let sale = SALE.to_owned();
    for (at, verb) in world.plan.verbs.clone() {
        tokio::time::sleep_until(started + at).await;
        let request_id = operator.uuid();
        for _ in 0..5 {
            let sale = sale.clone();
            let done = match verb {
                Verb::Pause => {
                    sales.pause_sale(operator.with(PauseSaleRequest { sale, ..Default::default() })).await.map(drop)
                }
                Verb::Open => {
                    sales.open_sale(operator.with(OpenSaleRequest { sale, ..Default::default() })).await.map(drop)
                }
                Verb::Close => {
                    sales.close_sale(operator.with(CloseSaleRequest { sale, ..Default::default() })).await.map(drop)
                }
                Verb::Adjust(delta) => {
                    // Also without an answer it may have been done.
                    told.raised.fetch_or(delta > 0, Ordering::Relaxed);
                    let request =
                        AdjustStockRequest { sale, delta, request_id: request_id.clone(), ..Default::default() };
                    sales.adjust_stock(operator.with(request)).await.map(drop)
                }
                Verb::Rebuild => operations
                    .rebuild_stock(operator.with(RebuildStockRequest { sale, ..Default::default() }))
                    .await
                    .map(drop),
            };
            operator.hands.note(|| format!("{verb:?}: {done:?}"));
            match done {
                Err(status) if matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded) => {
                    operator.wait(100, 1_000).await;
                }
                _ => break,
            }
        }
    }
}
