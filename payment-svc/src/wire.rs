//! Between the wire and the domain: what comes in is checked here once, and every fault names its field.

use bytes::Bytes;
use prost::Message;
use proto::{
    BuyerId, Error, Money, OrderId,
    error::Result,
    internal::{Amount, ChargeItem, PaymentResult, PaymentSettled, PaymentState, PaymentStatus, payment_result},
};

use crate::domain::{Answer, Charge, NewCharge};

/// A charge to begin, and of which order.
pub fn charge(item: ChargeItem) -> Result<(OrderId, NewCharge)> {
    let amount = item.amount.as_ref().ok_or_else(|| Error::invalid("amount", "must be given"))?;
    let new = NewCharge {
        payment_id: item.payment_id.parse()?,
        buyer: BuyerId::parse(&item.buyer)?,
        amount: Money::try_from(amount)?,
        method: item.payment_method,
    };
    Ok((OrderId::parse("order_id", &item.order_id)?, new))
}

/// One item's result. An order without charges has a state and nothing else.
pub fn result(order_id: &str, answer: Result<Answer>) -> PaymentResult {
    let result = match answer {
        Ok(Answer { state, charge: Some(charge), .. }) => payment_result::Result::Status(status(&charge, state)),
        Ok(Answer { state, charge: None, .. }) => {
            let status = PaymentStatus { order_id: order_id.to_owned(), state: state.into(), ..Default::default() };
            payment_result::Result::Status(status)
        }
        Err(error) => payment_result::Result::Refused(error.into()),
    };
    PaymentResult { result: Some(result) }
}

/// The announcement of an outcome: its message id and body.
pub fn settled(charge: &Charge) -> (String, Bytes) {
    let id = format!("{}-{}", charge.payment_id, charge.state.as_str_name());
    let message = PaymentSettled { status: Some(status(charge, charge.state)) };
    (id, Bytes::from(message.encode_to_vec()))
}

fn status(charge: &Charge, state: PaymentState) -> PaymentStatus {
    PaymentStatus {
        order_id: charge.order_id.to_string(),
        payment_id: charge.payment_id.to_string(),
        state: state.into(),
        decline_code: charge.decline_code.clone().unwrap_or_default(),
        amount: Some(Amount::from(&charge.amount)),
    }
}
