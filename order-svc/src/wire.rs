//! Between the wire and the domain: what comes in is checked here once, and every fault names its field.

use proto::{
    BuyerId, Error, Money, OrderId, Reason, SaleId,
    error::Result,
    internal::{ItemResult, OrderRecord, TransitionOrder, item_result},
    timestamp,
    v1::{self, OrderState},
};

use crate::domain::{Record, Transition};

/// A record to be written. `now_ms` is when a rejected one was closed.
pub fn record(item: OrderRecord, now_ms: i64) -> Result<Record> {
    let amount = item.amount.as_ref().ok_or_else(|| Error::invalid("amount", "must be given"))?;
    if item.quantity < 1 {
        return Err(Error::invalid("quantity", "must be at least 1"));
    }
    if item.create_at_ms < 0 || item.expire_at_ms < item.create_at_ms {
        return Err(Error::invalid("expire_at_ms", "must not be before create_at_ms"));
    }
    let rejected = match item.state() {
        OrderState::AwaitingPayment => false,
        OrderState::Rejected => true,
        _ => return Err(Error::invalid("state", "must be AWAITING_PAYMENT or REJECTED")),
    };
    if rejected && item.reject_reason() == Reason::Unspecified {
        return Err(Error::invalid("reject_reason", "must be given when REJECTED"));
    }
    Ok(Record {
        order_id: OrderId::parse("order_id", &item.order_id)?,
        buyer: BuyerId::parse(&item.buyer)?,
        sale_id: SaleId::parse("sale_id", &item.sale_id)?,
        quantity: item.quantity,
        amount: Money::try_from(amount)?,
        state: item.state(),
        reject_reason: rejected.then(|| item.reject_reason()),
        create_at_ms: item.create_at_ms,
        expire_at_ms: item.expire_at_ms,
        pay_at_ms: None,
        close_at_ms: rejected.then_some(now_ms),
        version: 1,
        saga_version: 0,
    })
}

/// A move to be followed.
pub fn transition(item: TransitionOrder) -> Result<Transition> {
    let to = match item.to() {
        OrderState::Unspecified | OrderState::Placed | OrderState::Rejected => {
            return Err(Error::invalid("to", "must be a state that an order moves to"));
        }
        to => to,
    };
    Ok(Transition {
        order_id: OrderId::parse("order_id", &item.order_id)?,
        to,
        at_ms: item.at_ms,
        saga_version: item.saga_version,
    })
}

/// The order as clients see it.
pub fn order(record: &Record) -> v1::Order {
    v1::Order {
        name: record.order_id.name(),
        sale: record.sale_id.name(),
        buyer: record.buyer.to_string(),
        quantity: record.quantity,
        amount: Some((&record.amount).into()),
        state: record.state.into(),
        reject_reason: record.reject_reason.map(|r| r.as_str_name().to_owned()).unwrap_or_default(),
        create_time: Some(timestamp(record.create_at_ms)),
        expire_time: Some(timestamp(record.expire_at_ms)),
        pay_time: record.pay_at_ms.map(timestamp),
        close_time: record.close_at_ms.map(timestamp),
        etag: record.version.to_string(),
    }
}

/// One item's result.
pub fn item_result(result: Result<()>) -> ItemResult {
    ItemResult {
        result: Some(match result {
            Ok(()) => item_result::Result::Done(()),
            Err(error) => item_result::Result::Refused(error.into()),
        }),
    }
}
