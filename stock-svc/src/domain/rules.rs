//! The protocol's rules by name, so that a model checker can show that each is needed.
//!
//! The functions of this domain ask `R::holds(rule)` where a rule is kept. Everything that serves is [`Enforced`], a
//! type without a value whose answer is always yes: nothing is passed, nothing is asked at run time, and no
//! configuration can turn a rule off. The checker brings a type of its own.

use std::{fmt, hash::Hash};

/// Which rules hold.
pub trait Rules: Copy + Default + fmt::Debug + Eq + Hash + 'static {
    /// Whether this one does.
    fn holds(rule: Rule) -> bool;
}

/// All of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Enforced;

impl Rules for Enforced {
    #[inline(always)]
    fn holds(_: Rule) -> bool {
        true
    }
}

macro_rules! rules {
    ($($(#[doc = $doc:literal])+ $rule:ident,)*) => {
        /// What the protocol rests on. A rule that is not a function's but the engine's (the order of two steps, what
        /// waits for what) is asked for by whoever plays the engine.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Rule { $($(#[doc = $doc])+ $rule,)* }

        impl Rule {
            /// All of them, in the order of the protocol.
            pub const ALL: &'static [Rule] = &[$(Rule::$rule),*];

            /// Its name.
            pub fn name(self) -> &'static str {
                match self { $(Rule::$rule => stringify!($rule),)* }
            }

            /// The sentence.
            pub fn sentence(self) -> &'static str {
                match self { $(Rule::$rule => concat!($($doc),+).trim_ascii(),)* }
            }
        }
    };
}

rules! {
    // Acquire.
    /// Permits that are lost or being rebuilt refuse everybody: not knowing is UNAVAILABLE.
    FailClosed,
    /// An order that has its grant gets the same answer again, before any stock is looked at.
    SameAnswerAgain,
    /// An order that came back is never granted again.
    ReturnedStaysReturned,
    /// Nothing is granted outside of the sale's window or against an operator's verb.
    Window,
    /// A buyer's permits are counted against its limit.
    LimitOfPermits,
    /// SOLD_OUT is said only when so many can never be there again.
    SoldOutIsFinal,

    // Lock.
    /// An order holds once: locking it again is the same answer again.
    OneHoldPerOrder,
    /// Units are locked only where the ledger has them.
    StockOfLedger,
    /// Grants of another epoch than the fence's cannot lock.
    Fence,
    /// What has a tombstone is never held.
    TombstoneRefusesLock,
    /// The ledger counts a buyer's units once more.
    LimitOfLedger,
    /// An order whose grant is stale acquires anew before it is refused.
    StaleAsksAnew,
    /// What is refused once leaves a tombstone before anybody is told.
    RefusalIsBuried,

    // Release.
    /// A hold is released once.
    ReleaseOnce,
    /// Releasing what never held changes no counter.
    NothingHeldNothingCounted,
    /// Releasing what never held leaves a tombstone: a later lock fails.
    ReleaseBuries,
    /// The ledger is changed first; permits follow from its outbox.
    LedgerFirst,

    // Refund.
    /// A release counts only if it is newer than the snapshot.
    ReleaseAfterSnapshot,
    /// A release counts once.
    ReleaseCountedOnce,
    /// A release takes only the grant off the list that its hold consumed.
    ReleaseUnlistsItsOwn,
    /// A permit refund counts only for the very grant that is listed, in its own epoch.
    ReturnOfListedGrant,
    /// The two kinds of refund share no idempotency key.
    TwoKeys,
    /// A refund that meets lost or rebuilding permits is not acknowledged.
    DeferWhileClosed,
    /// A refund never creates a key.
    RefundCreatesNothing,

    // Sweep.
    /// Only grants that the funnel has passed are swept.
    SweepBehindFunnel,
    /// A swept order leaves a tombstone: it and a late lock race on one key.
    SweepBuries,
    /// A grant too many of an order whose fate is settled goes back.
    SurplusGoesBack,

    // Rebuild.
    /// Every rebuild has an epoch of its own, above every other.
    NewEpoch,
    /// Allocating an epoch does not move the fence.
    FenceStaysAtAllocation,
    /// Only a newer epoch claims.
    ClaimOnlyNewer,
    /// A claim closes admission and forgets what was there.
    ClaimCloses,
    /// The claim comes before the snapshot.
    ClaimBeforeSnapshot,
    /// Orders accepted before the claim are locked before the fence moves.
    DrainBeforeFence,
    /// A rebuild does not wait for orders that only an opening can let through.
    DrainSkipsStale,
    /// The fence moves only forward, and only to the newest epoch there is.
    FenceOnlyToNewest,
    /// The snapshot is read in the transaction that moves the fence.
    SnapshotWithFence,
    /// Permits open only where the claim still stands.
    OpenOnlyClaimed,
    /// The snapshot's holds are put back among the grants before permits open.
    HoldsAreReloaded,

    // Reconcile.
    /// Permits that are too many are taken away.
    Clamp,
    /// Permits that are too few are raised only while no refund is on its way.
    RaiseOnEmptyOutbox,
    /// Permits are raised only if nothing was corrected since that was decided.
    RaiseIfUnchanged,
    /// Permits are raised by what is missing, never set to A.
    RaiseByDifference,
    /// A raise counts in every release so far: late duplicates of them count no more.
    RaisePastReleases,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_serves_keeps_every_rule() {
        assert!(Rule::ALL.iter().all(|rule| Enforced::holds(*rule)));
        assert_eq!(std::mem::size_of::<Enforced>(), 0);
    }
}
