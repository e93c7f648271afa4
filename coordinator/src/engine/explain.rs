//! What an operator's verbs would do to a stuck saga, read from its plan and its transitions without running anything.
//! Pure, and made of the functions that the engine itself goes by, so that it cannot promise something else.

use super::{Named, Saga, Work, plan::Plan};

/// What would be done, and where it ends if every step succeeds. A step may still find otherwise when it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Course {
    /// Actions or compensations, in order.
    pub steps: Vec<&'static str>,
    /// Whether they are compensations.
    pub compensates: bool,
    /// The state it comes to.
    pub result: &'static str,
}

/// What each verb would do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// Whether only the way forward is left.
    pub past_pivot: bool,
    /// Putting it back to work.
    pub retry: Course,
    /// Giving it up; `None` where that is not legal.
    pub abandon: Option<Course>,
}

/// Explains a saga in `state`; `abandoned` is its kind's event for being given up.
pub fn explain<S: Saga>(plan: &Plan<S>, state: S::State, abandoned: S::Event) -> Explanation {
    let (names, pivot) = plan.outline();
    let past_pivot = match S::work(state) {
        // The pivot's own step may have happened or not: until it has answered, the saga stands before it.
        Work::Forward { steps, .. } => {
            steps.iter().all(|step| names.iter().position(|name| name == step).is_some_and(|at| at > pivot))
        }
        Work::Compensate { .. } | Work::Rest => false,
    };
    let abandon = S::next(state, abandoned).ok().map(|next| course(plan, next));
    Explanation { past_pivot, retry: course(plan, state), abandon }
}

/// The work of one state after the other, as the engine would do it, until a state has none.
fn course<S: Saga>(plan: &Plan<S>, mut state: S::State) -> Course {
    let (mut steps, mut compensates) = (Vec::new(), false);
    // No course is longer than there are states, unless it goes round in circles.
    for _ in S::State::ALL {
        let done = match S::work(state) {
            Work::Rest => None,
            Work::Forward { steps: these, done } => {
                steps.extend(these);
                done
            }
            Work::Compensate { done } => {
                steps.extend(plan.compensations().map(|deed| deed.name));
                compensates = true;
                Some(done)
            }
        };
        match done.and_then(|event| S::next(state, event).ok()) {
            Some(next) => state = next,
            None => break,
        }
    }
    Course { steps, compensates, result: state.name() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        engine::tests::POLICY,
        order_saga::{self, Event, OrderSaga, State},
    };

    fn of(state: State) -> Explanation {
        explain::<OrderSaga>(&order_saga::plan(POLICY), state, Event::Abandoned)
    }

    #[test]
    fn before_the_pivot_a_retry_goes_on_and_an_abandon_undoes_last_first() {
        let explanation = of(State::Paying);
        let to_the_end = vec!["charge", "deduct", "mark_paid", "announce"];
        let retry = Course { steps: to_the_end, compensates: false, result: "PAID" };
        let undo = Course { steps: vec!["void", "close", "release"], compensates: true, result: "CANCELLED" };
        assert_eq!(explanation, Explanation { past_pivot: false, retry, abandon: Some(undo) });
    }

    #[test]
    fn past_the_pivot_an_abandon_does_nothing_more() {
        let explanation = of(State::Captured);
        let retry = Course { steps: vec!["deduct", "mark_paid", "announce"], compensates: false, result: "PAID" };
        let nothing = Course { steps: vec![], compensates: false, result: "ABANDONED" };
        assert_eq!(explanation, Explanation { past_pivot: true, retry, abandon: Some(nothing) });
    }

    #[test]
    fn what_is_being_undone_cannot_be_abandoned() {
        let explanation = of(State::Expiring);
        assert_eq!(explanation.retry.result, "EXPIRED");
        assert!(explanation.retry.compensates && explanation.abandon.is_none());
    }
}
