//! The saga of an order: lock, charge, deduct; or give everything back.
//!
//! ```text
//!   PLACED ──> REJECTED                     (PLACED is the message in the stream: no row yet)
//!     │
//!     v            declined
//!   AWAITING_PAYMENT <───── PAYING ──────────> CAPTURED ──────> PAID
//!     │ deadline, cancel      │ declined late    ^   │ hold lost
//!     v                       v                  │   v
//!   EXPIRING, CANCELLING <────┘   a unit again  REACQUIRING ──> REFUNDING ──> REFUNDED
//!     │      └──── captured after all ───> CAPTURED  ^   no unit
//!     v                                              │
//!   EXPIRED, CANCELLED ────── late capture ──────────┘
//! ```
//!
//! CAPTURED is past the pivot: money has moved, and the only way is forward, to PAID or REFUNDED (I4). Whoever wins the
//! compare-and-set out of AWAITING_PAYMENT wins the race between paying and expiring (E23).

use crate::{
    engine::{
        IllegalTransition, Saga, Work, named,
        plan::{Plan, Policy},
    },
    steps::{Steps, late, money, record, stock},
    store::Row,
};

named! {
    /// Where an order's saga can be. The names are stored, and label metrics and logs.
    pub enum State {
        /// Accepted: the message in the stream. Never stored.
        Placed = "PLACED",
        /// A unit is held until the deadline.
        AwaitingPayment = "AWAITING_PAYMENT",
        /// A charge was recorded and may be under way.
        Paying = "PAYING",
        /// Money has moved. Only forward from here.
        Captured = "CAPTURED",
        /// Past its deadline; being given back.
        Expiring = "EXPIRING",
        /// Given back by its buyer; being given back.
        Cancelling = "CANCELLING",
        /// Money came after the hold was gone: another unit is looked for.
        Reacquiring = "REACQUIRING",
        /// There was none: the money goes back.
        Refunding = "REFUNDING",
        /// Over: the ledger had no unit.
        Rejected = "REJECTED",
        /// Over: bought.
        Paid = "PAID",
        /// Over, unless money comes late: not paid in time.
        Expired = "EXPIRED",
        /// Over, unless money comes late: given back.
        Cancelled = "CANCELLED",
        /// Over: paid too late, money returned.
        Refunded = "REFUNDED",
        /// Over for automation: past the pivot, and an operator owns what is left.
        Abandoned = "ABANDONED",
    }
}

named! {
    /// What can happen to it.
    pub enum Event {
        /// The ledger holds its units.
        Locked = "LOCKED",
        /// The ledger had none.
        LockRefused = "LOCK_REFUSED",
        /// The buyer pays; the attempt is recorded.
        PayRequested = "PAY_REQUESTED",
        /// The provider has the money.
        Captured = "CAPTURED",
        /// The provider says no, in time for another try.
        Declined = "DECLINED",
        /// The provider says no, and the deadline has passed.
        DeclinedLate = "DECLINED_LATE",
        /// The deadline has passed.
        DeadlinePassed = "DEADLINE_PASSED",
        /// The buyer gives it back.
        CancelRequested = "CANCEL_REQUESTED",
        /// Everything is given back.
        Released = "RELEASED",
        /// Units are sold, the record says so, and it is announced.
        Completed = "COMPLETED",
        /// The hold was released before it could be deducted.
        HoldLost = "HOLD_LOST",
        /// A late capture holds units again.
        Reacquired = "REACQUIRED",
        /// There was no unit for a late capture.
        NoUnit = "NO_UNIT",
        /// The money is back with its buyer.
        MoneyReturned = "MONEY_RETURNED",
        /// An operator gives up on a stuck saga.
        Abandoned = "ABANDONED",
    }
}

/// The order saga.
#[derive(Clone, Copy, Debug)]
pub struct OrderSaga;

/// Every step of an order, in order. What stands before the pivot says what undoes it.
#[rustfmt::skip] // A step a line: it is a table.
pub fn plan(policy: Policy) -> Plan<OrderSaga> {
    Plan::builder(policy)
        // These two run in the funnel, before the saga is written: the message in the stream repeats them.
        .step("lock").action(stock::lock).compensation("release", stock::release)
        .step("record").action(record::create).compensation("close", record::close)
        .step("intend").action(record::show).compensation("void", money::void)
        .pivot("charge").action(money::charge)
        .forward("deduct").action(stock::deduct)
        .forward("mark_paid").action(record::mark_paid)
        .forward("announce").action(record::announce)
        // Only for money that came late. The refund has a saga of its own and is waited for.
        .forward("reacquire").action(late::reacquire)
        .forward("refund").action(late::refund).for_ever()
        .build()
}

impl Saga for OrderSaga {
    const KIND: &'static str = "order_saga";
    const START: State = State::Placed;
    type State = State;
    type Event = Event;
    type Context = Steps;

    fn next(state: State, event: Event) -> Result<State, IllegalTransition> {
        use State::*;
        Ok(match (state, event) {
            (Placed, Event::Locked) => AwaitingPayment,
            (Placed, Event::LockRefused) => Rejected,

            (AwaitingPayment, Event::PayRequested) => Paying,
            (AwaitingPayment, Event::DeadlinePassed) => Expiring,
            (AwaitingPayment, Event::CancelRequested) => Cancelling,

            (Paying, Event::Declined) => AwaitingPayment,
            (Paying, Event::DeclinedLate) => Expiring,
            // Nothing is captured as far as anybody knows: the compensations find out first.
            (Paying, Event::Abandoned) => Cancelling,

            // The provider's word counts, whatever it said before. While the hold may still be there, deducting tells.
            (AwaitingPayment | Paying | Expiring | Cancelling, Event::Captured) => Captured,
            (Expired | Cancelled, Event::Captured) => Reacquiring,

            (Expiring, Event::Released) => Expired,
            (Cancelling, Event::Released) => Cancelled,

            (Captured, Event::Completed) => Paid,
            (Captured, Event::HoldLost) => Reacquiring,
            (Reacquiring, Event::Reacquired) => Captured,
            (Reacquiring, Event::NoUnit) => Refunding,
            (Refunding, Event::MoneyReturned) => Refunded,
            (Captured | Reacquiring | Refunding, Event::Abandoned) => Abandoned,

            _ => return Err(IllegalTransition::new(state, event)),
        })
    }

    fn work(state: State) -> Work<Event> {
        match state {
            // Only after an attempt to pay: the record must show that there may be another.
            State::AwaitingPayment => Work::Forward { steps: &["intend"], done: None },
            State::Paying => Work::Forward { steps: &["charge"], done: Some(Event::Captured) },
            State::Captured => {
                Work::Forward { steps: &["deduct", "mark_paid", "announce"], done: Some(Event::Completed) }
            }
            State::Expiring | State::Cancelling => Work::Compensate { done: Event::Released },
            State::Reacquiring => Work::Forward { steps: &["reacquire"], done: Some(Event::Reacquired) },
            State::Refunding => Work::Forward { steps: &["refund"], done: Some(Event::MoneyReturned) },
            State::Placed
            | State::Rejected
            | State::Paid
            | State::Expired
            | State::Cancelled
            | State::Refunded
            | State::Abandoned => Work::Rest,
        }
    }

    fn enter(state: State, row: &mut Row, now_ms: i64) {
        match state {
            // The funnel has just written the record.
            State::AwaitingPayment if row.version == 1 => row.next_attempt_at = None,
            // Recorded before the steps that pass it on, so that every attempt says the same.
            State::Captured | State::Expiring | State::Cancelling | State::Rejected => row.close_at = Some(now_ms),
            // A released hold is never granted again: the late one has an id of its own (E24).
            State::Reacquiring => {
                let key = row.payment_id.map(|id| id.to_string()).unwrap_or_default();
                row.hold_id = row.order_id.derive_for("late", key.as_bytes());
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Named;

    /// Every pair of a state and an event: legal as listed, or refused.
    #[test]
    fn every_pair_is_legal_as_listed_or_refused() {
        use State::*;
        let legal = [
            (Placed, Event::Locked, AwaitingPayment),
            (Placed, Event::LockRefused, Rejected),
            (AwaitingPayment, Event::PayRequested, Paying),
            (AwaitingPayment, Event::DeadlinePassed, Expiring),
            (AwaitingPayment, Event::CancelRequested, Cancelling),
            (AwaitingPayment, Event::Captured, Captured),
            (Paying, Event::Captured, Captured),
            (Paying, Event::Declined, AwaitingPayment),
            (Paying, Event::DeclinedLate, Expiring),
            (Paying, Event::Abandoned, Cancelling),
            (Expiring, Event::Released, Expired),
            (Expiring, Event::Captured, Captured),
            (Cancelling, Event::Released, Cancelled),
            (Cancelling, Event::Captured, Captured),
            (Captured, Event::Completed, Paid),
            (Captured, Event::HoldLost, Reacquiring),
            (Captured, Event::Abandoned, Abandoned),
            (Expired, Event::Captured, Reacquiring),
            (Cancelled, Event::Captured, Reacquiring),
            (Reacquiring, Event::Reacquired, Captured),
            (Reacquiring, Event::NoUnit, Refunding),
            (Reacquiring, Event::Abandoned, Abandoned),
            (Refunding, Event::MoneyReturned, Refunded),
            (Refunding, Event::Abandoned, Abandoned),
        ];
        for state in State::ALL {
            for event in Event::ALL {
                let expected = legal.iter().find(|(s, e, _)| s == state && e == event).map(|(_, _, to)| *to);
                assert_eq!(OrderSaga::next(*state, *event).ok(), expected, "{state:?} + {event:?}");
            }
        }
    }

    #[test]
    fn what_is_over_has_no_work_and_stays_over() {
        for state in [State::Rejected, State::Paid, State::Refunded, State::Abandoned] {
            assert_eq!(OrderSaga::work(state), Work::Rest);
            assert!(Event::ALL.iter().all(|event| OrderSaga::next(state, *event).is_err()), "{state:?}");
        }
    }

    #[test]
    fn nothing_returns_from_past_the_pivot() {
        let before = [State::Placed, State::AwaitingPayment, State::Paying, State::Expiring, State::Cancelling];
        for state in [State::Captured, State::Reacquiring, State::Refunding, State::Paid, State::Refunded] {
            for event in Event::ALL {
                if let Ok(next) = OrderSaga::next(state, *event) {
                    assert!(!before.contains(&next), "{state:?} + {event:?} = {next:?}");
                }
            }
        }
    }

    #[test]
    fn names_are_unique_and_read_back() {
        for state in State::ALL {
            assert_eq!(State::parse(state.name()), Some(*state));
        }
        for event in Event::ALL {
            assert_eq!(Event::parse(event.name()), Some(*event));
        }
        assert_eq!(State::parse("PONDERING"), None);
    }

    #[test]
    fn the_plan_has_every_step_that_a_state_names() {
        let plan = plan(crate::engine::tests::POLICY);
        for state in State::ALL {
            if let Work::Forward { steps, .. } = OrderSaga::work(*state) {
                steps.iter().for_each(|step| assert_eq!(plan.action(step).name, *step));
            }
        }
        let (steps, pivot) = plan.outline();
        assert_eq!(steps[pivot], "charge");
        let back: Vec<_> = plan.compensations().map(|deed| deed.name).collect();
        assert_eq!(
            back,
            ["void", "close", "release"],
            "money first: nothing is given back on an unknown payment (E29)"
        );
    }
}
