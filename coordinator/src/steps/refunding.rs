//! The steps of a refund.

use std::sync::Arc;

use proto::{
    Error, OrderId,
    error::Result,
    internal::{PaymentState, PaymentStatus, TransitionOrder},
    v1::OrderState,
};

use super::{done, outcomes, unexpected};
use crate::{calls::Calls, engine::plan::Outcome, refund_saga::Event, store::Row};

/// Gives the captured money back. Given back before is the same answer again: once per order (I4).
pub async fn give_back(calls: Arc<Calls>, rows: Vec<Row>) -> Vec<Outcome<Event>> {
    let orders: Vec<OrderId> = rows.iter().map(|row| row.order_id).collect();
    outcomes(calls.refund(&orders).await, &rows, |_, result| given_back(result))
}

/// What the answer to a refund means.
pub fn given_back(result: Result<PaymentStatus>) -> Outcome<Event> {
    match result {
        Ok(status) => match status.state() {
            PaymentState::Refunded => done(),
            PaymentState::RefundPending => Outcome::InProgress,
            other => Outcome::Unknown(Error::internal(format!("a refund answered {}", other.as_str_name()))),
        },
        Err(error) => unexpected(error),
    }
}

/// The order's record says REFUNDED.
pub async fn mark_refunded(calls: Arc<Calls>, rows: Vec<Row>) -> Vec<Outcome<Event>> {
    let orders: Vec<OrderId> = rows.iter().map(|row| row.order_id).collect();
    let sagas = match calls.store.load(&orders).await {
        Ok(sagas) => sagas,
        Err(error) => return rows.iter().map(|_| Outcome::Unknown(error.clone())).collect(),
    };
    let items = rows.iter().map(|row| refunded(row, sagas.get(&row.order_id))).collect();
    outcomes(calls.transition(items).await, &rows, |_, result| match result {
        Ok(()) => done(),
        Err(error) => unexpected(error),
    })
}

/// The record of an order whose money is back.
pub fn refunded(row: &Row, order: Option<&Row>) -> TransitionOrder {
    TransitionOrder {
        order_id: row.order_id.to_string(),
        to: OrderState::Refunded.into(),
        at_ms: row.close_at.unwrap_or(row.update_at),
        // The order's saga waits for us: its version is the newest there is.
        saga_version: order.map_or(row.version, |order| order.version),
    }
}
