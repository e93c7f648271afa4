//! The stock protocol: permits beside a ledger, with the production functions of `stock_svc::domain` as its steps.
//!
//! What is played around them is what the services around them may do at their worst. Buyers ask again at any time. An
//! order may never reach the stream, or reach it late. The relay delivers a refund twice and in any order. Permits are
//! lost; rebuilds begin at any time and overtake each other; a hold may be paid or released at any time. Every step is
//! on its own, so a process may die between any two.
//!
//! What must never be seen: a broken ledger (I1), more offered than there is (I2), R other than A once everything has
//! come to rest, an order that was admitted and is then refused, an order that was accepted and loses its unit (E13), a
//! second unit for one order (E2), a buyer above its limit (I7), SOLD_OUT that is not final (I8), rebuilds that wait for
//! each other.
//!
//! A [`Scope`] says how much of all that there is. [`scopes`] are searched whole; [`proof`] says for every rule in which
//! scope it is missed when it is turned off.

use stock_svc::domain::rules::Rule;

use crate::search::{self, Limits, Report};

mod cast;
mod play;
mod switches;
mod values;

use play::Play;
pub use values::ORDERS;

/// How much of everything there is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope {
    /// What it is called.
    pub name: String,
    /// T.
    pub units: i64,
    /// Units a buyer may have.
    pub limit: i64,
    /// For every buyer, the quantities of its orders.
    pub buyers: Vec<Vec<i64>>,
    /// How often permits are lost.
    pub wipes: u8,
    /// How many rebuilds begin.
    pub rebuilds: u8,
    /// Whether rebuilds begin while permits are open, as operators may want.
    pub operators: bool,
    /// How many writes the permits' server loses after it has answered.
    pub losses: u8,
    /// Whether such writes are acquisitions.
    pub loses_acquires: bool,
    /// Whether such writes are refunds.
    pub loses_refunds: bool,
    /// How often R changes by one for no reason.
    pub slips: u8,
    /// Whether such changes are downwards.
    pub slips_down: bool,
    /// Whether such changes are upwards.
    pub slips_up: bool,
    /// Whether permits are reconciled with the ledger.
    pub reconciles: bool,
    /// Whether orders are closed that never held.
    pub closes_unheld: bool,
    /// Whether an operator closes the sale.
    pub closes: bool,
    /// Whether a rebuild puts the snapshot's holds back.
    pub reloads: bool,
    /// Whether every state must be able to come to rest by what is bound to happen.
    pub ends: bool,
}

impl Scope {
    /// So many units, buyers of one unit each, losses and rebuilds.
    pub fn new(units: i64, buyers: usize, wipes: u8, rebuilds: u8) -> Self {
        Self {
            name: format!("{units} units x {buyers} buyers x {wipes} wipes x {rebuilds} rebuilds"),
            units,
            limit: 1,
            buyers: vec![vec![1]; buyers],
            wipes,
            rebuilds,
            operators: true,
            losses: 0,
            loses_acquires: false,
            loses_refunds: false,
            slips: 0,
            slips_down: false,
            slips_up: false,
            reconciles: false,
            closes_unheld: false,
            closes: false,
            reloads: true,
            ends: false,
        }
    }

    fn named(self, what: &str) -> Self {
        Self { name: format!("{}, {what}", self.name), ..self }
    }
}

/// What is searched whole, small ones first.
pub fn scopes() -> Vec<Scope> {
    vec![
        ends(),
        unheld(),
        limits(),
        closing(),
        reconciling_too_few(),
        reconciling_too_many(),
        losing_refunds(),
        losing_an_acquire(),
        losing_acquires(),
        without_reload(),
        Scope::new(2, 2, 1, 2),
        largest(),
    ]
}

/// The largest of them. Operators double it, and are in all the others.
pub fn largest() -> Scope {
    Scope { operators: false, ..Scope::new(2, 3, 1, 2) }
}

fn ends() -> Scope {
    Scope { ends: true, ..Scope::new(1, 2, 1, 2) }.named("everything comes to rest")
}

fn unheld() -> Scope {
    Scope { closes_unheld: true, ..Scope::new(1, 2, 1, 1) }.named("orders closed unheld")
}

fn limits() -> Scope {
    Scope { buyers: vec![vec![1, 1], vec![1]], ..Scope::new(2, 2, 1, 1) }.named("one with two orders")
}

fn closing() -> Scope {
    Scope { closes: true, ..Scope::new(1, 2, 1, 1) }.named("the sale is closed")
}

fn reconciling_too_few() -> Scope {
    Scope { slips: 1, slips_down: true, reconciles: true, ..Scope::new(2, 2, 0, 1) }.named("a permit gets lost")
}

fn reconciling_too_many() -> Scope {
    Scope { slips: 1, slips_up: true, reconciles: true, ..Scope::new(1, 2, 0, 0) }.named("a permit is made up")
}

fn losing_refunds() -> Scope {
    Scope { losses: 1, loses_refunds: true, reconciles: true, ..Scope::new(1, 2, 0, 1) }.named("a refund gets lost")
}

fn losing_an_acquire() -> Scope {
    Scope { losses: 1, loses_acquires: true, ..Scope::new(1, 2, 0, 1) }.named("an acquisition gets lost")
}

fn losing_acquires() -> Scope {
    Scope { buyers: vec![vec![1, 1], vec![1]], losses: 1, loses_acquires: true, ..Scope::new(2, 2, 0, 1) }
        .named("one with two orders, an acquisition gets lost")
}

fn without_reload() -> Scope {
    Scope { reloads: false, ..Scope::new(2, 2, 1, 1) }.named("rebuilds put nothing back")
}

/// Where a rule is missed: a scope that is clean with all rules and is not without this one.
pub fn proof(rule: Rule) -> Scope {
    match rule {
        Rule::Window => closing(),
        Rule::LimitOfPermits => limits(),
        Rule::StockOfLedger => losing_an_acquire(),
        Rule::LimitOfLedger => losing_acquires(),
        Rule::NothingHeldNothingCounted | Rule::ReleaseBuries => unheld(),
        Rule::TwoKeys => without_reload(),
        Rule::Clamp => reconciling_too_many(),
        Rule::RaiseOnEmptyOutbox | Rule::RaiseIfUnchanged | Rule::RaiseByDifference => reconciling_too_few(),
        Rule::RaisePastReleases => losing_refunds(),
        // Who asks again must find a unit that it could take.
        Rule::HoldsAreReloaded => Scope::new(2, 2, 1, 2),
        _ => ends(),
    }
}

/// Searches a scope, without these rules.
pub fn check(scope: &Scope, without: &[Rule], limits: Limits, mut progress: impl FnMut(usize)) -> Report {
    let limits = Limits { ends: scope.ends, ..limits };
    switches::without(without, || search::search(&mut Play::new(scope), limits, &mut progress))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::search::Verdict;

    fn clean(scope: &Scope) {
        let Report { states, steps, verdict, .. } = check(scope, &[], Limits::default(), |_| {});
        println!("{}: {states} states, {steps} steps", scope.name);
        assert_eq!(verdict, Verdict::Clean, "{}", scope.name);
    }

    /// I1, I2, I7, I8 and the edge cases of stock, whatever happens in whatever order.
    #[test]
    fn e2_e3_e4_e5_e9_e10_e12_e13_e14_e15_e36_hold_in_every_small_scope() {
        scopes().iter().filter(|scope| **scope != largest()).for_each(clean);
    }

    /// A test of its own, beside the others.
    #[test]
    fn e10_e13_e15_two_units_three_buyers_a_loss_and_two_rebuilds_are_clean() {
        clean(&largest());
    }

    #[test]
    fn every_rule_is_missed_when_it_is_off() {
        for rule in Rule::ALL {
            let scope = proof(*rule);
            assert!(scopes().contains(&scope), "{}: is searched with all rules, too", scope.name);
            let report = check(&scope, &[*rule], Limits::default(), |_| {});
            assert!(matches!(report.verdict, Verdict::Violation { .. }), "{}: {report:?}", rule.name());
        }
    }

    /// What a reader of a trace sees.
    #[test]
    fn the_shortest_way_to_a_violation_is_told() {
        let report = check(&ends(), &[Rule::ReleaseCountedOnce], Limits::default(), |_| {});
        let Verdict::Violation { what, trace } = report.verdict else { panic!("{report:?}") };
        assert_eq!(what, "I2: R 2 + 0 granted > A 1");
        assert_eq!(
            trace,
            [
                "a acquires: a permit of epoch 1",
                "a is in the stream",
                "a is locked: held",
                "a is released",
                "a's release is refunded: R + 1",
                "a's release is refunded again: R + 1",
            ]
        );
    }
}
