//! What an order record is and which moves it may make. Pure: no database, no wire, no clock.
//!
//! ```text
//!              ┌────────────────────────────┐
//!              v                            │ declined
//!   AWAITING_PAYMENT ──────────────────> PAYING ──> PAID
//!        │     └──> EXPIRED, CANCELLED <────┘        ^
//!        │                 │ late money              │
//!        │                 ├─────────────────────────┘  a unit was found
//!        └─────────────────┴──> REFUNDED                none was
//!   REJECTED
//! ```

use proto::{BuyerId, Error, Money, OrderId, Reason, SaleId, error::Result, v1::OrderState};

/// One order as its buyer sees it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Record {
    /// The key.
    pub order_id: OrderId,
    /// Whose it is.
    pub buyer: BuyerId,
    /// Of which sale.
    pub sale_id: SaleId,
    /// How many units.
    pub quantity: i64,
    /// For how much, fixed when it was placed (E32).
    pub amount: Money,
    /// Where it is.
    pub state: OrderState,
    /// Why, when REJECTED.
    pub reject_reason: Option<Reason>,
    /// When its permit was granted, Unix milliseconds.
    pub create_at_ms: i64,
    /// Until when it can be paid.
    pub expire_at_ms: i64,
    /// When it was paid.
    pub pay_at_ms: Option<i64>,
    /// When it ended unpaid.
    pub close_at_ms: Option<i64>,
    /// Grows with every change that its buyer can see: the etag.
    pub version: i64,
    /// The newest saga version that was seen.
    pub saga_version: i64,
}

/// A move that the saga has made and the record follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transition {
    /// Whose.
    pub order_id: OrderId,
    /// Where to.
    pub to: OrderState,
    /// When it happened, Unix milliseconds.
    pub at_ms: i64,
    /// The saga's version after it.
    pub saga_version: i64,
}

/// What a transition did to a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing: seen before, or older than what was seen.
    None,
    /// The state was the same, but the saga has moved on: older transitions are stale from now on.
    Noted,
    /// The buyer sees another order.
    Moved,
}

impl Record {
    /// Follows a transition of the saga.
    ///
    /// The saga's version decides before legality does: transitions may arrive late and in any order, and one that
    /// the record has overtaken is done, not wrong (I10).
    pub fn apply(&mut self, transition: &Transition) -> Result<Change> {
        if transition.saga_version < self.saga_version {
            return Ok(Change::None);
        }
        if transition.to == self.state {
            let noted = transition.saga_version > self.saga_version;
            self.saga_version = transition.saga_version;
            return Ok(if noted { Change::Noted } else { Change::None });
        }
        if !is_legal(self.state, transition.to) {
            let (from, to) = (self.state.as_str_name(), transition.to.as_str_name());
            return Err(Error::illegal_state(from, format!("an order that is {from} cannot become {to}")));
        }
        match transition.to {
            OrderState::Paid => {
                self.pay_at_ms = Some(transition.at_ms);
                self.close_at_ms = None;
            }
            OrderState::Expired | OrderState::Cancelled => self.close_at_ms = Some(transition.at_ms),
            // It may have been closed before the money came.
            OrderState::Refunded => self.close_at_ms = self.close_at_ms.or(Some(transition.at_ms)),
            _ => {}
        }
        self.state = transition.to;
        self.saga_version = transition.saga_version;
        self.version += 1;
        Ok(Change::Moved)
    }
}

/// The record follows a saga that was already checked, so it may skip PAYING when that transition is still on its
/// way; what it never does is leave REJECTED, PAID or REFUNDED.
fn is_legal(from: OrderState, to: OrderState) -> bool {
    use OrderState::*;
    match from {
        AwaitingPayment => matches!(to, Paying | Paid | Expired | Cancelled | Refunded),
        Paying => matches!(to, AwaitingPayment | Paid | Expired | Cancelled | Refunded),
        // Money that came too late: a unit was found again, or the money went back (E24).
        Expired | Cancelled => matches!(to, Paid | Refunded),
        Paid | Refunded | Rejected | Placed | Unspecified => false,
    }
}

#[cfg(test)]
mod tests {
    use OrderState::*;

    use super::*;

    fn record(state: OrderState) -> Record {
        let buyer = BuyerId::parse("alice").unwrap();
        Record {
            order_id: OrderId::derive(&buyer, &proto::RequestId::random()),
            buyer,
            sale_id: SaleId::parse("sale", "s").unwrap(),
            quantity: 1,
            amount: Money::from_parts("amount", "EUR", 19, 990_000_000).unwrap(),
            state,
            reject_reason: None,
            create_at_ms: 1_000,
            expire_at_ms: 2_000,
            pay_at_ms: None,
            close_at_ms: None,
            version: 1,
            saga_version: 0,
        }
    }

    fn to(record: &Record, to: OrderState, saga_version: i64) -> Transition {
        Transition { order_id: record.order_id, to, at_ms: 1_000 + saga_version, saga_version }
    }

    #[test]
    fn every_pair_of_states_is_legal_or_refused_on_purpose() {
        let legal = [
            (AwaitingPayment, Paying),
            (AwaitingPayment, Paid),
            (AwaitingPayment, Expired),
            (AwaitingPayment, Cancelled),
            (AwaitingPayment, Refunded),
            (Paying, AwaitingPayment),
            (Paying, Paid),
            (Paying, Expired),
            (Paying, Cancelled),
            (Paying, Refunded),
            (Expired, Paid),
            (Expired, Refunded),
            (Cancelled, Paid),
            (Cancelled, Refunded),
        ];
        let all = [Placed, AwaitingPayment, Paying, Paid, Rejected, Expired, Cancelled, Refunded];
        for from in all {
            for target in all.into_iter().filter(|target| *target != from) {
                let mut moved = record(from);
                let before = moved.clone();
                match moved.apply(&to(&before, target, 1)) {
                    Ok(change) => {
                        assert!(legal.contains(&(from, target)), "{from:?} -> {target:?}");
                        assert_eq!((change, moved.state, moved.version), (Change::Moved, target, 2));
                    }
                    Err(error) => {
                        assert!(!legal.contains(&(from, target)), "{from:?} -> {target:?}: {error}");
                        assert_eq!(error.reason, Reason::IllegalState);
                        assert_eq!(error.metadata["state"], from.as_str_name());
                        assert_eq!(moved, before, "a refused move changes nothing");
                    }
                }
            }
        }
    }

    #[test]
    fn e22_a_replay_in_any_order_ends_where_the_saga_did() {
        let start = record(AwaitingPayment);
        let history =
            [to(&start, Paying, 1), to(&start, AwaitingPayment, 2), to(&start, Paying, 3), to(&start, Paid, 4)];
        let mut end = start.clone();
        for transition in &history {
            end.apply(transition).unwrap();
        }
        assert_eq!((end.state, end.pay_at_ms), (Paid, Some(1_004)));
        let mut again = end.clone();
        for transition in history.iter().chain(history.iter().rev()) {
            assert_eq!(again.apply(transition).unwrap(), Change::None);
        }
        assert_eq!(again, end);
    }

    #[test]
    fn an_overtaken_transition_is_dropped_also_when_the_state_did_not_change() {
        let mut record = record(AwaitingPayment);
        let (paying, declined) = (to(&record, Paying, 1), to(&record, AwaitingPayment, 2));
        assert_eq!(record.apply(&declined).unwrap(), Change::Noted);
        assert_eq!(record.apply(&paying).unwrap(), Change::None);
        assert_eq!((record.state, record.version), (AwaitingPayment, 1));
    }

    #[test]
    fn e24_late_money_reopens_or_refunds_a_closed_order() {
        let mut closed = record(AwaitingPayment);
        closed.apply(&to(&closed.clone(), Expired, 1)).unwrap();
        assert_eq!(closed.close_at_ms, Some(1_001));
        let mut paid = closed.clone();
        paid.apply(&to(&closed, Paid, 2)).unwrap();
        assert_eq!((paid.pay_at_ms, paid.close_at_ms), (Some(1_002), None));
        let mut refunded = closed.clone();
        refunded.apply(&to(&closed, Refunded, 2)).unwrap();
        assert_eq!((refunded.pay_at_ms, refunded.close_at_ms), (None, Some(1_001)));
    }
}
