//! What the steps of the sagas do: each a batch, each idempotent by looking at its own effect.

use std::sync::Arc;

use proto::{Error, error::Result};

use crate::{
    calls::{Calls, is_fault},
    engine::{plan::Outcome, runner::Engine},
    refund_saga::RefundSaga,
    store::{Patch, Row},
};

pub mod late;
pub mod money;
pub mod record;
pub mod refunding;
pub mod stock;

/// What the steps of an order work with.
#[derive(Debug)]
pub struct Steps {
    /// The other services.
    pub calls: Calls,
    /// Refunds have a saga of their own.
    pub refunds: Arc<Engine<RefundSaga>>,
}

/// Turns a batch call's results into outcomes: a failed call makes all unknown, a faulty item makes itself unknown, and
/// `read` says what everything else means.
fn outcomes<T, E>(
    results: Result<Vec<Result<T>>>,
    rows: &[Row],
    mut read: impl FnMut(&Row, Result<T>) -> Outcome<E>,
) -> Vec<Outcome<E>> {
    match results {
        Ok(results) => results
            .into_iter()
            .zip(rows)
            .map(|(result, row)| match result {
                Err(error) if is_fault(&error) => Outcome::Unknown(error),
                result => read(row, result),
            })
            .collect(),
        Err(error) => rows.iter().map(|_| Outcome::Unknown(error.clone())).collect(),
    }
}

fn done<E>() -> Outcome<E> {
    Outcome::Done(Patch::default())
}

fn refused<E>(event: E, detail: impl Into<String>) -> Outcome<E> {
    Outcome::Refused(event, Patch { detail: Some(detail.into()), ..Patch::default() })
}

/// A "no" that has no meaning here: a bug or broken data. It ends up before an operator.
fn unexpected<E>(error: Error) -> Outcome<E> {
    Outcome::Unknown(error)
}
