//! Faults on demand: what a proof makes go wrong in one coordinator, at a place that it names.
//!
//! They are put around what a coordinator is made of and reaches through: its plans, its store, its consumers, the
//! services it calls. They do what the world may do: lose a call before its effect or its answer after, do it twice, stop a
//! process. They never invent an answer: a refusal has a cause in the world.
//!
//! ```text
//!   [Fail, Stop] deed [Forget, Repeat, StopAfter] ──> event row ──> [Stop] ──> … ──> [Stop] acknowledgement
//! ```

use std::{
    collections::HashMap,
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use async_trait::async_trait;
use coordinator::{
    engine::{
        Saga,
        plan::{Outcome, Plan},
    },
    store::{Action, Decide, Entry, Filter, Postponed, Row, SharedStore, Store, Verdict, Which},
};
use mesh::{
    bus::{self, Consumer, Delivery, Settlement},
    testing::at_once,
};
use proto::{Error, OrderId, error::Result, subjects};
use tokio::sync::watch;
use tonic::body::Body;
use tower::{Service, util::BoxCloneSyncService};

/// What an outcome says that nobody knows.
const LOST: &str = "switched off by a proof";

/// Where something can go wrong.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// An action or a compensation of this kind of saga.
    Deed(&'static str, &'static str),
    /// Behind the event that gave a saga of this kind this version.
    Event(String, i64),
    /// Before messages of this consumer are acknowledged. All lanes are one.
    Ack(String),
}

/// A [`Place`], met for this many times before.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Moment {
    pub place: Place,
    pub before: usize,
}

/// What goes wrong there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Once, the deed is not done, and nobody knows.
    Fail,
    /// Once, the deed is done, and nobody knows.
    Forget,
    /// From now on the deed is not done, and nobody knows, until [`Faults::lift`].
    FailOn,
    /// The deed is done twice.
    Repeat,
    /// The process stops before the deed, behind the event, before the acknowledgement, until [`Faults::wake`].
    Stop,
    /// The process stops behind the deed, whose outcome it has not recorded, until [`Faults::wake`].
    StopAfter,
}

impl Fault {
    /// What can go wrong at a place.
    pub fn at(place: &Place) -> &'static [Fault] {
        use Fault::*;
        match place {
            Place::Deed(..) => &[Fail, Forget, FailOn, Repeat, Stop, StopAfter],
            Place::Event(..) | Place::Ack(_) => &[Stop],
        }
    }
}

/// The faults of one coordinator. Cheap to clone; clones are the same coordinator's.
#[derive(Clone, Debug)]
pub struct Faults(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    state: Mutex<State>,
    stopped: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct State {
    wanted: Option<(Moment, Fault)>,
    counts: HashMap<Place, usize>,
    met: Vec<Moment>,
    struck: bool,
    blamed: Vec<String>,
    sent_back: bool,
}

impl Faults {
    /// Nothing goes wrong; what is met is noted.
    pub fn none() -> Self {
        Self::new(None)
    }

    /// One thing goes wrong, when it is met.
    pub fn arm(moment: Moment, fault: Fault) -> Self {
        Self::new(Some((moment, fault)))
    }

    fn new(wanted: Option<(Moment, Fault)>) -> Self {
        let state = Mutex::new(State { wanted, ..State::default() });
        Self(Arc::new(Inner { state, stopped: watch::Sender::new(false) }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap()
    }

    /// What was met, in order.
    pub fn met(&self) -> Vec<Moment> {
        self.state().met.clone()
    }

    /// Whether it has gone wrong.
    pub fn struck(&self) -> bool {
        self.state().struck
    }

    /// What sagas were left with because of it, and whether the funnel sent orders back that have no saga yet.
    pub fn blamed(&self) -> (Vec<String>, bool) {
        let state = self.state();
        (state.blamed.clone(), state.sent_back)
    }

    /// Whether a deed fails until [`Faults::lift`].
    pub fn goes_on(&self) -> bool {
        let state = self.state();
        state.struck && matches!(state.wanted, Some((_, Fault::FailOn)))
    }

    /// From now on nothing goes wrong.
    pub fn lift(&self) {
        self.state().wanted = None;
    }

    /// Resolves when the process has stopped.
    pub async fn stopped(&self) {
        // Its sender is in here.
        let _ = self.0.stopped.subscribe().wait_for(|stopped| *stopped).await;
    }

    pub fn has_stopped(&self) -> bool {
        *self.0.stopped.borrow()
    }

    /// The process goes on where it stood.
    pub fn wake(&self) {
        self.0.stopped.send_replace(false);
    }

    /// Returns when the process can do something.
    async fn able(&self) {
        let _ = self.0.stopped.subscribe().wait_for(|stopped| !*stopped).await;
    }

    async fn stop(&self) {
        self.0.stopped.send_replace(true);
        self.able().await;
    }

    /// Notes a place, and says what is to go wrong with it.
    fn meet(&self, place: Place) -> Option<Fault> {
        let mut guard = self.state();
        let state = &mut *guard;
        let count = state.counts.entry(place.clone()).or_default();
        let moment = Moment { place, before: *count };
        *count += 1;
        state.met.push(moment.clone());
        let (wanted, fault) = state.wanted.as_ref()?;
        let now = match fault {
            Fault::FailOn => wanted.place == moment.place && wanted.before <= moment.before,
            _ => *wanted == moment,
        };
        state.struck |= now;
        now.then_some(*fault)
    }

    /// Passes a place where a process can only stop.
    async fn pass(&self, place: Place) {
        self.able().await;
        if self.meet(place).is_some() {
            self.stop().await;
        }
    }

    /// Does a deed, or what is to go wrong with it. `Err` where its outcome is to be unknown.
    async fn around<Fut: Future>(&self, place: Place, deed: impl Fn() -> Fut) -> Result<Fut::Output> {
        self.able().await;
        let lost = || Error::dependency("a service", LOST);
        let fault = self.meet(place);
        match fault {
            Some(Fault::Fail | Fault::FailOn) => return Err(lost()),
            Some(Fault::Forget) => {
                deed().await;
                return Err(lost());
            }
            Some(Fault::Repeat) => drop(deed().await),
            Some(Fault::Stop) => self.stop().await,
            None | Some(Fault::StopAfter) => {}
        }
        let outcome = deed().await;
        if fault == Some(Fault::StopAfter) {
            self.stop().await;
        }
        Ok(outcome)
    }

    /// A plan with faults around all that it does.
    pub fn plan<S: Saga>(&self, plan: Plan<S>) -> Plan<S> {
        plan.around(|name, run| {
            let faults = self.clone();
            Arc::new(move |context, rows| {
                let (faults, run) = (faults.clone(), run.clone());
                Box::pin(async move {
                    let deed = || run(context.clone(), rows.clone());
                    match faults.around(Place::Deed(S::KIND, name), deed).await {
                        Ok(outcomes) => outcomes,
                        Err(error) => rows.iter().map(|_| Outcome::Unknown(error.clone())).collect(),
                    }
                })
            })
        })
    }

    /// A store with faults behind every event, for paused time.
    pub fn store(&self, behind: SharedStore) -> SharedStore {
        Arc::new(FaultyStore { faults: self.clone(), behind })
    }

    /// A consumer with faults before its acknowledgements.
    pub fn consumer(&self, name: &str, behind: Arc<dyn Consumer>) -> Arc<dyn Consumer> {
        let name = if subjects::lane_window(name).is_some() { "lane" } else { name };
        Arc::new(FaultyConsumer { faults: self.clone(), behind, name: name.to_owned() })
    }

    /// A service that a process does not reach while it stands still.
    pub fn server<S>(&self, server: S) -> BoxCloneSyncService<http::Request<Body>, http::Response<Body>, Infallible>
    where
        S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>
            + Clone
            + Send
            + Sync
            + 'static,
        S::Future: Send + 'static,
    {
        let faults = self.clone();
        BoxCloneSyncService::new(tower::service_fn(move |request| {
            let (faults, mut server) = (faults.clone(), server.clone());
            async move {
                faults.able().await;
                server.call(request).await
            }
        }))
    }
}

#[derive(Debug)]
struct FaultyStore {
    faults: Faults,
    behind: SharedStore,
}

/// One method.
macro_rules! stored {
    ($self:ident, $effect:expr) => {{
        $self.faults.able().await;
        at_once($effect)
    }};
}

#[async_trait]
impl Store for FaultyStore {
    async fn insert(&self, sagas: Vec<(Row, Entry)>) -> Result<()> {
        let events: Vec<Place> = sagas.iter().map(|(row, _)| Place::Event(row.kind.clone(), row.version)).collect();
        stored!(self, self.behind.insert(sagas))?;
        for event in events {
            self.faults.pass(event).await;
        }
        Ok(())
    }

    async fn load(&self, ids: &[OrderId]) -> Result<HashMap<OrderId, Row>> {
        stored!(self, self.behind.load(ids))
    }

    async fn change(&self, ids: Vec<OrderId>, decide: Decide) -> Result<Vec<Verdict>> {
        let verdicts = stored!(self, self.behind.change(ids, decide))?;
        for row in verdicts.iter().flatten() {
            self.faults.pass(Place::Event(row.kind.clone(), row.version)).await;
        }
        Ok(verdicts)
    }

    async fn advance(&self, moves: Vec<(Row, Entry)>) -> Result<bool> {
        let events: Vec<Place> = moves.iter().map(|(row, _)| Place::Event(row.kind.clone(), row.version)).collect();
        let advanced = stored!(self, self.behind.advance(moves))?;
        for event in events.into_iter().filter(|_| advanced) {
            self.faults.pass(event).await;
        }
        Ok(advanced)
    }

    async fn postpone(&self, postponed: Vec<Postponed>) -> Result<()> {
        let errors = postponed.iter().map(|later| later.last_error.clone());
        self.faults.state().blamed.extend(errors.filter(|error| error.contains(LOST)));
        stored!(self, self.behind.postpone(postponed))
    }

    async fn claim(&self, of: Which, now: i64, until: i64, limit: u64) -> Result<Vec<Row>> {
        stored!(self, self.behind.claim(of, now, until, limit))
    }

    async fn overdue(&self, of: Which, before: i64, limit: u64) -> Result<Vec<OrderId>> {
        stored!(self, self.behind.overdue(of, before, limit))
    }

    async fn log(&self, id: OrderId) -> Result<Vec<Entry>> {
        stored!(self, self.behind.log(id))
    }

    async fn list(&self, filter: &Filter, after: &str, limit: u64) -> Result<Vec<Row>> {
        stored!(self, self.behind.list(filter, after, limit))
    }

    async fn count_stuck(&self) -> Result<u64> {
        stored!(self, self.behind.count_stuck())
    }

    async fn retry(&self, id: OrderId, now: i64) -> Result<bool> {
        stored!(self, self.behind.retry(id, now))
    }

    async fn record_action(&self, action: Action) -> Result<()> {
        stored!(self, self.behind.record_action(action))
    }

    async fn actions(&self, before: Option<&str>, target: &str, limit: u64) -> Result<Vec<Action>> {
        stored!(self, self.behind.actions(before, target, limit))
    }
}

#[derive(Debug)]
struct FaultyConsumer {
    faults: Faults,
    behind: Arc<dyn Consumer>,
    name: String,
}

#[async_trait]
impl Consumer for FaultyConsumer {
    async fn fetch(&self, max: usize, wait: Duration) -> Result<Vec<Delivery>, bus::Error> {
        loop {
            self.faults.able().await;
            tokio::select! {
                biased;
                // Nothing is handed to a process that stands still.
                () = self.faults.stopped() => {}
                fetched = self.behind.fetch(max, wait) => return fetched,
            }
        }
    }

    async fn settle(&self, settlements: Vec<(Delivery, Settlement)>) -> Result<(), bus::Error> {
        let is = |wanted: fn(&Settlement) -> bool| settlements.iter().any(|(_, settlement)| wanted(settlement));
        if self.name == subjects::FUNNEL && is(|settlement| matches!(settlement, Settlement::Nak(_))) {
            self.faults.state().sent_back = true;
        }
        if is(|settlement| *settlement == Settlement::Ack) {
            self.faults.pass(Place::Ack(self.name.clone())).await;
        } else {
            self.faults.able().await;
        }
        self.behind.settle(settlements).await
    }
}
