//! The buyer-facing record, and the announcement.

use std::sync::Arc;

use mesh::bus::Message;
use prost::Message as _;
use proto::{
    Reason,
    error::Result,
    internal::{OrderPaid, OrderRecord, TransitionOrder},
    subjects,
    v1::OrderState,
};

use super::{Steps, done, outcomes, unexpected};
use crate::{
    calls::Calls,
    engine::plan::Outcome,
    order_saga::Event,
    store::Row,
    wire::{order_state, trace_headers},
};

/// Writes records that are not there yet: awaiting payment, or rejected.
pub async fn create(steps: Arc<Steps>, rows: Vec<Row>) -> Vec<Outcome<Event>> {
    let items = rows.iter().map(first).collect();
    outcomes(steps.calls.create(items).await, &rows, |_, result| match result {
        Ok(()) => done(),
        Err(error) => unexpected(error),
    })
}

/// The record of a saga that has just begun.
pub fn first(row: &Row) -> OrderRecord {
    OrderRecord {
        order_id: row.order_id.to_string(),
        sale_id: row.sale_id.to_string(),
        buyer: row.buyer.to_string(),
        quantity: row.quantity,
        amount: Some((&row.amount).into()),
        state: order_state(row).into(),
        reject_reason: row.reject_reason.into(),
        create_at_ms: row.create_at,
        expire_at_ms: row.expire_at,
    }
}

/// Shows where the saga is now: awaiting payment, or paying. Nothing hangs on it: a record that has gone on by itself
/// stays as it is.
pub async fn show(steps: Arc<Steps>, rows: Vec<Row>) -> Vec<Outcome<Event>> {
    let items = rows.iter().map(shown).collect();
    outcomes(steps.calls.transition(items).await, &rows, |_, result| was_shown(result))
}

/// What the answer to showing means: a record that has gone on by itself is shown well enough.
pub fn was_shown(result: Result<()>) -> Outcome<Event> {
    match result {
        Ok(()) => done(),
        Err(error) if error.reason == Reason::IllegalState => done(),
        Err(error) => unexpected(error),
    }
}

/// The record of a saga that may still be paid.
pub fn shown(row: &Row) -> TransitionOrder {
    TransitionOrder {
        order_id: row.order_id.to_string(),
        to: order_state(row).into(),
        at_ms: row.update_at,
        saga_version: row.version,
    }
}

/// Expired or cancelled.
pub async fn close(steps: Arc<Steps>, rows: Vec<Row>) -> Vec<Outcome<Event>> {
    moved(&steps.calls, &rows, closed).await
}

/// Paid.
pub async fn mark_paid(steps: Arc<Steps>, rows: Vec<Row>) -> Vec<Outcome<Event>> {
    moved(&steps.calls, &rows, paid).await
}

/// The record of an order that is given back.
pub fn closed(row: &Row) -> TransitionOrder {
    ended(row, order_state(row))
}

/// The record of an order that is paid.
pub fn paid(row: &Row) -> TransitionOrder {
    ended(row, OrderState::Paid)
}

fn ended(row: &Row, to: OrderState) -> TransitionOrder {
    TransitionOrder {
        order_id: row.order_id.to_string(),
        to: to.into(),
        at_ms: row.close_at.unwrap_or(row.update_at),
        saga_version: row.version,
    }
}

async fn moved(calls: &Calls, rows: &[Row], to: impl Fn(&Row) -> TransitionOrder) -> Vec<Outcome<Event>> {
    let items = rows.iter().map(to).collect();
    outcomes(calls.transition(items).await, rows, |_, result| match result {
        Ok(()) => done(),
        Err(error) => unexpected(error),
    })
}

/// Tells delivery and whoever else cares. Once per order: the order's id is the message's.
pub async fn announce(steps: Arc<Steps>, rows: Vec<Row>) -> Vec<Outcome<Event>> {
    let messages = rows
        .iter()
        .map(|row| {
            let paid = OrderPaid {
                order_id: row.order_id.to_string(),
                sale_id: row.sale_id.to_string(),
                buyer: row.buyer.to_string(),
                quantity: row.quantity,
                amount: Some((&row.amount).into()),
                paid_at_ms: row.close_at.unwrap_or(row.update_at),
            };
            Message {
                subject: subjects::ORDERS_PAID.to_owned(),
                id: row.order_id.to_string(),
                headers: trace_headers(&row.traceparent),
                payload: paid.encode_to_vec().into(),
            }
        })
        .collect();
    let published = steps.calls.publish(subjects::EVENTS, messages).await;
    published
        .into_iter()
        .map(|result| match result {
            Ok(_) => done(),
            Err(error) => Outcome::Unknown(error.into()),
        })
        .collect()
}
