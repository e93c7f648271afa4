//! One sale's permits: free ones, grants, tombstones, and what each buyer has.
//!
//! [`Permits`] is a slot that may be empty: a lost key is a state of its own, and only [`Permits::claim`] fills it.
//! Every other operation on an empty or rebuilding slot says so and changes nothing (fail closed). The Redis scripts
//! mirror these functions line by line; a randomized test holds the two together.

use std::{
    collections::{BTreeMap, BTreeSet},
    marker::PhantomData,
};

use proto::BuyerId;

use super::{
    HoldId,
    rules::{Enforced, Rule, Rules},
    sale::Verb,
};

/// One sale's permits, or nothing when they are lost.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Permits<R = Enforced>(Option<State>, PhantomData<R>);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    header: Header,
    grants: BTreeMap<HoldId, Grant>,
    done: BTreeMap<HoldId, Done>,
    buyers: BTreeMap<BuyerId, Bought>,
    /// Grants of this epoch that nobody has said to be persisted, oldest first. A hint: the hold row decides.
    pending: BTreeSet<(i64, HoldId)>,
}

/// What is known of a sale's permits in one look.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Header {
    /// The epoch that these permits belong to.
    pub epoch: i64,
    /// Whether admission is open at all.
    pub phase: Phase,
    /// R: permits to be had.
    pub free: i64,
    /// Units granted in this epoch, less those given back as permits.
    pub granted: i64,
    /// Releases up to this sequence were in the snapshot.
    pub snapshot_seq: i64,
    /// Counts clamps, raises and withdrawals, so that each is decided on what is still so.
    pub version: i64,
    /// Which server these permits were claimed on; another one may have lost some.
    pub server: String,
    /// What admission needs to know of the sale.
    pub facts: Facts,
}

/// Whether admission is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Claimed by a rebuild and not opened yet.
    Rebuilding,
    /// In use. Operators' verbs and the clock may still refuse buyers.
    Open,
}

/// What admission needs to know of the sale. Newer versions replace older ones; `sold` only grows.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Facts {
    /// The sale row's version.
    pub version: i64,
    /// The operators' last word.
    pub verb: Verb,
    /// Not before, Unix milliseconds.
    pub start_at: i64,
    /// Not at or after, Unix milliseconds.
    pub end_at: i64,
    /// Units one buyer may hold or own (I7).
    pub limit: i64,
    /// T: units in all.
    pub total: i64,
    /// D: units sold for good.
    pub sold: i64,
}

/// A permit taken by one order.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Grant {
    /// The epoch it was taken in.
    pub epoch: i64,
    /// How many units.
    pub quantity: i64,
    /// When it was first granted, Unix milliseconds.
    pub at: i64,
    /// By whom.
    pub buyer: BuyerId,
}

/// How an order came back. The two kinds of refund never share one idempotency key: an order may see both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Done {
    /// Its permit was refunded.
    Returned,
    /// Its hold was released.
    Released,
}

/// What one buyer has of the sale.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Bought {
    units: i64,
    last: Option<HoldId>,
}

/// A wish for permits.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Acquire {
    /// For which hold.
    pub hold: HoldId,
    /// By whom.
    pub buyer: BuyerId,
    /// How many, all or none (E7).
    pub quantity: i64,
}

/// What a wish came to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Acquired {
    /// Lost or rebuilding: nobody knows (I8).
    Unavailable,
    /// Taken now.
    Fresh(Grant),
    /// Taken before; the same answer again.
    Again(Grant),
    /// Taken before with another quantity or by another buyer.
    Reused,
    /// Given back before; never granted again.
    Released,
    /// Before the start.
    NotStarted,
    /// Stopped by an operator.
    Paused,
    /// Over.
    Ended,
    /// The buyer has all it may have; its newest hold where it is known.
    AtLimit(Option<HoldId>),
    /// The buyer may have more, but not that many.
    OverLimit,
    /// Nothing now; something may come back.
    AllHeld,
    /// So many will never be there again.
    SoldOut,
}

/// A stock release on its way to the permits: a persisted hold went back to A, or the stock was raised.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Release {
    /// Which hold, or the adjustment's own id.
    pub hold: HoldId,
    /// Whose; none for an adjustment.
    pub buyer: Option<BuyerId>,
    /// How many units.
    pub quantity: i64,
    /// Its place among the sale's releases.
    pub seq: i64,
    /// The epoch of the grant that the hold consumed.
    pub grant_epoch: i64,
}

/// A permit refund on its way: a grant that never became a hold, or one too many of an order that has one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Return {
    /// Which hold.
    pub hold: HoldId,
    /// The grant's epoch.
    pub epoch: i64,
}

/// Either kind, as the outbox carries them in order.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Refund {
    /// See [`Release`].
    Release(Release),
    /// See [`Return`].
    Return(Return),
}

/// What a refund came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refunded {
    /// The units are free again.
    Applied,
    /// It was counted before, or must not count. Done with.
    Ignored,
    /// Lost or rebuilding: not done, keep it.
    Deferred,
}

/// What a claim came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Claimed {
    /// Admission is closed and waits for this epoch's opening.
    Yes,
    /// These permits are of this epoch already, which is not older.
    No(i64),
}

/// A hold of the ledger's snapshot, put back among the grants by a rebuild.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Held {
    /// Which.
    pub hold: HoldId,
    /// The grant it consumed, of an older epoch.
    pub grant: Grant,
}

/// How a rebuild opens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Opening {
    /// The claimed epoch.
    pub epoch: i64,
    /// A of the snapshot.
    pub available: i64,
    /// The last release of the snapshot.
    pub snapshot_seq: i64,
    /// The sale in the snapshot.
    pub facts: Facts,
}

/// A correction upwards, decided on an empty outbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Raise {
    /// Only if still this epoch …
    pub epoch: i64,
    /// … and nothing was corrected since …
    pub version: i64,
    /// … nor any release counted.
    pub offered: i64,
    /// Units that are not offered and should be.
    pub missing: i64,
    /// Releases up to here were counted in: a late duplicate of one of them must not count again.
    pub release_seq: i64,
}

/// What a withdrawal came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Withdrawn {
    /// So many fewer are free.
    Done,
    /// Fewer are free than that; nothing was taken.
    TooFew,
    /// Lost or rebuilding.
    Unavailable,
}

/// Grants that may never have become holds.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Pending {
    /// Which.
    pub hold: HoldId,
    /// As granted.
    pub grant: Grant,
}

impl Header {
    /// R and every unit granted in this epoch: what the ledger's side is compared with.
    pub fn offered(&self) -> i64 {
        self.free + self.granted
    }

    /// So many will never be there again, however much comes back.
    fn is_gone(&self, quantity: i64) -> bool {
        quantity > self.facts.total - self.facts.sold
    }
}

impl Facts {
    /// Why nothing is granted now, if that is so.
    fn outside(&self, now: i64) -> Option<Acquired> {
        if self.verb == Verb::Closed || now >= self.end_at {
            Some(Acquired::Ended)
        } else if now < self.start_at {
            Some(Acquired::NotStarted)
        } else if self.verb == Verb::Paused {
            Some(Acquired::Paused)
        } else {
            None
        }
    }

    /// Takes over what is newer.
    fn update(&mut self, new: &Facts) {
        let sold = self.sold.max(new.sold);
        if new.version > self.version {
            *self = new.clone();
        }
        self.sold = sold;
    }
}

impl<R: Rules> Permits<R> {
    /// Forgets everything, as a lost server does.
    pub fn wipe(&mut self) {
        self.0 = None;
    }

    /// The header; none when the permits are lost.
    pub fn header(&self) -> Option<&Header> {
        self.0.as_ref().map(|state| &state.header)
    }

    fn open_state(&mut self) -> Option<&mut State> {
        self.0.as_mut().filter(|state| state.header.phase == Phase::Open)
    }

    /// The slot where it admits buyers.
    fn admitting(&mut self) -> Option<&mut State> {
        self.0.as_mut().filter(|state| state.header.phase == Phase::Open || !R::holds(Rule::FailClosed))
    }

    /// Takes permits for one hold. The order of the checks is the protocol's.
    pub fn acquire(&mut self, wish: &Acquire, now: i64) -> Acquired {
        let Some(state) = self.admitting() else { return Acquired::Unavailable };
        // Before any stock check, or the retry of the last unit's winner would be told "sold out" (E2).
        if R::holds(Rule::SameAnswerAgain)
            && let Some(grant) = state.grants.get(&wish.hold)
        {
            let same = grant.quantity == wish.quantity && grant.buyer == wish.buyer;
            return if same { Acquired::Again(grant.clone()) } else { Acquired::Reused };
        }
        if R::holds(Rule::ReturnedStaysReturned) && state.done.contains_key(&wish.hold) {
            return Acquired::Released;
        }
        let header = &mut state.header;
        if R::holds(Rule::Window)
            && let Some(outside) = header.facts.outside(now)
        {
            return outside;
        }
        let bought = state.buyers.get(&wish.buyer);
        let units = bought.map_or(0, |b| b.units);
        if R::holds(Rule::LimitOfPermits) && units >= header.facts.limit {
            return Acquired::AtLimit(bought.and_then(|b| b.last));
        }
        if R::holds(Rule::LimitOfPermits) && units + wish.quantity > header.facts.limit {
            return Acquired::OverLimit;
        }
        if header.free < wish.quantity {
            let is_final = header.is_gone(wish.quantity) || !R::holds(Rule::SoldOutIsFinal);
            return if is_final { Acquired::SoldOut } else { Acquired::AllHeld };
        }
        header.free -= wish.quantity;
        header.granted += wish.quantity;
        let grant = Grant { epoch: header.epoch, quantity: wish.quantity, at: now, buyer: wish.buyer.clone() };
        state.grants.insert(wish.hold, grant.clone());
        state.pending.insert((now, wish.hold));
        state.count_in(&wish.buyer, wish.quantity, wish.hold);
        Acquired::Fresh(grant)
    }

    /// Applies one refund of either kind.
    pub fn refund(&mut self, refund: &Refund) -> Refunded {
        match refund {
            Refund::Release(release) => self.refund_release(release),
            Refund::Return(returned) => self.refund_permit(returned),
        }
    }

    /// A persisted hold went back to A: counted if it is newer than the snapshot and was not counted before.
    pub fn refund_release(&mut self, release: &Release) -> Refunded {
        let Some(state) = self.open_state() else { return Refunded::Deferred };
        let counted_before = match state.done.get(&release.hold) {
            Some(Done::Released) => R::holds(Rule::ReleaseCountedOnce),
            Some(Done::Returned) => !R::holds(Rule::TwoKeys),
            None => false,
        };
        // Only the grant that the hold consumed: one of another epoch is refunded as the permit it is.
        let consumed = |grant: &Grant| grant.epoch == release.grant_epoch || !R::holds(Rule::ReleaseUnlistsItsOwn);
        if state.grants.get(&release.hold).is_some_and(consumed) {
            state.unlist(release.hold);
        }
        state.done.insert(release.hold, Done::Released);
        let in_snapshot = release.seq <= state.header.snapshot_seq && R::holds(Rule::ReleaseAfterSnapshot);
        if counted_before || in_snapshot {
            return Refunded::Ignored;
        }
        state.header.free += release.quantity;
        if let Some(buyer) = &release.buyer {
            state.count_out(buyer, release.quantity, release.hold);
        }
        Refunded::Applied
    }

    /// A grant that will never be a hold: counted if that very grant is still listed.
    pub fn refund_permit(&mut self, returned: &Return) -> Refunded {
        let Some(state) = self.open_state() else { return Refunded::Deferred };
        // A grant of another epoch went with it. No tombstone either: the order may acquire anew in this one.
        if returned.epoch != state.header.epoch {
            return Refunded::Ignored;
        }
        state.done.entry(returned.hold).or_insert(Done::Returned);
        if state.grants.get(&returned.hold).is_none_or(|g| g.epoch != returned.epoch) {
            return Refunded::Ignored;
        }
        let Some(grant) = state.unlist(returned.hold) else { return Refunded::Ignored };
        state.header.free += grant.quantity;
        state.header.granted -= grant.quantity;
        state.count_out(&grant.buyer, grant.quantity, returned.hold);
        Refunded::Applied
    }

    /// Closes admission for a rebuild, if the epoch is newer than what is there. What was there is forgotten.
    pub fn claim(&mut self, epoch: i64, facts: &Facts, server: &str) -> Claimed {
        if R::holds(Rule::ClaimOnlyNewer)
            && let Some(there) = self.header()
            && there.epoch >= epoch
        {
            return Claimed::No(there.epoch);
        }
        self.0 = Some(State {
            header: Header {
                epoch,
                phase: Phase::Rebuilding,
                free: 0,
                granted: 0,
                snapshot_seq: 0,
                version: 0,
                server: server.to_owned(),
                facts: facts.clone(),
            },
            grants: BTreeMap::new(),
            done: BTreeMap::new(),
            buyers: BTreeMap::new(),
            pending: BTreeSet::new(),
        });
        Claimed::Yes
    }

    fn claimed(&mut self, epoch: i64) -> Option<&mut State> {
        self.0.as_mut().filter(|s| s.header.phase == Phase::Rebuilding && s.header.epoch == epoch)
    }

    /// Puts the snapshot's holds back before opening: their orders get the same answer again (E2), and their buyers'
    /// limits count (I7). Repeating it changes nothing. False when the claim is lost.
    pub fn load(&mut self, epoch: i64, holds: &[Held]) -> bool {
        let Some(state) = self.claimed(epoch) else { return false };
        for Held { hold, grant } in holds {
            if !state.grants.contains_key(hold) {
                state.grants.insert(*hold, grant.clone());
                state.count_in(&grant.buyer, grant.quantity, *hold);
            }
        }
        true
    }

    /// Opens admission with the snapshot's stock, only if the claim still stands.
    pub fn open(&mut self, opening: &Opening) -> bool {
        let claimed = if R::holds(Rule::OpenOnlyClaimed) { self.claimed(opening.epoch) } else { self.0.as_mut() };
        let Some(state) = claimed else { return false };
        state.header.phase = Phase::Open;
        state.header.free = opening.available;
        state.header.snapshot_seq = opening.snapshot_seq;
        state.header.facts.update(&opening.facts);
        true
    }

    /// Takes away what is offered too much, as far as it is free. Only permits are lost. The units taken; none when
    /// something was corrected since it was decided.
    pub fn clamp(&mut self, epoch: i64, version: i64, excess: i64) -> Option<i64> {
        let header = &mut self.open_state()?.header;
        if (header.epoch, header.version) != (epoch, version) {
            return None;
        }
        let taken = excess.min(header.free);
        header.free -= taken;
        header.version += 1;
        Some(taken)
    }

    /// Offers what is missing, only if nothing was corrected or released since it was decided.
    pub fn raise(&mut self, raise: &Raise) -> bool {
        let Some(state) = self.open_state() else { return false };
        let header = &mut state.header;
        let seen = (raise.epoch, raise.version, raise.offered);
        if R::holds(Rule::RaiseIfUnchanged) && (header.epoch, header.version, header.offered()) != seen {
            return false;
        }
        header.free += raise.missing;
        if R::holds(Rule::RaisePastReleases) {
            header.snapshot_seq = header.snapshot_seq.max(raise.release_seq);
        }
        header.version += 1;
        true
    }

    /// Takes free permits away before the ledger's stock is lowered: all or none.
    pub fn withdraw(&mut self, quantity: i64) -> Withdrawn {
        let Some(state) = self.open_state() else { return Withdrawn::Unavailable };
        if state.header.free < quantity {
            return Withdrawn::TooFew;
        }
        state.header.free -= quantity;
        state.header.version += 1;
        Withdrawn::Done
    }

    /// Takes over newer facts of the sale. False when there is nothing to tell.
    pub fn set_facts(&mut self, facts: &Facts) -> bool {
        let Some(state) = self.0.as_mut() else { return false };
        state.header.facts.update(facts);
        true
    }

    /// Says that these grants became holds.
    pub fn persisted(&mut self, epoch: i64, holds: &[HoldId]) {
        let Some(state) = self.open_state() else { return };
        for hold in holds {
            if let Some(grant) = state.grants.get(hold)
                && grant.epoch == epoch
            {
                state.pending.remove(&(grant.at, *hold));
            }
        }
    }

    /// Up to `limit` grants from before `before` that nobody has said to be persisted, oldest first. None when lost
    /// or rebuilding.
    pub fn pending(&self, before: i64, limit: usize) -> Option<Vec<Pending>> {
        let state = self.0.as_ref().filter(|s| s.header.phase == Phase::Open)?;
        let pending = state.pending.iter().take_while(|(at, _)| *at < before).take(limit);
        let listed =
            pending.filter_map(|(_, hold)| Some(Pending { hold: *hold, grant: state.grants.get(hold)?.clone() }));
        Some(listed.collect())
    }

    /// Finds grants by hold. None when lost or rebuilding: then nobody knows.
    pub fn lookup(&self, holds: &[HoldId]) -> Option<Vec<Option<Grant>>> {
        let state = self.0.as_ref().filter(|s| s.header.phase == Phase::Open)?;
        Some(holds.iter().map(|hold| state.grants.get(hold).cloned()).collect())
    }

    /// Everybody who holds or owns something.
    pub fn buyers(&self) -> Vec<BuyerId> {
        self.0.iter().flat_map(|state| state.buyers.keys().cloned()).collect()
    }

    /// Every grant, for audits and the model checker.
    pub fn grants(&self) -> impl Iterator<Item = (&HoldId, &Grant)> {
        self.0.iter().flat_map(|state| &state.grants)
    }
}

impl State {
    fn unlist(&mut self, hold: HoldId) -> Option<Grant> {
        let grant = self.grants.remove(&hold)?;
        self.pending.remove(&(grant.at, hold));
        Some(grant)
    }

    fn count_in(&mut self, buyer: &BuyerId, units: i64, hold: HoldId) {
        let bought = self.buyers.entry(buyer.clone()).or_insert(Bought { units: 0, last: None });
        bought.units += units;
        bought.last = Some(hold);
    }

    /// A buyer with nothing left is forgotten; one whose newest hold went has others, but which is not known.
    fn count_out(&mut self, buyer: &BuyerId, units: i64, hold: HoldId) {
        let Some(bought) = self.buyers.get_mut(buyer) else { return };
        bought.units -= units;
        if bought.last == Some(hold) {
            bought.last = None;
        }
        if bought.units <= 0 {
            self.buyers.remove(buyer);
        }
    }
}
