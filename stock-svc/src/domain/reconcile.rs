//! What to correct of the permits, by the two sums of [`crate::domain`].
//!
//! Within an epoch the ledger's sum only grows, but for withdrawn stock, which the permits gave up before. So permits
//! read *before* the ledger that exceed it are too many for certain, and permits read *after* a ledger whose outbox was
//! empty that fall short are too few for certain.

use super::{
    ledger::Ledger,
    permits::{Header, Phase, Raise},
    rules::{Enforced, Rule, Rules},
};

/// Units that open permits, read before the ledger, offer too much.
pub fn excess(before: &Header, ledger: &Ledger) -> Option<i64> {
    excess_under::<Enforced>(before, ledger)
}

/// [`excess`] under these rules.
pub fn excess_under<R: Rules>(before: &Header, ledger: &Ledger) -> Option<i64> {
    let excess = before.offered() - ledger.offerable();
    (compare(before, ledger) && excess > 0 && R::holds(Rule::Clamp)).then_some(excess)
}

/// What open permits lack that were read after the ledger and then its outbox.
pub fn shortage(ledger: &Ledger, outbox_is_empty: bool, after: &Header) -> Option<Raise> {
    shortage_under::<Enforced>(ledger, outbox_is_empty, after)
}

/// [`shortage`] under these rules.
pub fn shortage_under<R: Rules>(ledger: &Ledger, outbox_is_empty: bool, after: &Header) -> Option<Raise> {
    let nothing_is_on_its_way = outbox_is_empty || !R::holds(Rule::RaiseOnEmptyOutbox);
    let missing = ledger.offerable() - after.offered();
    if !compare(after, ledger) || !nothing_is_on_its_way || missing <= 0 {
        return None;
    }
    let missing = if R::holds(Rule::RaiseByDifference) { missing } else { ledger.available - after.free };
    let Header { epoch, version, .. } = *after;
    Some(Raise { epoch, version, offered: after.offered(), missing, release_seq: ledger.release_seq })
}

/// Only permits that are open in the fence's own epoch can be compared with its ledger.
fn compare(permits: &Header, ledger: &Ledger) -> bool {
    permits.phase == Phase::Open && permits.epoch == ledger.epoch
}
