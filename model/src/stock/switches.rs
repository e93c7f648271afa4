//! Rules that can be turned off. Only here: everything that serves is compiled with rules that cannot.

use std::cell::Cell;

use stock_svc::domain::rules::{Rule, Rules};

thread_local! {
    /// A bit for each rule that is off. A search runs on one thread.
    static OFF: Cell<u64> = const { Cell::new(0) };
}

/// The rules of the search on this thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Switched;

impl Rules for Switched {
    #[inline]
    fn holds(rule: Rule) -> bool {
        OFF.get() & (1 << rule as u64) == 0
    }
}

/// Whether a rule holds on this thread.
pub fn holds(rule: Rule) -> bool {
    Switched::holds(rule)
}

/// Runs `work` without these rules.
pub fn without<T>(rules: &[Rule], work: impl FnOnce() -> T) -> T {
    let before = OFF.replace(rules.iter().fold(0, |off, rule| off | 1 << *rule as u64));
    let result = work();
    OFF.set(before);
    result
}
