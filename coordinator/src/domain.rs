//! What an order is before it has a saga, and what its buyer may do with it after. Pure.

use std::time::Duration;

use proto::{
    BuyerId, Error, Money, OrderId, Reason, RequestId, SaleId,
    error::Result,
    internal::{AcceptOrder, AcquirePermit, Grant, OrderPlaced, PayOrderItem},
};

use crate::{
    engine::{Named, Saga},
    order_saga::{OrderSaga, State},
    store::Row,
    wire::order_state,
};

/// More than any sale's per-buyer limit.
const MAX_QUANTITY: i64 = 1_000_000;
/// What fits the column.
const MAX_METHOD: usize = 128;

/// The refund's saga of an order: the same every time.
pub fn refund_of(order: OrderId) -> OrderId {
    order.derive_for("refund", b"")
}

/// What a buyer asks for.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Derived: a retry is the same order.
    pub order_id: OrderId,
    /// Of which sale.
    pub sale_id: SaleId,
    /// For whom.
    pub buyer: BuyerId,
    /// How many units.
    pub quantity: i64,
}

impl Wanted {
    /// Checks a request.
    pub fn parse(item: &AcceptOrder) -> Result<Self> {
        let sale_id = SaleId::parse("sale", &item.sale_id)?;
        let buyer = BuyerId::parse(&item.buyer)?;
        let request = RequestId::parse("request_id", &item.request_id)?;
        if !(1..=MAX_QUANTITY).contains(&item.quantity) {
            return Err(Error::invalid("quantity", format!("must be from 1 to {MAX_QUANTITY}")));
        }
        let order_id = OrderId::derive(&buyer, &request);
        Ok(Self { order_id, sale_id, buyer, quantity: item.quantity })
    }

    /// The permit that it needs.
    pub fn permit(&self) -> AcquirePermit {
        AcquirePermit {
            hold_id: self.order_id.to_string(),
            sale_id: self.sale_id.to_string(),
            buyer: self.buyer.to_string(),
            quantity: self.quantity,
        }
    }

    /// The same request_id must mean the same order.
    pub fn check_same(&self, sale_id: &SaleId, quantity: i64) -> Result<()> {
        if *sale_id == self.sale_id && quantity == self.quantity {
            Ok(())
        } else {
            Err(Error::new(Reason::RequestIdReused, "request_id was used for another order"))
        }
    }
}

/// An accepted order, as its message in the stream has it.
#[derive(Clone, Debug, PartialEq)]
pub struct Placed {
    /// The order.
    pub order_id: OrderId,
    /// Of which sale.
    pub sale_id: SaleId,
    /// Whose.
    pub buyer: BuyerId,
    /// How many units.
    pub quantity: i64,
    /// What they cost together; the server's word (E32).
    pub amount: Money,
    /// The epoch of its grant.
    pub grant_epoch: i64,
    /// When it was granted, so that every retry says the same.
    pub create_at: i64,
    /// Until when it can be paid.
    pub expire_at: i64,
}

impl Placed {
    /// The wish that it answers.
    pub fn wanted(&self) -> Wanted {
        let Self { order_id, sale_id, buyer, quantity, .. } = self.clone();
        Wanted { order_id, sale_id, buyer, quantity }
    }

    /// The order that a grant stands for.
    pub fn from_grant(grant: &Grant) -> Result<Self> {
        let amount = grant.amount.as_ref().ok_or_else(|| Error::internal("a grant without an amount"))?;
        Ok(Self {
            order_id: grant.hold_id.parse()?,
            sale_id: SaleId::parse("sale", &grant.sale_id)?,
            buyer: BuyerId::parse(&grant.buyer)?,
            quantity: grant.quantity,
            amount: Money::try_from(amount)?,
            grant_epoch: grant.epoch,
            create_at: grant.granted_at_ms,
            expire_at: grant.granted_at_ms.saturating_add(grant.payment_window_ms),
        })
    }

    /// Reads a message. What it refuses can never become an order: a poison message (E20).
    pub fn from_message(message: &OrderPlaced) -> Result<Self> {
        let amount = message.amount.as_ref().ok_or_else(|| Error::invalid("amount", "must be given"))?;
        if message.quantity < 1 {
            return Err(Error::invalid("quantity", "must be at least 1"));
        }
        if message.create_at_ms < 0 || message.expire_at_ms < message.create_at_ms {
            return Err(Error::invalid("expire_at_ms", "must not be before create_at_ms"));
        }
        Ok(Self {
            order_id: OrderId::parse("order_id", &message.order_id)?,
            sale_id: SaleId::parse("sale_id", &message.sale_id)?,
            buyer: BuyerId::parse(&message.buyer)?,
            quantity: message.quantity,
            amount: Money::try_from(amount)?,
            grant_epoch: message.grant_epoch,
            create_at: message.create_at_ms,
            expire_at: message.expire_at_ms,
        })
    }

    /// Its message.
    pub fn message(&self) -> OrderPlaced {
        OrderPlaced {
            order_id: self.order_id.to_string(),
            sale_id: self.sale_id.to_string(),
            buyer: self.buyer.to_string(),
            quantity: self.quantity,
            amount: Some((&self.amount).into()),
            grant_epoch: self.grant_epoch,
            create_at_ms: self.create_at,
            expire_at_ms: self.expire_at,
        }
    }

    /// The lane that it waits in.
    pub fn window(&self) -> Duration {
        Duration::from_millis((self.expire_at - self.create_at).max(0).unsigned_abs())
    }

    /// Its saga before the first transition.
    pub fn row(&self, traceparent: String) -> Row {
        Row {
            saga_id: self.order_id,
            kind: OrderSaga::KIND.to_owned(),
            state: OrderSaga::START.name().to_owned(),
            version: 0,
            stuck: false,
            attempts: 0,
            next_attempt_at: None,
            last_error: String::new(),
            order_id: self.order_id,
            sale_id: self.sale_id.clone(),
            buyer: self.buyer.clone(),
            quantity: self.quantity,
            amount: self.amount.clone(),
            hold_id: self.order_id,
            grant_epoch: self.grant_epoch,
            expire_at: self.expire_at,
            reject_reason: Reason::Unspecified,
            payment_id: None,
            payment_method: String::new(),
            payment_request_id: String::new(),
            decline_code: String::new(),
            traceparent,
            close_at: None,
            create_at: self.create_at,
            update_at: self.create_at,
        }
    }
}

/// Whether a buyer at its limit gets this order back instead of a refusal (E37).
pub fn is_open(row: &Row) -> bool {
    matches!(State::parse(&row.state), Some(State::AwaitingPayment | State::Paying | State::Captured))
}

/// A buyer's attempt to pay.
#[derive(Clone, Debug)]
pub struct PayRequest {
    /// Which order.
    pub order_id: OrderId,
    /// Who pays.
    pub buyer: BuyerId,
    /// With what.
    pub method: String,
    /// The buyer's idempotency key.
    pub request_id: RequestId,
}

impl PayRequest {
    /// Checks a request.
    pub fn parse(item: &PayOrderItem) -> Result<Self> {
        let order_id = OrderId::parse("order", &item.order_id)?;
        let buyer = BuyerId::parse(&item.buyer)?;
        let request_id = RequestId::parse("request_id", &item.request_id)?;
        let method = item.payment_method.clone();
        if method.is_empty() {
            return Err(Error::invalid("payment_method", "must be given"));
        }
        if method.len() > MAX_METHOD || method.chars().any(char::is_control) {
            return Err(Error::invalid("payment_method", "must be 1 to 128 bytes without control characters"));
        }
        Ok(Self { order_id, buyer, method, request_id })
    }

    /// The provider's idempotency key: one per order and attempt.
    pub fn payment_id(&self) -> OrderId {
        self.order_id.derive_for("payment", self.request_id.as_bytes())
    }
}

/// What paying comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pay {
    /// Record the attempt, then charge.
    Charge,
    /// The attempt was made before: the order as it is.
    Repeat,
}

/// Decides whether an order can be paid by this request, now.
pub fn decide_pay(row: &Row, request: &PayRequest, now: i64) -> Result<Pay> {
    check_owner(row, &request.buyer)?;
    let state = State::parse(&row.state);
    if row.payment_request_id == request.request_id.to_string() {
        if row.payment_method != request.method {
            return Err(Error::new(Reason::RequestIdReused, "request_id was used with another payment method"));
        }
        if !row.decline_code.is_empty() {
            return Err(declined(&row.decline_code));
        }
        if matches!(state, Some(State::Paying | State::Captured | State::Paid)) {
            return Ok(Pay::Repeat);
        }
    }
    match state {
        Some(State::AwaitingPayment) if now < row.expire_at => Ok(Pay::Charge),
        Some(State::AwaitingPayment) => Err(Error::illegal_state("EXPIRED", "an expired order cannot be paid")),
        _ => {
            let state = order_state(row).as_str_name();
            Err(Error::illegal_state(state, format!("an order that is {state} cannot be paid")))
        }
    }
}

/// The provider said no.
pub fn declined(code: &str) -> Error {
    Error::new(Reason::PaymentDeclined, "the payment was declined").with_metadata("declineCode", code)
}

/// Another's order is not there (E39).
pub fn check_owner(row: &Row, buyer: &BuyerId) -> Result<()> {
    if row.buyer == *buyer { Ok(()) } else { Err(Error::not_found("order")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(state: State) -> Row {
        let buyer = BuyerId::parse("alice").unwrap();
        let placed = Placed {
            order_id: OrderId::derive(&buyer, &RequestId::random()),
            sale_id: SaleId::parse("sale", "s").unwrap(),
            buyer,
            quantity: 1,
            amount: Money::from_parts("amount", "EUR", 19, 990_000_000).unwrap(),
            grant_epoch: 1,
            create_at: 1_000,
            expire_at: 2_000,
        };
        Row { state: state.name().to_owned(), ..placed.row(String::new()) }
    }

    fn request(row: &Row) -> PayRequest {
        PayRequest {
            order_id: row.order_id,
            buyer: row.buyer.clone(),
            method: "card".to_owned(),
            request_id: RequestId::random(),
        }
    }

    fn attempted(state: State) -> (Row, PayRequest) {
        let mut row = row(state);
        let request = request(&row);
        row.payment_request_id = request.request_id.to_string();
        row.payment_method = request.method.clone();
        (row, request)
    }

    #[test]
    fn only_a_held_order_can_be_paid_and_only_in_time() {
        let held = row(State::AwaitingPayment);
        assert_eq!(decide_pay(&held, &request(&held), 1_999), Ok(Pay::Charge));
        let late = decide_pay(&held, &request(&held), 2_000).unwrap_err();
        assert_eq!((late.reason, late.metadata["state"].as_str()), (Reason::IllegalState, "EXPIRED"));
        for state in State::ALL.iter().filter(|state| **state != State::AwaitingPayment) {
            let row = row(*state);
            assert_eq!(decide_pay(&row, &request(&row), 1_500).unwrap_err().reason, Reason::IllegalState, "{state:?}");
        }
    }

    #[test]
    fn e28_the_same_click_again_charges_nothing() {
        for state in [State::Paying, State::Captured, State::Paid] {
            let (row, request) = attempted(state);
            assert_eq!(decide_pay(&row, &request, 1_500), Ok(Pay::Repeat), "{state:?}");
            let other = PayRequest { method: "cash".to_owned(), ..request };
            assert_eq!(decide_pay(&row, &other, 1_500).unwrap_err().reason, Reason::RequestIdReused);
        }
    }

    #[test]
    fn e30_a_declined_attempt_stays_declined_and_another_may_be_made() {
        let (mut row, request) = attempted(State::AwaitingPayment);
        row.decline_code = "no_funds".to_owned();
        let error = decide_pay(&row, &request, 1_500).unwrap_err();
        assert_eq!((error.reason, error.metadata["declineCode"].as_str()), (Reason::PaymentDeclined, "no_funds"));
        let another = PayRequest { request_id: RequestId::random(), ..request };
        assert_eq!(decide_pay(&row, &another, 1_500), Ok(Pay::Charge));
    }

    #[test]
    fn e39_anothers_order_is_not_there() {
        let row = row(State::AwaitingPayment);
        let stranger = PayRequest { buyer: BuyerId::parse("mallory").unwrap(), ..request(&row) };
        assert_eq!(decide_pay(&row, &stranger, 1_500).unwrap_err().reason, Reason::NotFound);
    }

    #[test]
    fn a_message_is_read_as_it_was_written_and_nonsense_is_refused() {
        let row = row(State::Placed);
        let placed = Placed {
            order_id: row.order_id,
            sale_id: row.sale_id,
            buyer: row.buyer,
            quantity: 2,
            amount: row.amount,
            grant_epoch: 7,
            create_at: 1_000,
            expire_at: 61_000,
        };
        let message = placed.message();
        assert_eq!(Placed::from_message(&message), Ok(placed.clone()));
        assert_eq!(placed.window(), Duration::from_secs(60));
        for poison in [
            OrderPlaced { order_id: "x".to_owned(), ..message.clone() },
            OrderPlaced { quantity: 0, ..message.clone() },
            OrderPlaced { amount: None, ..message.clone() },
            OrderPlaced { expire_at_ms: 0, ..message.clone() },
        ] {
            assert!(Placed::from_message(&poison).is_err(), "{poison:?}");
        }
    }
}
