//! The production values that a state is made of, each kept once. A step on one of them runs the production function the
//! first time, and is remembered.

use std::collections::BTreeMap;

use proto::Reason;
use stock_svc::domain::{
    HoldId,
    ledger::{Book, Changes, Hold, HoldState, Ledger, Lock, Locked, Snapshot, Swept},
    permits::{self, Acquire, Acquired, Claimed, Facts, Grant, Held, Opening, Pending, Phase, Raise, Refund, Refunded},
    rebuild::Fenced,
    rules::Rule,
    sale::Verb,
};

use super::{
    cast::Cast,
    switches::{Switched, holds},
};
use crate::search::{Interner, Memo};

/// At most so many orders.
pub const ORDERS: usize = 4;

/// Permits under rules that can be turned off.
pub type Permits = permits::Permits<Switched>;

/// A sale's ledger and every hold.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Books {
    /// The ledger.
    pub ledger: Ledger,
    /// The rows.
    pub holds: BTreeMap<HoldId, Hold>,
}

/// What acquiring came to, without whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Got {
    /// A grant of this epoch.
    Fresh(i64),
    /// The grant of this epoch, again.
    Again(i64),
    /// Nobody knows.
    Unavailable,
    /// Given back before.
    Released,
    /// Outside of the window.
    Closed,
    /// At the limit, or above it.
    Limit,
    /// Nothing now.
    AllHeld,
    /// Never again.
    SoldOut,
}

/// What is done to permits.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum PermitOp {
    /// By this order.
    Acquire(usize),
    /// This refund.
    Refund(Refund),
    /// The hint that this order's grant of this epoch became a hold.
    Persisted(i64, usize),
    /// A rebuild's claim.
    Claim(i64, Facts),
    /// A rebuild's last step.
    Open(Opening, Vec<Held>),
    /// The sale has changed.
    Facts(Facts),
    /// A correction.
    Clamp { epoch: i64, version: i64, excess: i64 },
    /// A correction.
    Raise(Raise),
    /// A withdrawal.
    Withdraw,
    /// Everything is lost.
    Wipe,
}

/// What it came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PermitAnswer {
    /// Of an acquisition.
    Got(Got),
    /// Of a refund.
    Refunded(Refunded),
    /// Of a claim.
    Claimed(Claimed),
    /// Of an opening.
    Opened(bool),
    /// Of anything else.
    Done,
}

/// What a search needs to know of permits at every step.
#[derive(Clone, Copy, Debug, Default)]
pub struct PermitView {
    /// Whether there are any.
    pub is_there: bool,
    /// Whether they are open.
    pub is_open: bool,
    /// Of which epoch.
    pub epoch: i64,
    /// R.
    pub free: i64,
    /// R and what is granted.
    pub offered: i64,
    /// Corrections.
    pub version: i64,
    /// Releases in the snapshot.
    pub snapshot_seq: i64,
    /// Which epoch's grant each order has; 0 for none.
    pub listed: [i64; ORDERS],
    /// Orders whose grants nobody has said to be persisted.
    pub pending: u8,
    /// Whether a buyer is counted who has no grant.
    pub miscounts: bool,
}

/// What is done to the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LedgerOp {
    /// An order with a grant of this epoch.
    Lock(usize, i64),
    /// An order that was granted no other permit.
    Refuse(usize),
    /// A hold goes back.
    Release(usize),
    /// A hold is paid.
    Deduct(usize),
    /// A grant of this epoch is swept.
    Sweep(usize, i64),
    /// A rebuild's first step.
    Allocate,
    /// A rebuild's fourth step.
    Fence(i64),
    /// The same, whatever the fence says.
    ForceFence(i64),
}

/// What it came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LedgerAnswer {
    /// Of a lock or a refusal.
    Locked(Locked),
    /// Of a sweep.
    Swept(Swept),
    /// Of an allocation.
    Epoch(i64),
    /// Of a fence that moved: the number of what was seen.
    Fenced(u32),
    /// Of a fence that is further already.
    NotFenced,
    /// Of a release or a deduction: whether it was taken.
    Done(bool),
}

/// A step on the ledger.
#[derive(Clone, Copy, Debug)]
pub struct LedgerStep {
    /// The ledger after it.
    pub to: u32,
    /// What it put in the outbox, by its number.
    pub refunds: u32,
    /// What it answered.
    pub answer: LedgerAnswer,
}

/// What a search needs to know of a ledger at every step.
#[derive(Clone, Debug)]
pub struct LedgerView {
    /// The ledger.
    pub ledger: Ledger,
    /// Every order's row.
    pub rows: [Option<HoldState>; ORDERS],
    /// The epoch of the grant that each hold consumed.
    pub consumed: [i64; ORDERS],
    /// What is wrong with it by itself.
    pub problem: Option<String>,
}

/// The outbox: refunds that wait, and refunds that were relayed and may come once more.
pub type Outbox = Vec<(Refund, bool)>;

/// A refund in an outbox.
#[derive(Clone, Copy, Debug)]
pub struct Waiting {
    op: u32,
    /// Of which order.
    pub order: usize,
    /// Of the grant it gives back; none for a release.
    pub epoch: Option<i64>,
    /// Whether it was relayed before.
    pub again: bool,
}

/// All values of one search.
pub struct Values {
    cast: Cast,
    limit: i64,
    permits: Interner<Permits>,
    permit_views: Vec<PermitView>,
    /// By which step from which other value each came to be: so it can be exchanged without looking inside.
    permit_origins: Vec<(u32, u32)>,
    permit_ops: Interner<PermitOp>,
    permit_steps: Memo<(u32, u32), (u32, PermitAnswer)>,
    ledgers: Interner<Books>,
    ledger_views: Vec<LedgerView>,
    ledger_steps: Memo<(u32, LedgerOp), LedgerStep>,
    refunds: Interner<Vec<Refund>>,
    outboxes: Interner<Outbox>,
    outbox_adds: Memo<(u32, u32), u32>,
    outbox_relays: Memo<(u32, u8), u32>,
    waiting: Memo<(u32, u8), Waiting>,
    fenced: Interner<Fenced>,
    swapped_permits: Swapped,
    swapped_permit_ops: Swapped,
    swapped_ledgers: Swapped,
    swapped_outboxes: Swapped,
}

impl Values {
    /// None yet but lost permits and an empty outbox, both with the number 0.
    pub fn new(cast: Cast, limit: i64) -> Self {
        let swapped = Swapped::new(cast.swaps.len());
        let mut values = Self {
            cast,
            limit,
            permits: Interner::default(),
            permit_views: Vec::new(),
            permit_origins: Vec::new(),
            permit_ops: Interner::default(),
            permit_steps: Memo::default(),
            ledgers: Interner::default(),
            ledger_views: Vec::new(),
            ledger_steps: Memo::default(),
            refunds: Interner::default(),
            outboxes: Interner::default(),
            outbox_adds: Memo::default(),
            outbox_relays: Memo::default(),
            waiting: Memo::default(),
            fenced: Interner::default(),
            swapped_permits: swapped.clone(),
            swapped_permit_ops: swapped.clone(),
            swapped_ledgers: swapped.clone(),
            swapped_outboxes: swapped,
        };
        values.add_permits(Permits::default(), (0, 0));
        values.outboxes.add(Vec::new());
        values.refunds.add(Vec::new());
        values
    }

    /// Who takes part.
    pub fn cast(&self) -> &Cast {
        &self.cast
    }

    // Permits.

    fn add_permits(&mut self, permits: Permits, origin: (u32, u32)) -> u32 {
        let view = self.view_of(&permits);
        let (number, new) = self.permits.add(permits);
        if new {
            self.permit_views.push(view);
            self.permit_origins.push(origin);
        }
        number
    }

    fn view_of(&self, permits: &Permits) -> PermitView {
        let Some(header) = permits.header() else { return PermitView::default() };
        let mut listed = [0; ORDERS];
        for (hold, grant) in permits.grants() {
            listed[self.cast.index_of(*hold)] = grant.epoch;
        }
        let mut pending = 0;
        for grant in permits.pending(i64::MAX, usize::MAX).unwrap_or_default() {
            pending |= 1 << self.cast.index_of(grant.hold);
        }
        let has_grant = |buyer| permits.grants().any(|(_, grant)| grant.buyer == buyer);
        PermitView {
            is_there: true,
            is_open: header.phase == Phase::Open,
            epoch: header.epoch,
            free: header.free,
            offered: header.offered(),
            version: header.version,
            snapshot_seq: header.snapshot_seq,
            listed,
            pending,
            miscounts: !permits.buyers().into_iter().all(has_grant),
        }
    }

    /// What is to be known of them.
    pub fn permit_view(&self, permits: u32) -> &PermitView {
        &self.permit_views[permits as usize]
    }

    /// Their header, as reconciliation reads it.
    pub fn header(&self, permits: u32) -> Option<&permits::Header> {
        self.permits.get(permits).header()
    }

    /// Does something to permits.
    pub fn permit(&mut self, permits: u32, op: &PermitOp) -> (u32, PermitAnswer) {
        let op = self.permit_ops.number(op);
        self.permit_by(permits, op)
    }

    fn permit_by(&mut self, permits: u32, op: u32) -> (u32, PermitAnswer) {
        if let Some(step) = self.permit_steps.get(&(permits, op)) {
            return *step;
        }
        let mut after = self.permits.get(permits).clone();
        let answer = self.apply_permit(&mut after, self.permit_ops.get(op));
        let to = self.add_permits(after, (permits, op));
        self.permit_steps.insert((permits, op), (to, answer));
        (to, answer)
    }

    fn apply_permit(&self, permits: &mut Permits, op: &PermitOp) -> PermitAnswer {
        match op {
            PermitOp::Acquire(order) => {
                let order = &self.cast.orders[*order];
                let wish = Acquire { hold: order.hold, buyer: order.buyer.clone(), quantity: order.quantity };
                PermitAnswer::Got(match permits.acquire(&wish, 0) {
                    Acquired::Fresh(grant) => Got::Fresh(grant.epoch),
                    Acquired::Again(grant) => Got::Again(grant.epoch),
                    Acquired::Unavailable => Got::Unavailable,
                    Acquired::Released => Got::Released,
                    Acquired::NotStarted | Acquired::Paused | Acquired::Ended => Got::Closed,
                    Acquired::AtLimit(_) | Acquired::OverLimit => Got::Limit,
                    Acquired::AllHeld => Got::AllHeld,
                    Acquired::SoldOut => Got::SoldOut,
                    Acquired::Reused => unreachable!("an order always wants the same"),
                })
            }
            PermitOp::Refund(refund) => PermitAnswer::Refunded(permits.refund(refund)),
            PermitOp::Persisted(epoch, order) => {
                permits.persisted(*epoch, &[self.cast.orders[*order].hold]);
                PermitAnswer::Done
            }
            PermitOp::Claim(epoch, facts) => PermitAnswer::Claimed(permits.claim(*epoch, facts, "server")),
            PermitOp::Open(opening, held) => {
                let loaded = permits.load(opening.epoch, held) || !holds(Rule::OpenOnlyClaimed);
                PermitAnswer::Opened(loaded && permits.open(opening))
            }
            PermitOp::Facts(facts) => {
                permits.set_facts(facts);
                PermitAnswer::Done
            }
            PermitOp::Clamp { epoch, version, excess } => {
                permits.clamp(*epoch, *version, *excess);
                PermitAnswer::Done
            }
            PermitOp::Raise(raise) => {
                permits.raise(raise);
                PermitAnswer::Done
            }
            PermitOp::Withdraw => {
                permits.withdraw(1);
                PermitAnswer::Done
            }
            PermitOp::Wipe => {
                permits.wipe();
                PermitAnswer::Done
            }
        }
    }

    /// The permits after an exchange of names: what the same steps, exchanged, have made of nothing.
    pub fn swapped_permits(&mut self, permits: u32, swap: u8) -> u32 {
        if swap == 0 || permits == 0 {
            return permits;
        }
        if let Some(swapped) = self.swapped_permits.get((permits, swap)) {
            return swapped;
        }
        let (origin, op) = self.permit_origins[permits as usize];
        let (origin, op) = (self.swapped_permits(origin, swap), self.swapped_permit_op(op, swap));
        let (swapped, _) = self.permit_by(origin, op);
        self.swapped_permits.insert((permits, swap), swapped);
        swapped
    }

    fn swapped_permit_op(&mut self, op: u32, swap: u8) -> u32 {
        if let Some(swapped) = self.swapped_permit_ops.get((op, swap)) {
            return swapped;
        }
        let by = swap as usize;
        let swapped = match self.permit_ops.get(op).clone() {
            PermitOp::Acquire(order) => PermitOp::Acquire(self.cast.swaps[by][order]),
            PermitOp::Persisted(epoch, order) => PermitOp::Persisted(epoch, self.cast.swaps[by][order]),
            PermitOp::Refund(refund) => PermitOp::Refund(self.cast.refund(by, &refund)),
            PermitOp::Open(opening, held) => PermitOp::Open(opening, self.cast.held(by, &held)),
            anonymous => anonymous,
        };
        let (swapped, _) = self.permit_ops.add(swapped);
        self.swapped_permit_ops.insert((op, swap), swapped);
        swapped
    }

    // Ledgers.

    /// A new ledger's number.
    pub fn add_ledger(&mut self, books: Books) -> u32 {
        let view = self.ledger_view_of(&books);
        let (number, new) = self.ledgers.add(books);
        if new {
            self.ledger_views.push(view);
        }
        number
    }

    fn ledger_view_of(&self, books: &Books) -> LedgerView {
        let mut rows = [None; ORDERS];
        let mut consumed = [0; ORDERS];
        for (id, hold) in &books.holds {
            let order = self.cast.index_of(*id);
            rows[order] = Some(hold.state);
            consumed[order] = hold.grant_epoch;
        }
        LedgerView { ledger: books.ledger.clone(), rows, consumed, problem: self.problem_of(books) }
    }

    /// I1 and I7.
    fn problem_of(&self, books: &Books) -> Option<String> {
        let Ledger { available, held, sold, total, .. } = books.ledger;
        if available < 0 || held < 0 || sold < 0 || available + held + sold != total {
            return Some(format!("I1: A {available} + H {held} + D {sold} of {total}"));
        }
        let units = |state| books.holds.values().filter(|h| h.state == state).map(|h| h.quantity).sum::<i64>();
        let (locked, paid) = (units(HoldState::Locked), units(HoldState::Sold));
        if (locked, paid) != (held, sold) {
            return Some(format!("I1: H {held} and D {sold}, where the holds have {locked} and {paid}"));
        }
        self.bought(books)
            .into_values()
            .any(|units| units > self.limit)
            .then(|| "I7: a buyer above its limit".to_owned())
    }

    fn bought(&self, books: &Books) -> BTreeMap<proto::BuyerId, i64> {
        let mut bought = BTreeMap::new();
        for hold in books.holds.values().filter(|h| matches!(h.state, HoldState::Locked | HoldState::Sold)) {
            *bought.entry(hold.buyer.clone()).or_insert(0) += hold.quantity;
        }
        bought
    }

    /// What is to be known of it.
    pub fn ledger_view(&self, ledger: u32) -> &LedgerView {
        &self.ledger_views[ledger as usize]
    }

    /// What admission is told of the sale.
    pub fn facts(&self, ledger: u32, is_closed: bool) -> Facts {
        let ledger = &self.ledger_view(ledger).ledger;
        Facts {
            version: if is_closed { 2 } else { 1 },
            verb: if is_closed { Verb::Closed } else { Verb::Open },
            start_at: 0,
            end_at: i64::MAX,
            limit: self.limit,
            total: ledger.total,
            sold: ledger.sold,
        }
    }

    /// What a rebuild sees of the ledger as it is, without moving its fence.
    pub fn look(&self, ledger: u32, is_closed: bool) -> Fenced {
        let books = self.ledgers.get(ledger);
        let live = books.holds.iter().filter(|(_, h)| matches!(h.state, HoldState::Locked | HoldState::Sold));
        let held = live.map(|(id, h)| {
            let grant = Grant { epoch: h.grant_epoch, quantity: h.quantity, at: 0, buyer: h.buyer.clone() };
            Held { hold: *id, grant }
        });
        let Ledger { available, release_seq, .. } = books.ledger;
        let snapshot = Snapshot { available, release_seq };
        Fenced { snapshot, facts: self.facts(ledger, is_closed), held: held.collect() }
    }

    /// What was seen.
    pub fn fenced(&self, number: u32) -> &Fenced {
        self.fenced.get(number)
    }

    /// Does something to the ledger, in one transaction.
    pub fn book(&mut self, ledger: u32, op: LedgerOp) -> LedgerStep {
        if let Some(step) = self.ledger_steps.get(&(ledger, op)) {
            return *step;
        }
        let (books, refunds, answer) = self.apply_ledger(ledger, op);
        let to = self.add_ledger(books);
        let answer = match answer {
            // Of the moved fence's own moment.
            LedgerAnswer::Fenced(_) => {
                let fenced = self.look(to, false);
                LedgerAnswer::Fenced(self.fenced.add(fenced).0)
            }
            answer => answer,
        };
        let (refunds, _) = self.refunds.add(refunds);
        let step = LedgerStep { to, refunds, answer };
        self.ledger_steps.insert((ledger, op), step);
        step
    }

    fn apply_ledger(&self, ledger: u32, op: LedgerOp) -> (Books, Vec<Refund>, LedgerAnswer) {
        let mut books = self.ledgers.get(ledger).clone();
        match op {
            LedgerOp::Allocate => {
                let epoch = books.ledger.allocate_epoch(0);
                return (books, Vec::new(), LedgerAnswer::Epoch(epoch));
            }
            LedgerOp::Fence(epoch) => {
                let moved = books.ledger.move_fence(epoch).is_some();
                let answer = if moved { LedgerAnswer::Fenced(0) } else { LedgerAnswer::NotFenced };
                return (books, Vec::new(), answer);
            }
            LedgerOp::ForceFence(epoch) => {
                (books.ledger.epoch, books.ledger.persisted) = (epoch, 0);
                return (books, Vec::new(), LedgerAnswer::Fenced(0));
            }
            _ => {}
        }
        let index = match op {
            LedgerOp::Lock(order, _) | LedgerOp::Refuse(order) | LedgerOp::Release(order) => order,
            LedgerOp::Deduct(order) | LedgerOp::Sweep(order, _) => order,
            LedgerOp::Allocate | LedgerOp::Fence(_) | LedgerOp::ForceFence(_) => unreachable!("done above"),
        };
        let order = &self.cast.orders[index];
        // As the store reads it: the batch's rows, and what the batch's buyers have.
        let there = books.holds.iter().filter(|(id, _)| **id == order.hold).map(|(id, h)| (*id, h.clone())).collect();
        let is_new = !books.holds.contains_key(&order.hold);
        let mut book: Book<Switched> =
            Book::open(self.cast.sale.clone(), self.limit, books.ledger.clone(), there, self.bought(&books));
        let wish = |grant_epoch, refusal| Lock {
            hold: order.hold,
            order: order.hold,
            buyer: order.buyer.clone(),
            quantity: order.quantity,
            grant_epoch,
            expire_at: 0,
            refusal,
        };
        let answer = match op {
            LedgerOp::Lock(_, epoch) => LedgerAnswer::Locked(book.lock(&wish(epoch, Reason::Unspecified))),
            LedgerOp::Refuse(_) => LedgerAnswer::Locked(book.lock(&wish(0, Reason::AllHeld))),
            LedgerOp::Release(_) => LedgerAnswer::Done(book.release(order.hold, order.hold, &order.buyer).is_ok()),
            LedgerOp::Deduct(_) => LedgerAnswer::Done(book.deduct(order.hold).is_ok()),
            LedgerOp::Sweep(_, epoch) => {
                let grant = Grant { epoch, quantity: order.quantity, at: 0, buyer: order.buyer.clone() };
                LedgerAnswer::Swept(book.sweep(&Pending { hold: order.hold, grant }))
            }
            LedgerOp::Allocate | LedgerOp::Fence(_) | LedgerOp::ForceFence(_) => unreachable!("done above"),
        };
        let (after, Changes { inserted, moved, outbox }) = book.close();
        books.ledger = after;
        books.holds.extend(inserted.into_iter().chain(moved));
        if is_new && matches!(op, LedgerOp::Release(_)) && !holds(Rule::NothingHeldNothingCounted) {
            books.ledger.available += 1;
        }
        (books, outbox, answer)
    }

    /// The ledger after an exchange of names.
    pub fn swapped_ledger(&mut self, ledger: u32, swap: u8) -> u32 {
        if swap == 0 {
            return ledger;
        }
        if let Some(swapped) = self.swapped_ledgers.get((ledger, swap)) {
            return swapped;
        }
        let books = self.ledgers.get(ledger);
        let holds = books.holds.iter().map(|(id, hold)| self.cast.row(swap as usize, *id, hold)).collect();
        let swapped = Books { ledger: books.ledger.clone(), holds };
        let swapped = self.add_ledger(swapped);
        self.swapped_ledgers.insert((ledger, swap), swapped);
        swapped
    }

    // Outboxes.

    /// What is in it.
    pub fn outbox(&self, outbox: u32) -> &Outbox {
        self.outboxes.get(outbox)
    }

    /// A refund in it.
    pub fn waiting(&mut self, outbox: u32, index: usize) -> Waiting {
        let key = (outbox, index as u8);
        if let Some(waiting) = self.waiting.get(&key) {
            return *waiting;
        }
        let (refund, again) = self.outboxes.get(outbox)[index].clone();
        let (hold, epoch) = match &refund {
            Refund::Release(release) => (release.hold, None),
            Refund::Return(returned) => (returned.hold, Some(returned.epoch)),
        };
        let op = self.permit_ops.number(&PermitOp::Refund(refund));
        let waiting = Waiting { op, order: self.cast.index_of(hold), epoch, again };
        self.waiting.insert(key, waiting);
        waiting
    }

    /// Brings a refund of the outbox to the permits.
    pub fn refund(&mut self, permits: u32, outbox: u32, index: usize) -> (u32, Refunded) {
        let op = self.waiting(outbox, index).op;
        let (to, answer) = self.permit_by(permits, op);
        let PermitAnswer::Refunded(refunded) = answer else { unreachable!("that was asked") };
        (to, refunded)
    }

    /// Puts refunds in. One that waits already is there once.
    pub fn put_out(&mut self, outbox: u32, refunds: u32) -> u32 {
        if refunds == 0 {
            return outbox;
        }
        if let Some(to) = self.outbox_adds.get(&(outbox, refunds)) {
            return *to;
        }
        let mut entries = self.outboxes.get(outbox).clone();
        for refund in self.refunds.get(refunds) {
            entries.retain(|(known, _)| known != refund);
            entries.push((refund.clone(), false));
        }
        entries.sort();
        let (to, _) = self.outboxes.add(entries);
        self.outbox_adds.insert((outbox, refunds), to);
        to
    }

    /// One was relayed: it may come once more, and then no more.
    pub fn relayed(&mut self, outbox: u32, index: usize) -> u32 {
        let key = (outbox, index as u8);
        if let Some(to) = self.outbox_relays.get(&key) {
            return *to;
        }
        let mut entries = self.outboxes.get(outbox).clone();
        if entries[index].1 {
            entries.remove(index);
        } else {
            entries[index].1 = true;
        }
        let (to, _) = self.outboxes.add(entries);
        self.outbox_relays.insert(key, to);
        to
    }

    /// The outbox after an exchange of names.
    pub fn swapped_outbox(&mut self, outbox: u32, swap: u8) -> u32 {
        if swap == 0 || outbox == 0 {
            return outbox;
        }
        if let Some(swapped) = self.swapped_outboxes.get((outbox, swap)) {
            return swapped;
        }
        let entries = self.outboxes.get(outbox);
        let mut swapped: Outbox =
            entries.iter().map(|(refund, late)| (self.cast.refund(swap as usize, refund), *late)).collect();
        swapped.sort();
        let (swapped, _) = self.outboxes.add(swapped);
        self.swapped_outboxes.insert((outbox, swap), swapped);
        swapped
    }
}

/// Values after exchanges, as far as they were asked for.
#[derive(Clone, Debug)]
pub struct Swapped {
    swaps: usize,
    known: Vec<u32>,
}

impl Swapped {
    const UNKNOWN: u32 = u32::MAX;

    /// For so many exchanges.
    pub fn new(swaps: usize) -> Self {
        Self { swaps, known: Vec::new() }
    }

    /// The number of a value after an exchange.
    pub fn get(&self, (value, swap): (u32, u8)) -> Option<u32> {
        let known = self.known.get(value as usize * self.swaps + swap as usize);
        known.copied().filter(|known| *known != Self::UNKNOWN)
    }

    /// Notes it.
    pub fn insert(&mut self, (value, swap): (u32, u8), swapped: u32) {
        let place = value as usize * self.swaps + swap as usize;
        if place >= self.known.len() {
            self.known.resize((place + 1).max(self.known.len() * 2), Self::UNKNOWN);
        }
        self.known[place] = swapped;
    }
}
