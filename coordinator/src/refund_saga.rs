//! The saga of a refund: money goes back once, then the order says so. Forward only: its first step is the pivot.

use crate::{
    calls::Calls,
    engine::{
        IllegalTransition, Saga, Work, named,
        plan::{Plan, Policy},
    },
    steps::refunding,
    store::Row,
};

named! {
    /// Where a refund can be. The names are stored, and label metrics and logs.
    pub enum State {
        /// Wanted. Never stored.
        Wanted = "WANTED",
        /// The provider is asked.
        Returning = "RETURNING",
        /// The money is back; the record must say so.
        Returned = "RETURNED",
        /// Over.
        Closed = "CLOSED",
        /// Over for automation: an operator owns what is left.
        GivenUp = "GIVEN_UP",
    }
}

named! {
    /// What can happen to it.
    pub enum Event {
        /// An order needs it.
        Requested = "REQUESTED",
        /// The provider has given the money back.
        Returned = "RETURNED",
        /// The record says so.
        Recorded = "RECORDED",
        /// An operator gives up on a stuck refund.
        Abandoned = "ABANDONED",
    }
}

/// The refund saga.
#[derive(Clone, Copy, Debug)]
pub struct RefundSaga;

/// Every step of a refund, in order.
#[rustfmt::skip] // A step a line: it is a table.
pub fn plan(policy: Policy) -> Plan<RefundSaga> {
    Plan::builder(policy)
        .pivot("return").action(refunding::give_back)
        .forward("mark_refunded").action(refunding::mark_refunded)
        .build()
}

impl Saga for RefundSaga {
    const KIND: &'static str = "refund_saga";
    const START: State = State::Wanted;
    type State = State;
    type Event = Event;
    type Context = Calls;

    fn next(state: State, event: Event) -> Result<State, IllegalTransition> {
        Ok(match (state, event) {
            (State::Wanted, Event::Requested) => State::Returning,
            (State::Returning, Event::Returned) => State::Returned,
            (State::Returned, Event::Recorded) => State::Closed,
            (State::Returning | State::Returned, Event::Abandoned) => State::GivenUp,
            _ => return Err(IllegalTransition::new(state, event)),
        })
    }

    fn work(state: State) -> Work<Event> {
        match state {
            State::Returning => Work::Forward { steps: &["return"], done: Some(Event::Returned) },
            State::Returned => Work::Forward { steps: &["mark_refunded"], done: Some(Event::Recorded) },
            State::Wanted | State::Closed | State::GivenUp => Work::Rest,
        }
    }

    fn enter(state: State, row: &mut Row, now_ms: i64) {
        if state == State::Returned {
            row.close_at = Some(now_ms);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Named;

    #[test]
    fn every_pair_is_legal_as_listed_or_refused() {
        let legal = [
            (State::Wanted, Event::Requested, State::Returning),
            (State::Returning, Event::Returned, State::Returned),
            (State::Returned, Event::Recorded, State::Closed),
            (State::Returning, Event::Abandoned, State::GivenUp),
            (State::Returned, Event::Abandoned, State::GivenUp),
        ];
        for state in State::ALL {
            for event in Event::ALL {
                let expected = legal.iter().find(|(s, e, _)| s == state && e == event).map(|(_, _, to)| *to);
                assert_eq!(RefundSaga::next(*state, *event).ok(), expected, "{state:?} + {event:?}");
            }
        }
    }

    #[test]
    fn it_only_goes_forward() {
        let plan = plan(crate::engine::tests::POLICY);
        assert_eq!(plan.outline(), (vec!["return", "mark_refunded"], 0));
        assert_eq!(plan.compensations().count(), 0);
    }
}
