//! Orders: the buyers' door. Who is told what of which order is decided here, and nothing else is.
//!
//! - A refusal from memory comes before anything is spent; what is not known there is asked in batches.
//! - An order that is accepted but not yet written is read from its grant ([`find`]), so that a buyer who has seen PLACED
//!   never sees NOT_FOUND.
//! - Another's order and no order get the same answer (E39).
//! - A call that got no answer may have taken effect; trying again with the same request_id finds out, and changes
//!   nothing (E47).

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use futures::{Stream, stream};
use http::HeaderValue;
use mesh::{
    batch::{Batcher, Limits, Refused},
    identity::Identity,
    layers::Deadline,
    lifecycle::Lifecycle,
    link::Link,
};
use proto::{
    BuyerId, Error, OrderId, Reason, RequestId, SaleId,
    internal::{
        AcceptOrder, AcceptOrdersRequest, CancelOrderItem, CancelOrdersRequest, ListBuyerOrdersRequest, OrderResult,
        PayOrderItem, PayOrdersRequest, coordinator_client::CoordinatorClient,
        order_records_client::OrderRecordsClient, order_result,
    },
    v1::{
        CancelOrderRequest, GetOrderRequest, ListOrdersRequest, ListOrdersResponse, Order, OrderState, PayOrderRequest,
        PlaceOrderRequest, WatchOrderRequest, orders_server,
    },
};
use tokio::time::{Instant, sleep, timeout_at};
use tonic::{Request, Response, Status};

use self::{
    find::Finder,
    follow::{Follower, is_terminal},
};
use super::{Callers, answer, each, given, handed_on, page_size, refuse, sale, shutting_down};
use crate::{accepted::Accepted, failure::Prepared, soldout::SoldOut, watch::Registry};

mod find;
mod follow;

/// Who watches which order.
pub type OrderWatchers = Registry<OrderId, Arc<Order>>;

/// Units of one order, at most: the contract's largest per-buyer limit.
const LARGEST_QUANTITY: i64 = 1_000_000;

/// The longest `wait` of a reader.
pub const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// How long paying or cancelling waits for the funnel to write the order. It takes some ten milliseconds when all is
/// well; a buyer who is quicker than that should not be told so.
const UNTIL_WRITTEN: Duration = Duration::from_secs(2);

/// Accepting takes some milliseconds when all is well. A batch that takes longer lets the next one go beside it: buyers wait.
const ACCEPT_TURN: Duration = Duration::from_millis(20);

type Batch<T> = Batcher<T, Result<Order, Error>>;

/// Looks at a wish to buy before anything is spent on it. It only says no to what is in vain; whatever else is wrong the rpc
/// says, and is counted there. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Desk {
    callers: Callers,
    memory: Arc<SoldOut>,
}

/// A wish to buy, well-formed and by a buyer.
struct Wanted {
    sale: SaleId,
    buyer: BuyerId,
    quantity: i64,
    request_id: RequestId,
}

impl Desk {
    /// On what is remembered of sales.
    pub fn new(callers: Callers, memory: Arc<SoldOut>) -> Self {
        Self { callers, memory }
    }

    /// Who asks; none where there is something wrong that the rpc will name. The refusal of a wish that is surely in vain:
    /// the rpc looks again, since much may happen on the way to it.
    pub fn look(
        &self,
        authorization: Option<&HeaderValue>,
        request: &PlaceOrderRequest,
    ) -> Result<Option<Identity>, Arc<Prepared>> {
        let Ok(caller) = self.callers.named(authorization) else { return Ok(None) };
        let Ok(wanted) = Self::read(&caller, request) else { return Ok(None) };
        self.refuse_what_is_in_vain(&wanted).map(|()| Some(caller))
    }

    fn refuse_what_is_in_vain(&self, wanted: &Wanted) -> Result<(), Arc<Prepared>> {
        self.memory.refusal(&wanted.sale, &wanted.buyer).map_or(Ok(()), Err)
    }

    fn read(caller: &Identity, request: &PlaceOrderRequest) -> Result<Wanted, Error> {
        let buyer = caller.require_buyer()?.clone();
        let sale = SaleId::parse("sale", &request.sale)?;
        if !(1..=LARGEST_QUANTITY).contains(&request.quantity) {
            return Err(Error::invalid("quantity", format!("must be from 1 to {LARGEST_QUANTITY}")));
        }
        let request_id = RequestId::parse("request_id", &request.request_id)?;
        Ok(Wanted { sale, buyer, quantity: request.quantity, request_id })
    }
}

/// Serves `seckill.v1.Orders`.
#[derive(Clone)]
pub struct Orders {
    callers: Callers,
    desk: Desk,
    accepted: Accepted,
    accept: Batch<AcceptOrder>,
    pay: Batch<PayOrderItem>,
    cancel: Batch<CancelOrderItem>,
    finder: Finder,
    records: OrderRecordsClient<Link>,
    watchers: OrderWatchers,
    timeout: Duration,
    life: Lifecycle,
}

/// The services that orders are asked of.
#[derive(Clone, Debug)]
pub struct Links {
    /// Grants of orders that are not written yet.
    pub stock: Link,
    /// Orders that are.
    pub order: Link,
    /// Placing, paying, cancelling.
    pub coordinator: Link,
}

impl Orders {
    /// Over these links. `timeout` is for one call without its `wait`.
    pub fn new(
        callers: Callers,
        (desk, accepted): (Desk, Accepted),
        watchers: OrderWatchers,
        links: Links,
        timeout: Duration,
        life: &Lifecycle,
    ) -> Self {
        let coordinator = CoordinatorClient::new(links.coordinator);
        let accept = {
            let limits = Limits {
                max_items: 256,
                in_flight: 4,
                overlap_from: 64,
                longest_turn: ACCEPT_TURN,
                ..Limits::default()
            };
            let coordinator = coordinator.clone();
            Batcher::start("accept", limits, life.tasks(), move |items: Vec<AcceptOrder>| {
                let (count, mut coordinator) = (items.len(), coordinator.clone());
                async move {
                    let answered = coordinator.accept_orders(AcceptOrdersRequest { items }).await;
                    each(count, answered.map(|r| r.into_inner().results), order)
                }
            })
        };
        let pay = {
            // Many small calls at once: a provider that takes its time must not hold up who comes after.
            let limits = Limits { max_items: 64, in_flight: 64, ..Limits::default() };
            let coordinator = coordinator.clone();
            Batcher::start("pay", limits, life.tasks(), move |items: Vec<PayOrderItem>| {
                let (count, mut coordinator) = (items.len(), coordinator.clone());
                async move {
                    let answered = coordinator.pay_orders(PayOrdersRequest { items }).await;
                    each(count, answered.map(|r| r.into_inner().results), order)
                }
            })
        };
        let cancel = {
            let limits = Limits { max_items: 64, in_flight: 16, ..Limits::default() };
            Batcher::start("cancel", limits, life.tasks(), move |items: Vec<CancelOrderItem>| {
                let (count, mut coordinator) = (items.len(), coordinator.clone());
                async move {
                    let answered = coordinator.cancel_orders(CancelOrdersRequest { items }).await;
                    each(count, answered.map(|r| r.into_inner().results), order)
                }
            })
        };
        let finder = Finder::new(links.order.clone(), links.stock, life);
        let records = OrderRecordsClient::new(links.order);
        Self { callers, desk, accepted, accept, pay, cancel, finder, records, watchers, timeout, life: life.clone() }
    }

    async fn place(&self, request: Request<PlaceOrderRequest>) -> Result<Order, Error> {
        // Known already where the desk has looked at it: the gateway's own word, which no header can bring.
        let caller = match request.extensions().get::<Identity>() {
            Some(caller) => caller.clone(),
            None => self.callers.known(request.metadata())?,
        };
        let wanted = Desk::read(&caller, request.get_ref())?;
        self.desk.refuse_what_is_in_vain(&wanted).map_err(|refusal| refusal.error().clone())?;
        let Wanted { sale, buyer, quantity, request_id } = wanted;
        let item = AcceptOrder {
            sale_id: sale.as_str().to_owned(),
            buyer: buyer.as_str().to_owned(),
            quantity,
            request_id: request_id.to_string(),
            traceparent: traceparent(),
        };
        let order = self.accept.submit(item).await.map_err(Error::from).flatten().map_err(unknown)?;
        if let Ok(id) = OrderId::parse("order", &order.name) {
            self.accepted.keep(id, &order);
        }
        Ok(order)
    }

    async fn get(&self, request: Request<GetOrderRequest>) -> Result<Order, Error> {
        let caller = self.reader(request.metadata())?;
        let request = request.into_inner();
        let id = OrderId::parse("order", &request.order)?;
        let wait = wait(request.wait)?;
        // The layers cannot see the `wait`, so they leave this rpc's deadline to it.
        let deadline = Deadline::after(self.timeout + wait);
        let read = async {
            // Registered first and read after, so that nothing falls in between.
            let follower = if wait.is_zero() { None } else { Some(self.follower(id)?.impatient()) };
            let remembered = follower.as_ref().and_then(|_| self.accepted.find(&id));
            let order = match remembered.filter(|order| may_see(&caller, order)) {
                Some(order) => Arc::unwrap_or_clone(order),
                None => self.visible(id, &caller).await?,
            };
            let Some(mut follower) = follower.filter(|_| order.state() == OrderState::Placed) else {
                return Ok(order);
            };
            let left_placed = async {
                loop {
                    let order = follower.next().await?;
                    if order.state() != OrderState::Placed {
                        return Ok::<_, Error>(order);
                    }
                }
            };
            let left_placed = timeout_at(Instant::now() + wait, left_placed);
            match self.life.soft_token().run_until_cancelled(left_placed).await {
                Some(Ok(Ok(order))) => Ok(order),
                // The wait is over, or it was cut short: the state is what it is now.
                Some(Ok(Err(_)) | Err(_)) | None => self.visible(id, &caller).await,
            }
        };
        timeout_at(deadline.0, deadline.scope(read))
            .await
            .unwrap_or_else(|_| Err(Error::new(Reason::DeadlineExceeded, "deadline exceeded")))
    }

    async fn list(&self, request: Request<ListOrdersRequest>) -> Result<ListOrdersResponse, Error> {
        let buyer = self.callers.buyer(request.metadata())?;
        let request = request.into_inner();
        let wanted = ListBuyerOrdersRequest {
            buyer: buyer.as_str().to_owned(),
            page_size: page_size(request.page_size)?,
            page_token: request.page_token,
            sale_id: if request.sale.is_empty() { String::new() } else { sale(&request.sale)? },
        };
        handed_on(self.records.clone().list_orders(wanted).await)
    }

    async fn pay(&self, request: Request<PayOrderRequest>) -> Result<Order, Error> {
        let buyer = self.callers.buyer(request.metadata())?;
        let request = request.into_inner();
        let id = OrderId::parse("order", &request.order)?;
        given("payment_method", &request.payment_method)?;
        let request_id = RequestId::parse("request_id", &request.request_id)?;
        let item = PayOrderItem {
            order_id: id.to_string(),
            buyer: buyer.as_str().to_owned(),
            payment_method: request.payment_method,
            request_id: request_id.to_string(),
            traceparent: traceparent(),
        };
        self.once_written(id, &buyer, || self.pay.submit(item.clone())).await
    }

    async fn cancel(&self, request: Request<CancelOrderRequest>) -> Result<Order, Error> {
        let buyer = self.callers.buyer(request.metadata())?;
        let id = OrderId::parse("order", &request.get_ref().order)?;
        let item =
            CancelOrderItem { order_id: id.to_string(), buyer: buyer.as_str().to_owned(), traceparent: traceparent() };
        self.once_written(id, &buyer, || self.cancel.submit(item.clone())).await
    }

    async fn watch(&self, request: Request<WatchOrderRequest>) -> Result<OrderStream, Error> {
        let caller = self.reader(request.metadata())?;
        let id = OrderId::parse("order", &request.get_ref().order)?;
        let mut follower = self.follower(id)?;
        let first = self.visible(id, &caller).await?;
        follower.seen(&first);
        let watching = Watching { follower, next: Some(first), ended: false, life: self.life.clone() };
        Ok(Box::pin(stream::unfold(watching, Watching::step)))
    }

    /// Tries; where the coordinator has no saga yet although the buyer has the order, waits for it and tries again.
    /// Safe because both verbs are idempotent.
    async fn once_written<F, Fut>(&self, id: OrderId, buyer: &BuyerId, attempt: F) -> Result<Order, Error>
    where
        F: Fn() -> Fut,
        Fut: Future<Output = Result<Result<Order, Error>, Refused>>,
    {
        self.accepted.forget(&id);
        let until = Instant::now() + UNTIL_WRITTEN;
        // From when the record is there to when the saga is, which is the next thing written.
        let mut pause = Duration::from_millis(10);
        loop {
            match attempt().await.map_err(Error::from).flatten() {
                Err(error) if error.reason == Reason::NotFound => {}
                result => return result.map_err(unknown),
            }
            let mut follower = self.follower(id)?;
            let not_found = || Error::not_found("order");
            let mut order = self.finder.find(id).await?.filter(|o| o.buyer == buyer.as_str()).ok_or_else(not_found)?;
            while order.state() == OrderState::Placed {
                let Ok(changed) = timeout_at(until, follower.next()).await else {
                    return Err(not_ready("PLACED"));
                };
                order = changed?;
            }
            let state = order.state().as_str_name();
            if is_terminal(order.state()) {
                return Err(Error::illegal_state(state, format!("the order is {state}")));
            }
            if Instant::now() + pause > until {
                return Err(not_ready(state));
            }
            sleep(pause).await;
            pause *= 2;
        }
    }

    /// Who may read orders at all: buyers their own, operators any.
    fn reader(&self, metadata: &tonic::metadata::MetadataMap) -> Result<Identity, Error> {
        let caller = self.callers.known(metadata)?;
        if !caller.scopes.operator {
            caller.require_buyer()?;
        }
        Ok(caller)
    }

    /// The order, when it is there and this caller's to see; the same NOT_FOUND otherwise (E39).
    async fn visible(&self, id: OrderId, caller: &Identity) -> Result<Order, Error> {
        let order = self.finder.find(id).await?;
        order.filter(|order| may_see(caller, order)).ok_or_else(|| Error::not_found("order"))
    }

    fn follower(&self, id: OrderId) -> Result<Follower, Error> {
        Ok(Follower::new(id, self.watchers.watch(id)?, self.finder.clone()))
    }
}

/// Buyers their own, operators any (I11).
fn may_see(caller: &Identity, order: &Order) -> bool {
    caller.scopes.operator || order.buyer == caller.subject.as_str()
}

/// One item's result.
fn order(result: OrderResult) -> Result<Order, Error> {
    match result.result {
        Some(order_result::Result::Order(order)) => Ok(order),
        Some(order_result::Result::Refused(refusal)) => Err(refusal.into()),
        None => Err(Error::internal("an empty result")),
    }
}

/// Says of what may have taken effect how to find out.
fn unknown(mut error: Error) -> Error {
    if matches!(error.reason, Reason::DependencyDown | Reason::DeadlineExceeded) {
        error.message.push_str("; try again with the same request_id");
    }
    error
}

fn traceparent() -> String {
    mesh::telemetry::current_traceparent().unwrap_or_default()
}

/// How long a reader wants to wait.
fn wait(asked: Option<prost_types::Duration>) -> Result<Duration, Error> {
    let Some(asked) = asked else { return Ok(Duration::ZERO) };
    match Duration::try_from(asked) {
        Ok(wait) if wait <= LONGEST_WAIT => Ok(wait),
        _ => Err(Error::invalid("wait", "must be from 0s to 30s")),
    }
}

type OrderStream = Pin<Box<dyn Stream<Item = Result<Order, Status>> + Send>>;

/// One watcher of one order.
struct Watching {
    follower: Follower,
    /// What it is to be told next; afterwards the follower knows.
    next: Option<Order>,
    ended: bool,
    life: Lifecycle,
}

impl Watching {
    async fn step(mut self) -> Option<(Result<Order, Status>, Self)> {
        if self.ended {
            return None;
        }
        let order = match self.next.take() {
            Some(first) => Ok(first),
            None => tokio::select! {
                biased;
                () = self.life.stopping() => Err(shutting_down()),
                order = self.follower.next() => order,
            },
        };
        self.ended = order.as_ref().map_or(true, |order| is_terminal(order.state()));
        Some((order.map_err(refuse), self))
    }
}

#[tonic::async_trait]
impl orders_server::Orders for Orders {
    type WatchOrderStream = OrderStream;

    async fn place_order(&self, request: Request<PlaceOrderRequest>) -> Result<Response<Order>, Status> {
        answer(self.place(request).await)
    }

    async fn get_order(&self, request: Request<GetOrderRequest>) -> Result<Response<Order>, Status> {
        answer(self.get(request).await)
    }

    async fn list_orders(&self, request: Request<ListOrdersRequest>) -> Result<Response<ListOrdersResponse>, Status> {
        answer(self.list(request).await)
    }

    async fn pay_order(&self, request: Request<PayOrderRequest>) -> Result<Response<Order>, Status> {
        answer(self.pay(request).await)
    }

    async fn cancel_order(&self, request: Request<CancelOrderRequest>) -> Result<Response<Order>, Status> {
        answer(self.cancel(request).await)
    }

    async fn watch_order(&self, request: Request<WatchOrderRequest>) -> Result<Response<OrderStream>, Status> {
        answer(self.watch(request).await)
    }
}

/// The funnel lags. The order is good and will be ready: an answer that says "try again", never a final one.
fn not_ready(state: &str) -> Error {
    let message = "the order is not ready yet; try again with the same request_id";
    Error::new(Reason::Overloaded, message).with_metadata("state", state)
}
