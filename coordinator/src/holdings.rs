//! What a saga has in its hands, read from its state alone. Pure.

use proto::v1::{
    SagaHoldings,
    saga_holdings::{Money, Units},
};

use crate::{
    engine::{Named, Saga},
    order_saga::State,
    refund_saga::{self, RefundSaga},
    store::Row,
};

/// Of this saga. A newer release's state tells nothing.
pub fn holdings(row: &Row) -> SagaHoldings {
    let known = if row.kind == RefundSaga::KIND {
        refund_saga::State::parse(&row.state).map(of_refund)
    } else {
        State::parse(&row.state).map(|state| of_order(state, row.payment_id.is_some()))
    };
    let (units, money) = known.unwrap_or_default();
    SagaHoldings {
        units: units.into(),
        quantity: row.quantity,
        hold: row.hold_id.to_string(),
        grant_epoch: row.grant_epoch,
        money: money.into(),
        amount: Some((&row.amount).into()),
        payment: row.payment_id.map(|id| id.to_string()).unwrap_or_default(),
        payment_method: row.payment_method.clone(),
        decline_code: row.decline_code.clone(),
    }
}

/// `tried` is whether there was an attempt to pay: until it is voided it may have taken money.
fn of_order(state: State, tried: bool) -> (Units, Money) {
    match state {
        State::Placed | State::Rejected | State::Expired | State::Cancelled => (Units::NoUnits, Money::NoMoney),
        State::AwaitingPayment => (Units::Held, Money::NoMoney),
        State::Paying => (Units::Held, Money::Uncertain),
        State::Captured | State::Reacquiring => (Units::Moving, Money::Captured),
        State::Expiring | State::Cancelling => (Units::Moving, if tried { Money::Uncertain } else { Money::NoMoney }),
        State::Refunding => (Units::NoUnits, Money::Returning),
        State::Paid => (Units::Sold, Money::Captured),
        State::Refunded => (Units::NoUnits, Money::Returned),
        // Wherever it stood: past the pivot, and not at its end.
        State::Abandoned => (Units::Moving, Money::Uncertain),
    }
}

fn of_refund(state: refund_saga::State) -> (Units, Money) {
    use refund_saga::State;
    let money = match state {
        State::Wanted => Money::Captured,
        State::Returning => Money::Returning,
        State::Returned | State::Closed => Money::Returned,
        State::GivenUp => Money::Uncertain,
    };
    (Units::NoUnits, money)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        engine::Work,
        order_saga::{self, OrderSaga},
    };

    #[test]
    fn what_is_over_holds_nothing_that_is_on_its_way() {
        for state in State::ALL.iter().filter(|state| OrderSaga::work(**state) == Work::Rest) {
            let (units, money) = of_order(*state, true);
            let on_its_way = units == Units::Moving || matches!(money, Money::Uncertain | Money::Returning);
            assert_eq!(on_its_way, *state == State::Abandoned, "{state:?}: an operator owns what is left");
        }
    }

    #[test]
    fn captured_is_what_the_way_forward_starts_from() {
        let plan = order_saga::plan(crate::engine::tests::POLICY);
        for state in State::ALL {
            let past = crate::engine::explain::explain(&plan, *state, order_saga::Event::Abandoned).past_pivot;
            let (_, money) = of_order(*state, true);
            assert!(!past || matches!(money, Money::Captured | Money::Returning), "{state:?}");
        }
    }
}
