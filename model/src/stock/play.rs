//! Everything that can happen around the stock of one sale, and what must never be seen.

use std::{
    fmt,
    hash::{Hash, Hasher},
};

use stock_svc::domain::{
    ledger::{HoldState, Ledger, Locked, Swept},
    permits::{Claimed, Opening, Phase, Raise, Refund, Refunded, Release},
    rebuild::{Fenced, Rebuild, Todo, blocks_under},
    reconcile::{excess_under, shortage_under},
    rules::Rule,
};

use super::{
    Scope,
    cast::Cast,
    switches::{Switched, holds},
    values::{
        Books, Got, LedgerAnswer, LedgerOp, LedgerStep, LedgerView, ORDERS, PermitAnswer, PermitOp, PermitView,
        Swapped, Values, Waiting,
    },
};
use crate::search::{Interner, Model, Step};

/// A state: numbers of values, and what little is known beside them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct State {
    permits: u32,
    ledger: u32,
    outbox: u32,
    /// Rebuilds and corrections that have begun.
    begun: u32,
    orders: [Buyer; ORDERS],
    budget: Budget,
}

impl Hash for State {
    /// In as few words as possible.
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        let word = |high: u32, low: u32| u64::from(high) << 32 | u64::from(low);
        hasher.write_u64(word(self.permits, self.ledger));
        hasher.write_u64(word(self.outbox, self.begun));
        let orders = |orders: &[Buyer]| {
            orders.iter().fold(0, |word, Buyer { stage, epoch, notes }| {
                word << 24 | u64::from(*stage as u8) << 16 | u64::from(*epoch) << 8 | u64::from(*notes)
            })
        };
        let Budget { wipes, rebuilds, losses, slips, claimed, flags } = self.budget;
        let left = u64::from(wipes) << 12 | u64::from(rebuilds) << 8 | u64::from(losses) << 4 | u64::from(slips);
        hasher.write_u64(orders(&self.orders[..2]) << 16 | left);
        hasher.write_u64(orders(&self.orders[2..]) << 16 | u64::from(claimed) << 8 | u64::from(flags));
    }
}

/// How far one order has come on its way to the ledger.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Buyer {
    stage: Stage,
    /// Of the grant that it knows, or that its message carries.
    epoch: u8,
    notes: u8,
}

/// See [`Buyer`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Stage {
    /// Nobody has asked for a permit, or none was given.
    #[default]
    Idle,
    /// Granted, and not in the stream.
    Granted,
    /// In the stream.
    Waiting,
    /// The funnel is done with it.
    Passed,
}

/// Its grant was stale and another was given: the message still carries the stale one.
const RENEWED: u8 = 1;
/// Its grant was stale, no other was given, and somebody is about to refuse it.
const REFUSING: u8 = 2;
/// Nothing is promised to it: it was published when its permit was lost already, or it was given back.
const UNPROMISED: u8 = 4;
/// Told that it holds nothing and never will.
const CLOSED: u8 = 8;

/// What may still happen, and what has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Budget {
    wipes: u8,
    rebuilds: u8,
    losses: u8,
    slips: u8,
    /// The newest epoch that was ever claimed.
    claimed: u8,
    flags: u8,
}

/// The sale was closed.
const SALE_CLOSED: u8 = 1;
/// Permits may be too many: a write was lost, or units were made up.
const TOO_MANY: u8 = 2;
/// The permits' server has lost a write and is another one: the guard will have them rebuilt.
const FOREIGN: u8 = 4;
/// The permits were lost and not opened since.
const LOST: u8 = 8;

/// Rebuilds and corrections that have begun.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Begun {
    rebuilds: Vec<Running>,
    raises: Vec<Raise>,
}

/// A rebuild.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Running {
    rebuild: Rebuild,
    /// Orders in the stream when it claimed.
    awaited: u8,
    /// A snapshot that was read at another moment than it should be.
    looked: Option<Fenced>,
}

/// What can happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// A buyer asks for a permit, for the first time or again.
    Acquire(u8, Got),
    /// The same, and the permits lose it.
    AcquireLost(u8),
    /// An accepted order is in the stream.
    Publish(u8),
    /// The funnel locks an order.
    Lock(u8, Locked),
    /// The funnel asks for another permit for an order whose grant is stale.
    Renew(u8, Got),
    /// The ledger refuses an order that got none.
    Refuse(u8, Locked),
    /// A hold is released: expired or cancelled.
    Release(u8),
    /// An order is closed that never held.
    ReleaseNothing(u8),
    /// A hold is paid.
    Pay(u8),
    /// The sweep looks at a grant.
    Sweep(u8, Swept),
    /// A refund reaches the permits.
    Relay(Relayed),
    /// Permits are refunded before the ledger knows.
    RefundFirst(u8),
    /// A rebuild begins.
    Begin(i64),
    /// It claims.
    Claim(i64, bool),
    /// Nothing blocks its fence.
    Drained(i64),
    /// It sees that it has lost its claim.
    Overtaken(i64),
    /// It reads the ledger before it should.
    Look(i64, i64),
    /// It moves the fence.
    Fence(i64, bool),
    /// It opens.
    Open(i64, bool),
    /// The permits are lost.
    Wipe,
    /// A permit is lost for no reason.
    SlipDown,
    /// A permit is made up.
    SlipUp,
    /// Too many permits are taken away.
    Clamp,
    /// Too few permits are found.
    Short(i64),
    /// They are raised.
    Raise(i64),
    /// An operator closes the sale.
    CloseSale,
    /// Nothing goes on.
    Stuck,
}

/// A refund on its way, and what it came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Relayed {
    order: u8,
    /// Of the grant it gives back; none for a release.
    epoch: Option<i64>,
    again: bool,
    counted: bool,
    lost: bool,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |order: &u8| char::from(b'a' + order);
        match self {
            Action::Acquire(order, got) => write!(f, "{} acquires: {}", name(order), said(*got)),
            Action::AcquireLost(order) => write!(f, "{} acquires, and the permits lose that", name(order)),
            Action::Publish(order) => write!(f, "{} is in the stream", name(order)),
            Action::Lock(order, locked) => write!(f, "{} is locked: {}", name(order), told(*locked)),
            Action::Renew(order, got) => write!(f, "{} acquires anew: {}", name(order), said(*got)),
            Action::Refuse(order, locked) => write!(f, "{} is to be refused: {}", name(order), told(*locked)),
            Action::Release(order) => write!(f, "{} is released", name(order)),
            Action::ReleaseNothing(order) => write!(f, "{} is closed, though it never held", name(order)),
            Action::Pay(order) => write!(f, "{} is paid", name(order)),
            Action::Sweep(order, swept) => write!(f, "{} is swept: {swept:?}", name(order)),
            Action::Relay(Relayed { order, epoch, again, counted, lost }) => {
                let what = match epoch {
                    Some(epoch) => format!("{}'s permit of epoch {epoch}", name(order)),
                    None => format!("{}'s release", name(order)),
                };
                let again = if *again { " again" } else { "" };
                let end = if *counted { "R + 1" } else { "not counted" };
                write!(f, "{what} is refunded{again}: {end}{}", if *lost { ", and the permits lose that" } else { "" })
            }
            Action::RefundFirst(order) => write!(f, "{}'s permit is refunded before its release", name(order)),
            Action::Begin(epoch) => write!(f, "rebuild {epoch} begins"),
            Action::Claim(epoch, true) => write!(f, "rebuild {epoch} claims"),
            Action::Claim(epoch, false) => write!(f, "rebuild {epoch} claims in vain"),
            Action::Drained(epoch) => write!(f, "rebuild {epoch} has waited for the funnel"),
            Action::Overtaken(epoch) => write!(f, "rebuild {epoch} sees that it is overtaken"),
            Action::Look(epoch, available) => write!(f, "rebuild {epoch} sees A = {available}"),
            Action::Fence(epoch, true) => write!(f, "rebuild {epoch} moves the fence"),
            Action::Fence(epoch, false) => write!(f, "rebuild {epoch} finds the fence further"),
            Action::Open(epoch, true) => write!(f, "rebuild {epoch} opens"),
            Action::Open(epoch, false) => write!(f, "rebuild {epoch} opens in vain"),
            Action::Wipe => f.write_str("the permits are lost"),
            Action::SlipDown => f.write_str("a permit gets lost"),
            Action::SlipUp => f.write_str("a permit is made up"),
            Action::Clamp => f.write_str("permits are clamped"),
            Action::Short(missing) => write!(f, "permits are found {missing} too few"),
            Action::Raise(missing) => write!(f, "permits are raised by {missing}"),
            Action::CloseSale => f.write_str("the sale is closed"),
            Action::Stuck => f.write_str("nothing goes on"),
        }
    }
}

fn said(got: Got) -> String {
    match got {
        Got::Fresh(epoch) => format!("a permit of epoch {epoch}"),
        Got::Again(epoch) => format!("its permit of epoch {epoch} again"),
        Got::Unavailable => "unavailable".to_owned(),
        Got::Released => "released before".to_owned(),
        Got::Closed => "the sale has ended".to_owned(),
        Got::Limit => "at the limit".to_owned(),
        Got::AllHeld => "all held".to_owned(),
        Got::SoldOut => "sold out".to_owned(),
    }
}

fn told(locked: Locked) -> String {
    match locked {
        Locked::Yes => "held".to_owned(),
        Locked::Stale => "its grant is stale".to_owned(),
        Locked::Refused(reason) => format!("refused, {}", reason.as_str_name()),
    }
}

/// The game: see the module.
pub struct Play {
    scope: Scope,
    values: Values,
    begun: Interner<Begun>,
    swapped_begun: Swapped,
    start: Option<State>,
}

/// A state, read.
#[derive(Clone, Copy)]
struct Scene {
    state: State,
    permits: PermitView,
}

impl Play {
    /// Of this scope.
    pub fn new(scope: &Scope) -> Self {
        let values = Values::new(Cast::new(&scope.buyers), scope.limit);
        let mut begun = Interner::default();
        begun.add(Begun::default());
        let swapped_begun = Swapped::new(values.cast().swaps.len());
        Self { scope: scope.clone(), values, begun, swapped_begun, start: None }
    }

    fn orders(&self) -> usize {
        self.values.cast().orders.len()
    }

    fn ledger(&self, scene: &Scene) -> &LedgerView {
        self.values.ledger_view(scene.state.ledger)
    }

    fn is_closed(scene: &Scene) -> bool {
        scene.state.budget.flags & SALE_CLOSED != 0
    }

    // Buyers.

    /// What an answer to an acquisition must not be.
    fn judge(&self, scene: &Scene, order: usize, got: Got) -> Result<(), String> {
        let (permits, ledger) = (&scene.permits, self.ledger(scene));
        let quantity = self.values.cast().orders[order].quantity;
        let has = permits.listed[order];
        if !permits.is_open && got != Got::Unavailable {
            return Err("I8: not knowing is UNAVAILABLE, and nothing else".to_owned());
        }
        if permits.is_open && has != 0 && got != Got::Again(has) {
            return Err("E2: an order that has its grant gets another answer".to_owned());
        }
        match got {
            Got::SoldOut if quantity <= ledger.ledger.total - ledger.ledger.sold => {
                Err("I8: sold out is said while a unit may come back".to_owned())
            }
            Got::Fresh(_) if Self::is_closed(scene) => Err("E34: a permit is given after the end".to_owned()),
            Got::Fresh(_)
                if matches!(ledger.rows[order], Some(HoldState::Locked | HoldState::Sold))
                    && scene.state.budget.flags & TOO_MANY == 0
                    && self.scope.reloads =>
            {
                Err("E2: an order that holds a unit is granted a second".to_owned())
            }
            _ => Ok(()),
        }
    }

    fn acquire(&mut self, scene: &Scene, order: usize, steps: &mut Vec<Step<Self>>) {
        let (permits, answer) = self.values.permit(scene.state.permits, &PermitOp::Acquire(order));
        let PermitAnswer::Got(got) = answer else { unreachable!("that was asked") };
        let action = Action::Acquire(order as u8, got);
        if let Err(what) = self.judge(scene, order, got) {
            steps.push(Step { action, bound: false, to: Err(what) });
            return;
        }
        let mut to = State { permits, ..scene.state };
        let buyer = &mut to.orders[order];
        if let Got::Fresh(epoch) | Got::Again(epoch) = got
            && matches!(buyer.stage, Stage::Idle | Stage::Granted)
        {
            (buyer.stage, buyer.epoch) = (Stage::Granted, epoch as u8);
        }
        push(steps, scene, action, false, to);
        if matches!(got, Got::Fresh(_)) && scene.state.budget.losses > 0 && self.scope.loses_acquires {
            to.permits = scene.state.permits;
            to.budget.losses -= 1;
            to.budget.flags |= TOO_MANY | FOREIGN;
            push(steps, scene, Action::AcquireLost(order as u8), false, to);
        }
    }

    fn publish(&self, scene: &Scene, order: usize, steps: &mut Vec<Step<Self>>) {
        let buyer = scene.state.orders[order];
        if buyer.stage != Stage::Granted {
            return;
        }
        let too_late = scene.state.budget.claimed > buyer.epoch || self.ledger(scene).rows[order].is_some();
        let mut to = scene.state;
        to.orders[order].stage = Stage::Waiting;
        if too_late {
            to.orders[order].notes |= UNPROMISED;
        }
        push(steps, scene, Action::Publish(order as u8), false, to);
    }

    // The funnel.

    fn funnel(&mut self, scene: &Scene, order: usize, steps: &mut Vec<Step<Self>>) {
        let buyer = scene.state.orders[order];
        if buyer.notes & REFUSING != 0 {
            self.refuse(scene, order, steps);
        }
        if buyer.stage != Stage::Waiting {
            return;
        }
        let epoch = i64::from(buyer.epoch);
        let was_there = self.ledger(scene).rows[order].is_some();
        let LedgerStep { to: ledger, refunds, answer } =
            self.values.book(scene.state.ledger, LedgerOp::Lock(order, epoch));
        let LedgerAnswer::Locked(locked) = answer else { unreachable!("that was asked") };
        let action = Action::Lock(order as u8, locked);
        let mut to = State { ledger, outbox: self.values.put_out(scene.state.outbox, refunds), ..scene.state };
        if locked == Locked::Stale {
            self.renew(scene, order, steps);
            return;
        }
        let again = self.values.book(ledger, LedgerOp::Lock(order, epoch));
        if again.to != ledger || again.answer != answer {
            steps.push(Step { action, bound: true, to: Err("I10: locking twice is not locking once".to_owned()) });
            return;
        }
        to.orders[order] = passed(buyer);
        let excused = scene.state.budget.flags & TOO_MANY != 0;
        let wrong = match locked {
            Locked::Yes => {
                to.permits = self.values.permit(to.permits, &PermitOp::Persisted(epoch, order)).0;
                None
            }
            Locked::Refused(reason) if !was_there && !excused => {
                let reason = reason.as_str_name();
                Some(format!("an order that was admitted is refused by the ledger: {reason}"))
            }
            Locked::Refused(_) if buyer.notes & UNPROMISED == 0 && !excused => {
                Some("E13: an accepted order has lost its unit".to_owned())
            }
            _ => None,
        };
        match wrong {
            Some(what) => steps.push(Step { action, bound: true, to: Err(what) }),
            None => push(steps, scene, action, true, to),
        }
    }

    fn renew(&mut self, scene: &Scene, order: usize, steps: &mut Vec<Step<Self>>) {
        let buyer = scene.state.orders[order];
        let quantity = self.values.cast().orders[order].quantity;
        if !holds(Rule::StaleAsksAnew) {
            let could = scene.permits.is_open && scene.permits.free >= quantity;
            let mut to = scene.state;
            to.orders[order].notes |= REFUSING;
            let action = Action::Renew(order as u8, Got::AllHeld);
            if could {
                steps.push(Step {
                    action,
                    bound: true,
                    to: Err("an order is refused unasked while there is a unit for it".to_owned()),
                });
            } else {
                push(steps, scene, action, true, to);
            }
            return;
        }
        let (permits, answer) = self.values.permit(scene.state.permits, &PermitOp::Acquire(order));
        let PermitAnswer::Got(got) = answer else { unreachable!("that was asked") };
        let action = Action::Renew(order as u8, got);
        if let Err(what) = self.judge(scene, order, got) {
            steps.push(Step { action, bound: true, to: Err(what) });
            return;
        }
        let mut to = State { permits, ..scene.state };
        match got {
            Got::Fresh(epoch) | Got::Again(epoch) => {
                to.orders[order] = Buyer { epoch: epoch as u8, notes: buyer.notes | RENEWED, ..buyer };
            }
            Got::Unavailable => {}
            _ => to.orders[order].notes |= REFUSING,
        }
        push(steps, scene, action, true, to);
    }

    /// Somebody was told by the permits that there is nothing, and comes to the ledger with that; another may have got a
    /// permit for the same order meanwhile.
    fn refuse(&mut self, scene: &Scene, order: usize, steps: &mut Vec<Step<Self>>) {
        let buyer = scene.state.orders[order];
        let LedgerStep { to: ledger, refunds, answer } = self.values.book(scene.state.ledger, LedgerOp::Refuse(order));
        let LedgerAnswer::Locked(locked) = answer else { unreachable!("that was asked") };
        let action = Action::Refuse(order as u8, locked);
        let mut to = State { ledger, outbox: self.values.put_out(scene.state.outbox, refunds), ..scene.state };
        let excused = scene.state.budget.flags & TOO_MANY != 0;
        if locked != Locked::Yes && buyer.notes & UNPROMISED == 0 && !excused {
            let what = "E13: an accepted order has lost its unit".to_owned();
            steps.push(Step { action, bound: true, to: Err(what) });
            return;
        }
        to.orders[order].notes &= !REFUSING;
        if self.values.ledger_view(ledger).rows[order].is_some() {
            to.orders[order] = passed(to.orders[order]);
        } else {
            // It was told so, and its message may come again.
            to.orders[order].notes |= CLOSED;
        }
        push(steps, scene, action, true, to);
    }

    // The order's saga.

    fn settle(&mut self, scene: &Scene, order: usize, steps: &mut Vec<Step<Self>>) {
        match self.ledger(scene).rows[order] {
            Some(HoldState::Locked) => {
                self.decide(scene, scene.state, Action::Release(order as u8), LedgerOp::Release(order), steps);
                self.decide(scene, scene.state, Action::Pay(order as u8), LedgerOp::Deduct(order), steps);
                if !holds(Rule::LedgerFirst) {
                    self.refund_first(scene, order, steps);
                }
            }
            None if self.scope.closes_unheld => {
                let mut closed = scene.state;
                closed.orders[order].notes |= UNPROMISED;
                if !holds(Rule::ReleaseBuries) {
                    closed.orders[order].notes |= CLOSED;
                }
                self.decide(scene, closed, Action::ReleaseNothing(order as u8), LedgerOp::Release(order), steps);
            }
            _ => {}
        }
    }

    /// A step of the saga on the ledger, which happens twice as easily as once.
    fn decide(&mut self, scene: &Scene, from: State, action: Action, op: LedgerOp, steps: &mut Vec<Step<Self>>) {
        let LedgerStep { to: ledger, refunds, answer } = self.values.book(from.ledger, op);
        let again = self.values.book(ledger, op);
        if again.to != ledger || again.answer != answer {
            steps.push(Step { action, bound: false, to: Err("I10: doing it twice is not doing it once".to_owned()) });
            return;
        }
        let mut to = State { ledger, outbox: self.values.put_out(from.outbox, refunds), ..from };
        if matches!(op, LedgerOp::Deduct(_)) {
            // Told at once; a guard repeats it.
            let facts = self.values.facts(ledger, Self::is_closed(scene));
            to.permits = self.values.permit(to.permits, &PermitOp::Facts(facts)).0;
        }
        push(steps, scene, action, false, to);
    }

    fn refund_first(&mut self, scene: &Scene, order: usize, steps: &mut Vec<Step<Self>>) {
        let ledger = self.ledger(scene);
        let (seq, grant_epoch) = (ledger.ledger.release_seq + 1, ledger.consumed[order]);
        let cast = self.values.cast().orders[order].clone();
        let refund = Refund::Release(Release {
            hold: cast.hold,
            buyer: Some(cast.buyer),
            quantity: cast.quantity,
            seq,
            grant_epoch,
        });
        let (permits, _) = self.values.permit(scene.state.permits, &PermitOp::Refund(refund));
        push(steps, scene, Action::RefundFirst(order as u8), false, State { permits, ..scene.state });
    }

    // The sweep.

    fn sweep(&mut self, scene: &Scene, order: usize, steps: &mut Vec<Step<Self>>) {
        let in_stream = scene.state.orders[order].stage == Stage::Waiting;
        if scene.permits.pending & 1 << order == 0 || (in_stream && holds(Rule::SweepBehindFunnel)) {
            return;
        }
        let epoch = scene.permits.listed[order];
        let LedgerStep { to: ledger, refunds, answer } =
            self.values.book(scene.state.ledger, LedgerOp::Sweep(order, epoch));
        let LedgerAnswer::Swept(swept) = answer else { unreachable!("that was asked") };
        let mut to = State { ledger, outbox: self.values.put_out(scene.state.outbox, refunds), ..scene.state };
        if swept == Swept::Persisted {
            to.permits = self.values.permit(to.permits, &PermitOp::Persisted(epoch, order)).0;
        }
        push(steps, scene, Action::Sweep(order as u8, swept), true, to);
    }

    // The relay.

    fn relay(&mut self, scene: &Scene, index: usize, steps: &mut Vec<Step<Self>>) {
        let Waiting { order, epoch, again, .. } = self.values.waiting(scene.state.outbox, index);
        let (mut permits, mut refunded) = self.values.refund(scene.state.permits, scene.state.outbox, index);
        if refunded == Refunded::Ignored && !again && epoch.is_some() && !holds(Rule::ReturnOfListedGrant) {
            permits = self.raise_by_one(permits);
            refunded = Refunded::Applied;
        }
        if refunded == Refunded::Deferred && !scene.permits.is_there && !holds(Rule::RefundCreatesNothing) {
            permits = self.forge(scene, order, epoch);
            refunded = Refunded::Applied;
        }
        if refunded == Refunded::Deferred && holds(Rule::DeferWhileClosed) {
            return;
        }
        let counted = refunded == Refunded::Applied;
        let outbox = self.values.relayed(scene.state.outbox, index);
        let relayed = Relayed { order: order as u8, epoch, again, counted, lost: false };
        push(steps, scene, Action::Relay(relayed), !again, State { permits, outbox, ..scene.state });
        if counted && !again && scene.state.budget.losses > 0 && self.scope.loses_refunds {
            let mut to = State { outbox, ..scene.state };
            to.budget.losses -= 1;
            to.budget.flags |= FOREIGN;
            push(steps, scene, Action::Relay(Relayed { lost: true, ..relayed }), false, to);
        }
    }

    fn raise_by_one(&mut self, permits: u32) -> u32 {
        let PermitView { epoch, version, offered, .. } = *self.values.permit_view(permits);
        self.values.permit(permits, &PermitOp::Raise(Raise { epoch, version, offered, missing: 1, release_seq: 0 })).0
    }

    /// What a refund would make of nothing if it were allowed to.
    fn forge(&mut self, scene: &Scene, order: usize, epoch: Option<i64>) -> u32 {
        let epoch = epoch.unwrap_or(self.ledger(scene).consumed[order]);
        let facts = self.values.facts(scene.state.ledger, false);
        let (permits, _) = self.values.permit(scene.state.permits, &PermitOp::Claim(epoch, facts.clone()));
        let opening = Opening { epoch, available: 1, snapshot_seq: 0, facts };
        self.values.permit(permits, &PermitOp::Open(opening, Vec::new())).0
    }

    // Rebuilds.

    fn begin(&mut self, scene: &Scene, steps: &mut Vec<Step<Self>>) {
        if scene.state.budget.rebuilds == 0 || (scene.permits.is_open && !self.scope.operators) {
            return;
        }
        let fence = self.ledger(scene).ledger.epoch;
        let mut to = scene.state;
        to.budget.rebuilds -= 1;
        let epoch = if holds(Rule::NewEpoch) {
            let step = self.values.book(to.ledger, LedgerOp::Allocate);
            to.ledger = step.to;
            let LedgerAnswer::Epoch(epoch) = step.answer else { unreachable!("that was asked") };
            epoch
        } else {
            fence
        };
        if !holds(Rule::FenceStaysAtAllocation) {
            to.ledger = self.values.book(to.ledger, LedgerOp::Fence(epoch)).to;
        }
        let mut rebuild = Rebuild::default();
        rebuild.allocated(epoch);
        let mut begun = self.begun.get(to.begun).clone();
        begun.rebuilds.push(Running { rebuild, awaited: 0, looked: None });
        to.begun = self.note(begun);
        push(steps, scene, Action::Begin(epoch), false, to);
    }

    fn note(&mut self, mut begun: Begun) -> u32 {
        begun.rebuilds.retain(|running| !matches!(running.rebuild.todo(), Todo::Over { .. }));
        begun.rebuilds.sort_by_key(|running| running.rebuild.epoch());
        begun.raises.sort_by_key(|raise| (raise.epoch, raise.version, raise.missing, raise.release_seq));
        self.begun.add(begun).0
    }

    fn advance(&mut self, scene: &Scene, index: usize, steps: &mut Vec<Step<Self>>) {
        let mut begun = self.begun.get(scene.state.begun).clone();
        let mut running = begun.rebuilds.remove(index);
        let mut to = scene.state;
        let epoch = running.rebuild.epoch();
        let keeps_claim = scene.permits.epoch == epoch && scene.permits.is_there && !scene.permits.is_open;
        if matches!(running.rebuild.todo(), Todo::Drain) && !keeps_claim {
            let rest = self.note(begun.clone());
            push(steps, scene, Action::Overtaken(epoch), true, State { begun: rest, ..to });
        }
        let action = match running.rebuild.todo().clone() {
            Todo::Claim if !holds(Rule::ClaimBeforeSnapshot) && running.looked.is_none() => {
                self.fence(scene, &mut running, &mut to);
                if running.looked.is_none() {
                    running.rebuild.overtaken();
                }
                Action::Fence(epoch, running.looked.is_some())
            }
            Todo::Claim => self.claim(scene, &mut running, &mut to),
            Todo::Drain => {
                if self.is_blocked(scene, &running) {
                    return;
                }
                running.rebuild.drained();
                Action::Drained(epoch)
            }
            Todo::Fence if !holds(Rule::SnapshotWithFence) && running.looked.is_none() => {
                let looked = self.values.look(to.ledger, false);
                let available = looked.snapshot.available;
                running.looked = Some(looked);
                Action::Look(epoch, available)
            }
            Todo::Fence => {
                let looked = running.looked.take();
                if looked.is_none() || holds(Rule::ClaimBeforeSnapshot) {
                    self.fence(scene, &mut running, &mut to);
                }
                let seen = running.looked.take();
                let moved = seen.is_some() || !holds(Rule::ClaimBeforeSnapshot);
                running.rebuild.fenced(if moved { looked.or(seen) } else { None });
                Action::Fence(epoch, moved)
            }
            Todo::Open(fenced) => {
                let reloads = self.scope.reloads && holds(Rule::HoldsAreReloaded);
                let held = if reloads { fenced.held.clone() } else { Vec::new() };
                let open = PermitOp::Open(running.rebuild.opening(&fenced), held);
                let (permits, answer) = self.values.permit(to.permits, &open);
                let PermitAnswer::Opened(opened) = answer else { unreachable!("that was asked") };
                to.permits = permits;
                if opened {
                    to.budget.flags &= !(FOREIGN | LOST);
                }
                running.rebuild.opened(opened);
                Action::Open(epoch, opened)
            }
            Todo::Allocate { .. } | Todo::Over { .. } => unreachable!("it has an epoch, and is not over"),
        };
        begun.rebuilds.push(running);
        to.begun = self.note(begun);
        push(steps, scene, action, true, to);
    }

    fn claim(&mut self, scene: &Scene, running: &mut Running, to: &mut State) -> Action {
        let epoch = running.rebuild.epoch();
        let facts = self.values.facts(to.ledger, Self::is_closed(scene));
        let (permits, answer) = self.values.permit(to.permits, &PermitOp::Claim(epoch, facts.clone()));
        let PermitAnswer::Claimed(claimed) = answer else { unreachable!("that was asked") };
        to.permits = permits;
        if claimed == Claimed::Yes {
            to.budget.claimed = to.budget.claimed.max(epoch as u8);
            let in_stream = |order: &usize| scene.state.orders[*order].stage == Stage::Waiting;
            running.awaited = (0..self.orders()).filter(in_stream).fold(0, |awaited, order| awaited | 1 << order);
            if scene.permits.is_open && !holds(Rule::ClaimCloses) {
                let PermitView { free: available, snapshot_seq, .. } = scene.permits;
                let opening = Opening { epoch, available, snapshot_seq, facts };
                to.permits = self.values.permit(to.permits, &PermitOp::Open(opening, Vec::new())).0;
            }
        }
        let phase = if scene.permits.is_open { Phase::Open } else { Phase::Rebuilding };
        running.rebuild.claimed(claimed, scene.permits.is_there.then_some(phase), self.ledger(scene).ledger.epoch);
        if matches!(running.rebuild.todo(), Todo::Allocate { .. }) {
            // Permits ahead of every epoch there is: only where a rule is off.
            running.rebuild.overtaken();
        }
        if matches!(running.rebuild.todo(), Todo::Drain) && !holds(Rule::DrainBeforeFence) {
            running.rebuild.drained();
        }
        Action::Claim(epoch, claimed == Claimed::Yes)
    }

    fn is_blocked(&self, scene: &Scene, running: &Running) -> bool {
        let ledger = self.ledger(scene);
        (0..self.orders()).filter(|order| running.awaited & 1 << order != 0).any(|order| {
            let buyer = scene.state.orders[order];
            // A renewed order's message still carries the grant that was stale.
            let epoch = if buyer.notes & RENEWED != 0 { 0 } else { i64::from(buyer.epoch) };
            let waits = buyer.stage == Stage::Waiting && ledger.rows[order].is_none();
            waits && blocks_under::<Switched>(epoch, ledger.ledger.epoch)
        })
    }

    /// Moves the fence and notes what was seen, unless it is further already.
    fn fence(&mut self, scene: &Scene, running: &mut Running, to: &mut State) {
        let epoch = running.rebuild.epoch();
        let moved_before = self.ledger(scene).ledger.epoch == epoch;
        if moved_before && (!holds(Rule::NewEpoch) || !holds(Rule::FenceStaysAtAllocation)) {
            running.looked = Some(self.values.look(to.ledger, false));
            return;
        }
        let forced = !holds(Rule::FenceOnlyToNewest);
        let op = if forced { LedgerOp::ForceFence(epoch) } else { LedgerOp::Fence(epoch) };
        let step = self.values.book(to.ledger, op);
        to.ledger = step.to;
        running.looked = match step.answer {
            LedgerAnswer::Fenced(number) => Some(self.values.fenced(number).clone()),
            _ => None,
        };
    }

    // Faults and corrections.

    fn fail(&mut self, scene: &Scene, steps: &mut Vec<Step<Self>>) {
        let State { permits, budget, .. } = scene.state;
        if budget.wipes > 0 && scene.permits.is_there {
            let (permits, _) = self.values.permit(permits, &PermitOp::Wipe);
            let budget = Budget { wipes: budget.wipes - 1, flags: budget.flags & !FOREIGN | LOST, ..budget };
            push(steps, scene, Action::Wipe, false, State { permits, budget, ..scene.state });
        }
        if budget.slips > 0 && scene.permits.is_open {
            let less = Budget { slips: budget.slips - 1, ..budget };
            if scene.permits.free > 0 && self.scope.slips_down {
                let (permits, _) = self.values.permit(permits, &PermitOp::Withdraw);
                push(steps, scene, Action::SlipDown, false, State { permits, budget: less, ..scene.state });
            }
            if self.scope.slips_up {
                let permits = self.raise_by_one(permits);
                let budget = Budget { flags: budget.flags | TOO_MANY, ..less };
                push(steps, scene, Action::SlipUp, false, State { permits, budget, ..scene.state });
            }
        }
        if self.scope.closes && !Self::is_closed(scene) {
            let facts = self.values.facts(scene.state.ledger, true);
            let (permits, _) = self.values.permit(permits, &PermitOp::Facts(facts));
            let budget = Budget { flags: budget.flags | SALE_CLOSED, ..budget };
            push(steps, scene, Action::CloseSale, false, State { permits, budget, ..scene.state });
        }
    }

    fn reconcile(&mut self, scene: &Scene, steps: &mut Vec<Step<Self>>) {
        let Some(header) = self.values.header(scene.state.permits).cloned() else { return };
        if !self.scope.reconciles || header.phase != Phase::Open {
            return;
        }
        let ledger = self.ledger(scene).ledger.clone();
        if let Some(excess) = excess_under::<Switched>(&header, &ledger)
            && header.free > 0
        {
            let clamp = PermitOp::Clamp { epoch: header.epoch, version: header.version, excess };
            let (permits, _) = self.values.permit(scene.state.permits, &clamp);
            push(steps, scene, Action::Clamp, true, State { permits, ..scene.state });
        }
        let is_empty = self.values.outbox(scene.state.outbox).iter().all(|(_, relayed)| *relayed);
        let mut begun = self.begun.get(scene.state.begun).clone();
        if begun.raises.len() < 2
            && let Some(raise) = shortage_under::<Switched>(&ledger, is_empty, &header)
        {
            begun.raises.push(raise);
            let begun = self.note(begun.clone());
            push(steps, scene, Action::Short(raise.missing), true, State { begun, ..scene.state });
            // Two may have found it.
        }
        begun = self.begun.get(scene.state.begun).clone();
        for index in 0..begun.raises.len() {
            let mut rest = begun.clone();
            let raise = rest.raises.remove(index);
            let (permits, _) = self.values.permit(scene.state.permits, &PermitOp::Raise(raise));
            let rest = self.note(rest);
            push(steps, scene, Action::Raise(raise.missing), true, State { permits, begun: rest, ..scene.state });
        }
    }

    /// Whether whatever is bound to happen has happened.
    fn at_rest(&self, scene: &Scene, steps: &[Step<Self>]) -> Result<(), (Action, String)> {
        if steps.iter().any(|step| step.bound) {
            return Ok(());
        }
        if !self.begun.get(scene.state.begun).rebuilds.is_empty() {
            return Err((Action::Stuck, "a rebuild waits for what never comes".to_owned()));
        }
        let Ledger { available, epoch, .. } = self.ledger(scene).ledger;
        let PermitView { is_open, free, miscounts, .. } = scene.permits;
        if !is_open && scene.state.budget.flags & LOST == 0 {
            return Err((Action::Stuck, "permits stay closed that nobody has lost".to_owned()));
        }
        if !is_open || scene.permits.epoch != epoch || scene.state.budget.flags & FOREIGN != 0 {
            return Ok(());
        }
        if free != available {
            return Err((Action::Stuck, format!("at rest R = {free} and A = {available}")));
        }
        if miscounts {
            return Err((Action::Stuck, "E36: a buyer who has nothing cannot buy again".to_owned()));
        }
        Ok(())
    }

    fn read(&self, state: State) -> Scene {
        Scene { state, permits: *self.values.permit_view(state.permits) }
    }

    fn swapped_begun(&mut self, begun: u32, swap: u8) -> u32 {
        if swap == 0 || begun == 0 {
            return begun;
        }
        if let Some(swapped) = self.swapped_begun.get((begun, swap)) {
            return swapped;
        }
        let cast = self.values.cast();
        let held = |fenced: &Fenced| Fenced { held: cast.held(swap as usize, &fenced.held), ..fenced.clone() };
        let there = self.begun.get(begun);
        let rebuilds = there.rebuilds.iter().map(|running| {
            let mut rebuild = running.rebuild.clone();
            if let Todo::Open(fenced) = rebuild.todo() {
                let fenced = held(fenced);
                rebuild.fenced(Some(fenced));
            }
            Running {
                rebuild,
                awaited: cast.mask(swap as usize, running.awaited),
                looked: running.looked.as_ref().map(held),
            }
        });
        let swapped = Begun { rebuilds: rebuilds.collect(), raises: there.raises.clone() };
        let (swapped, _) = self.begun.add(swapped);
        self.swapped_begun.insert((begun, swap), swapped);
        swapped
    }
}

fn passed(buyer: Buyer) -> Buyer {
    let kept = if buyer.notes & REFUSING == 0 { CLOSED } else { REFUSING | CLOSED | UNPROMISED };
    Buyer { stage: Stage::Passed, epoch: 0, notes: buyer.notes & kept }
}

fn push(steps: &mut Vec<Step<Play>>, scene: &Scene, action: Action, bound: bool, to: State) {
    if to != scene.state {
        steps.push(Step { action, bound, to: Ok(to) });
    }
}

impl Model for Play {
    type State = State;
    type Action = Action;

    /// The sale is open in its first epoch.
    fn start(&mut self) -> State {
        if let Some(start) = self.start {
            return start;
        }
        let books = Books { ledger: Ledger::new(self.scope.units), holds: Default::default() };
        let ledger = self.values.add_ledger(books);
        let step = self.values.book(ledger, LedgerOp::Allocate);
        let LedgerAnswer::Epoch(epoch) = step.answer else { unreachable!("that was asked") };
        let facts = self.values.facts(step.to, false);
        let (permits, _) = self.values.permit(0, &PermitOp::Claim(epoch, facts.clone()));
        let step = self.values.book(step.to, LedgerOp::Fence(epoch));
        let opening = Opening { epoch, available: self.scope.units, snapshot_seq: 0, facts };
        let (permits, _) = self.values.permit(permits, &PermitOp::Open(opening, Vec::new()));
        let budget = Budget {
            wipes: self.scope.wipes,
            rebuilds: self.scope.rebuilds,
            losses: self.scope.losses,
            slips: self.scope.slips,
            claimed: epoch as u8,
            flags: 0,
        };
        let start = State { permits, ledger: step.to, outbox: 0, begun: 0, orders: [Buyer::default(); ORDERS], budget };
        self.start = Some(start);
        start
    }

    fn steps(&mut self, state: State, steps: &mut Vec<Step<Self>>) {
        let scene = self.read(state);
        for order in 0..self.orders() {
            self.acquire(&scene, order, steps);
            self.publish(&scene, order, steps);
            self.funnel(&scene, order, steps);
            self.settle(&scene, order, steps);
            self.sweep(&scene, order, steps);
        }
        for index in 0..self.values.outbox(state.outbox).len() {
            self.relay(&scene, index, steps);
        }
        self.begin(&scene, steps);
        for index in 0..self.begun.get(state.begun).rebuilds.len() {
            self.advance(&scene, index, steps);
        }
        self.fail(&scene, steps);
        self.reconcile(&scene, steps);
        if let Err((action, what)) = self.at_rest(&scene, steps) {
            steps.push(Step { action, bound: true, to: Err(what) });
        }
    }

    fn check(&mut self, state: State) -> Result<(), String> {
        let scene = self.read(state);
        let view = self.values.ledger_view(state.ledger);
        if let Some(problem) = &view.problem {
            return Err(problem.clone());
        }
        for order in 0..self.orders() {
            let is_closed = state.orders[order].notes & CLOSED != 0;
            if is_closed && matches!(view.rows[order], Some(HoldState::Locked | HoldState::Sold)) {
                return Err("E4: an order that was told it holds nothing holds a unit".to_owned());
            }
        }
        if !scene.permits.is_open {
            return Ok(());
        }
        if scene.permits.epoch != view.ledger.epoch {
            let lasts = self.begun.get(state.begun).rebuilds.is_empty();
            return if lasts { Err("open permits of another epoch than the fence's".to_owned()) } else { Ok(()) };
        }
        if state.budget.flags & TOO_MANY != 0 {
            return Ok(());
        }
        let PermitView { epoch, free, offered, listed, .. } = scene.permits;
        let unpersisted = (0..self.orders()).filter(|order| listed[*order] == epoch && view.rows[*order].is_none());
        let unpersisted: i64 = unpersisted.map(|order| self.values.cast().orders[order].quantity).sum();
        let Ledger { available, .. } = view.ledger;
        if free + unpersisted > available {
            return Err(format!("I2: R {free} + {unpersisted} granted > A {available}"));
        }
        let offerable = view.ledger.offerable();
        if offered > offerable {
            return Err(format!("the sums: {offered} offered of {offerable}"));
        }
        Ok(())
    }

    fn canonical(&mut self, state: State) -> State {
        let mut least = state;
        for swap in 1..self.values.cast().swaps.len() {
            let mut orders = [Buyer::default(); ORDERS];
            for (order, to) in self.values.cast().swaps[swap].iter().enumerate() {
                orders[*to] = state.orders[order];
            }
            // The orders alone mostly decide, and cost least.
            if orders > least.orders {
                continue;
            }
            let swap = swap as u8;
            let swapped = State {
                permits: self.values.swapped_permits(state.permits, swap),
                ledger: self.values.swapped_ledger(state.ledger, swap),
                outbox: self.values.swapped_outbox(state.outbox, swap),
                begun: self.swapped_begun(state.begun, swap),
                orders,
                budget: state.budget,
            };
            if (orders, swapped) < (least.orders, least) {
                least = swapped;
            }
        }
        least
    }

    fn is_end(&mut self, state: State) -> bool {
        let mut steps = Vec::new();
        self.steps(state, &mut steps);
        steps.iter().all(|step| !step.bound)
    }
}
