//! One sale's ledger and the holds a batch is about.
//!
//! A [`Book`] is opened with the ledger as it is under its row lock and the holds that exist already; items change it
//! one after the other, so that an item sees what the items before it did; [`Book::close`] hands out what to write, in
//! one transaction. Nothing else changes a ledger.

use std::{
    collections::{BTreeMap, BTreeSet},
    marker::PhantomData,
};

use proto::{BuyerId, Error, OrderId, Reason, SaleId, error::Result};

use super::{
    HoldId, MAX_STOCK,
    permits::{Grant, Pending, Refund, Release, Return},
    rules::{Enforced, Rule, Rules},
};

/// The stock of one sale. I1: `available + held + sold = total`, none negative.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Ledger {
    /// A: to be had.
    pub available: i64,
    /// H: held unpaid.
    pub held: i64,
    /// D: sold for good.
    pub sold: i64,
    /// T: all of them.
    pub total: i64,
    /// Units locked by grants of this epoch, whatever became of them.
    pub persisted: i64,
    /// The fence: grants of other epochs cannot lock. 0 before the first permits.
    pub epoch: i64,
    /// The next rebuild's epoch. Allocated before the fence moves.
    pub next_epoch: i64,
    /// The newest release.
    pub release_seq: i64,
}

/// One hold, or the tombstone that forbids it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Hold {
    /// Whose order.
    pub order: OrderId,
    /// Of which sale.
    pub sale: SaleId,
    /// By whom.
    pub buyer: BuyerId,
    /// How many; 0 for a tombstone that never knew.
    pub quantity: i64,
    /// Where it stands.
    pub state: HoldState,
    /// Why a tombstone was refused.
    pub refusal: Reason,
    /// The grant it consumed. 0 for a tombstone, so that whatever grant its order may have is one too many.
    pub grant_epoch: i64,
    /// Its release's place; 0 while it has none.
    pub release_seq: i64,
    /// When payment is due, Unix milliseconds.
    pub expire_at: i64,
}

/// Where a hold stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HoldState {
    /// Set aside, unpaid.
    Locked,
    /// Paid.
    Sold,
    /// Back on sale.
    Released,
    /// Never held and never will be.
    Tombstone,
}

/// A wish to hold.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Lock {
    /// Which hold.
    pub hold: HoldId,
    /// Whose order.
    pub order: OrderId,
    /// By whom.
    pub buyer: BuyerId,
    /// How many.
    pub quantity: i64,
    /// The grant's epoch.
    pub grant_epoch: i64,
    /// When payment is due, Unix milliseconds.
    pub expire_at: i64,
    /// Why its order, whose grant was stale, was not granted another: it is refused for that, unless it holds already.
    /// Unspecified for a wish that has its grant.
    pub refusal: Reason,
}

/// What a wish to hold came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Locked {
    /// Held now, or before.
    Yes,
    /// The fence is not where the grant was taken: acquire anew.
    Stale,
    /// Never.
    Refused(Reason),
}

/// What the sweep found a grant to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Swept {
    /// It became this hold; only the mark was missing.
    Persisted,
    /// Its order has another fate: the permit goes back.
    Surplus,
    /// It became nothing: a tombstone now forbids its hold, the permit goes back.
    Orphan,
}

/// A rebuild's view: A and the newest release, at the moment the fence moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Snapshot {
    /// A.
    pub available: i64,
    /// The newest release that A contains.
    pub release_seq: i64,
}

/// What a batch changed: to be written in one transaction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// New rows.
    pub inserted: Vec<(HoldId, Hold)>,
    /// Rows that were there, as they are now.
    pub moved: Vec<(HoldId, Hold)>,
    /// For the outbox, in order.
    pub outbox: Vec<Refund>,
}

/// One sale's ledger, opened for a batch.
#[derive(Clone, Debug)]
pub struct Book<R = Enforced> {
    sale: SaleId,
    limit: i64,
    ledger: Ledger,
    holds: BTreeMap<HoldId, Hold>,
    /// Held or owned units of the batch's buyers.
    bought: BTreeMap<BuyerId, i64>,
    inserted: BTreeSet<HoldId>,
    moved: BTreeSet<HoldId>,
    outbox: Vec<Refund>,
    rules: PhantomData<R>,
}

impl Ledger {
    /// A new sale's.
    pub fn new(stock: i64) -> Self {
        Self { available: stock, held: 0, sold: 0, total: stock, persisted: 0, epoch: 0, next_epoch: 1, release_seq: 0 }
    }

    /// A and every unit locked in this epoch: what the permits' side is compared with.
    pub fn offerable(&self) -> i64 {
        self.available + self.persisted
    }

    /// Step 1 of a rebuild: an epoch above every one allocated, and above what the permits claim. The fence stays.
    pub fn allocate_epoch(&mut self, above: i64) -> i64 {
        let epoch = self.next_epoch.max(above + 1);
        self.next_epoch = epoch + 1;
        epoch
    }

    /// Step 4 of a rebuild: moves the fence, only forward, and says what there is. None when it is further already, or
    /// when there is a newer rebuild: that one may have claimed, and its claim may be lost; were this one to open now,
    /// the newer fence would cut off orders that were accepted meanwhile.
    pub fn move_fence(&mut self, epoch: i64) -> Option<Snapshot> {
        if epoch <= self.epoch || epoch + 1 < self.next_epoch {
            return None;
        }
        self.epoch = epoch;
        self.persisted = 0;
        Some(Snapshot { available: self.available, release_seq: self.release_seq })
    }
}

impl<R: Rules> Book<R> {
    /// Opens a sale's ledger with the holds that exist among the batch's, and what the batch's buyers have.
    pub fn open(
        sale: SaleId,
        limit: i64,
        ledger: Ledger,
        holds: BTreeMap<HoldId, Hold>,
        bought: BTreeMap<BuyerId, i64>,
    ) -> Self {
        Self {
            sale,
            limit,
            ledger,
            holds,
            bought,
            inserted: BTreeSet::new(),
            moved: BTreeSet::new(),
            outbox: Vec::new(),
            rules: PhantomData,
        }
    }

    /// A hold as it is now.
    pub fn hold(&self, id: HoldId) -> Option<&Hold> {
        self.holds.get(&id)
    }

    /// Learns of a hold that another sale's book has made in the same transaction: ids belong to all sales together.
    pub fn learn(&mut self, id: HoldId, hold: &Hold) {
        self.holds.entry(id).or_insert_with(|| hold.clone());
    }

    /// The ledger as it is now.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// The ledger and what is to be written.
    pub fn close(self) -> (Ledger, Changes) {
        let rows =
            |ids: BTreeSet<HoldId>| ids.into_iter().filter_map(|id| Some((id, self.holds.get(&id)?.clone()))).collect();
        let (inserted, moved) = (rows(self.inserted), rows(self.moved));
        (self.ledger, Changes { inserted, moved, outbox: self.outbox })
    }

    /// Sets units aside for one order.
    pub fn lock(&mut self, wish: &Lock) -> Locked {
        if let Some(hold) = self.holds.get(&wish.hold).filter(|hold| Self::settles(hold)) {
            let ours = hold.sale == self.sale;
            let has_another = !(ours && hold.grant_epoch == wish.grant_epoch) && R::holds(Rule::SurplusGoesBack);
            if has_another && wish.grant_epoch == self.ledger.epoch {
                // One grant too many for an order whose fate is settled.
                self.outbox.push(Refund::Return(Return { hold: wish.hold, epoch: wish.grant_epoch }));
            }
            return match hold.state {
                // Of this very order: a late capture's own hold is nobody else's.
                HoldState::Locked | HoldState::Sold if ours && hold.order == wish.order => Locked::Yes,
                HoldState::Tombstone if ours => Locked::Refused(hold.refusal),
                _ => Locked::Refused(Reason::PermitLapsed),
            };
        }
        if wish.refusal != Reason::Unspecified {
            return self.refuse(wish, wish.refusal);
        }
        if wish.grant_epoch != self.ledger.epoch && R::holds(Rule::Fence) {
            return Locked::Stale;
        }
        let bought = self.bought.get(&wish.buyer).copied().unwrap_or(0);
        if bought + wish.quantity > self.limit && R::holds(Rule::LimitOfLedger) {
            return self.refuse(wish, Reason::PurchaseLimitReached);
        }
        if self.ledger.available < wish.quantity && R::holds(Rule::StockOfLedger) {
            let gone = wish.quantity > self.ledger.total - self.ledger.sold;
            return self.refuse(wish, if gone { Reason::SoldOut } else { Reason::AllHeld });
        }
        self.ledger.available -= wish.quantity;
        self.ledger.held += wish.quantity;
        self.ledger.persisted += wish.quantity;
        self.bought.insert(wish.buyer.clone(), bought + wish.quantity);
        self.insert(
            wish.hold,
            Hold {
                order: wish.order,
                sale: self.sale.clone(),
                buyer: wish.buyer.clone(),
                quantity: wish.quantity,
                state: HoldState::Locked,
                refusal: Reason::Unspecified,
                grant_epoch: wish.grant_epoch,
                release_seq: 0,
                expire_at: wish.expire_at,
            },
        );
        Locked::Yes
    }

    /// Whether this row decides what becomes of a lock.
    fn settles(hold: &Hold) -> bool {
        match hold.state {
            HoldState::Tombstone => R::holds(Rule::TombstoneRefusesLock),
            HoldState::Locked | HoldState::Sold | HoldState::Released => R::holds(Rule::OneHoldPerOrder),
        }
    }

    /// A refusal is remembered: what was refused once is never held later, when its order has been told so.
    fn refuse(&mut self, wish: &Lock, reason: Reason) -> Locked {
        if !R::holds(Rule::RefusalIsBuried) {
            return Locked::Refused(reason);
        }
        self.bury(wish.hold, wish.order, &wish.buyer, wish.quantity, reason);
        // A stale grant went with its epoch.
        if wish.grant_epoch == self.ledger.epoch {
            self.outbox.push(Refund::Return(Return { hold: wish.hold, epoch: wish.grant_epoch }));
        }
        Locked::Refused(reason)
    }

    /// Puts units back on sale. What never held leaves a tombstone and changes no counter (E4, E5).
    pub fn release(&mut self, id: HoldId, order: OrderId, buyer: &BuyerId) -> Result<()> {
        let Some(hold) = self.holds.get_mut(&id) else {
            if !R::holds(Rule::ReleaseBuries) {
                return Ok(());
            }
            self.bury(id, order, buyer, 0, Reason::PermitLapsed);
            // A grant may be on its way to a lock that will now fail.
            self.outbox.push(Refund::Return(Return { hold: id, epoch: self.ledger.epoch }));
            return Ok(());
        };
        match hold.state {
            _ if hold.sale != self.sale => Err(Error::illegal_state("UNKNOWN", "the hold is of another sale")),
            HoldState::Sold => Err(Error::illegal_state("SOLD", "a sold hold cannot be released")),
            HoldState::Released if R::holds(Rule::ReleaseOnce) => Ok(()),
            HoldState::Tombstone => Ok(()),
            HoldState::Locked | HoldState::Released => {
                self.ledger.held -= hold.quantity;
                self.ledger.available += hold.quantity;
                self.ledger.release_seq += 1;
                hold.state = HoldState::Released;
                hold.release_seq = self.ledger.release_seq;
                self.outbox.push(Refund::Release(Release {
                    hold: id,
                    buyer: Some(hold.buyer.clone()),
                    quantity: hold.quantity,
                    seq: hold.release_seq,
                    grant_epoch: hold.grant_epoch,
                }));
                self.touch(id);
                Ok(())
            }
        }
    }

    /// A paid hold becomes sold.
    pub fn deduct(&mut self, id: HoldId) -> Result<()> {
        let Some(hold) = self.holds.get_mut(&id).filter(|hold| hold.sale == self.sale) else {
            return Err(Error::illegal_state("UNKNOWN", "there is no such hold"));
        };
        match hold.state {
            HoldState::Sold => Ok(()),
            HoldState::Released | HoldState::Tombstone => {
                Err(Error::illegal_state("RELEASED", "a released hold cannot be sold"))
            }
            HoldState::Locked => {
                self.ledger.held -= hold.quantity;
                self.ledger.sold += hold.quantity;
                hold.state = HoldState::Sold;
                self.touch(id);
                Ok(())
            }
        }
    }

    /// Decides about a grant that the funnel has provably passed. A late lock and this race on the hold's key.
    pub fn sweep(&mut self, pending: &Pending) -> Swept {
        let Grant { epoch, quantity, buyer, .. } = &pending.grant;
        let swept = match self.holds.get(&pending.hold) {
            Some(hold) if hold.sale == self.sale && hold.grant_epoch == *epoch => return Swept::Persisted,
            Some(_) if !R::holds(Rule::SurplusGoesBack) => return Swept::Surplus,
            Some(_) => Swept::Surplus,
            None if !R::holds(Rule::SweepBuries) => Swept::Orphan,
            None => {
                // The order's id is the hold's, or is not known any more; nothing reads it of a tombstone.
                self.bury(pending.hold, pending.hold, buyer, *quantity, Reason::PermitLapsed);
                Swept::Orphan
            }
        };
        self.outbox.push(Refund::Return(Return { hold: pending.hold, epoch: *epoch }));
        swept
    }

    /// Raises or lowers the stock. Raised stock reaches buyers like a release, by its own id and sequence (E9); before
    /// it is lowered the permits must have been withdrawn.
    pub fn adjust(&mut self, id: HoldId, delta: i64) -> Result<()> {
        let Some(total) = self.ledger.total.checked_add(delta).filter(|total| *total <= MAX_STOCK) else {
            return Err(Error::invalid("delta", format!("must not raise the stock above {MAX_STOCK}")));
        };
        if self.ledger.available + delta < 0 {
            return Err(Error::illegal_state("HELD", "fewer units than that are available"));
        }
        self.ledger.total = total;
        self.ledger.available += delta;
        if delta > 0 {
            self.ledger.release_seq += 1;
            let seq = self.ledger.release_seq;
            self.outbox.push(Refund::Release(Release { hold: id, buyer: None, quantity: delta, seq, grant_epoch: 0 }));
        }
        Ok(())
    }

    fn bury(&mut self, id: HoldId, order: OrderId, buyer: &BuyerId, quantity: i64, refusal: Reason) {
        self.insert(
            id,
            Hold {
                order,
                sale: self.sale.clone(),
                buyer: buyer.clone(),
                quantity,
                state: HoldState::Tombstone,
                refusal,
                grant_epoch: 0,
                release_seq: 0,
                expire_at: 0,
            },
        );
    }

    fn insert(&mut self, id: HoldId, hold: Hold) {
        self.holds.insert(id, hold);
        self.inserted.insert(id);
    }

    /// Notes a changed row, unless it is new in this batch and written as such anyway.
    fn touch(&mut self, id: HoldId) {
        if !self.inserted.contains(&id) {
            self.moved.insert(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e15_only_the_newest_rebuild_moves_the_fence_and_only_once() {
        let mut ledger = Ledger::new(3);
        let (older, newer) = (ledger.allocate_epoch(0), ledger.allocate_epoch(0));
        assert_eq!(ledger.move_fence(older), None, "a newer one may have claimed");
        let snapshot = Snapshot { available: 3, release_seq: 0 };
        assert_eq!(ledger.move_fence(newer), Some(snapshot));
        assert_eq!(ledger.move_fence(newer), None);
        assert_eq!(ledger.epoch, newer);
    }
}
