//! Recovery's planner: sagas in, decisions out. Pure; the executor is [`runner`](super::runner).

use std::collections::BTreeMap;

use proto::OrderId;

use super::{Named, Saga, Work, plan::Retry};
use crate::store::{Postponed, Row};

/// What to do about the sagas whose turn it is.
#[derive(Debug, PartialEq)]
pub struct Decisions<St: Ord> {
    /// Do the work of this state.
    pub run: BTreeMap<St, Vec<Row>>,
    /// Leave these, and why.
    pub left: Vec<(Row, Left)>,
}

/// Why recovery leaves a saga.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// This process works on it right now.
    Running,
    /// Nothing is to be done in its state.
    Resting,
    /// Its state is not one of ours: a newer release's, which will see to it.
    Foreign,
}

/// Decides. `is_running` tells which sagas this process works on right now.
pub fn decide<S: Saga>(due: Vec<Row>, is_running: impl Fn(OrderId) -> bool) -> Decisions<S::State> {
    let mut decisions = Decisions { run: BTreeMap::new(), left: Vec::new() };
    for row in due {
        match S::State::parse(&row.state) {
            None => decisions.left.push((row, Left::Foreign)),
            Some(_) if is_running(row.saga_id) => decisions.left.push((row, Left::Running)),
            Some(state) if S::work(state) == Work::Rest => decisions.left.push((row, Left::Resting)),
            Some(state) => decisions.run.entry(state).or_default().push(row),
        }
    }
    decisions
}

/// What a failed attempt makes of a saga: tried again later, or stuck, or both.
pub fn postpone(row: &Row, retry: &Retry, error: String, now: i64) -> Postponed {
    let attempts = row.attempts.saturating_add(1);
    let stuck = attempts >= retry.attempts;
    let again = !stuck || retry.goes_on;
    Postponed {
        saga_id: row.saga_id,
        turn: row.turn(),
        attempts,
        next_attempt_at: again.then(|| now.saturating_add(retry.delay(attempts).as_millis() as i64)),
        stuck,
        last_error: error,
    }
}
