//! The order of a rebuild's steps, which matters, apart from how they are done.
//!
//! 1. SQL: allocate an epoch. The fence stays where it is.
//! 2. Permits: claim it. Admission is closed from here.
//! 3. Let the funnel pass the stream's end, so that every accepted order has its unit before stock is offered anew.
//! 4. SQL, one transaction: move the fence, read the snapshot.
//! 5. Permits: put the snapshot's holds back and open, only if the claim still stands.
//!
//! Whoever plays the engine does what [`Rebuild::todo`] says and tells what came of it. Whoever loses its claim to a
//! newer epoch is over; two rebuilders at once end in one opening (E15).

use super::{
    ledger::Snapshot,
    permits::{Claimed, Facts, Held, Opening, Phase},
    rules::{Enforced, Rule, Rules},
};

/// What step 4 of a rebuild sees, all at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Fenced {
    /// A and the newest release.
    pub snapshot: Snapshot,
    /// The sale at that moment.
    pub facts: Facts,
    /// Every hold that is locked or sold, oldest first.
    pub held: Vec<Held>,
}

/// What is to be done next.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Todo {
    /// Step 1, above this epoch.
    Allocate {
        /// What the permits claim to be, when that is ahead of the ledger; 0 otherwise.
        above: i64,
    },
    /// Step 2.
    Claim,
    /// Step 3, until nothing [`blocks`] any more.
    Drain,
    /// Step 4.
    Fence,
    /// Step 5.
    Open(Box<Fenced>),
    /// Nothing: it has opened, or was overtaken.
    Over {
        /// Which of the two.
        opened: bool,
    },
}

/// One rebuild. See the module.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Rebuild {
    epoch: i64,
    tried_above: bool,
    todo: Todo,
}

impl Default for Rebuild {
    fn default() -> Self {
        Self { epoch: 0, tried_above: false, todo: Todo::Allocate { above: 0 } }
    }
}

impl Rebuild {
    /// What is to be done next.
    pub fn todo(&self) -> &Todo {
        &self.todo
    }

    /// Its own, once it is allocated.
    pub fn epoch(&self) -> i64 {
        self.epoch
    }

    /// The ledger has given it an epoch.
    pub fn allocated(&mut self, epoch: i64) {
        self.epoch = epoch;
        self.todo = Todo::Claim;
    }

    /// What its claim came to. `there` is what phase the permits are in that were not claimed, `fence` the ledger's
    /// epoch, read after the claim.
    pub fn claimed(&mut self, claimed: Claimed, there: Option<Phase>, fence: i64) {
        self.todo = match claimed {
            // Before the first permits nobody was granted anything, hence nothing is on its way.
            Claimed::Yes if fence == 0 => Todo::Fence,
            Claimed::Yes => Todo::Drain,
            Claimed::No(_) if there == Some(Phase::Rebuilding) || self.tried_above => Todo::Over { opened: false },
            // Open and ahead of everything allocated: the ledger was put back from the past.
            Claimed::No(above) => {
                self.tried_above = true;
                Todo::Allocate { above }
            }
        };
    }

    /// Nothing blocks any more.
    pub fn drained(&mut self) {
        self.todo = Todo::Fence;
    }

    /// The fence has moved, or was further already.
    pub fn fenced(&mut self, fenced: Option<Fenced>) {
        self.todo = match fenced {
            Some(fenced) => Todo::Open(Box::new(fenced)),
            None => Todo::Over { opened: false },
        };
    }

    /// The permits are open, or the claim was lost.
    pub fn opened(&mut self, opened: bool) {
        self.todo = Todo::Over { opened };
    }

    /// Another has claimed.
    pub fn overtaken(&mut self) {
        self.todo = Todo::Over { opened: false };
    }

    /// How it opens.
    pub fn opening(&self, fenced: &Fenced) -> Opening {
        let Snapshot { available, release_seq: snapshot_seq } = fenced.snapshot;
        Opening { epoch: self.epoch, available, snapshot_seq, facts: fenced.facts.clone() }
    }
}

/// Whether an order that the funnel has not passed must be locked before the fence may move: its grant can be locked
/// where the fence is now. One that is stale already cannot, however long a rebuild waits: it needs permits anew, which
/// only an opening gives. To wait for that would be to wait for oneself, or for a rebuild that this one has overtaken.
pub fn blocks(grant_epoch: i64, fence: i64) -> bool {
    blocks_under::<Enforced>(grant_epoch, fence)
}

/// [`blocks`] under these rules.
pub fn blocks_under<R: Rules>(grant_epoch: i64, fence: i64) -> bool {
    grant_epoch == fence || !R::holds(Rule::DrainSkipsStale)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::sale::Verb;

    fn fenced() -> Fenced {
        let facts = Facts { version: 1, verb: Verb::Open, start_at: 0, end_at: 1, limit: 1, total: 3, sold: 0 };
        Fenced { snapshot: Snapshot { available: 3, release_seq: 7 }, facts, held: Vec::new() }
    }

    #[test]
    fn steps_follow_each_other_to_an_opening() {
        let mut rebuild = Rebuild::default();
        assert_eq!(rebuild.todo(), &Todo::Allocate { above: 0 });
        rebuild.allocated(4);
        assert_eq!(rebuild.todo(), &Todo::Claim);
        rebuild.claimed(Claimed::Yes, None, 3);
        assert_eq!(rebuild.todo(), &Todo::Drain);
        rebuild.drained();
        assert_eq!(rebuild.todo(), &Todo::Fence);
        rebuild.fenced(Some(fenced()));
        let Todo::Open(fenced) = rebuild.todo().clone() else { panic!("{rebuild:?}") };
        let opening = rebuild.opening(&fenced);
        assert_eq!((opening.epoch, opening.available, opening.snapshot_seq), (4, 3, 7));
        rebuild.opened(true);
        assert_eq!(rebuild.todo(), &Todo::Over { opened: true });
    }

    #[test]
    fn before_the_first_permits_nothing_is_waited_for() {
        let mut rebuild = Rebuild::default();
        rebuild.allocated(1);
        rebuild.claimed(Claimed::Yes, None, 0);
        assert_eq!(rebuild.todo(), &Todo::Fence);
    }

    #[test]
    fn permits_ahead_of_the_ledger_are_outbid_once_and_a_rebuild_under_way_is_left_alone() {
        let mut rebuild = Rebuild::default();
        rebuild.allocated(4);
        rebuild.claimed(Claimed::No(50), Some(Phase::Open), 3);
        assert_eq!(rebuild.todo(), &Todo::Allocate { above: 50 });
        rebuild.allocated(51);
        rebuild.claimed(Claimed::No(60), Some(Phase::Open), 3);
        assert_eq!(rebuild.todo(), &Todo::Over { opened: false });

        let mut rebuild = Rebuild::default();
        rebuild.allocated(4);
        rebuild.claimed(Claimed::No(5), Some(Phase::Rebuilding), 3);
        assert_eq!(rebuild.todo(), &Todo::Over { opened: false });
    }

    #[test]
    fn only_what_can_be_locked_where_the_fence_is_blocks() {
        assert!(blocks(3, 3));
        assert!(!blocks(2, 3), "stale: it waits for the opening itself");
        assert!(!blocks(0, 3), "never granted: its tombstone refuses it");
    }
}
