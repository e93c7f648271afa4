//! The executor: records transitions, runs the work of states, and takes up what was left.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use mesh::clock::Clock;
use proto::{Error, OrderId, error::Result};
use tokio::{sync::Semaphore, time::Instant};

use super::{
    Named, Saga, Work,
    plan::{Deed, Outcome, Plan, Retry},
    recovery,
};
use crate::{
    calls::is_fault,
    store::{Entry, Patch, Postponed, Row, SharedStore, Verdict, Which},
};

/// A saga does no more than this many states' work in one go; a plan that goes round in circles is left to recovery,
/// whose backoff slows it down.
const MAX_ROUNDS: usize = 8;

/// How much at once, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// For how long who executes a saga may count on being alone. The work of one state ends a fifth before.
    pub lease: Duration,
    /// Batches going forward at once.
    pub forward: usize,
    /// Batches of compensations at once. Their own: new orders cannot take it.
    pub compensations: usize,
    /// Sagas that recovery takes up at once.
    pub recovery_batch: u64,
}

/// Something happened to a saga.
#[derive(Clone, Debug)]
pub struct Change<S: Saga> {
    /// To which.
    pub saga_id: OrderId,
    /// What.
    pub event: S::Event,
    /// What else is known.
    pub patch: Patch,
    /// When it does not count.
    pub guard: Guard,
    /// As whoever changes it has just seen it: it is read again only where that is not so any more.
    pub seen: Option<Row>,
}

/// What must still be so for a change to count, beyond being legal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Guard {
    /// Nothing.
    None,
    /// The saga has made no transition since.
    Version(i64),
    /// The same, and it is stuck still.
    Stuck(i64),
    /// It is about the same attempt to pay.
    Payment(OrderId),
    /// Its deadline is not after this time.
    Due(i64),
}

impl Guard {
    /// Whether it is still so.
    pub fn holds(self, row: &Row) -> bool {
        match self {
            Guard::None => true,
            Guard::Version(version) => row.version == version,
            Guard::Stuck(version) => row.version == version && row.stuck,
            Guard::Payment(payment) => row.payment_id == Some(payment),
            Guard::Due(now) => row.expire_at <= now,
        }
    }
}

/// Which way a saga's work goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Actions.
    Forward,
    /// Compensations.
    Backward,
}

/// Drives all sagas of one kind.
pub struct Engine<S: Saga> {
    plan: Plan<S>,
    context: Arc<S::Context>,
    store: SharedStore,
    clock: Clock,
    limits: Limits,
    forward: Semaphore,
    backward: Semaphore,
    running: Running,
}

impl<S: Saga> std::fmt::Debug for Engine<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("kind", &S::KIND).field("plan", &self.plan).finish_non_exhaustive()
    }
}

impl<S: Saga> Engine<S> {
    /// An engine for a plan.
    pub fn new(plan: Plan<S>, context: Arc<S::Context>, store: SharedStore, clock: Clock, limits: Limits) -> Self {
        Self {
            plan,
            context,
            store,
            clock,
            limits,
            forward: Semaphore::new(limits.forward.max(1)),
            backward: Semaphore::new(limits.compensations.max(1)),
            running: Running::default(),
        }
    }

    /// The plan.
    pub fn plan(&self) -> &Plan<S> {
        &self.plan
    }

    /// What the steps work with.
    pub fn context(&self) -> &Arc<S::Context> {
        &self.context
    }

    /// Makes a row that is not stored yet take an event: for sagas whose first steps run before they are written.
    /// Answers the row and its log entry.
    pub fn take(&self, row: &Row, event: S::Event, patch: &Patch) -> Option<(Row, Entry)> {
        taken::<S>(row, event, patch, self.clock.now_ms(), self.limits.lease)
    }

    /// Records changes: one verdict each, in order. Concurrent callers may be batched by the caller.
    pub async fn apply(&self, changes: Vec<Change<S>>) -> Result<Vec<Verdict>> {
        let mut verdicts: Vec<Option<Verdict>> = vec![None; changes.len()];
        let (guessed, moves): (Vec<usize>, Vec<(Row, Entry)>) = self.guess(&changes).into_iter().unzip();
        if !moves.is_empty() && self.store.advance(moves.clone()).await? {
            count::<S>(moves.iter().map(|(row, entry)| (entry.from.as_str(), row.state.as_str())));
            for (place, (row, _)) in guessed.into_iter().zip(moves) {
                verdicts[place] = Some(Ok(row));
            }
        }
        let (left, changes): (Vec<usize>, Vec<Change<S>>) =
            changes.into_iter().enumerate().filter(|(place, _)| verdicts[*place].is_none()).unzip();
        for (place, verdict) in left.into_iter().zip(self.read_and_apply(changes).await?) {
            verdicts[place] = Some(verdict);
        }
        Ok(verdicts.into_iter().flatten().collect())
    }

    /// What becomes of sagas that are as they were seen, by place. One that comes twice is guessed once, and read then.
    fn guess(&self, changes: &[Change<S>]) -> Vec<(usize, (Row, Entry))> {
        let (now, lease) = (self.clock.now_ms(), self.limits.lease);
        let mut ids = HashSet::with_capacity(changes.len());
        let guess = |change: &Change<S>| {
            // Whether a saga is stuck is no transition, so that its version does not tell.
            let seen = change.seen.as_ref().filter(|_| !matches!(change.guard, Guard::Stuck(_)))?;
            change.guard.holds(seen).then(|| taken::<S>(seen, change.event, &change.patch, now, lease)).flatten()
        };
        changes
            .iter()
            .enumerate()
            .filter_map(|(place, change)| Some((place, guess(change)?)))
            .filter(|(_, (row, _))| ids.insert(row.saga_id))
            .collect()
    }

    async fn read_and_apply(&self, changes: Vec<Change<S>>) -> Result<Vec<Verdict>> {
        let (now, lease) = (self.clock.now_ms(), self.limits.lease);
        let ids: Vec<OrderId> = changes.iter().map(|c| c.saga_id).collect();
        // Written again when the transaction begins again; read once it is through.
        let left = Arc::new(Mutex::new(vec![String::new(); ids.len()]));
        let leaving = left.clone();
        let decide = move |index: usize, row: &Row| {
            let change = &changes[index];
            let (row, entry) =
                change.guard.holds(row).then(|| taken::<S>(row, change.event, &change.patch, now, lease)).flatten()?;
            leaving.lock().unwrap_or_else(PoisonError::into_inner)[index].clone_from(&entry.from);
            Some((row, entry))
        };
        let verdicts = self.store.change(ids, Arc::new(decide)).await?;
        let left = left.lock().unwrap_or_else(PoisonError::into_inner);
        let moves = left.iter().zip(&verdicts).filter_map(|(from, v)| Some((from.as_str(), v.as_ref().ok()?)));
        count::<S>(moves.map(|(from, row)| (from, row.state.as_str())));
        Ok(verdicts)
    }

    /// Does what is to be done for these sagas until they rest, or until their work does not come to an end. Answers
    /// them as they are then, in order. Dropping it leaves them to recovery.
    pub async fn drive(&self, rows: Vec<Row>) -> Vec<Row> {
        let _running = self.running.mark(&rows);
        let order: Vec<OrderId> = rows.iter().map(|row| row.saga_id).collect();
        let mut all: HashMap<OrderId, Row> = HashMap::with_capacity(rows.len());
        // Two callers may bring the same saga: its work is done once.
        let mut active: Vec<Row> =
            BTreeMap::from_iter(rows.into_iter().map(|row| (row.saga_id, row))).into_values().collect();
        for _ in 0..MAX_ROUNDS {
            let mut states: BTreeMap<S::State, Vec<Row>> = BTreeMap::new();
            for row in active.drain(..) {
                match S::State::parse(&row.state) {
                    Some(state) if S::work(state) != Work::Rest && row.next_attempt_at.is_some() => {
                        states.entry(state).or_default().push(row);
                    }
                    _ => drop(all.insert(row.saga_id, row)),
                }
            }
            let work = states.into_iter().map(|(state, rows)| self.work(state, rows));
            for (moved, row) in futures::future::join_all(work).await.into_iter().flatten() {
                if moved {
                    active.push(row);
                } else {
                    all.insert(row.saga_id, row);
                }
            }
            if active.is_empty() {
                break;
            }
        }
        all.extend(active.into_iter().map(|row| (row.saga_id, row)));
        order.iter().filter_map(|id| all.get(id).cloned()).collect()
    }

    /// Takes up what was left: due, and leased by nobody. One direction at a time, so that each has its own loop.
    pub async fn recover(&self, direction: Direction) -> Result<()> {
        let states = S::State::ALL
            .iter()
            .filter(|state| match S::work(**state) {
                Work::Rest => false,
                Work::Forward { .. } => direction == Direction::Forward,
                Work::Compensate { .. } => direction == Direction::Backward,
            })
            .map(|state| state.name());
        let of = Which { kind: S::KIND, states: states.collect() };
        loop {
            let now = self.clock.now_ms();
            let until = now + self.limits.lease.as_millis() as i64;
            let due = self.store.claim(of.clone(), now, until, self.limits.recovery_batch).await?;
            let claimed = due.len() as u64;
            let decisions = recovery::decide::<S>(due, |id| self.running.contains(id));
            for (row, why) in &decisions.left {
                tracing::debug!(saga = %row.saga_id, state = row.state, ?why, "recovery leaves a saga");
            }
            let taken: usize = decisions.run.values().map(Vec::len).sum();
            if taken > 0 {
                tracing::debug!(kind = S::KIND, taken, "recovery takes up sagas");
                metrics::counter!("seckill_saga_recovered_total", "saga" => S::KIND).increment(taken as u64);
            }
            futures::future::join_all(decisions.run.into_values().map(|rows| self.drive(rows))).await;
            if claimed < self.limits.recovery_batch {
                return Ok(());
            }
        }
    }

    /// The work of one state for the sagas in it. Answers each saga, and whether it made a transition.
    async fn work(&self, state: S::State, rows: Vec<Row>) -> Vec<(bool, Row)> {
        let (deeds, done, capacity): (Vec<&Deed<S>>, _, _) = match S::work(state) {
            Work::Rest => return rows.into_iter().map(|row| (false, row)).collect(),
            Work::Forward { steps, done } => {
                (steps.iter().map(|name| self.plan.action(name)).collect(), done, &self.forward)
            }
            Work::Compensate { done } => (self.plan.compensations().collect(), Some(done), &self.backward),
        };
        // Never closed.
        let _permit = capacity.acquire().await;
        // Another may take the saga up once the lease is over. Whoever worked for longer could not even note that it
        // failed: the turn would not be its own any more, attempts would not be counted, and nobody would ever be told.
        let until = Instant::now() + self.limits.lease / 5 * 4;
        let mut left: Vec<(Row, Patch)> = rows.into_iter().map(|row| (row, Patch::default())).collect();
        let mut changes = Vec::new();
        let mut failed = Vec::new();
        for deed in deeds {
            if left.is_empty() {
                break;
            }
            let before: Vec<Row> = left.iter().map(|(row, _)| row.clone()).collect();
            let outcomes = deed.run_until(until, &self.context, &before).await;
            let mut going = Vec::with_capacity(left.len());
            for ((mut row, mut patch), outcome) in left.into_iter().zip(outcomes) {
                match outcome {
                    Outcome::Done(found) => {
                        found.write(&mut row);
                        patch.merge(found);
                        going.push((row, patch));
                    }
                    Outcome::Refused(event, found) => {
                        patch.merge(found);
                        changes.push((row, event, patch));
                    }
                    Outcome::InProgress => failed.push((row, deed.retry, deed.name, None)),
                    Outcome::Unknown(error) => failed.push((row, deed.retry, deed.name, Some(error))),
                }
            }
            left = going;
        }
        let mut results: Vec<(bool, Row)> = Vec::new();
        match done {
            Some(event) => changes.extend(left.into_iter().map(|(row, patch)| (row, event, patch))),
            None => {
                self.rest(left.iter().map(|(row, _)| row)).await;
                // They made no transition, and are answered all the same: one row out for every row in.
                results.extend(left.into_iter().map(|(row, _)| (false, Row { next_attempt_at: None, ..row })));
            }
        }
        results.extend(self.postpone(failed).await.into_iter().map(|row| (false, row)));
        results.extend(self.settle(changes).await);
        results
    }

    /// Records the events that the work came to. Whoever was faster counts: a saga that has moved on since is answered
    /// as it is.
    async fn settle(&self, changes: Vec<(Row, S::Event, Patch)>) -> Vec<(bool, Row)> {
        if changes.is_empty() {
            return Vec::new();
        }
        let (rows, changes): (Vec<Row>, Vec<Change<S>>) = changes
            .into_iter()
            .map(|(row, event, patch)| {
                let guard = Guard::Version(row.version);
                let change = Change { saga_id: row.saga_id, event, patch, guard, seen: Some(row.clone()) };
                (row, change)
            })
            .unzip();
        match self.apply(changes).await {
            Ok(verdicts) => rows
                .into_iter()
                .zip(verdicts)
                .map(|(row, verdict)| match verdict {
                    Ok(row) => (true, row),
                    Err(rejected) => (false, rejected.current.unwrap_or(row)),
                })
                .collect(),
            Err(error) => {
                // The lease runs out and recovery repeats the work, which is idempotent.
                tracing::warn!(kind = S::KIND, %error, "outcomes could not be recorded");
                rows.into_iter().map(|row| (false, row)).collect()
            }
        }
    }

    async fn rest(&self, rows: impl Iterator<Item = &Row>) {
        let resting = rows
            .map(|row| Postponed {
                saga_id: row.saga_id,
                turn: row.turn(),
                attempts: 0,
                next_attempt_at: None,
                stuck: false,
                last_error: String::new(),
            })
            .collect();
        if let Err(error) = self.store.postpone(resting).await {
            tracing::warn!(kind = S::KIND, %error, "finished work could not be noted, it will be repeated");
        }
    }

    async fn postpone(&self, failed: Vec<(Row, Retry, &'static str, Option<Error>)>) -> Vec<Row> {
        if failed.is_empty() {
            return Vec::new();
        }
        let now = self.clock.now_ms();
        let mut rows = Vec::with_capacity(failed.len());
        let mut postponed = Vec::with_capacity(failed.len());
        for (mut row, retry, step, error) in failed {
            let what = match &error {
                None => format!("{step}: in progress"),
                Some(error) => format!("{step}: {error}"),
            };
            // What time may mend is tried on, also when it was reported: nobody needs to tell a thousand sagas one by one
            // that a database is back. A "no" without a meaning stays one, and waits for an operator.
            let retry = if error.as_ref().is_none_or(is_fault) { retry.for_ever() } else { retry };
            let later = recovery::postpone(&row, &retry, what, now);
            if later.stuck && !row.stuck {
                tracing::error!(kind = S::KIND, saga = %row.saga_id, state = row.state, step, last_error = later.last_error, "a saga is stuck");
            } else if error.is_some() {
                tracing::debug!(kind = S::KIND, saga = %row.saga_id, step, last_error = later.last_error, "a step is tried again later");
            }
            metrics::counter!("seckill_saga_retries_total", "saga" => S::KIND, "step" => step).increment(1);
            row.attempts = later.attempts;
            row.stuck = later.stuck;
            row.next_attempt_at = later.next_attempt_at;
            row.last_error.clone_from(&later.last_error);
            rows.push(row);
            postponed.push(later);
        }
        if let Err(error) = self.store.postpone(postponed).await {
            tracing::warn!(kind = S::KIND, %error, "a later attempt could not be noted, the lease decides");
        }
        rows
    }
}

/// The row after an event, and the log's entry; `None` when the event is not legal. Pure: every transition of every
/// saga is this function's.
pub fn taken<S: Saga>(row: &Row, event: S::Event, patch: &Patch, now: i64, lease: Duration) -> Option<(Row, Entry)> {
    let from = S::State::parse(&row.state)?;
    let to = S::next(from, event).ok()?;
    let mut next = row.clone();
    patch.write(&mut next);
    next.state = to.name().to_owned();
    next.version += 1;
    next.stuck = false;
    next.attempts = 0;
    next.last_error.clear();
    // Whoever makes the transition goes on at once; recovery takes over when the lease runs out.
    next.next_attempt_at = (S::work(to) != Work::Rest).then(|| now.saturating_add(lease.as_millis() as i64));
    next.update_at = now;
    S::enter(to, &mut next, now);
    let entry = Entry {
        version: next.version,
        event: event.name().to_owned(),
        from: from.name().to_owned(),
        to: to.name().to_owned(),
        detail: patch.detail.clone().unwrap_or_default(),
        at: now,
    };
    Some((next, entry))
}

/// Counts transitions by kind and states.
pub(crate) fn count<'a, S: Saga>(moves: impl Iterator<Item = (&'a str, &'a str)>) {
    let mut counts: HashMap<(&str, &str), u64> = HashMap::new();
    for way in moves {
        *counts.entry(way).or_default() += 1;
    }
    for ((from, to), count) in counts {
        let (from, to) = (from.to_owned(), to.to_owned());
        metrics::counter!("seckill_saga_transitions_total", "saga" => S::KIND, "from" => from, "to" => to)
            .increment(count);
    }
}

/// The sagas that this process works on right now, each as often as somebody does.
#[derive(Debug, Default)]
struct Running(Mutex<HashMap<OrderId, usize>>);

impl Running {
    /// Until the mark is dropped.
    fn mark(&self, rows: &[Row]) -> Mark<'_> {
        let ids: Vec<OrderId> = rows.iter().map(|row| row.saga_id).collect();
        let mut counts = self.counts();
        for id in &ids {
            *counts.entry(*id).or_default() += 1;
        }
        Mark { running: self, ids }
    }

    fn contains(&self, id: OrderId) -> bool {
        self.counts().contains_key(&id)
    }

    fn counts(&self) -> MutexGuard<'_, HashMap<OrderId, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Marks sagas as being worked on.
struct Mark<'r> {
    running: &'r Running,
    ids: Vec<OrderId>,
}

impl Drop for Mark<'_> {
    fn drop(&mut self) {
        let mut counts = self.running.counts();
        for id in &self.ids {
            if let Some(count) = counts.get_mut(id) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(id);
                }
            }
        }
    }
}
