//! The other services, as the coordinator sees them: the same promises, kept in memory. Every unit and every cent is
//! counted, so that a test can ask where it is.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use mesh::{
    bus::{Message, SharedBus},
    clock::Clock,
};
use prost::Message as _;
use proto::{
    Error, Reason,
    internal::{order_records_server::OrderRecords, payment_result, payments_server::Payments, stock_server::Stock, *},
    subjects,
    v1::{self, OrderState},
};
use tokio::sync::Notify;
use tonic::{Request, Response, Status, async_trait};

/// Before or after a call's effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    Before,
    After,
}

/// Where a test stops the world: the call with this name hangs for ever, and whoever waits for that is told.
#[derive(Debug, Default)]
pub struct Gate {
    armed: Mutex<Option<(&'static str, When)>>,
    hit: Notify,
}

impl Gate {
    pub fn arm(&self, call: &'static str, when: When) {
        *self.armed.lock().unwrap() = Some((call, when));
    }

    pub fn disarm(&self) {
        *self.armed.lock().unwrap() = None;
    }

    /// Resolves when a call hangs at the gate; `false` when none came.
    pub async fn reached(&self) -> bool {
        tokio::time::timeout(Duration::from_secs(10), self.hit.notified()).await.is_ok()
    }

    pub async fn pass(&self, call: &'static str, when: When) {
        if *self.armed.lock().unwrap() == Some((call, when)) {
            self.hit.notify_one();
            std::future::pending::<()>().await;
        }
    }
}

/// How long an orphan grant is left alone.
pub const GRACE_MS: i64 = 5_000;

#[derive(Clone, Debug, PartialEq)]
pub struct Sale {
    pub free: i64,
    pub limit: i64,
    pub window_ms: i64,
    pub epoch: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HoldState {
    Granted,
    Locked,
    Sold,
    Released,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Hold {
    pub sale: String,
    pub buyer: String,
    pub quantity: i64,
    pub state: HoldState,
    pub epoch: i64,
    pub granted_at: i64,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    pub state: OrderState,
    pub reason: Reason,
    pub saga_version: i64,
    pub order: v1::Order,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Payment {
    pub order: String,
    pub method: String,
    pub state: PaymentState,
    pub amount: Option<Amount>,
}

/// Everything that the others know.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    pub sales: BTreeMap<String, Sale>,
    pub holds: BTreeMap<String, Hold>,
    pub records: BTreeMap<String, Record>,
    pub payments: BTreeMap<String, Payment>,
    pub voided: HashSet<String>,
    /// How often money moved, by order.
    pub captures: HashMap<String, u32>,
    pub refunds: HashMap<String, u32>,
    /// Pending charges answer a void with this.
    pub void_answer: Option<PaymentState>,
    /// How many grants were made in all.
    pub grants: u32,
    /// Calls of these names fail.
    pub down: HashSet<&'static str>,
}

/// The three services. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Fakes {
    state: Arc<Mutex<State>>,
    pub gate: Arc<Gate>,
    bus: SharedBus,
    clock: Clock,
}

impl Fakes {
    pub fn new(bus: SharedBus, clock: Clock) -> Self {
        Self { state: Arc::default(), gate: Arc::default(), bus, clock }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    async fn enter(&self, call: &'static str) -> Result<(), Status> {
        self.gate.pass(call, When::Before).await;
        if self.state().down.contains(call) {
            return Err(Error::dependency("the fake", call).into());
        }
        Ok(())
    }

    async fn leave<T>(&self, call: &'static str, answer: T) -> Result<Response<T>, Status> {
        self.gate.pass(call, When::After).await;
        Ok(Response::new(answer))
    }

    /// The provider says what became of a charge, by itself.
    pub async fn settle(&self, order: &str, outcome: PaymentState) {
        let status = {
            let mut state = self.state();
            let (id, payment) = state.payments.iter_mut().find(|(_, p)| p.order == order).expect("a charge");
            payment.state = outcome;
            let status = status(id, payment);
            if outcome == PaymentState::Captured {
                *state.captures.entry(order.to_owned()).or_default() += 1;
            }
            status
        };
        self.announce(&status).await;
    }

    pub async fn announce(&self, status: &PaymentStatus) {
        let id = format!("{}-{}", status.payment_id, status.state().as_str_name());
        let payload = PaymentSettled { status: Some(status.clone()) }.encode_to_vec().into();
        let message =
            Message { subject: subjects::PAYMENTS_SETTLED.to_owned(), id, headers: Default::default(), payload };
        self.bus.publish(subjects::PAYMENTS, vec![message]).await.pop().unwrap().unwrap();
    }
}

fn refusal(reason: Reason) -> Refusal {
    Error::new(reason, "no").into()
}

fn item(result: Result<(), Reason>) -> ItemResult {
    ItemResult {
        result: Some(match result {
            Ok(()) => item_result::Result::Done(()),
            Err(reason) => item_result::Result::Refused(refusal(reason)),
        }),
    }
}

fn grant(hold_id: &str, hold: &Hold, sale: &Sale, fresh: bool) -> Grant {
    Grant {
        hold_id: hold_id.to_owned(),
        sale_id: hold.sale.clone(),
        buyer: hold.buyer.clone(),
        quantity: hold.quantity,
        epoch: hold.epoch,
        granted_at_ms: hold.granted_at,
        fresh,
        amount: Some(Amount { currency: "EUR".to_owned(), units: 19 * hold.quantity, nanos: 0 }),
        payment_window_ms: sale.window_ms,
        kept_until_ms: hold.granted_at + GRACE_MS,
    }
}

fn status(id: &str, payment: &Payment) -> PaymentStatus {
    PaymentStatus {
        order_id: payment.order.clone(),
        payment_id: id.to_owned(),
        state: payment.state.into(),
        decline_code: if payment.state == PaymentState::Declined { "no_funds".to_owned() } else { String::new() },
        amount: payment.amount.clone(),
    }
}

impl State {
    fn acquire(&mut self, item: AcquirePermit, now: i64) -> acquire_result::Result {
        use acquire_result::Result::*;
        let Some(sale) = self.sales.get_mut(&item.sale_id) else { return Refused(refusal(Reason::NotFound)) };
        if let Some(hold) = self.holds.get(&item.hold_id).filter(|hold| hold.sale == item.sale_id) {
            return match hold.state {
                HoldState::Released => Released(()),
                _ => Granted(grant(&item.hold_id, hold, sale, false)),
            };
        }
        let theirs =
            |hold: &&Hold| hold.buyer == item.buyer && hold.sale == item.sale_id && hold.state != HoldState::Released;
        let bought: i64 = self.holds.values().filter(theirs).map(|hold| hold.quantity).sum();
        if bought + item.quantity > sale.limit {
            let last = self.holds.iter().filter(|(_, hold)| theirs(hold)).max_by_key(|(_, hold)| hold.granted_at);
            let last_hold_id = last.map(|(id, _)| id.clone()).unwrap_or_default();
            return LimitReached(internal_limit(last_hold_id));
        }
        if sale.free < item.quantity {
            let held = self.holds.values().any(|h| matches!(h.state, HoldState::Granted | HoldState::Locked));
            return Refused(refusal(if held { Reason::AllHeld } else { Reason::SoldOut }));
        }
        sale.free -= item.quantity;
        self.grants += 1;
        let hold = Hold {
            sale: item.sale_id,
            buyer: item.buyer,
            quantity: item.quantity,
            state: HoldState::Granted,
            epoch: sale.epoch,
            granted_at: now,
        };
        let granted = Granted(grant(&item.hold_id, &hold, sale, true));
        self.holds.insert(item.hold_id, hold);
        granted
    }

    fn lock(&mut self, item: &LockItem) -> lock_result::Result {
        use lock_result::Result::*;
        let epoch = self.sales.get(&item.sale_id).map_or(0, |sale| sale.epoch);
        match self.holds.get_mut(&item.hold_id).map(|hold| (hold.state, hold)) {
            Some((HoldState::Locked | HoldState::Sold, _)) => Locked(()),
            Some((HoldState::Released, _)) => Refused(refusal(Reason::PermitLapsed)),
            _ if item.refusal() != Reason::Unspecified => {
                self.bury(item);
                Refused(refusal(item.refusal()))
            }
            _ if item.grant_epoch < epoch => StaleEpoch(()),
            Some((HoldState::Granted, hold)) => {
                hold.state = HoldState::Locked;
                Locked(())
            }
            None => Refused(refusal(Reason::SoldOut)),
        }
    }

    /// What is refused is never held later.
    fn bury(&mut self, item: &LockItem) {
        let buried = Hold {
            sale: item.sale_id.clone(),
            buyer: item.buyer.clone(),
            quantity: item.quantity,
            state: HoldState::Released,
            epoch: item.grant_epoch,
            granted_at: 0,
        };
        let before = self.holds.insert(item.hold_id.clone(), buried);
        if let Some(granted) = before.filter(|hold| hold.state == HoldState::Granted) {
            self.sales.get_mut(&granted.sale).unwrap().free += granted.quantity;
        }
    }

    /// Every unit of a sale: free, granted, locked, sold.
    pub fn units(&self, sale: &str) -> (i64, i64, i64, i64) {
        let sum =
            |state| self.holds.values().filter(|h| h.sale == sale && h.state == state).map(|h| h.quantity).sum::<i64>();
        (self.sales[sale].free, sum(HoldState::Granted), sum(HoldState::Locked), sum(HoldState::Sold))
    }
}

fn internal_limit(last_hold_id: String) -> LimitReached {
    LimitReached { last_hold_id }
}

#[async_trait]
impl Stock for Fakes {
    async fn acquire_permits(
        &self,
        request: Request<AcquirePermitsRequest>,
    ) -> Result<Response<AcquirePermitsResponse>, Status> {
        self.enter("acquire").await?;
        let now = self.clock.now_ms();
        let results = {
            let mut state = self.state();
            let items = request.into_inner().items.into_iter();
            items.map(|item| AcquireResult { result: Some(state.acquire(item, now)) }).collect()
        };
        self.leave("acquire", AcquirePermitsResponse { results }).await
    }

    async fn lookup_grants(
        &self,
        request: Request<LookupGrantsRequest>,
    ) -> Result<Response<LookupGrantsResponse>, Status> {
        let state = self.state();
        let results = request.into_inner().hold_ids.into_iter().map(|id| {
            let result = match state.holds.get(&id).filter(|hold| hold.state != HoldState::Released) {
                Some(hold) => lookup_result::Result::Granted(grant(&id, hold, &state.sales[&hold.sale], false)),
                None => lookup_result::Result::Absent(()),
            };
            LookupResult { result: Some(result) }
        });
        Ok(Response::new(LookupGrantsResponse { results: results.collect() }))
    }

    async fn lock_stock(&self, request: Request<LockStockRequest>) -> Result<Response<LockStockResponse>, Status> {
        self.enter("lock").await?;
        let results = {
            let mut state = self.state();
            request.into_inner().items.iter().map(|item| LockResult { result: Some(state.lock(item)) }).collect()
        };
        self.leave("lock", LockStockResponse { results }).await
    }

    async fn release_stock(
        &self,
        request: Request<ReleaseStockRequest>,
    ) -> Result<Response<ReleaseStockResponse>, Status> {
        self.enter("release").await?;
        let results = {
            let mut state = self.state();
            let state = &mut *state;
            let results = request.into_inner().items.into_iter().map(|release| {
                let Some(hold) = state.holds.get_mut(&release.hold_id) else { return item(Ok(())) };
                match hold.state {
                    HoldState::Sold => return item(Err(Reason::IllegalState)),
                    HoldState::Released => {}
                    HoldState::Granted | HoldState::Locked => {
                        hold.state = HoldState::Released;
                        state.sales.get_mut(&hold.sale).unwrap().free += hold.quantity;
                    }
                }
                item(Ok(()))
            });
            results.collect()
        };
        self.leave("release", ReleaseStockResponse { results }).await
    }

    async fn deduct_stock(
        &self,
        request: Request<DeductStockRequest>,
    ) -> Result<Response<DeductStockResponse>, Status> {
        self.enter("deduct").await?;
        let results = {
            let mut state = self.state();
            let results =
                request.into_inner().items.into_iter().map(|deduct| match state.holds.get_mut(&deduct.hold_id) {
                    Some(hold) if matches!(hold.state, HoldState::Locked | HoldState::Sold) => {
                        hold.state = HoldState::Sold;
                        item(Ok(()))
                    }
                    _ => item(Err(Reason::IllegalState)),
                });
            results.collect()
        };
        self.leave("deduct", DeductStockResponse { results }).await
    }

    async fn get_sale(&self, request: Request<v1::GetSaleRequest>) -> Result<Response<v1::Sale>, Status> {
        let name = request.into_inner().sale;
        let id = name.trim_start_matches("sales/");
        let sale = self.state().sales.get(id).cloned().ok_or_else(|| Error::not_found("sale"))?;
        let window = Duration::from_millis(sale.window_ms.unsigned_abs());
        Ok(Response::new(v1::Sale {
            name,
            price: Some(proto::WireMoney { currency_code: "EUR".to_owned(), units: 19, nanos: 0 }),
            payment_window: Some(prost_types::Duration::try_from(window).unwrap()),
            ..Default::default()
        }))
    }

    async fn create_sale(&self, _: Request<v1::CreateSaleRequest>) -> Result<Response<v1::Sale>, Status> {
        Err(Status::unimplemented("not the coordinator's"))
    }
    async fn list_sales(&self, _: Request<v1::ListSalesRequest>) -> Result<Response<v1::ListSalesResponse>, Status> {
        Err(Status::unimplemented("not the coordinator's"))
    }
    async fn open_sale(&self, _: Request<v1::OpenSaleRequest>) -> Result<Response<v1::Sale>, Status> {
        Err(Status::unimplemented("not the coordinator's"))
    }
    async fn pause_sale(&self, _: Request<v1::PauseSaleRequest>) -> Result<Response<v1::Sale>, Status> {
        Err(Status::unimplemented("not the coordinator's"))
    }
    async fn close_sale(&self, _: Request<v1::CloseSaleRequest>) -> Result<Response<v1::Sale>, Status> {
        Err(Status::unimplemented("not the coordinator's"))
    }
    async fn adjust_stock(&self, _: Request<v1::AdjustStockRequest>) -> Result<Response<v1::StockReport>, Status> {
        Err(Status::unimplemented("not the coordinator's"))
    }
    async fn get_stock(&self, _: Request<v1::GetStockRequest>) -> Result<Response<v1::StockReport>, Status> {
        Err(Status::unimplemented("not the coordinator's"))
    }
    async fn rebuild_stock(&self, _: Request<v1::RebuildStockRequest>) -> Result<Response<v1::StockReport>, Status> {
        Err(Status::unimplemented("not the coordinator's"))
    }
    async fn reconcile_stock(
        &self,
        _: Request<v1::ReconcileStockRequest>,
    ) -> Result<Response<v1::StockReconciliation>, Status> {
        Err(Status::unimplemented("not the coordinator's"))
    }
}

#[async_trait]
impl OrderRecords for Fakes {
    async fn create_orders(
        &self,
        request: Request<CreateOrdersRequest>,
    ) -> Result<Response<CreateOrdersResponse>, Status> {
        self.enter("create").await?;
        let items = request.into_inner().items;
        let results = items.iter().map(|_| item(Ok(()))).collect();
        for record in items {
            let reason = record.reject_reason();
            let order = v1::Order {
                name: format!("orders/{}", record.order_id),
                sale: format!("sales/{}", record.sale_id),
                buyer: record.buyer.clone(),
                quantity: record.quantity,
                state: record.state,
                etag: "1".to_owned(),
                ..Default::default()
            };
            let record_state = record.state();
            self.state().records.entry(record.order_id).or_insert(Record {
                state: record_state,
                reason,
                saga_version: 0,
                order,
            });
        }
        self.leave("create", CreateOrdersResponse { results }).await
    }

    async fn transition_orders(
        &self,
        request: Request<TransitionOrdersRequest>,
    ) -> Result<Response<TransitionOrdersResponse>, Status> {
        let items = request.into_inner().items;
        let call = match items.first().map(TransitionOrder::to) {
            Some(OrderState::Paid) => "mark_paid",
            Some(OrderState::Expired | OrderState::Cancelled) => "close",
            Some(OrderState::Refunded) => "mark_refunded",
            _ => "show",
        };
        self.enter(call).await?;
        let results = {
            let mut state = self.state();
            let results = items.into_iter().map(|moved| {
                let Some(record) = state.records.get_mut(&moved.order_id) else {
                    return item(Err(Reason::NotFound));
                };
                if moved.saga_version < record.saga_version || moved.to() == record.state {
                    return item(Ok(()));
                }
                use OrderState::*;
                let legal = match record.state {
                    AwaitingPayment | Paying => true,
                    Expired | Cancelled => matches!(moved.to(), Paid | Refunded),
                    _ => false,
                };
                if !legal {
                    return item(Err(Reason::IllegalState));
                }
                record.state = moved.to();
                record.saga_version = moved.saga_version;
                record.order.state = moved.to;
                item(Ok(()))
            });
            results.collect()
        };
        self.leave(call, TransitionOrdersResponse { results }).await
    }

    async fn get_orders(&self, request: Request<GetOrdersRequest>) -> Result<Response<GetOrdersResponse>, Status> {
        let state = self.state();
        let results = request.into_inner().order_ids.into_iter().map(|id| {
            let result = match state.records.get(&id) {
                Some(record) => get_order_result::Result::Order(record.order.clone()),
                None => get_order_result::Result::Absent(()),
            };
            GetOrderResult { result: Some(result) }
        });
        Ok(Response::new(GetOrdersResponse { results: results.collect() }))
    }

    async fn list_orders(
        &self,
        _: Request<ListBuyerOrdersRequest>,
    ) -> Result<Response<v1::ListOrdersResponse>, Status> {
        Err(Status::unimplemented("not the coordinator's"))
    }
}

impl State {
    /// Charges once per payment: a status, or why not.
    fn charge(&mut self, charge: ChargeItem) -> Result<PaymentStatus, Reason> {
        if let Some(payment) = self.payments.get(&charge.payment_id) {
            return Ok(status(&charge.payment_id, payment));
        }
        let busy = |p: &Payment| {
            p.order == charge.order_id && matches!(p.state, PaymentState::Pending | PaymentState::Captured)
        };
        if self.voided.contains(&charge.order_id) || self.payments.values().any(busy) {
            return Err(Reason::IllegalState);
        }
        let outcome = match charge.payment_method.as_str() {
            "approve" | "slow" => PaymentState::Captured,
            "decline" => PaymentState::Declined,
            "hang" => PaymentState::Pending,
            _ => return Err(Reason::InvalidField),
        };
        if outcome == PaymentState::Captured {
            *self.captures.entry(charge.order_id.clone()).or_default() += 1;
        }
        let payment =
            Payment { order: charge.order_id, method: charge.payment_method, state: outcome, amount: charge.amount };
        let answer = status(&charge.payment_id, &payment);
        self.payments.insert(charge.payment_id, payment);
        Ok(answer)
    }

    fn void(&mut self, order: &str) -> PaymentStatus {
        let answer = self.void_answer;
        let theirs: Vec<_> = self.payments.iter_mut().filter(|(_, p)| p.order == order).collect();
        for (id, payment) in theirs {
            match (payment.state, answer) {
                (PaymentState::Captured, _) => return status(id, payment),
                (PaymentState::Pending, Some(answer)) => {
                    payment.state = answer;
                    if answer == PaymentState::Pending {
                        return status(id, payment);
                    }
                }
                (PaymentState::Pending, None) => return status(id, payment),
                _ => {}
            }
        }
        self.voided.insert(order.to_owned());
        PaymentStatus { order_id: order.to_owned(), state: PaymentState::Cancelled.into(), ..Default::default() }
    }
}

fn paid(result: Result<PaymentStatus, Reason>) -> PaymentResult {
    PaymentResult {
        result: Some(match result {
            Ok(status) => payment_result::Result::Status(status),
            Err(reason) => payment_result::Result::Refused(refusal(reason)),
        }),
    }
}

#[async_trait]
impl Payments for Fakes {
    async fn charge(&self, request: Request<ChargeRequest>) -> Result<Response<ChargeResponse>, Status> {
        self.enter("charge").await?;
        let mut results = Vec::new();
        for charge in request.into_inner().items {
            let slow = charge.payment_method == "slow";
            let result = self.state().charge(charge);
            if let Ok(status) = &result
                && status.state() != PaymentState::Pending
            {
                self.announce(status).await;
            }
            if slow {
                tokio::time::sleep(Duration::from_secs(2)).await;
            }
            results.push(paid(result));
        }
        self.leave("charge", ChargeResponse { results }).await
    }

    async fn resolve(&self, request: Request<ResolveRequest>) -> Result<Response<ResolveResponse>, Status> {
        let results = {
            let state = self.state();
            let ids = request.into_inner().payment_ids.into_iter();
            ids.map(|id| paid(state.payments.get(&id).map(|p| status(&id, p)).ok_or(Reason::NotFound))).collect()
        };
        self.leave("resolve", ResolveResponse { results }).await
    }

    async fn void(&self, request: Request<VoidRequest>) -> Result<Response<VoidResponse>, Status> {
        self.enter("void").await?;
        let results = {
            let mut state = self.state();
            request.into_inner().order_ids.iter().map(|order| paid(Ok(state.void(order)))).collect()
        };
        self.leave("void", VoidResponse { results }).await
    }

    async fn refund(&self, request: Request<RefundRequest>) -> Result<Response<RefundResponse>, Status> {
        self.enter("refund").await?;
        let results = {
            let mut state = self.state();
            let state = &mut *state;
            let results = request.into_inner().order_ids.into_iter().map(|order| {
                let found = state.payments.iter_mut().find(|(_, p)| {
                    p.order == order && matches!(p.state, PaymentState::Captured | PaymentState::Refunded)
                });
                paid(match found {
                    Some((id, payment)) => {
                        if payment.state == PaymentState::Captured {
                            payment.state = PaymentState::Refunded;
                            *state.refunds.entry(order.clone()).or_default() += 1;
                        }
                        Ok(status(id, payment))
                    }
                    None => Err(Reason::IllegalState),
                })
            });
            results.collect()
        };
        self.leave("refund", RefundResponse { results }).await
    }

    async fn handle_webhook(&self, _: Request<HandleWebhookRequest>) -> Result<Response<()>, Status> {
        Err(Status::unimplemented("not the coordinator's"))
    }
}
