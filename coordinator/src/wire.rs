//! Rows and messages as others read them.

use mesh::bus::Headers;
use proto::{
    Reason, timestamp,
    v1::{Order, OrderState},
};

use crate::{domain::Placed, engine::Named, order_saga::State, store::Row};

/// W3C trace context: the header's name, and its length in the only version there is.
const TRACEPARENT: &str = "traceparent";
const TRACEPARENT_LENGTH: usize = 55;

/// The order's state as its buyer sees it.
pub fn order_state(row: &Row) -> OrderState {
    match State::parse(&row.state) {
        Some(State::Placed) => OrderState::Placed,
        Some(State::AwaitingPayment) => OrderState::AwaitingPayment,
        // Money has moved, but nothing is sold before it is deducted.
        Some(State::Paying | State::Captured) => OrderState::Paying,
        Some(State::Paid) => OrderState::Paid,
        Some(State::Rejected) => OrderState::Rejected,
        // Decided; what is left is only giving back.
        Some(State::Expiring | State::Expired) => OrderState::Expired,
        Some(State::Cancelling | State::Cancelled) => OrderState::Cancelled,
        // Late money: the record stays closed until it is known what becomes of it.
        Some(State::Reacquiring | State::Refunding | State::Abandoned) => OrderState::Expired,
        Some(State::Refunded) => OrderState::Refunded,
        None => OrderState::Unspecified,
    }
}

/// Whether the saga alone tells the order's state; otherwise the record knows better.
pub fn tells_state(row: &Row) -> bool {
    !matches!(State::parse(&row.state), None | Some(State::Reacquiring | State::Refunding | State::Abandoned))
}

/// The order as its saga has it: for when its record cannot be read.
pub fn order_of(row: &Row) -> Order {
    let state = order_state(row);
    let (paid, closed) = match state {
        OrderState::Paid => (row.close_at, None),
        OrderState::Rejected | OrderState::Expired | OrderState::Cancelled | OrderState::Refunded => {
            (None, row.close_at)
        }
        _ => (None, None),
    };
    Order {
        name: row.order_id.name(),
        sale: row.sale_id.name(),
        buyer: row.buyer.to_string(),
        quantity: row.quantity,
        amount: Some((&row.amount).into()),
        state: state.into(),
        reject_reason: match row.reject_reason {
            Reason::Unspecified => String::new(),
            reason => reason.as_str_name().to_owned(),
        },
        create_time: Some(timestamp(row.create_at)),
        expire_time: Some(timestamp(row.expire_at)),
        pay_time: paid.map(timestamp),
        close_time: closed.map(timestamp),
        etag: row.version.to_string(),
    }
}

/// An order that is accepted and not locked yet.
pub fn placed_order(placed: &Placed) -> Order {
    Order {
        name: placed.order_id.name(),
        sale: placed.sale_id.name(),
        buyer: placed.buyer.to_string(),
        quantity: placed.quantity,
        amount: Some((&placed.amount).into()),
        state: OrderState::Placed.into(),
        reject_reason: String::new(),
        create_time: Some(timestamp(placed.create_at)),
        expire_time: Some(timestamp(placed.expire_at)),
        pay_time: None,
        close_time: None,
        etag: "0".to_owned(),
    }
}

/// Headers that continue a trace; none where there is none.
pub fn trace_headers(traceparent: &str) -> Headers {
    let mut headers = Headers::new();
    if !traceparent.is_empty() {
        headers.insert(TRACEPARENT.to_owned(), traceparent.to_owned());
    }
    headers
}

/// The trace that a message belongs to; empty for none, or for what cannot be one and would not fit its column.
pub fn traceparent(headers: &Headers) -> String {
    headers.get(TRACEPARENT).filter(|t| t.len() == TRACEPARENT_LENGTH && t.is_ascii()).cloned().unwrap_or_default()
}
