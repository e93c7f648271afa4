//! The saga engine: small serialisable state machines, driven in batches.
//!
//! A kind of saga is a [`Saga`]: its states, its events, one pure function that says which transitions are legal, and
//! a [`Plan`](plan::Plan) of steps. The engine knows nothing of what a step does. Its promises:
//!
//! - **The log is the truth.** Every transition is a compare-and-set on (state, version) and a row of an append-only
//!   log, in one transaction. [`Saga::next`] decides live; [`replay`] runs the same function over the log.
//! - **Unknown is not failure.** A step whose outcome is not known is asked again; nothing is compensated on it.
//! - **At least once, and leased.** Whoever executes a saga holds it until `next_attempt_at`; after that, recovery
//!   takes it up. Two may still meet on one step, so every step must be idempotent (I10).
//! - **Compensations** retry for ever and have capacity of their own, which new orders cannot take. A step that used up
//!   its attempts leaves its saga *stuck*: a flag, an alert, and an operator's verbs. What may pass by itself, a service
//!   that is away or work in progress, is tried on all the same; a step that was refused is not.

use std::fmt;

use crate::store::{Entry, Row};

pub mod explain;
pub mod plan;
pub mod recovery;
pub mod runner;
#[cfg(test)]
pub(crate) mod tests;

/// An enum whose variants are stored, logged and counted by name.
pub trait Named: Copy + Eq + fmt::Debug + Send + Sync + 'static {
    /// All of them.
    const ALL: &'static [Self];

    /// As stored.
    fn name(self) -> &'static str;

    /// Reads what [`Named::name`] wrote; `None` for what a newer release wrote.
    fn parse(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|v| v.name() == name)
    }
}

/// Declares an enum that is [`Named`].
macro_rules! named {
    ($(#[$meta:meta])* pub enum $type:ident { $($(#[$doc:meta])* $variant:ident = $name:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $type { $($(#[$doc])* $variant,)* }

        impl $crate::engine::Named for $type {
            const ALL: &'static [Self] = &[$($type::$variant),*];

            fn name(self) -> &'static str {
                match self { $($type::$variant => $name,)* }
            }
        }
    };
}
pub(crate) use named;

/// A kind of saga.
pub trait Saga: Copy + fmt::Debug + Send + Sync + 'static {
    /// Its name in the table, in metrics and in logs.
    const KIND: &'static str;

    /// Where a saga can be.
    type State: Named + Ord;

    /// What can happen to it.
    type Event: Named;

    /// What its steps work with.
    type Context: Send + Sync + 'static;

    /// Where every saga of this kind begins. Never stored: the first entry of the log leaves it.
    const START: Self::State;

    /// The one function that says what is legal. Pure.
    fn next(state: Self::State, event: Self::Event) -> Result<Self::State, IllegalTransition>;

    /// What is to be done in a state.
    fn work(state: Self::State) -> Work<Self::Event>;

    /// Records what the steps of `state` will need before they run: ids first, times once. Pure.
    fn enter(state: Self::State, row: &mut Row, now_ms: i64);
}

/// What is to be done in a state. Steps are named as in the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work<E: 'static> {
    /// Nothing: it waits for an event from outside, or it is over.
    Rest,
    /// The actions of these steps, in order; then the event, or rest where there is none.
    Forward {
        /// Names of steps.
        steps: &'static [&'static str],
        /// What their success means.
        done: Option<E>,
    },
    /// The compensations of all steps before the pivot, last first; then the event.
    Compensate {
        /// What their success means.
        done: E,
    },
}

/// An event that a state does not take. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{event} is not legal in {state}")]
pub struct IllegalTransition {
    /// The state's name.
    pub state: &'static str,
    /// The event's name.
    pub event: &'static str,
}

impl IllegalTransition {
    /// For [`Saga::next`].
    pub fn new(state: impl Named, event: impl Named) -> Self {
        Self { state: state.name(), event: event.name() }
    }
}

/// Why a log is not one that [`Saga::next`] could have written.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BrokenLog {
    /// A transition that is not legal.
    #[error(transparent)]
    Illegal(#[from] IllegalTransition),
    /// An entry that does not follow the one before it.
    #[error("version {0} does not follow what is before it")]
    Gap(i64),
}

/// Runs the log through [`Saga::next`] and answers where it ends.
pub fn replay<S: Saga>(log: &[Entry]) -> Result<S::State, BrokenLog> {
    let mut state = S::START;
    for (entry, version) in log.iter().zip(1..) {
        let event = S::Event::parse(&entry.event).ok_or(BrokenLog::Gap(entry.version))?;
        let next = S::next(state, event)?;
        if entry.version != version || entry.from != state.name() || entry.to != next.name() {
            return Err(BrokenLog::Gap(entry.version));
        }
        state = next;
    }
    Ok(state)
}
