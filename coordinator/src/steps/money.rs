//! Money: the charge is the pivot, and voiding it is what undoes the intention to charge.

use std::{collections::HashMap, sync::Arc};

use proto::{
    OrderId, Reason,
    error::Result,
    internal::{ChargeItem, PaymentState, PaymentStatus},
};

use super::{Steps, done, outcomes, record, refused, unexpected};
use crate::{
    calls::{Calls, is_fault},
    engine::plan::Outcome,
    order_saga::Event,
    store::{Patch, Row},
};

/// Drives a recorded attempt to a known outcome. The buyer's own call charges by itself; this is for what that call
/// left: asks first, charges where the attempt never started, and after the deadline makes sure that it never will.
pub async fn charge(steps: Arc<Steps>, rows: Vec<Row>) -> Vec<Outcome<Event>> {
    let calls = &steps.calls;
    let now = calls.clock.now_ms();
    let (in_time, late): (Vec<Row>, Vec<Row>) = rows.iter().cloned().partition(|row| now < row.expire_at);
    let mut found: HashMap<OrderId, Outcome<Event>> = HashMap::with_capacity(rows.len());
    found.extend(late.iter().map(|row| row.saga_id).zip(void_late(calls, &late).await));

    let payments: Vec<OrderId> = in_time.iter().map(|row| row.payment_id.unwrap_or(row.order_id)).collect();
    let mut never_started = Vec::new();
    if !in_time.is_empty() {
        let asked = outcomes(calls.resolve(&payments).await, &in_time, |row, result| match result {
            Ok(status) => read_charge(row, now, &status),
            Err(error) if error.reason == Reason::NotFound => {
                never_started.push(row.clone());
                Outcome::InProgress
            }
            Err(error) => unexpected(error),
        });
        found.extend(in_time.iter().map(|row| row.saga_id).zip(asked));
    }
    if !never_started.is_empty() {
        let items = never_started.iter().map(charge_item).collect();
        let charged = outcomes(calls.charge(items).await, &never_started, |row, result| charged(row, now, result));
        found.extend(never_started.iter().map(|row| row.saga_id).zip(charged));
    }
    let charged: Vec<_> = rows.iter().map(|row| found.remove(&row.saga_id).unwrap_or(Outcome::InProgress)).collect();
    show_open(calls, &rows, &charged).await;
    charged
}

/// Lets the records of what stays open say PAYING, once. Money does not wait for it: whatever comes next brings the
/// record in line.
async fn show_open(calls: &Calls, rows: &[Row], charged: &[Outcome<Event>]) {
    let is_open = |outcome: &Outcome<Event>| matches!(outcome, Outcome::InProgress | Outcome::Unknown(_));
    let open = rows.iter().zip(charged).filter(|(row, outcome)| row.attempts == 0 && is_open(outcome));
    let items: Vec<_> = open.map(|(row, _)| record::shown(row)).collect();
    if !items.is_empty()
        && let Err(error) = calls.transition(items).await
    {
        tracing::debug!(%error, "records do not show PAYING");
    }
}

/// After the deadline nobody may be charged any more: what became of it is then known, or pending (E29).
async fn void_late(calls: &Calls, rows: &[Row]) -> Vec<Outcome<Event>> {
    if rows.is_empty() {
        return Vec::new();
    }
    let orders: Vec<OrderId> = rows.iter().map(|row| row.order_id).collect();
    let now = calls.clock.now_ms();
    outcomes(calls.void(&orders).await, rows, |row, result| match result {
        Ok(status) => read_charge(row, now, &status),
        Err(error) => unexpected(error),
    })
}

/// The recorded attempt, as the provider is asked for it.
pub fn charge_item(row: &Row) -> ChargeItem {
    ChargeItem {
        payment_id: row.payment_id.unwrap_or(row.order_id).to_string(),
        order_id: row.order_id.to_string(),
        buyer: row.buyer.to_string(),
        amount: Some((&row.amount).into()),
        payment_method: row.payment_method.clone(),
    }
}

/// What the answer to a charge means for an order that is paying. Shared by the buyer's call and recovery.
pub fn charged(row: &Row, now: i64, result: Result<PaymentStatus>) -> Outcome<Event> {
    match result {
        Ok(status) => read_charge(row, now, &status),
        Err(error) if is_fault(&error) => Outcome::Unknown(error),
        // The provider has never seen this attempt, and will not: it is taken back.
        Err(error) if matches!(error.reason, Reason::InvalidField | Reason::RequestIdReused) => {
            let patch =
                Patch { payment: Some(Default::default()), detail: Some(error.to_string()), ..Patch::default() };
            Outcome::Refused(declined(row, now), patch)
        }
        // Another charge of the order is not known yet, or it was voided: asking again tells which.
        Err(error) => Outcome::Unknown(error),
    }
}

/// What a payment's status means for an order that is paying.
pub fn read_charge(row: &Row, now: i64, status: &PaymentStatus) -> Outcome<Event> {
    match status.state() {
        PaymentState::Captured => done(),
        PaymentState::Declined | PaymentState::Cancelled => {
            let patch = Patch { decline_code: Some(decline_code(status)), ..Patch::default() };
            Outcome::Refused(declined(row, now), patch)
        }
        // By the provider itself: nobody of us refunds what is being paid. Nothing else can pay this order any more, so it
        // is over as soon as its time is.
        PaymentState::Refunded if now >= row.expire_at => Outcome::Refused(
            Event::DeclinedLate,
            Patch { decline_code: Some("refunded".to_owned()), ..Patch::default() },
        ),
        PaymentState::Pending | PaymentState::Unspecified | PaymentState::RefundPending | PaymentState::Refunded => {
            Outcome::InProgress
        }
    }
}

/// Why; never empty, since that means "not declined".
pub fn decline_code(status: &PaymentStatus) -> String {
    match (status.decline_code.as_str(), status.state()) {
        ("", PaymentState::Cancelled) => "cancelled".to_owned(),
        ("", _) => "declined".to_owned(),
        (code, _) => code.chars().take(64).collect(),
    }
}

/// Declined in time leaves the units held for another try (E30).
pub fn declined(row: &Row, now: i64) -> Event {
    if now < row.expire_at { Event::Declined } else { Event::DeclinedLate }
}

/// Makes sure that the order can no longer be charged. An order that nobody tried to pay has nothing to void: an attempt
/// is recorded before it is made.
pub async fn void(steps: Arc<Steps>, rows: Vec<Row>) -> Vec<Outcome<Event>> {
    let tried: Vec<Row> = rows.iter().filter(|row| row.payment_id.is_some()).cloned().collect();
    if tried.is_empty() {
        return rows.iter().map(|_| done()).collect();
    }
    let orders: Vec<OrderId> = tried.iter().map(|row| row.order_id).collect();
    let voided = outcomes(steps.calls.void(&orders).await, &tried, |_, result| voided(result));
    let mut voided: HashMap<OrderId, Outcome<Event>> = tried.iter().map(|row| row.saga_id).zip(voided).collect();
    rows.iter().map(|row| voided.remove(&row.saga_id).unwrap_or_else(done)).collect()
}

/// What the answer to a void means for an order that is given back.
pub fn voided(result: Result<PaymentStatus>) -> Outcome<Event> {
    match result {
        Ok(status) => match status.state() {
            PaymentState::Cancelled | PaymentState::Declined => done(),
            PaymentState::Captured => refused(Event::Captured, "captured before it could be voided"),
            // Nothing is resold on an unknown payment (E29).
            PaymentState::Pending | PaymentState::Unspecified => Outcome::InProgress,
            PaymentState::RefundPending | PaymentState::Refunded => done(),
        },
        Err(error) => unexpected(error),
    }
}
