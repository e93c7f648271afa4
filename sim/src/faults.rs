//! Chance and its record: what goes wrong at a port, and what the run did.
//!
//! Everything that a role does to the world goes through its [`Hands`]. They draw from the run's one source of chance
//! what becomes of a call, and note it. A role that has crashed has dead hands: whatever of it still moves reaches
//! nothing. One that is frozen goes on where it stood, later.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    future::Future,
    hash::{DefaultHasher, Hash, Hasher},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use mesh::testing::within_a_step;
use proto::OrderId;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use tokio::time::{Instant, sleep, sleep_until};

use crate::plan::Plan;

/// What a role reaches through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Port {
    Store,
    Permits,
    Bus,
    Link,
    Provider,
}

/// What can go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fault {
    /// No effect and no answer.
    Lost,
    /// No effect, and an error.
    FailedBefore,
    /// The effect, and an error.
    FailedAfter,
    /// Later.
    Delayed,
    /// Twice.
    Duplicated,
    /// In another order.
    Reordered,
}

/// What happens to whole parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Disaster {
    /// A role's memory and tasks are gone.
    Crash,
    /// A role stands still for a while, and goes on with what it knew.
    Freeze,
    /// All permits are gone.
    KvWiped,
    /// All permits are as they were a second ago.
    KvSetBack,
    /// The bus answers nobody.
    BusAway,
}

/// How often each fault happens at one port, in a thousand calls.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rates {
    pub lost: u32,
    pub failed_before: u32,
    pub failed_after: u32,
    pub delayed: u32,
    pub duplicated: u32,
    pub reordered: u32,
    /// The longest delay.
    pub longest: Duration,
}

/// What becomes of one call.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fate {
    pub before: Duration,
    pub after: Duration,
    pub fault: Option<Fault>,
    pub reordered: bool,
}

/// One thing that happened.
#[derive(Clone, Debug)]
pub struct Note {
    pub at: Duration,
    pub who: Arc<str>,
    pub what: String,
}

/// One run's chance and record.
pub struct Run {
    rates: BTreeMap<Port, Rates>,
    started: Instant,
    /// Whether nothing in the plan can lose permits.
    permits_are_safe: bool,
    /// Whether notes are kept, and not only counted.
    detailed: bool,
    calm: AtomicBool,
    bus_back_at: Mutex<Option<Instant>>,
    state: Mutex<State>,
}

struct State {
    rng: SmallRng,
    hash: DefaultHasher,
    notes: Vec<Note>,
    faults: BTreeMap<(Fault, Port), u64>,
    disasters: BTreeMap<Disaster, u64>,
    alarms: Vec<String>,
    refused: BTreeSet<OrderId>,
    /// When the last note was made: the time within a step.
    at: Duration,
}

impl fmt::Debug for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Run").field("rates", &self.rates).finish_non_exhaustive()
    }
}

impl Run {
    /// Draws from `seed`.
    pub fn new(seed: u64, plan: &Plan, detailed: bool) -> Self {
        let state = State {
            rng: SmallRng::seed_from_u64(seed),
            hash: DefaultHasher::new(),
            notes: Vec::new(),
            faults: BTreeMap::new(),
            disasters: BTreeMap::new(),
            alarms: Vec::new(),
            refused: BTreeSet::new(),
            at: Duration::ZERO,
        };
        Self {
            rates: plan.rates.clone(),
            permits_are_safe: plan.permits_are_safe(),
            started: Instant::now(),
            detailed,
            calm: AtomicBool::new(false),
            bus_back_at: Mutex::default(),
            state: Mutex::new(state),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From here on nothing goes wrong any more.
    pub fn calm(&self) {
        self.calm.store(true, Ordering::Relaxed);
        *self.bus_back_at.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Whether nothing in the plan can lose permits or leave too many: then the nets below the protocol catch nothing.
    pub fn permits_are_safe(&self) -> bool {
        self.permits_are_safe
    }

    pub fn is_calm(&self) -> bool {
        self.calm.load(Ordering::Relaxed)
    }

    /// The bus is away for so long.
    pub fn take_bus_away(&self, how_long: Duration) {
        *self.bus_back_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now() + how_long);
    }

    fn bus_is_away(&self) -> bool {
        self.bus_back_at.lock().unwrap_or_else(PoisonError::into_inner).is_some_and(|at| at > Instant::now())
    }

    /// A number below `bound`.
    pub fn below(&self, bound: usize) -> usize {
        self.state().rng.random_range(0..bound)
    }

    /// Something has happened that must never.
    pub fn alarm(&self, what: String) {
        self.note(&"alarm".into(), || what.clone());
        self.state().alarms.push(what);
    }

    /// Whether the ledger has not refused this order before.
    pub fn is_first_refusal(&self, order: &OrderId) -> bool {
        self.state().refused.insert(*order)
    }

    /// What has happened that must never.
    pub fn alarms(&self) -> Vec<String> {
        std::mem::take(&mut self.state().alarms)
    }

    /// Counts a disaster and notes it.
    pub fn disaster(&self, disaster: Disaster, whom: &Arc<str>) {
        *self.state().disasters.entry(disaster).or_default() += 1;
        self.note(whom, || format!("{disaster:?}"));
    }

    /// Notes what happened.
    pub fn note(&self, who: &Arc<str>, what: impl FnOnce() -> String) {
        let mut state = self.state();
        // Within a step it is the drivers' clock that runs, and the run's that stands still.
        let at = if within_a_step() { state.at } else { self.started.elapsed() };
        state.at = at;
        (at.as_millis(), who).hash(&mut state.hash);
        if self.detailed {
            let note = Note { at, who: who.clone(), what: what() };
            state.notes.push(note);
        }
    }

    fn draw(&self, port: Port) -> Fate {
        let mut fate = Fate::default();
        if self.is_calm() {
            return fate;
        }
        if port == Port::Bus && self.bus_is_away() {
            fate.fault = Some(Fault::FailedBefore);
            return fate;
        }
        let Some(rates) = self.rates.get(&port) else { return fate };
        let mut state = self.state();
        let State { rng, faults, .. } = &mut *state;
        let happens = |rate: u32, rng: &mut SmallRng| rate > 0 && rng.random_range(0..1000) < rate;
        let longest = rates.longest.as_millis().max(1) as u64;
        if happens(rates.delayed, rng) {
            // Most are short; some are longer than anybody waits.
            let pick = |rng: &mut SmallRng| match rng.random_range(0..4) {
                0 => rng.random_range(0..=longest),
                _ => rng.random_range(0..=longest / 20),
            };
            if rng.random() {
                fate.before = Duration::from_millis(pick(rng));
            } else {
                fate.after = Duration::from_millis(pick(rng));
            }
            *faults.entry((Fault::Delayed, port)).or_default() += 1;
        }
        if happens(rates.reordered, rng) {
            fate.reordered = true;
            *faults.entry((Fault::Reordered, port)).or_default() += 1;
        }
        let ways = [
            (Fault::Lost, rates.lost),
            (Fault::FailedBefore, rates.failed_before),
            (Fault::FailedAfter, rates.failed_after),
            (Fault::Duplicated, rates.duplicated),
        ];
        fate.fault = ways.into_iter().find(|(_, rate)| happens(*rate, rng)).map(|(fault, _)| fault);
        if let Some(fault) = fate.fault {
            *faults.entry((fault, port)).or_default() += 1;
        }
        fate
    }

    /// How often what went wrong.
    pub fn counts(&self) -> (BTreeMap<(Fault, Port), u64>, BTreeMap<Disaster, u64>) {
        let state = self.state();
        (state.faults.clone(), state.disasters.clone())
    }

    /// What happened, and a number that tells two runs apart.
    pub fn record(&self) -> (Vec<Note>, u64) {
        let mut state = self.state();
        (std::mem::take(&mut state.notes), state.hash.finish())
    }
}

/// One life of one role, or of somebody outside. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Hands(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    run: Arc<Run>,
    who: Arc<str>,
    dead: AtomicBool,
    thaws_at: Mutex<Option<Instant>>,
}

impl Hands {
    pub fn new(run: Arc<Run>, who: impl Into<Arc<str>>) -> Self {
        Self(Arc::new(Inner { run, who: who.into(), dead: AtomicBool::new(false), thaws_at: Mutex::default() }))
    }

    pub fn run(&self) -> &Arc<Run> {
        &self.0.run
    }

    pub fn who(&self) -> &Arc<str> {
        &self.0.who
    }

    /// Whatever they had begun stays as it is.
    pub fn die(&self) {
        self.0.dead.store(true, Ordering::Relaxed);
    }

    pub fn freeze(&self, how_long: Duration) {
        *self.0.thaws_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now() + how_long);
    }

    pub fn thaw(&self) {
        *self.0.thaws_at.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub fn is_dead(&self) -> bool {
        self.0.dead.load(Ordering::Relaxed)
    }

    /// Returns when they can do something: for the dead, never.
    pub async fn able(&self) {
        loop {
            if self.is_dead() {
                std::future::pending::<()>().await;
            }
            let thaws_at = *self.0.thaws_at.lock().unwrap_or_else(PoisonError::into_inner);
            match thaws_at.filter(|at| *at > Instant::now()) {
                Some(at) => sleep_until(at.min(Instant::now() + Duration::from_millis(100))).await,
                None => return,
            }
        }
    }

    pub async fn pause(&self, how_long: Duration) {
        if !how_long.is_zero() {
            sleep(how_long).await;
            self.able().await;
        }
    }

    pub fn draw(&self, port: Port) -> Fate {
        self.0.run.draw(port)
    }

    pub fn note(&self, what: impl FnOnce() -> String) {
        self.0.run.note(&self.0.who, what);
    }

    /// A call of a port whose `effect` is one indivisible step. `broken` makes the error of one that failed.
    pub async fn call<T: fmt::Debug, E: fmt::Debug>(
        &self,
        port: Port,
        operation: &'static str,
        asked: impl FnOnce() -> String,
        effect: impl Future<Output = Result<T, E>>,
        broken: impl FnOnce(&'static str) -> E,
    ) -> Result<T, E> {
        let may_wait = !within_a_step();
        if may_wait {
            self.able().await;
        }
        let fate = self.draw(port);
        if may_wait {
            self.pause(fate.before).await;
        }
        if let Some(fault @ (Fault::Lost | Fault::FailedBefore)) = fate.fault {
            self.note(|| format!("{operation} {}: {fault:?}", asked()));
            return Err(broken("simulated: it did not happen"));
        }
        let result = effect.await;
        self.note(|| {
            let fault = fate.fault.map(|fault| format!(" but {fault:?}")).unwrap_or_default();
            format!("{operation} {} = {result:?}{fault}", asked())
        });
        if may_wait {
            self.pause(fate.after).await;
        }
        match fate.fault {
            Some(Fault::FailedAfter) => Err(broken("simulated: it happened, and this is no answer")),
            _ => result,
        }
    }
}
