//! One order's saga, from its message in the stream to its end, with everybody who may meddle.
//!
//! Two coordinators work on it, each between any two steps of the other, and each may die between any two of its own;
//! what they know is what they read when they began. The buyer pays, pays again, and cancels. The clock passes the
//! deadline. The provider decides late, and may capture what it had declined or cancelled. A rival takes the unit when it
//! is free. Announced payments are heard late, twice, in any order.
//!
//! What decides each step is production code: the saga's transitions and work ([`taken`], [`Saga::work`]), what the
//! steps make of answers (`coordinator::steps`), and, behind the calls, the other services' own domains: the payment
//! book, the order's record, the stock ledger.
//!
//! What must never be seen: a unit given back while a payment may still take money (E29), an order awaiting payment
//! without its hold (I3), an expiry before the deadline (E33). And at the end: an order that is not over (I5), money
//! that belongs to nobody or was kept or returned twice (I4, E24), a hold without its order, a record that says
//! something else.

use std::{collections::BTreeMap, fmt};

use coordinator::{
    domain::{Pay, PayRequest, Placed, decide_pay},
    engine::{
        Named, Saga, Work,
        plan::Outcome,
        runner::{Guard, taken},
    },
    order_saga::{self, OrderSaga},
    pay::attempt,
    refund_saga::{self, RefundSaga},
    settle::{Meaning, meaning},
    steps::{late, money, record, refunding, stock},
    store::{Patch, Row},
};
use order_svc::domain::{Change, Record};
use payment_svc::domain::{self as payment, Command, PaymentId, Times};
use proto::{
    BuyerId, Error, Money, OrderId, Reason, RequestId, SaleId,
    internal::{PaymentResult, PaymentState, PaymentStatus, TransitionOrder, payment_result},
    v1::OrderState,
};
use stock_svc::domain::ledger::{Book, Changes, Hold, HoldState, Ledger, Lock, Locked};

use crate::search::{self, Interner, Limits, Memo, Model, Report, Step};

/// How much may happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// What this is called.
    pub name: &'static str,
    /// Attempts to pay, and so many ids to pay by.
    pub pays: u8,
    /// Whether the buyer may cancel.
    pub cancels: bool,
    /// How often the provider captures what it had given up.
    pub contradictions: u8,
    /// How often a rival takes the unit, and gives it back.
    pub rivals: u8,
    /// Whether the order's grant is stale when the funnel comes to it.
    pub stale: bool,
    /// How often an operator gives up on a payment.
    pub abandons: u8,
    /// Coordinators; at most three.
    pub coordinators: usize,
    /// What is done wrong.
    pub lapses: Vec<Lapse>,
}

macro_rules! lapses {
    ($($(#[doc = $doc:literal])+ $lapse:ident,)*) => {
        /// Something done wrong, to show that it would be noticed.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Lapse { $($(#[doc = $doc])+ $lapse,)* }

        impl Lapse {
            /// All of them.
            pub const ALL: &'static [Lapse] = &[$(Lapse::$lapse),*];

            /// What is done.
            pub fn sentence(self) -> &'static str {
                match self { $(Lapse::$lapse => concat!($($doc),+).trim_ascii(),)* }
            }
        }
    };
}

lapses! {
    /// Compensations run first step first: the unit goes back before the payment is voided.
    VoidsLast,
    /// A payment that is not voided yet is taken for voided.
    TakesPendingForVoid,
    /// An attempt to pay is made without being recorded.
    ForgetsAttempt,
    /// An outcome counts whatever the saga has done since.
    NoVersionGuard,
    /// An attempt's outcome counts for whatever attempt is the last.
    NoPaymentGuard,
    /// A deadline counts whenever somebody says so.
    NoDueGuard,
    /// What the permits refuse is taken for the ledger's word.
    RefusesUnburied,
    /// A capture is not noticed once the order is closed.
    IgnoresLateMoney,
}

/// What is searched whole.
pub fn bounds() -> Vec<Bounds> {
    let base = Bounds {
        name: "paying, expiring and cancelling",
        pays: 2,
        cancels: true,
        contradictions: 0,
        rivals: 0,
        stale: false,
        abandons: 0,
        coordinators: 2,
        lapses: Vec::new(),
    };
    vec![
        base.clone(),
        Bounds { name: "a stale grant and a rival", pays: 1, rivals: 1, stale: true, ..base.clone() },
        Bounds { name: "late money and a rival", contradictions: 1, rivals: 1, ..base.clone() },
        Bounds { name: "an operator gives up", contradictions: 1, abandons: 1, ..base.clone() },
        Bounds { name: "three coordinators", pays: 1, coordinators: 3, ..base },
    ]
}

/// Where a lapse is noticed.
pub fn proof(lapse: Lapse) -> Bounds {
    let all = bounds();
    let mut bounds = match lapse {
        Lapse::NoVersionGuard | Lapse::NoPaymentGuard | Lapse::NoDueGuard => all[0].clone(),
        Lapse::RefusesUnburied => all[1].clone(),
        Lapse::IgnoresLateMoney => all[2].clone(),
        Lapse::VoidsLast | Lapse::TakesPendingForVoid | Lapse::ForgetsAttempt => all[3].clone(),
    };
    bounds.lapses = vec![lapse];
    bounds
}

/// Searches. Every state must be able to come to an end by what is bound to happen.
pub fn check(bounds: &Bounds, limits: Limits, mut progress: impl FnMut(usize)) -> Report {
    search::search(&mut Order::new(bounds), Limits { ends: true, ..limits }, &mut progress)
}

/// The order is created now …
const BEGINS: i64 = 1_000;
/// … and is due now.
const DUE: i64 = 2_000;
const LEASE: std::time::Duration = std::time::Duration::from_secs(1);
/// At most so many.
const COORDINATORS: usize = 3;
const TIMES: Times = Times { now_ms: 0, call_ms: 0 };

/// A state: numbers of values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct State {
    row: u32,
    refund: u32,
    money: u32,
    record: u32,
    stock: u32,
    coordinators: [u32; COORDINATORS],
    rest: Rest,
}

/// What is little.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Rest {
    pays: u8,
    contradictions: u8,
    rivals: u8,
    abandons: u8,
    /// Payments that were announced, a bit each.
    heard: u16,
    is_due: bool,
    announced: bool,
    acknowledged: bool,
}

/// The ledger and its holds.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Stock {
    ledger: Ledger,
    holds: BTreeMap<OrderId, Hold>,
}

/// What a coordinator is about to do.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Coordinator {
    /// Anything.
    Idle,
    /// To lock the order, in the funnel.
    Lock(i64),
    /// To ask for another permit.
    Renew,
    /// To have the order refused.
    Bury(Reason),
    /// To write the record of a saga that begins.
    Create(u32),
    /// To write that saga.
    Insert(u32),
    /// To record an attempt to pay that was found in order.
    Attempt(u8),
    /// To charge for a recorded attempt, in the buyer's own call.
    Charge(u32),
    /// To record an event.
    Note(Note),
    /// To do a step of the saga's work.
    Work(Working),
}

/// An event to be recorded.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Note {
    event: Happened,
    patch: Patch,
    guard: Guard,
}

/// Of either saga.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Happened {
    Order(order_saga::Event),
    Refund(refund_saga::Event),
}

/// Work on a saga as it was read.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Working {
    row: u32,
    is_refund: bool,
    step: usize,
    patch: Patch,
    within: Within,
}

/// Inside of a step that makes more than one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Within {
    Start,
    /// The provider has never heard of the attempt: charge.
    Charge,
    /// There is a permit of this epoch: lock.
    Lock(i64),
    /// There was none.
    Bury(Reason),
}

/// What can happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Action {
    who: Option<u8>,
    what: &'static str,
    result: &'static str,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(who) = self.who {
            write!(f, "coordinator {}: ", who + 1)?;
        }
        f.write_str(self.what)?;
        if self.result.is_empty() { Ok(()) } else { write!(f, ": {}", self.result) }
    }
}

/// The game: see the module.
pub struct Order {
    bounds: Bounds,
    placed: Placed,
    rival: OrderId,
    requests: Vec<PayRequest>,
    /// The plan's compensations, in their order.
    back: Vec<&'static str>,
    rows: Interner<Option<Row>>,
    moneys: Interner<payment::Book>,
    records: Interner<Option<Record>>,
    stocks: Interner<Stock>,
    coordinators: Interner<Coordinator>,
    /// What one coordinator can do, whatever the other is about to do.
    acts: Memo<State, Vec<(Action, bool, State)>>,
}

/// A call's answer may be one of several: the state after it, and what was answered.
type Answers<T> = Vec<(State, T, &'static str)>;

impl Order {
    /// Within these bounds.
    pub fn new(bounds: &Bounds) -> Self {
        let buyer = BuyerId::parse("buyer").expect("a buyer's name");
        let request = |n: u8| RequestId::parse("request", &format!("{n:032x}")).expect("a request's id");
        let order_id = OrderId::derive(&buyer, &request(1));
        let placed = Placed {
            order_id,
            sale_id: SaleId::parse("sale", "model").expect("a sale's id"),
            buyer: buyer.clone(),
            quantity: 1,
            amount: Money::from_parts("amount", "EUR", 19, 0).expect("an amount"),
            grant_epoch: 1,
            create_at: BEGINS,
            expire_at: DUE,
        };
        let attempt =
            |n| PayRequest { order_id, buyer: buyer.clone(), method: "card".to_owned(), request_id: request(10 + n) };
        Self {
            bounds: bounds.clone(),
            rival: OrderId::derive(&BuyerId::parse("rival").expect("a buyer's name"), &request(1)),
            requests: (0..bounds.pays).map(attempt).collect(),
            placed,
            back: order_saga::plan(coordinator::Config::default().policy()).compensations().map(|d| d.name).collect(),
            rows: Interner::default(),
            moneys: Interner::default(),
            records: Interner::default(),
            stocks: Interner::default(),
            coordinators: Interner::default(),
            acts: Memo::default(),
        }
    }

    fn lapses(&self, lapse: Lapse) -> bool {
        self.bounds.lapses.contains(&lapse)
    }

    fn now(state: &State) -> i64 {
        if state.rest.is_due { DUE } else { BEGINS }
    }

    fn row(&self, state: &State) -> Option<&Row> {
        self.rows.get(state.row).as_ref()
    }

    fn held(&self, number: u32) -> Row {
        self.rows.get(number).clone().expect("only rows that are there are worked on")
    }

    // Sagas.

    /// A row without what only tells when: no step compares it here.
    fn keep(&mut self, mut row: Row) -> u32 {
        row.update_at = 0;
        row.close_at = row.close_at.map(|_| 0);
        row.next_attempt_at = row.next_attempt_at.map(|_| 0);
        self.rows.add(Some(row)).0
    }

    /// What a coordinator goes on with that has made a transition.
    fn go_on(&mut self, row: u32, is_refund: bool) -> Coordinator {
        let now = self.held(row);
        let at_work = if is_refund {
            refund_saga::State::parse(&now.state).is_some_and(|state| RefundSaga::work(state) != Work::Rest)
        } else {
            order_saga::State::parse(&now.state).is_some_and(|state| OrderSaga::work(state) != Work::Rest)
        };
        if !at_work || now.next_attempt_at.is_none() {
            return Coordinator::Idle;
        }
        Coordinator::Work(Working { row, is_refund, step: 0, patch: Patch::default(), within: Within::Start })
    }

    fn note(&mut self, state: State, who: usize, note: &Note) -> (State, &'static str) {
        let mut to = state;
        let now = Self::now(&state);
        let (current, is_refund) = match note.event {
            Happened::Order(_) => (state.row, false),
            Happened::Refund(_) => (state.refund, true),
        };
        let guard = match note.guard {
            Guard::Version(_) if self.lapses(Lapse::NoVersionGuard) => Guard::None,
            Guard::Payment(_) if self.lapses(Lapse::NoPaymentGuard) => Guard::None,
            Guard::Due(_) if self.lapses(Lapse::NoDueGuard) => Guard::None,
            guard => guard,
        };
        let next = self.rows.get(current).as_ref().filter(|row| guard.holds(row)).and_then(|row| match note.event {
            Happened::Order(event) => taken::<OrderSaga>(row, event, &note.patch, now, LEASE),
            Happened::Refund(event) => taken::<RefundSaga>(row, event, &note.patch, now, LEASE),
        });
        let Some((mut next, _)) = next else {
            to.coordinators[who] = self.coordinators.add(Coordinator::Idle).0;
            return (to, "too late");
        };
        if self.lapses(Lapse::ForgetsAttempt) {
            next.payment_id = None;
        }
        let next = self.keep(next);
        if is_refund {
            to.refund = next
        } else {
            to.row = next
        }
        let on = self.go_on(next, is_refund);
        to.coordinators[who] = self.coordinators.add(on).0;
        (to, "recorded")
    }

    // The other services.

    fn stock<T>(&mut self, state: State, hold: OrderId, work: impl FnOnce(&mut Book) -> T) -> (State, T) {
        let mut stock = self.stocks.get(state.stock).clone();
        let there = stock.holds.iter().filter(|(id, _)| **id == hold).map(|(id, h)| (*id, h.clone())).collect();
        let mut book: Book = Book::open(self.placed.sale_id.clone(), 2, stock.ledger.clone(), there, BTreeMap::new());
        let result = work(&mut book);
        let (ledger, Changes { inserted, moved, .. }) = book.close();
        stock.ledger = ledger;
        stock.holds.extend(inserted.into_iter().chain(moved));
        (State { stock: self.stocks.add(stock).0, ..state }, result)
    }

    fn lock(&mut self, state: State, hold: OrderId, grant_epoch: i64, refusal: Reason) -> (State, Option<stock::Lock>) {
        let wish = Lock {
            hold,
            order: self.placed.order_id,
            buyer: self.placed.buyer.clone(),
            quantity: 1,
            grant_epoch,
            expire_at: DUE,
            refusal,
        };
        let (to, locked) = self.stock(state, hold, |book| book.lock(&wish));
        let lock = match locked {
            Locked::Yes => Some(stock::Lock::Held { epoch: grant_epoch }),
            Locked::Stale => None,
            Locked::Refused(reason) => Some(stock::Lock::Refused(Error::new(reason, "no"))),
        };
        (to, lock)
    }

    /// Asks for a permit. Of permits only this much matters here: who has a hold gets it again, and nobody gets more
    /// than there is.
    fn acquire(&self, state: &State, hold: OrderId) -> Result<i64, Reason> {
        let stock = self.stocks.get(state.stock);
        match stock.holds.get(&hold).map(|hold| hold.state) {
            Some(HoldState::Locked | HoldState::Sold) => Ok(stock.ledger.epoch),
            Some(HoldState::Released | HoldState::Tombstone) => Err(Reason::PermitLapsed),
            None if stock.ledger.available > 0 => Ok(stock.ledger.epoch),
            None => Err(Reason::AllHeld),
        }
    }

    fn transition(&mut self, state: State, item: TransitionOrder) -> (State, Result<(), Error>) {
        let mut record = self.records.get(state.record).clone();
        let moved = match (&mut record, order_svc::wire::transition(item)) {
            (Some(record), Ok(transition)) => record.apply(&transition).map(|_: Change| ()),
            (None, Ok(_)) => Err(Error::not_found("order")),
            (_, Err(error)) => Err(error),
        };
        if let Some(record) = &mut record {
            record.pay_at_ms = record.pay_at_ms.map(|_| 0);
            record.close_at_ms = record.close_at_ms.map(|_| 0);
            record.version = 0;
        }
        (State { record: self.records.add(record).0, ..state }, moved)
    }

    fn book(&mut self, state: State, command: &Command) -> (State, Result<payment::Answer, Error>) {
        let mut book = self.moneys.get(state.money).clone();
        let answer = book.apply(command, TIMES);
        let mut rest = state.rest;
        for charge in std::mem::take(&mut book.announcements) {
            rest.heard |= self.announcement(&charge);
        }
        (State { money: self.moneys.add(book).0, rest, ..state }, answer)
    }

    fn said(
        &mut self,
        state: State,
        payment: &PaymentId,
        event: payment::Event,
    ) -> (State, Result<payment::Answer, Error>) {
        self.book(state, &Command::Settle(payment.clone(), event))
    }

    /// A bit for each attempt and outcome.
    fn announcement(&self, charge: &payment::Charge) -> u16 {
        let attempt = self.requests.iter().position(|r| r.payment_id().to_string() == charge.payment_id.to_string());
        // One that was not recorded has no id of its own.
        let attempt = attempt.unwrap_or(0);
        let outcome = HEARD.iter().position(|state| *state == charge.state).expect("only outcomes are announced");
        1 << (attempt * HEARD.len() + outcome)
    }

    /// The provider says what it says, and the answer is one of those.
    fn charge(&mut self, state: State, row: &Row) -> Answers<Result<PaymentStatus, Error>> {
        let begun = match payment_svc::wire::charge(money::charge_item(row)) {
            Ok((_, new)) => self.book(state, &Command::Begin(new)),
            Err(error) => (state, Err(error)),
        };
        let (to, Ok(answer)) = begun else { return vec![(begun.0, begun.1.map(|_| unreachable!()), "refused")] };
        let mut answers = vec![(to, status(answer.clone()), "pending")];
        if let Some(charge) = answer.todo.first() {
            for (event, name) in [(captured(), "captured"), (declined(), "declined")] {
                let (to, answer) = self.said(to, &charge.payment_id, event);
                answers.push((to, answer.and_then(status), name));
            }
        } else {
            answers[0].2 = "as before";
        }
        answers
    }

    fn void(&mut self, state: State) -> Answers<Result<PaymentStatus, Error>> {
        let (to, answer) = self.book(state, &Command::Void);
        let open = answer.as_ref().map(|answer| answer.todo.clone()).unwrap_or_default();
        let mut answers = vec![(to, answer.and_then(status), "")];
        if let Some(charge) = open.first() {
            answers[0].2 = "not yet";
            for (event, name) in [(payment::Event::Cancelled, "cancelled"), (captured(), "captured before")] {
                let (to, _) = self.said(to, &charge.payment_id, event);
                let (to, answer) = self.book(to, &Command::Void);
                answers.push((to, answer.and_then(status), name));
            }
        }
        answers
    }

    fn refund(&mut self, state: State) -> Answers<Result<PaymentStatus, Error>> {
        let (to, answer) = self.book(state, &Command::Refund);
        let open = answer.as_ref().map(|answer| answer.todo.clone()).unwrap_or_default();
        let mut answers = vec![(to, answer.and_then(status), "")];
        if let Some(charge) = open.first() {
            answers[0].2 = "not yet";
            let (to, answer) = self.said(to, &charge.payment_id, payment::Event::Refunded);
            answers.push((to, answer.and_then(status), "refunded"));
        }
        answers
    }

    // Coordinators.

    fn set(&mut self, mut state: State, who: usize, next: Coordinator) -> State {
        state.coordinators[who] = self.coordinators.add(next).0;
        state
    }

    fn idle(&mut self) -> u32 {
        self.coordinators.add(Coordinator::Idle).0
    }

    /// What an idle coordinator may begin.
    fn begin(&mut self, state: State, who: usize, steps: &mut Vec<Step<Self>>) {
        let now = Self::now(&state);
        if !state.rest.acknowledged {
            let known = self.row(&state).is_some();
            let mut to = state;
            if known {
                to.rest.acknowledged = true;
            } else {
                to = self.set(state, who, Coordinator::Lock(self.placed.grant_epoch));
            }
            push(steps, &state, by(who, "takes the order from the stream", ""), true, to);
        }
        let Some(row) = self.row(&state).cloned() else { return };
        let on = self.go_on(state.row, false);
        if on != Coordinator::Idle {
            let to = self.set(state, who, on);
            push(steps, &state, by(who, "takes up the order", static_name(&row.state)), true, to);
        }
        if let Some(refund) = self.rows.get(state.refund).clone() {
            let on = self.go_on(state.refund, true);
            if on != Coordinator::Idle {
                let to = self.set(state, who, on);
                push(steps, &state, by(who, "takes up the refund", static_name(&refund.state)), true, to);
            }
        }
        for n in 0..self.requests.len() {
            if let Ok(Pay::Charge) = decide_pay(&row, &self.requests[n], now)
                && state.rest.pays > 0
            {
                let to = self.set(state, who, Coordinator::Attempt(n as u8));
                push(steps, &state, by(who, "is asked to pay", if n == 0 { "" } else { "another way" }), false, to);
            }
        }
        let mut happen = |order: &mut Self, what, result, bound, event, patch: Patch, guard| {
            let (to, _) = order.note(state, who, &Note { event: Happened::Order(event), patch, guard });
            push(steps, &state, by(who, what, result), bound, to);
        };
        if self.bounds.cancels {
            let event = order_saga::Event::CancelRequested;
            happen(self, "is asked to cancel", "", false, event, Patch::default(), Guard::None);
        }
        let event = order_saga::Event::DeadlinePassed;
        happen(self, "sees the deadline", "", true, event, Patch::default(), Guard::Due(now));
        if state.rest.abandons > 0 && row.state == order_saga::State::Paying.name() {
            let mut given_up = state;
            given_up.rest.abandons -= 1;
            let event = order_saga::Event::Abandoned;
            let note =
                Note { event: Happened::Order(event), patch: Patch::default(), guard: Guard::Version(row.version) };
            let (to, _) = self.note(given_up, who, &note);
            push(steps, &state, by(who, "is told to give up", ""), false, to);
        }
        for attempt in 0..self.requests.len() {
            for (outcome, heard) in HEARD.iter().enumerate() {
                if state.rest.heard & 1 << (attempt * HEARD.len() + outcome) == 0 {
                    continue;
                }
                let status = PaymentStatus {
                    order_id: row.order_id.to_string(),
                    payment_id: self.requests[attempt].payment_id().to_string(),
                    state: (*heard).into(),
                    ..Default::default()
                };
                if let Meaning::Happened(event, patch, guard) = meaning(&row, &status, now, 0) {
                    let closed = matches!(row.state.as_str(), "EXPIRED" | "CANCELLED");
                    if closed && self.lapses(Lapse::IgnoresLateMoney) {
                        continue;
                    }
                    let (to, _) = self.note(state, who, &Note { event: Happened::Order(event), patch, guard });
                    push(steps, &state, by(who, "hears of a payment", heard.as_str_name()), true, to);
                }
            }
        }
    }

    /// What a coordinator does that has begun.
    fn act(&mut self, state: State, who: usize, at: Coordinator, steps: &mut Vec<Step<Self>>) {
        let now = Self::now(&state);
        match at {
            Coordinator::Idle => self.begin(state, who, steps),
            Coordinator::Lock(epoch) => {
                let (to, lock) = self.lock(state, self.placed.order_id, epoch, Reason::Unspecified);
                self.funnelled(to, state, who, "locks", lock, steps);
            }
            Coordinator::Renew => {
                let (next, result) = match self.acquire(&state, self.placed.order_id) {
                    Ok(epoch) => (Coordinator::Lock(epoch), "granted"),
                    Err(reason) => (Coordinator::Bury(reason), "refused"),
                };
                let to = self.set(state, who, next);
                push(steps, &state, by(who, "asks for another permit", result), true, to);
            }
            Coordinator::Bury(reason) if self.lapses(Lapse::RefusesUnburied) => {
                let refused = Some(stock::Lock::Refused(Error::new(reason, "no")));
                self.funnelled(state, state, who, "takes no for an answer", refused, steps);
            }
            Coordinator::Bury(reason) => {
                let (to, lock) = self.lock(state, self.placed.order_id, self.placed.grant_epoch, reason);
                self.funnelled(to, state, who, "has it refused", lock, steps);
            }
            Coordinator::Create(row) => {
                let mut to = state;
                if self.records.get(state.record).is_none() {
                    let record = order_svc::wire::record(record::first(&self.held(row)), 0).expect("a good record");
                    to.record = self.records.add(Some(Record { version: 0, ..record })).0;
                }
                let to = self.set(to, who, Coordinator::Insert(row));
                push(steps, &state, by(who, "writes the record", ""), true, to);
            }
            Coordinator::Insert(row) => {
                let mut to = state;
                if self.row(&state).is_none() {
                    to.row = row;
                }
                to.rest.acknowledged = true;
                let to = self.set(to, who, Coordinator::Idle);
                push(steps, &state, by(who, "writes the saga", static_name(&self.held(row).state)), true, to);
            }
            Coordinator::Attempt(n) => {
                let row = self.held(state.row);
                let change = attempt(&row, &self.requests[n as usize]);
                let note = Note { event: Happened::Order(change.event), patch: change.patch, guard: change.guard };
                let mut attempted = state;
                attempted.rest.pays = state.rest.pays.saturating_sub(1);
                let (mut to, result) = self.note(attempted, who, &note);
                // The buyer's own call charges at once; the work of PAYING is for what it leaves.
                let next = if result == "recorded" { Coordinator::Charge(to.row) } else { Coordinator::Idle };
                to = self.set(to, who, next);
                push(steps, &state, by(who, "records the attempt", result), true, to);
            }
            Coordinator::Charge(number) => {
                let row = self.held(number);
                for (to, answer, result) in self.charge(state, &row) {
                    let note =
                        |event, patch, guard| Coordinator::Note(Note { event: Happened::Order(event), patch, guard });
                    let next = match money::charged(&row, now, answer) {
                        Outcome::Done(patch) => note(order_saga::Event::Captured, patch, Guard::None),
                        Outcome::Refused(event, patch) => {
                            note(event, patch, row.payment_id.map_or(Guard::None, Guard::Payment))
                        }
                        Outcome::InProgress | Outcome::Unknown(_) => Coordinator::Idle,
                    };
                    let to = self.set(to, who, next);
                    push(steps, &state, by(who, "charges", result), true, to);
                }
            }
            Coordinator::Note(note) => {
                let (to, result) = self.note(state, who, &note);
                push(steps, &state, by(who, "records what came of it", result), true, to);
            }
            Coordinator::Work(working) => self.work(state, who, working, steps),
        }
        if state.coordinators[who] != self.idle() {
            let to = self.set(state, who, Coordinator::Idle);
            push(steps, &state, by(who, "dies", ""), false, to);
        }
    }

    /// A lock in the funnel came to something.
    fn funnelled(
        &mut self,
        to: State,
        state: State,
        who: usize,
        what: &'static str,
        lock: Option<stock::Lock>,
        steps: &mut Vec<Step<Self>>,
    ) {
        let Some(lock) = lock else {
            let to = self.set(to, who, Coordinator::Renew);
            push(steps, &state, by(who, what, "stale"), true, to);
            return;
        };
        let (event, patch, result) = match stock::locked(lock) {
            Outcome::Done(patch) => (order_saga::Event::Locked, patch, "held"),
            Outcome::Refused(event, patch) => (event, patch, "refused"),
            Outcome::InProgress | Outcome::Unknown(_) => {
                let to = self.set(to, who, Coordinator::Idle);
                push(steps, &state, by(who, what, "unknown"), true, to);
                return;
            }
        };
        let row = self.placed.row(String::new());
        let (row, _) = taken::<OrderSaga>(&row, event, &patch, Self::now(&state), LEASE).expect("a legal beginning");
        let row = self.keep(row);
        let to = self.set(to, who, Coordinator::Create(row));
        push(steps, &state, by(who, what, result), true, to);
    }

    /// The steps of a state's work, and what their success means.
    fn deeds(&self, row: &Row, is_refund: bool) -> (Vec<&'static str>, Option<Happened>) {
        if is_refund {
            let state = refund_saga::State::parse(&row.state).expect("one of ours");
            return match RefundSaga::work(state) {
                Work::Forward { steps, done } => (steps.to_vec(), done.map(Happened::Refund)),
                Work::Compensate { .. } | Work::Rest => (Vec::new(), None),
            };
        }
        match OrderSaga::work(order_saga::State::parse(&row.state).expect("one of ours")) {
            Work::Forward { steps, done } => (steps.to_vec(), done.map(Happened::Order)),
            Work::Compensate { done } => {
                let mut back = self.back.clone();
                if self.lapses(Lapse::VoidsLast) {
                    back.reverse();
                }
                (back, Some(Happened::Order(done)))
            }
            Work::Rest => (Vec::new(), None),
        }
    }

    fn work(&mut self, state: State, who: usize, working: Working, steps: &mut Vec<Step<Self>>) {
        let row = self.held(working.row);
        let (deeds, done) = self.deeds(&row, working.is_refund);
        let Some(deed) = deeds.get(working.step) else {
            match done {
                Some(event) => {
                    let note = Note { event, patch: working.patch, guard: Guard::Version(row.version) };
                    let (to, result) = self.note(state, who, &note);
                    push(steps, &state, by(who, "records its work", result), true, to);
                }
                None => {
                    let mut to = self.set(state, who, Coordinator::Idle);
                    if let Some(current) = self.row(&state).filter(|current| current.version == row.version) {
                        let resting = Row { next_attempt_at: None, ..current.clone() };
                        to.row = self.keep(resting);
                    }
                    push(steps, &state, by(who, "rests", ""), true, to);
                }
            }
            return;
        };
        let mut known = row.clone();
        working.patch.write(&mut known);
        for (to, outcome, result) in self.deed(state, deed, &known, working.within) {
            let next = match outcome {
                Ok(Outcome::Done(found)) => {
                    let mut patch = working.patch.clone();
                    patch.merge(found);
                    let step = working.step + 1;
                    Coordinator::Work(Working { step, patch, within: Within::Start, ..working.clone() })
                }
                Ok(Outcome::Refused(event, found)) => {
                    let mut patch = working.patch.clone();
                    patch.merge(found);
                    // A word for the log, and none for us.
                    patch.detail = None;
                    let event = Happened::Order(event);
                    Coordinator::Note(Note { event, patch, guard: Guard::Version(row.version) })
                }
                Ok(Outcome::InProgress | Outcome::Unknown(_)) => Coordinator::Idle,
                Err(within) => Coordinator::Work(Working { within, ..working.clone() }),
            };
            let to = self.set(to, who, next);
            push(steps, &state, by(who, deed, result), true, to);
        }
    }

    /// A step's call and what the step makes of its answer, or where inside of the step it goes on. What a charge leaves
    /// open may be shown by the record, or not: nothing waits for it.
    fn deed(
        &mut self,
        state: State,
        deed: &'static str,
        row: &Row,
        within: Within,
    ) -> Answers<Result<Outcome<order_saga::Event>, Within>> {
        let mut answers = self.effect(state, deed, row, within);
        if deed == "charge" {
            let is_open =
                |(_, outcome, _): &&(State, _, _)| matches!(outcome, Ok(Outcome::InProgress | Outcome::Unknown(_)));
            let open: Vec<_> = answers.iter().filter(is_open).cloned().collect();
            for (to, outcome, _) in open {
                let (shown, _) = self.transition(to, record::shown(row));
                answers.push((shown, outcome, "open, and shown"));
            }
        }
        answers
    }

    fn effect(
        &mut self,
        state: State,
        deed: &'static str,
        row: &Row,
        within: Within,
    ) -> Answers<Result<Outcome<order_saga::Event>, Within>> {
        let now = Self::now(&state);
        let one = |to, outcome: Outcome<order_saga::Event>| {
            let result = match &outcome {
                Outcome::Done(_) => "done",
                Outcome::Refused(event, _) => event.name(),
                Outcome::InProgress => "in progress",
                Outcome::Unknown(_) => "unknown",
            };
            vec![(to, Ok(outcome), result)]
        };
        let simple = |result: Result<(), Error>| match result {
            Ok(()) => Outcome::Done(Patch::default()),
            Err(error) => Outcome::Unknown(error),
        };
        match (deed, within) {
            ("intend", _) => {
                let (to, shown) = self.transition(state, record::shown(row));
                one(to, record::was_shown(shown))
            }
            ("charge", Within::Start) if now >= row.expire_at => {
                let read = |answer| match answer {
                    Ok(status) => money::read_charge(row, now, &status),
                    Err(error) => Outcome::Unknown(error),
                };
                self.void(state).into_iter().map(|(to, answer, result)| (to, Ok(read(answer)), result)).collect()
            }
            ("charge", Within::Start) => {
                let payment = row.payment_id.unwrap_or(row.order_id).to_string();
                let book = self.moneys.get(state.money);
                match book.charges.iter().find(|charge| charge.payment_id.to_string() == payment) {
                    None => vec![(state, Err(Within::Charge), "never begun")],
                    Some(charge) => {
                        let answer =
                            payment::Answer { state: charge.state, charge: Some(charge.clone()), todo: Vec::new() };
                        match status(answer) {
                            Ok(status) => one(state, money::read_charge(row, now, &status)),
                            Err(error) => one(state, Outcome::Unknown(error)),
                        }
                    }
                }
            }
            ("charge", _) => {
                let answers = self.charge(state, row).into_iter();
                answers.map(|(to, answer, result)| (to, Ok(money::charged(row, now, answer)), result)).collect()
            }
            ("deduct", _) => {
                let (to, deducted) = self.stock(state, row.hold_id, |book| book.deduct(row.hold_id));
                one(to, stock::deducted(deducted))
            }
            ("mark_paid", _) => {
                let (to, moved) = self.transition(state, record::paid(row));
                one(to, simple(moved))
            }
            ("announce", _) => {
                let mut to = state;
                to.rest.announced = true;
                one(to, Outcome::Done(Patch::default()))
            }
            ("reacquire", Within::Lock(epoch)) => {
                let (to, lock) = self.lock(state, row.hold_id, epoch, Reason::Unspecified);
                let unknown = stock::Lock::Unknown(Error::new(Reason::StockRebuilding, "the fence moved"));
                one(to, late::reacquired(lock.unwrap_or(unknown)))
            }
            ("reacquire", Within::Bury(reason)) => {
                let (to, lock) = self.lock(state, row.hold_id, row.grant_epoch, reason);
                let unknown = stock::Lock::Unknown(Error::new(Reason::StockRebuilding, "the fence moved"));
                one(to, late::reacquired(lock.unwrap_or(unknown)))
            }
            ("reacquire", _) => match self.acquire(&state, row.hold_id) {
                Ok(epoch) => vec![(state, Err(Within::Lock(epoch)), "granted")],
                Err(reason) if self.lapses(Lapse::RefusesUnburied) => {
                    one(state, late::reacquired(stock::Lock::Refused(Error::new(reason, "no"))))
                }
                Err(reason) => vec![(state, Err(Within::Bury(reason)), "no permit")],
            },
            ("refund", _) => {
                let mut to = state;
                if self.rows.get(state.refund).is_none() {
                    let event = refund_saga::Event::Requested;
                    let wanted = late::wanted(row);
                    let begun = taken::<RefundSaga>(&wanted, event, &Patch::default(), now, LEASE);
                    to.refund = self.keep(begun.expect("a legal beginning").0);
                }
                let closed = refund_saga::State::Closed.name();
                let is_closed = self.rows.get(to.refund).as_ref().is_some_and(|refund| refund.state == closed);
                one(to, if is_closed { Outcome::Done(Patch::default()) } else { Outcome::InProgress })
            }
            ("return", _) => {
                let answers = self.refund(state).into_iter();
                answers.map(|(to, answer, result)| (to, Ok(as_order(refunding::given_back(answer))), result)).collect()
            }
            ("mark_refunded", _) => {
                let order = self.row(&state).cloned();
                let (to, moved) = self.transition(state, refunding::refunded(row, order.as_ref()));
                one(to, simple(moved))
            }
            ("void", _) if row.payment_id.is_none() => one(state, Outcome::Done(Patch::default())),
            ("void", _) => {
                let hasty = self.lapses(Lapse::TakesPendingForVoid);
                let read = |answer| match money::voided(answer) {
                    Outcome::InProgress if hasty => Outcome::Done(Patch::default()),
                    outcome => outcome,
                };
                self.void(state).into_iter().map(|(to, answer, result)| (to, Ok(read(answer)), result)).collect()
            }
            ("close", _) => {
                let (to, moved) = self.transition(state, record::closed(row));
                one(to, simple(moved))
            }
            ("release", _) => {
                let release = |book: &mut Book| book.release(row.hold_id, row.order_id, &row.buyer);
                let (to, released) = self.stock(state, row.hold_id, release);
                one(to, stock::released(released))
            }
            (deed, _) => unreachable!("a step that nobody plays: {deed}"),
        }
    }

    // Everybody else.

    fn provider(&mut self, state: State, steps: &mut Vec<Step<Self>>) {
        let book = self.moneys.get(state.money).clone();
        for charge in &book.charges {
            let mut says = |order: &mut Self, event, result, bound, from: State| {
                let (to, _) = order.said(from, &charge.payment_id, event);
                push(steps, &state, Action { who: None, what: "the provider says", result }, bound, to);
            };
            match charge.state {
                PaymentState::Pending => {
                    says(self, captured(), "captured", true, state);
                    says(self, declined(), "declined", true, state);
                    if book.voided {
                        says(self, payment::Event::Cancelled, "cancelled", true, state);
                    }
                    if state.rest.contradictions > 0 {
                        let mut from = state;
                        from.rest.contradictions -= 1;
                        says(self, payment::Event::Refunded, "refunded, unasked", false, from);
                    }
                }
                PaymentState::RefundPending => says(self, payment::Event::Refunded, "refunded", true, state),
                PaymentState::Declined | PaymentState::Cancelled if state.rest.contradictions > 0 => {
                    let mut from = state;
                    from.rest.contradictions -= 1;
                    says(self, captured(), "captured after all", false, from);
                }
                _ => {}
            }
        }
    }

    fn rival(&mut self, state: State, steps: &mut Vec<Step<Self>>) {
        let stock = self.stocks.get(state.stock);
        let rival = self.rival;
        let buyer = BuyerId::parse("rival").expect("a buyer's name");
        // The unit of a grant that is good is nobody else's.
        let granted = !self.bounds.stale && !stock.holds.contains_key(&self.placed.order_id);
        match stock.holds.get(&rival).map(|hold| hold.state) {
            None if state.rest.rivals > 0 && stock.ledger.available > 0 && !granted => {
                let wish = Lock {
                    hold: rival,
                    order: rival,
                    buyer,
                    quantity: 1,
                    grant_epoch: stock.ledger.epoch,
                    expire_at: DUE,
                    refusal: Reason::Unspecified,
                };
                let (mut to, _) = self.stock(state, rival, |book| book.lock(&wish));
                to.rest.rivals -= 1;
                push(steps, &state, Action { who: None, what: "a rival takes the unit", result: "" }, false, to);
            }
            Some(HoldState::Locked) => {
                let (to, _) = self.stock(state, rival, |book| book.release(rival, rival, &buyer));
                push(steps, &state, Action { who: None, what: "the rival gives it back", result: "" }, false, to);
            }
            _ => {}
        }
    }

    /// What must be so when nothing is bound to happen any more.
    fn at_end(&self, state: &State) -> Result<(), String> {
        let Some(row) = self.row(state) else { return Err("I5: an accepted order has come to nothing".to_owned()) };
        let record = self.records.get(state.record).as_ref().map(|record| record.state);
        let book = self.moneys.get(state.money);
        let kept = book.charges.iter().filter(|c| c.state == PaymentState::Captured).count();
        // Not what the provider returned before it ever told us that it had it.
        let ours = |c: &&payment::Charge| c.reference.is_some() && !c.surplus;
        let returned = book.charges.iter().filter(ours).filter(|c| c.state == PaymentState::Refunded).count();
        let stock = self.stocks.get(state.stock);
        let ours = stock.holds.iter().filter(|(id, _)| **id != self.rival);
        let units = |state| ours.clone().filter(|(_, hold)| hold.state == state).count();
        let (locked, sold) = (units(HoldState::Locked), units(HoldState::Sold));
        let expected = match row.state.as_str() {
            "PAID" => (OrderState::Paid, 1, 0, 1),
            "EXPIRED" => (OrderState::Expired, 0, 0, 0),
            "CANCELLED" => (OrderState::Cancelled, 0, 0, 0),
            "REJECTED" => (OrderState::Rejected, 0, 0, 0),
            "REFUNDED" => (OrderState::Refunded, 0, 1, 0),
            state => return Err(format!("I5: an order ends in {state}")),
        };
        if (kept, returned) != (expected.1, expected.2) {
            return Err(format!("I4: {} with {kept} payments kept and {returned} returned", row.state));
        }
        if locked > 0 {
            return Err(format!("I3: {} leaves a hold without an order", row.state));
        }
        if sold != expected.3 {
            return Err(format!("I3: {} with {sold} units sold", row.state));
        }
        if record != Some(expected.0) {
            return Err(format!("{} while the record says {record:?}", row.state));
        }
        if (row.state == "PAID") != state.rest.announced {
            return Err(format!("{} was {} announced", row.state, if state.rest.announced { "" } else { "not" }));
        }
        Ok(())
    }
}

/// Outcomes that payment-svc announces.
const HEARD: [PaymentState; 4] =
    [PaymentState::Captured, PaymentState::Declined, PaymentState::Cancelled, PaymentState::Refunded];

fn captured() -> payment::Event {
    payment::Event::Captured { reference: Some("taken".to_owned()) }
}

fn declined() -> payment::Event {
    payment::Event::Declined { code: "no".to_owned() }
}

/// The answer as the coordinator reads it.
fn status(answer: payment::Answer) -> Result<PaymentStatus, Error> {
    let PaymentResult { result } = payment_svc::wire::result("", Ok(answer));
    match result {
        Some(payment_result::Result::Status(status)) => Ok(status),
        Some(payment_result::Result::Refused(refusal)) => Err(refusal.into()),
        None => Err(Error::internal("an empty result")),
    }
}

/// The refund's steps refuse nothing.
fn as_order(outcome: Outcome<refund_saga::Event>) -> Outcome<order_saga::Event> {
    match outcome {
        Outcome::Done(patch) => Outcome::Done(patch),
        Outcome::InProgress => Outcome::InProgress,
        Outcome::Unknown(error) => Outcome::Unknown(error),
        Outcome::Refused(event, _) => unreachable!("{event:?}"),
    }
}

fn by(who: usize, what: &'static str, result: &'static str) -> Action {
    Action { who: Some(who as u8), what, result }
}

fn static_name(state: &str) -> &'static str {
    let order = order_saga::State::parse(state).map(Named::name);
    order.or_else(|| refund_saga::State::parse(state).map(Named::name)).unwrap_or("")
}

fn push(steps: &mut Vec<Step<Order>>, from: &State, action: Action, bound: bool, to: State) {
    if to != *from {
        steps.push(Step { action, bound, to: Ok(to) });
    }
}

impl Model for Order {
    type State = State;
    type Action = Action;

    fn start(&mut self) -> State {
        let mut ledger = Ledger::new(1);
        (ledger.epoch, ledger.next_epoch) = if self.bounds.stale { (2, 3) } else { (1, 2) };
        let nobody = self.rows.add(None).0;
        State {
            row: nobody,
            refund: nobody,
            money: self.moneys.add(payment::Book::new(self.placed.order_id)).0,
            record: self.records.add(None).0,
            stock: self.stocks.add(Stock { ledger, holds: BTreeMap::new() }).0,
            coordinators: [self.idle(); COORDINATORS],
            rest: Rest {
                pays: self.bounds.pays,
                contradictions: self.bounds.contradictions,
                rivals: self.bounds.rivals,
                abandons: self.bounds.abandons,
                heard: 0,
                is_due: false,
                announced: false,
                acknowledged: false,
            },
        }
    }

    fn steps(&mut self, state: State, steps: &mut Vec<Step<Self>>) {
        for who in 0..self.bounds.coordinators {
            let mine = state.coordinators[who];
            let mut alone = State { coordinators: [self.idle(); COORDINATORS], ..state };
            alone.coordinators[0] = mine;
            if !self.acts.contains_key(&alone) {
                let at = self.coordinators.get(mine).clone();
                let mut acts = Vec::new();
                self.act(alone, 0, at, &mut acts);
                let acts = acts.into_iter().filter_map(|step| Some((step.action, step.bound, step.to.ok()?)));
                self.acts.insert(alone, acts.collect());
            }
            for (action, bound, to) in &self.acts[&alone] {
                let mut to = *to;
                let mine = to.coordinators[0];
                to.coordinators = state.coordinators;
                to.coordinators[who] = mine;
                steps.push(Step { action: Action { who: Some(who as u8), ..*action }, bound: *bound, to: Ok(to) });
            }
        }
        self.provider(state, steps);
        self.rival(state, steps);
        if !state.rest.is_due {
            let mut to = state;
            to.rest.is_due = true;
            push(steps, &state, Action { who: None, what: "the deadline passes", result: "" }, true, to);
        }
        if steps.iter().all(|step| !step.bound)
            && let Err(what) = self.at_end(&state)
        {
            let action = Action { who: None, what: "nothing goes on", result: "" };
            steps.push(Step { action, bound: true, to: Err(what) });
        }
    }

    fn check(&mut self, state: State) -> Result<(), String> {
        let stock = self.stocks.get(state.stock);
        let Ledger { available, held, sold, total, .. } = stock.ledger;
        if available < 0 || held < 0 || sold < 0 || available + held + sold != total {
            return Err(format!("I1: A {available} + H {held} + D {sold} of {total}"));
        }
        let book = self.moneys.get(state.money);
        let moved = |charge: &&payment::Charge| {
            matches!(charge.state, PaymentState::Captured | PaymentState::RefundPending | PaymentState::Refunded)
        };
        if book.charges.iter().filter(moved).filter(|charge| !charge.surplus).count() > 1 {
            return Err("I4: money is captured twice".to_owned());
        }
        let hold = stock.holds.get(&self.placed.order_id).map(|hold| hold.state);
        let is_open = book.charges.iter().any(|charge| charge.state == PaymentState::Pending);
        if hold == Some(HoldState::Released) && is_open {
            return Err("E29: the unit is given back while its payment is unknown".to_owned());
        }
        let Some(row) = self.row(&state) else { return Ok(()) };
        let is_held = matches!(row.state.as_str(), "AWAITING_PAYMENT" | "PAYING");
        if is_held && hold != Some(HoldState::Locked) {
            return Err(format!("I3: {} without its hold", row.state));
        }
        if row.state == "AWAITING_PAYMENT" && is_open {
            return Err("E28: it waits for another payment while one is open".to_owned());
        }
        if row.state == "EXPIRING" && !state.rest.is_due {
            return Err("E33: it expires before its deadline".to_owned());
        }
        Ok(())
    }

    /// Coordinators are alike.
    fn canonical(&mut self, mut state: State) -> State {
        state.coordinators[..self.bounds.coordinators].sort_unstable();
        state
    }

    fn is_end(&mut self, state: State) -> bool {
        let mut steps = Vec::new();
        self.steps(state, &mut steps);
        steps.iter().all(|step| !step.bound)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::search::Verdict;

    /// I1, I3, I4 and I5, whatever happens in whatever order, with coordinators that die anywhere.
    #[test]
    fn e23_e24_e28_e29_e30_e31_e33_every_order_comes_to_an_end_that_fits_its_money() {
        for bounds in bounds() {
            let Report { states, steps, verdict, .. } = check(&bounds, Limits::default(), |_| {});
            println!("{}: {states} states, {steps} steps", bounds.name);
            assert_eq!(verdict, Verdict::Clean, "{}", bounds.name);
        }
    }

    #[test]
    fn what_is_done_wrong_is_noticed() {
        for lapse in Lapse::ALL {
            let report = check(&proof(*lapse), Limits::default(), |_| {});
            assert!(matches!(report.verdict, Verdict::Violation { .. }), "{lapse:?}: {report:?}");
        }
    }

    /// Both who lock for the first time and who look for a late hold must bury what the permits refuse.
    #[test]
    fn e24_a_late_hold_that_was_refused_is_not_held_by_another_coordinator() {
        let bounds = Bounds { lapses: vec![Lapse::RefusesUnburied], ..bounds()[2].clone() };
        let report = check(&bounds, Limits::default(), |_| {});
        let Verdict::Violation { what, .. } = report.verdict else { panic!("{report:?}") };
        assert_eq!(what, "I3: REFUNDED leaves a hold without an order");
    }
}
