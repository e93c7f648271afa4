//! What may happen to an order's money. Pure: no database, no provider, no clock of its own.
//!
//! Two rules carry everything:
//!
//! - **A charge's state only rises.** The provider's words (PENDING < DECLINED < CANCELLED < CAPTURED < REFUNDED) may come
//!   late, twice and in any order, as answers, polls and webhooks; the highest one heard is the truth, because money that
//!   moved outweighs money that did not, and money that came back outweighs both. Whatever the order of the words, the
//!   end is the same, and each state is entered and announced once (E24–E26).
//! - **An order's charges are looked at together**, under one lock ([`Book`]): a charge begins only where no other may
//!   have taken money, and if the provider takes it twice all the same, the second goes straight back (I4).

use std::{fmt, str::FromStr};

pub use proto::internal::PaymentState as State;
use proto::{BuyerId, Error, Money, OrderId, Reason, error::Result};

/// A charge's id and idempotency key: 1 to 64 letters, digits, hyphens and underscores, derived from the order and the
/// buyer's request.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PaymentId(String);

impl PaymentId {
    /// The id.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for PaymentId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
        if text.is_empty() || text.len() > 64 || !text.bytes().all(allowed) {
            return Err(Error::invalid("payment_id", "must be 1 to 64 letters, digits, hyphens and underscores"));
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for PaymentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What is heard about a charge, or wanted of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The provider has the money.
    Captured {
        /// The provider's own id of it.
        reference: Option<String>,
    },
    /// The provider said no.
    Declined {
        /// Why.
        code: String,
    },
    /// The provider will never charge it.
    Cancelled,
    /// We want the money to go back.
    RefundRequested,
    /// The money went back.
    Refunded,
}

/// What follows from a change of state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// Everybody who cares is told, once.
    Announce,
}

/// How much is known of the money; see the module.
fn rank(state: State) -> u8 {
    match state {
        State::Unspecified | State::Pending => 0,
        State::Declined => 1,
        State::Cancelled => 2,
        State::Captured => 3,
        State::RefundPending => 4,
        State::Refunded => 5,
    }
}

/// Whether money was captured, whatever became of it since.
fn has_moved(state: State) -> bool {
    rank(state) >= rank(State::Captured)
}

/// Whether the provider still owes a word.
pub fn is_open(state: State) -> bool {
    matches!(state, State::Pending | State::RefundPending)
}

/// The one function that moves a charge. ILLEGAL_STATE for a refund of what was not captured; everything the provider
/// says is taken, and changes nothing when more is known already.
pub fn next(state: State, event: &Event) -> Result<(State, Effect)> {
    let said = match event {
        Event::Declined { .. } => State::Declined,
        Event::Cancelled => State::Cancelled,
        Event::Captured { .. } => State::Captured,
        Event::Refunded => State::Refunded,
        Event::RefundRequested if !has_moved(state) => {
            let name = state.as_str_name();
            return Err(Error::illegal_state(name, format!("a payment that is {name} cannot be refunded")));
        }
        Event::RefundRequested => State::RefundPending,
    };
    match said {
        _ if rank(said) <= rank(state) => Ok((state, Effect::None)),
        // Ours, and not an outcome.
        State::RefundPending => Ok((said, Effect::None)),
        _ => Ok((said, Effect::Announce)),
    }
}

/// One attempt to take an order's money.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Charge {
    /// The key.
    pub payment_id: PaymentId,
    /// Whose money it is about.
    pub order_id: OrderId,
    /// Who pays.
    pub buyer: BuyerId,
    /// How much: the server's figure (E32).
    pub amount: Money,
    /// By which method.
    pub method: String,
    /// What is known.
    pub state: State,
    /// Why it was declined.
    pub decline_code: Option<String>,
    /// The provider's own id of the capture.
    pub reference: Option<String>,
    /// Taken although the order's money was taken before: it only goes back, and nobody hears of it.
    pub surplus: bool,
    /// How often the provider was asked in vain.
    pub asked: i32,
    /// When to ask next, Unix milliseconds; none when it is settled.
    pub ask_at_ms: Option<i64>,
    /// When it began.
    pub create_at_ms: i64,
    /// When it changed.
    pub update_at_ms: i64,
    /// Grows with every change of state.
    pub version: i64,
}

/// A charge to begin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewCharge {
    /// The idempotency key.
    pub payment_id: PaymentId,
    /// Who pays.
    pub buyer: BuyerId,
    /// How much.
    pub amount: Money,
    /// By which method.
    pub method: String,
}

/// What is done with an order's money.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Writes a charge ahead of the provider's call.
    Begin(NewCharge),
    /// The provider said something of a charge.
    Settle(PaymentId, Event),
    /// The provider's webhook said something of a charge of this amount.
    Webhook(PaymentId, Money, Event),
    /// The provider was asked and has not said.
    Unsettled(PaymentId),
    /// No charge begins any more, and those that are open are to be cancelled.
    Void,
    /// What was captured is to go back.
    Refund,
}

/// What a command came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// What is known.
    pub state: State,
    /// Of which charge; none when the order has none.
    pub charge: Option<Charge>,
    /// What to call the provider for: the charge to make, those to cancel, the one to refund.
    pub todo: Vec<Charge>,
}

/// When things happen.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// Now, Unix milliseconds.
    pub now_ms: i64,
    /// How long whoever got a `todo` may take with the provider before somebody else asks.
    pub call_ms: i64,
}

/// How the provider is to be asked about an open charge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing is open.
    Rest,
    /// What became of it? If the provider never heard of it, it may be charged.
    Ask,
    /// It must not happen any more.
    Cancel,
    /// The money must go back.
    Refund,
}

/// An order's money: whether it may still be charged, and every charge there was. Held under the order's lock.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Book {
    /// Whose.
    pub order_id: OrderId,
    /// No charge begins any more.
    pub voided: bool,
    /// Oldest first.
    pub charges: Vec<Charge>,
    /// Charges as they were when they entered a state that others must hear of.
    pub announcements: Vec<Charge>,
}

impl Book {
    /// Of an order without charges.
    pub fn new(order_id: OrderId) -> Self {
        Self { order_id, voided: false, charges: Vec::new(), announcements: Vec::new() }
    }

    /// Does a command, or refuses it and changes nothing.
    pub fn apply(&mut self, command: &Command, times: Times) -> Result<Answer> {
        match command {
            Command::Begin(new) => self.begin(new, times),
            Command::Settle(payment_id, event) => self.settle(payment_id, event, times),
            Command::Webhook(payment_id, amount, event) => {
                let charge = &self.charges[self.position(payment_id)?];
                if charge.amount != *amount {
                    return Err(Error::invalid("amount", "is not the amount of the charge"));
                }
                self.settle(payment_id, event, times)
            }
            Command::Unsettled(payment_id) => {
                let position = self.position(payment_id)?;
                let charge = &mut self.charges[position];
                if is_open(charge.state) {
                    charge.ask_at_ms = Some(times.now_ms + pause_ms(charge.asked));
                    charge.asked = charge.asked.saturating_add(1);
                }
                Ok(self.answer_for(position))
            }
            Command::Void => Ok(self.void(times)),
            Command::Refund => self.refund(times),
        }
    }

    /// How the provider is to be asked about this charge.
    pub fn step(&self, payment_id: &PaymentId) -> Step {
        let Some(charge) = self.charges.iter().find(|c| c.payment_id == *payment_id) else { return Step::Rest };
        match charge.state {
            State::Pending if self.voided || self.other_moved(payment_id) => Step::Cancel,
            State::Pending => Step::Ask,
            State::RefundPending => Step::Refund,
            _ => Step::Rest,
        }
    }

    fn begin(&mut self, new: &NewCharge, times: Times) -> Result<Answer> {
        if let Ok(position) = self.position(&new.payment_id) {
            let known = &self.charges[position];
            if (&known.buyer, &known.amount, &known.method) != (&new.buyer, &new.amount, &new.method) {
                return Err(reused());
            }
            // The same click again (E28): whoever began it calls the provider.
            return Ok(self.answer_for(position));
        }
        if self.voided {
            return Err(Error::illegal_state(State::Cancelled.as_str_name(), "the order can no longer be paid"));
        }
        if let Some(other) = self.charges.iter().find(|c| c.state == State::Pending || has_moved(c.state)) {
            let state = other.state.as_str_name();
            return Err(Error::illegal_state(state, format!("another payment of the order is {state}")));
        }
        self.charges.push(Charge {
            payment_id: new.payment_id.clone(),
            order_id: self.order_id,
            buyer: new.buyer.clone(),
            amount: new.amount.clone(),
            method: new.method.clone(),
            state: State::Pending,
            decline_code: None,
            reference: None,
            surplus: false,
            asked: 0,
            ask_at_ms: Some(times.now_ms + times.call_ms),
            create_at_ms: times.now_ms,
            update_at_ms: times.now_ms,
            version: 1,
        });
        let answer = self.answer_for(self.charges.len() - 1);
        Ok(Answer { todo: answer.charge.iter().cloned().collect(), ..answer })
    }

    fn settle(&mut self, payment_id: &PaymentId, event: &Event, times: Times) -> Result<Answer> {
        let position = self.position(payment_id)?;
        let taken_before = self.other_moved(payment_id);
        let charge = &mut self.charges[position];
        let (state, effect) = next(charge.state, event)?;
        if state == charge.state {
            return Ok(self.answer_for(position));
        }
        match event {
            Event::Captured { reference } => charge.reference = reference.as_deref().map(|r| first(128, r)),
            Event::Declined { code } => charge.decline_code = Some(first(64, code)),
            Event::Cancelled | Event::RefundRequested | Event::Refunded => {}
        }
        // This must not become a second outcome of the order, it only goes back (I4).
        charge.surplus |= taken_before && !has_moved(charge.state) && has_moved(state);
        let refund_at_once = charge.surplus && state == State::Captured;
        charge.enter(if refund_at_once { State::RefundPending } else { state }, times.now_ms);
        if effect == Effect::Announce && !charge.surplus {
            let announcement = charge.clone();
            self.announcements.push(announcement);
        }
        Ok(self.answer_for(position))
    }

    fn void(&mut self, times: Times) -> Answer {
        self.voided = true;
        let open = self.charges.iter_mut().filter(|c| c.state == State::Pending);
        let todo = open
            .map(|charge| {
                charge.ask_at_ms = Some(times.now_ms + times.call_ms);
                charge.clone()
            })
            .collect();
        // What matters most comes first: money that is there, then money that may be.
        let first = [State::Captured, State::RefundPending, State::Pending, State::Refunded];
        let position = first.iter().find_map(|state| self.charges.iter().position(|c| c.state == *state));
        match position {
            Some(position) => Answer { todo, ..self.answer_for(position) },
            None => Answer { state: State::Cancelled, charge: self.charges.last().cloned(), todo },
        }
    }

    fn refund(&mut self, times: Times) -> Result<Answer> {
        // One that was not refunded yet, if there is one; or the answer is that it was.
        let moved = [State::Captured, State::RefundPending, State::Refunded];
        let position = moved.iter().find_map(|state| self.charges.iter().position(|c| c.state == *state));
        let Some(position) = position else {
            let state = self.charges.last().map_or(State::Cancelled, |c| c.state).as_str_name();
            return Err(Error::illegal_state(state, "nothing was captured"));
        };
        let charge = &mut self.charges[position];
        let (state, _) = next(charge.state, &Event::RefundRequested)?;
        if state != charge.state {
            charge.enter(state, times.now_ms);
        }
        if state == State::RefundPending {
            charge.ask_at_ms = Some(times.now_ms + times.call_ms);
        }
        let todo = (state == State::RefundPending).then(|| charge.clone()).into_iter().collect();
        Ok(Answer { todo, ..self.answer_for(position) })
    }

    fn position(&self, payment_id: &PaymentId) -> Result<usize> {
        self.charges.iter().position(|c| c.payment_id == *payment_id).ok_or_else(|| Error::not_found("payment"))
    }

    fn other_moved(&self, payment_id: &PaymentId) -> bool {
        self.charges.iter().any(|c| c.payment_id != *payment_id && has_moved(c.state))
    }

    fn answer_for(&self, position: usize) -> Answer {
        let charge = self.charges[position].clone();
        Answer { state: charge.state, charge: Some(charge), todo: Vec::new() }
    }
}

impl Charge {
    fn enter(&mut self, state: State, now_ms: i64) {
        self.state = state;
        self.asked = 0;
        self.ask_at_ms = is_open(state).then_some(now_ms);
        self.update_at_ms = now_ms;
        self.version += 1;
    }
}

/// The provider's words are kept, but not at any length.
fn first(length: usize, text: &str) -> String {
    text.chars().take(length).collect()
}

/// The same payment_id with another payload.
pub fn reused() -> Error {
    Error::new(Reason::RequestIdReused, "the same request id was used for another payment")
}

/// How long to wait after having asked in vain so often: a buyer is looking on for the first seconds, nobody later.
fn pause_ms(asked: i32) -> i64 {
    const FIRST: i64 = 250;
    const LONGEST: i64 = 30_000;
    let doublings = (asked / 4).saturating_sub(4).clamp(0, 7);
    (FIRST << doublings).min(LONGEST)
}

#[cfg(test)]
mod tests {
    use proto::RequestId;

    use super::*;

    const TIMES: Times = Times { now_ms: 1_000, call_ms: 1_500 };

    fn book() -> Book {
        let buyer = BuyerId::parse("alice").unwrap();
        Book::new(OrderId::derive(&buyer, &RequestId::random()))
    }

    fn euros(units: i64) -> Money {
        Money::from_parts("amount", "EUR", units, 990_000_000).unwrap()
    }

    fn id(text: &str) -> PaymentId {
        text.parse().unwrap()
    }

    fn begin(payment: &str) -> Command {
        let buyer = BuyerId::parse("alice").unwrap();
        Command::Begin(NewCharge { payment_id: id(payment), buyer, amount: euros(19), method: "card".into() })
    }

    fn captured() -> Event {
        Event::Captured { reference: Some("r-1".into()) }
    }

    fn declined() -> Event {
        Event::Declined { code: "card_declined".into() }
    }

    fn announced(book: &Book) -> Vec<(&str, State)> {
        book.announcements.iter().map(|c| (c.payment_id.as_str(), c.state)).collect()
    }

    /// Every sequence of up to `length` of the provider's words.
    fn sequences(length: usize) -> Vec<Vec<Event>> {
        let words = [captured(), declined(), Event::Cancelled, Event::Refunded];
        let mut all = vec![vec![]];
        let mut last = all.clone();
        for _ in 0..length {
            last = last
                .iter()
                .flat_map(|s| words.iter().map(move |w| [s.as_slice(), std::slice::from_ref(w)].concat()))
                .collect();
            all.extend(last.clone());
        }
        all
    }

    fn end_of(events: &[Event]) -> (State, Vec<State>) {
        let (mut state, mut announced) = (State::Pending, Vec::new());
        for event in events {
            let (next, effect) = next(state, event).unwrap();
            if effect == Effect::Announce {
                announced.push(next);
            }
            state = next;
        }
        (state, announced)
    }

    #[test]
    fn e26_the_providers_words_converge_in_whatever_order_they_come() {
        for events in sequences(4) {
            let (end, _) = end_of(&events);
            let mut reversed = events.clone();
            reversed.reverse();
            assert_eq!(end_of(&reversed).0, end, "{events:?}");
            let highest = events.iter().map(|e| end_of(std::slice::from_ref(e)).0).max_by_key(|s| rank(*s));
            assert_eq!(end, highest.unwrap_or(State::Pending), "{events:?}");
        }
    }

    #[test]
    fn e25_the_same_word_again_changes_and_announces_nothing() {
        for events in sequences(3) {
            let doubled: Vec<_> = events.iter().flat_map(|e| [e.clone(), e.clone()]).collect();
            let replayed = [events.clone(), events.clone()].concat();
            assert_eq!(end_of(&doubled), end_of(&events), "{events:?}");
            assert_eq!(end_of(&replayed), end_of(&events), "{events:?}");
            let (_, announced) = end_of(&events);
            assert!(announced.windows(2).all(|w| rank(w[0]) < rank(w[1])), "each state once: {announced:?}");
        }
    }

    #[test]
    fn e25_success_after_a_refund_changes_nothing() {
        let mut book = book();
        book.apply(&begin("p"), TIMES).unwrap();
        book.apply(&Command::Settle(id("p"), captured()), TIMES).unwrap();
        let refund = book.apply(&Command::Refund, TIMES).unwrap();
        assert_eq!((refund.state, refund.todo.len()), (State::RefundPending, 1));
        assert_eq!(book.apply(&Command::Settle(id("p"), captured()), TIMES).unwrap().state, State::RefundPending);
        book.apply(&Command::Settle(id("p"), Event::Refunded), TIMES).unwrap();
        let late = book.apply(&Command::Webhook(id("p"), euros(19), captured()), TIMES).unwrap();
        assert_eq!(late.state, State::Refunded);
        let again = book.apply(&Command::Refund, TIMES).unwrap();
        assert_eq!((again.state, again.todo.len()), (State::Refunded, 0), "no second refund");
        assert_eq!(announced(&book), [("p", State::Captured), ("p", State::Refunded)]);
    }

    #[test]
    fn e28_two_clicks_make_one_charge() {
        let mut book = book();
        assert_eq!(book.apply(&begin("p"), TIMES).unwrap().todo.len(), 1);
        let again = book.apply(&begin("p"), TIMES).unwrap();
        assert_eq!((again.state, again.todo.len()), (State::Pending, 0), "the same click");
        let other = book.apply(&begin("q"), TIMES).unwrap_err();
        assert_eq!((other.reason, other.metadata["state"].as_str()), (Reason::IllegalState, "PENDING"));
        book.apply(&Command::Settle(id("p"), captured()), TIMES).unwrap();
        assert_eq!(book.apply(&begin("q"), TIMES).unwrap_err().metadata["state"], "CAPTURED");
        let changed = Command::Begin(NewCharge {
            payment_id: id("p"),
            buyer: BuyerId::parse("alice").unwrap(),
            amount: euros(20),
            method: "card".into(),
        });
        assert_eq!(book.apply(&changed, TIMES).unwrap_err().reason, Reason::RequestIdReused);
        assert_eq!(book.charges.len(), 1);
    }

    #[test]
    fn e30_after_a_decline_another_try_may_begin() {
        let mut book = book();
        book.apply(&begin("p"), TIMES).unwrap();
        let answer = book.apply(&Command::Settle(id("p"), declined()), TIMES).unwrap();
        assert_eq!(answer.charge.unwrap().decline_code.as_deref(), Some("card_declined"));
        assert_eq!(book.apply(&begin("q"), TIMES).unwrap().todo.len(), 1);
        assert!(!book.voided);
    }

    #[test]
    fn e29_a_void_is_pending_until_the_provider_has_spoken() {
        let mut book = book();
        book.apply(&begin("p"), TIMES).unwrap();
        let void = book.apply(&Command::Void, TIMES).unwrap();
        assert_eq!((void.state, void.todo.len()), (State::Pending, 1));
        assert_eq!(book.step(&id("p")), Step::Cancel);
        book.apply(&Command::Unsettled(id("p")), TIMES).unwrap();
        assert_eq!(book.apply(&Command::Void, TIMES).unwrap().state, State::Pending);
        book.apply(&Command::Settle(id("p"), Event::Cancelled), TIMES).unwrap();
        let void = book.apply(&Command::Void, TIMES).unwrap();
        assert_eq!((void.state, void.todo.len()), (State::Cancelled, 0));
        assert_eq!(book.apply(&begin("q"), TIMES).unwrap_err().reason, Reason::IllegalState);
        assert_eq!(book.apply(&begin("p"), TIMES).unwrap().state, State::Cancelled, "the same click is answered");
    }

    #[test]
    fn e24_a_capture_after_the_void_is_announced_and_refunded_once() {
        let mut book = book();
        book.apply(&begin("p"), TIMES).unwrap();
        book.apply(&Command::Void, TIMES).unwrap();
        book.apply(&Command::Settle(id("p"), Event::Cancelled), TIMES).unwrap();
        for _ in 0..2 {
            book.apply(&Command::Settle(id("p"), captured()), TIMES).unwrap();
        }
        assert_eq!(announced(&book), [("p", State::Cancelled), ("p", State::Captured)]);
        assert_eq!(book.apply(&Command::Void, TIMES).unwrap().state, State::Captured);
        book.apply(&Command::Refund, TIMES).unwrap();
        book.apply(&Command::Settle(id("p"), Event::Refunded), TIMES).unwrap();
        assert_eq!(book.apply(&Command::Void, TIMES).unwrap().state, State::Refunded);
    }

    #[test]
    fn e24_money_taken_twice_goes_back_once_and_is_no_outcome_of_the_order() {
        let mut book = book();
        book.apply(&begin("p"), TIMES).unwrap();
        book.apply(&Command::Settle(id("p"), declined()), TIMES).unwrap();
        book.apply(&begin("q"), TIMES).unwrap();
        // The provider changes its mind about the first while the second is under way: one of them stays.
        book.apply(&Command::Settle(id("p"), captured()), TIMES).unwrap();
        assert_eq!(book.step(&id("q")), Step::Cancel);
        let surplus = book.apply(&Command::Settle(id("q"), captured()), TIMES).unwrap();
        assert_eq!(surplus.state, State::RefundPending);
        assert_eq!((book.step(&id("p")), book.step(&id("q"))), (Step::Rest, Step::Refund));
        book.apply(&Command::Settle(id("q"), Event::Refunded), TIMES).unwrap();
        assert_eq!(announced(&book), [("p", State::Declined), ("p", State::Captured)]);
        assert_eq!(book.apply(&Command::Void, TIMES).unwrap().state, State::Captured);
        book.apply(&Command::Refund, TIMES).unwrap();
        book.apply(&Command::Settle(id("p"), Event::Refunded), TIMES).unwrap();
        assert_eq!(announced(&book).last(), Some(&("p", State::Refunded)));
    }

    #[test]
    fn e27_a_webhook_of_another_amount_or_currency_changes_nothing() {
        let mut book = book();
        book.apply(&begin("p"), TIMES).unwrap();
        let before = book.clone();
        let dollars = Money::from_parts("amount", "USD", 19, 990_000_000).unwrap();
        for wrong in [euros(20), dollars, Money::from_parts("amount", "EUR", 19, 0).unwrap()] {
            let refused = book.apply(&Command::Webhook(id("p"), wrong, captured()), TIMES).unwrap_err();
            assert_eq!((refused.reason, refused.field.as_deref()), (Reason::InvalidField, Some("amount")));
        }
        let unknown = book.apply(&Command::Webhook(id("q"), euros(19), captured()), TIMES).unwrap_err();
        assert_eq!(unknown.reason, Reason::NotFound);
        assert_eq!(book, before);
    }

    #[test]
    fn nothing_is_refunded_that_was_not_captured() {
        let mut book = book();
        assert_eq!(book.apply(&Command::Refund, TIMES).unwrap_err().reason, Reason::IllegalState);
        book.apply(&begin("p"), TIMES).unwrap();
        assert_eq!(book.apply(&Command::Refund, TIMES).unwrap_err().metadata["state"], "PENDING");
    }

    #[test]
    fn an_order_without_charges_is_void_at_once() {
        let mut book = book();
        let answer = book.apply(&Command::Void, TIMES).unwrap();
        assert_eq!(answer, Answer { state: State::Cancelled, charge: None, todo: vec![] });
        assert_eq!(book.apply(&begin("p"), TIMES).unwrap_err().metadata["state"], "CANCELLED");
    }

    #[test]
    fn the_provider_is_asked_often_at_first_and_never_given_up() {
        assert_eq!(pause_ms(0), 250);
        assert_eq!(pause_ms(19), 250);
        assert!(pause_ms(24) > 250);
        assert_eq!(pause_ms(i32::MAX), 30_000);
    }
}
