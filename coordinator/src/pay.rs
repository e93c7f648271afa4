//! Paying and cancelling: the buyer's own calls.
//!
//! Paying records the attempt before it is made, charges, and goes on to the end if the provider says so at once. What
//! the provider has not decided stays PAYING and is asked again by recovery, or announced by payment-svc.

use std::{pin::pin, time::Duration};

use mesh::{
    batch::{Batcher, Limits},
    lifecycle::Lifecycle,
};
use proto::{
    BuyerId, Error, OrderId, Reason,
    error::Result,
    internal::{CancelOrderItem, ChargeItem, PayOrderItem, PaymentStatus, TransitionOrder},
    v1::{Order, OrderState},
};

use crate::{
    calls::{Calls, is_fault},
    config::Config,
    domain::{Pay, PayRequest, check_owner, decide_pay, declined},
    engine::{
        plan::Outcome,
        runner::{Change, Guard},
    },
    order_saga::{Event, OrderSaga},
    sagas::Sagas,
    steps::{money, record},
    store::{Patch, Payment, Row},
    wire::order_state,
};

/// A provider takes its time; what comes within this goes together.
const CHARGE_TURN: Duration = Duration::from_millis(10);

/// A charge that takes longer is worth showing.
const SHOW_AFTER: Duration = Duration::from_millis(100);

/// Buyers' calls on their orders. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Counter {
    calls: Calls,
    sagas: Sagas,
    charges: Batcher<ChargeItem, Result<PaymentStatus>>,
    records: Batcher<TransitionOrder, Result<()>>,
}

impl Counter {
    /// Starts the batches.
    pub fn start(config: &Config, calls: Calls, sagas: Sagas, life: &Lifecycle) -> Self {
        let limits = Limits { max_items: config.saga_batch, in_flight: config.saga_calls, ..Limits::default() };
        // A batch is as slow as its slowest charge, so whoever comes later must soon find a call of its own.
        let many = Limits { in_flight: config.charge_calls, overlap_from: 64, longest_turn: CHARGE_TURN, ..limits };
        let charges = {
            let calls = calls.clone();
            Batcher::start("charges", many, life.tasks(), move |items: Vec<ChargeItem>| {
                let calls = calls.clone();
                async move {
                    let count = items.len();
                    each(count, calls.charge(items).await)
                }
            })
        };
        let records = {
            let calls = calls.clone();
            Batcher::start("records_paying", limits, life.tasks(), move |items: Vec<TransitionOrder>| {
                let calls = calls.clone();
                async move {
                    let count = items.len();
                    each(count, calls.transition(items).await)
                }
            })
        };
        Self { calls, sagas, charges, records }
    }

    /// Pays one order. Two clicks are one charge (E28): the second finds the first one's attempt.
    pub async fn pay(&self, item: &PayOrderItem) -> Result<Order> {
        let request = PayRequest::parse(item)?;
        let mut row = self.find(request.order_id).await?;
        let paying = loop {
            match decide_pay(&row, &request, self.calls.clock.now_ms())? {
                Pay::Repeat => return Ok(self.sagas.view(&row).await),
                Pay::Charge => match self.sagas.change(attempt(&row, &request)).await? {
                    Ok(paying) => break paying,
                    // Somebody was faster: decide again on what is there now.
                    Err(rejected) => row = rejected.current.ok_or_else(|| Error::not_found("order"))?,
                },
            }
        };
        let charged = self.charge(&paying).await;
        let told = match &charged {
            Err(error) if error.reason == Reason::InvalidField => {
                Some(Error::invalid("payment_method", "is not one that the payment provider takes"))
            }
            Err(error) if !is_fault(error) => Some(error.clone()),
            _ => None,
        };
        match money::charged(&paying, self.calls.clock.now_ms(), charged) {
            Outcome::Done(patch) => {
                let after = self.move_on(&paying, Event::Captured, patch, Guard::None).await?;
                Ok(self.sagas.view(&after).await)
            }
            Outcome::Refused(event, patch) => {
                let code = patch.decline_code.clone().unwrap_or_default();
                let payment = paying.payment_id.map_or(Guard::None, Guard::Payment);
                self.move_on(&paying, event, patch, payment).await?;
                Err(told.unwrap_or_else(|| declined(&code)))
            }
            // Nobody knows yet: recovery asks again, or payment-svc announces it.
            Outcome::InProgress | Outcome::Unknown(_) => Ok(self.sagas.view(&paying).await),
        }
    }

    /// Gives one order back. Repeating it changes nothing.
    pub async fn cancel(&self, item: &CancelOrderItem) -> Result<Order> {
        let order_id = OrderId::parse("order", &item.order_id)?;
        let row = self.find(order_id).await?;
        check_owner(&row, &BuyerId::parse(&item.buyer)?)?;
        if order_state(&row) == OrderState::Cancelled {
            return Ok(self.sagas.view(&row).await);
        }
        let change = Change {
            saga_id: order_id,
            event: Event::CancelRequested,
            patch: Patch::default(),
            guard: Guard::None,
            seen: Some(row),
        };
        let after = match self.sagas.change(change).await? {
            Ok(cancelling) => self.sagas.drive(cancelling).await,
            Err(rejected) => rejected.current.ok_or_else(|| Error::not_found("order"))?,
        };
        match order_state(&after) {
            OrderState::Cancelled => Ok(self.sagas.view(&after).await),
            state => {
                let state = state.as_str_name();
                Err(Error::illegal_state(state, format!("an order that is {state} cannot be cancelled")))
            }
        }
    }

    async fn find(&self, order: OrderId) -> Result<Row> {
        self.sagas.get(order).await?.ok_or_else(|| Error::not_found("order"))
    }

    /// Charges, and lets the record show PAYING where that takes long enough for its buyer to look: most charges are
    /// decided before, and then showing it would be a write for nobody.
    async fn charge(&self, paying: &Row) -> Result<PaymentStatus> {
        let mut charge = pin!(self.charges.submit(money::charge_item(paying)));
        let show = async {
            let shown = self.records.submit(record::shown(paying)).await;
            report(shown.map_err(Error::from).and_then(|result| result));
        };
        let charged = match tokio::time::timeout(SHOW_AFTER, &mut charge).await {
            Ok(charged) => {
                let charged = charged.map_err(Error::from).and_then(|result| result);
                if is_open(&charged) {
                    show.await;
                }
                return charged;
            }
            Err(_) => futures::future::join(charge, show).await.0,
        };
        charged?
    }

    /// Records what the provider said and does what follows from it. Whoever was faster has said the same.
    async fn move_on(&self, paying: &Row, event: Event, patch: Patch, guard: Guard) -> Result<Row> {
        let change = Change { saga_id: paying.saga_id, event, patch, guard, seen: Some(paying.clone()) };
        let row = match self.sagas.change(change).await? {
            Ok(row) => row,
            Err(rejected) => rejected.current.ok_or_else(|| Error::not_found("order"))?,
        };
        Ok(self.sagas.drive(row).await)
    }
}

/// The attempt, recorded before it is made.
pub fn attempt(row: &Row, request: &PayRequest) -> Change<OrderSaga> {
    let payment = Payment {
        payment_id: Some(request.payment_id()),
        method: request.method.clone(),
        request_id: request.request_id.to_string(),
    };
    let patch = Patch { payment: Some(payment), ..Patch::default() };
    Change { saga_id: row.saga_id, event: Event::PayRequested, patch, guard: Guard::None, seen: Some(row.clone()) }
}

/// Whether the provider has not decided.
fn is_open(charged: &Result<PaymentStatus>) -> bool {
    use proto::internal::PaymentState;
    match charged {
        Ok(status) => matches!(status.state(), PaymentState::Pending | PaymentState::Unspecified),
        Err(error) => is_fault(error),
    }
}

/// The record lags behind then; whatever comes next brings it in line.
fn report(shown: Result<()>) {
    if let Err(error) = shown {
        tracing::debug!(%error, "a record does not show PAYING");
    }
}

fn each<T>(count: usize, results: Result<Vec<Result<T>>>) -> Vec<Result<T>> {
    match results {
        Ok(results) => results,
        Err(error) => (0..count).map(|_| Err(error.clone())).collect(),
    }
}
