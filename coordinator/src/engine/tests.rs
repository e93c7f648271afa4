//! The engine on its own, with a saga whose steps do what a script says.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use mesh::{
    clock::Clock,
    testing::{TestDatabase, eventually},
};
use proto::{BuyerId, Error, OrderId, RequestId};
use tokio::time::Instant;

use super::{
    BrokenLog, IllegalTransition, Saga, Work, named,
    plan::{Outcome, Outcomes, Plan, Policy, Retry},
    recovery::{self, Left},
    replay,
    runner::{Change, Direction, Engine, Guard, Limits},
};
use crate::store::{Patch, Row, SharedStore, Verdict, sql::SqlStore, tests::new_row};

/// Quick, and soon stuck.
pub(crate) const POLICY: Policy = Policy {
    retry: Retry { base: Duration::from_millis(100), cap: Duration::from_secs(1), attempts: 3, goes_on: false },
    timeout: Duration::from_secs(5),
};

const HOUR: Duration = Duration::from_secs(3600);

const LIMITS: Limits =
    Limits { lease: Duration::from_millis(1_000), forward: 4, compensations: 2, recovery_batch: 100 };

named! {
    pub enum State {
        Start = "START",
        Building = "BUILDING",
        Decided = "DECIDED",
        Undoing = "UNDOING",
        Done = "DONE",
        Undone = "UNDONE",
    }
}

named! {
    pub enum Event {
        Begun = "BEGUN",
        Decided = "DECIDED",
        Refused = "REFUSED",
        Finished = "FINISHED",
        Undone = "UNDONE",
    }
}

#[derive(Clone, Copy, Debug)]
struct Demo;

impl Saga for Demo {
    const KIND: &'static str = "demo";
    const START: State = State::Start;
    type State = State;
    type Event = Event;
    type Context = Script;

    fn next(state: State, event: Event) -> Result<State, IllegalTransition> {
        Ok(match (state, event) {
            (State::Start, Event::Begun) => State::Building,
            (State::Building, Event::Decided) => State::Decided,
            (State::Building, Event::Refused) => State::Undoing,
            (State::Undoing, Event::Undone) => State::Undone,
            (State::Decided, Event::Finished) => State::Done,
            _ => return Err(IllegalTransition::new(state, event)),
        })
    }

    fn work(state: State) -> Work<Event> {
        match state {
            State::Building => Work::Forward { steps: &["first", "second", "pivot"], done: Some(Event::Decided) },
            State::Decided => Work::Forward { steps: &["last"], done: Some(Event::Finished) },
            State::Undoing => Work::Compensate { done: Event::Undone },
            State::Start | State::Done | State::Undone => Work::Rest,
        }
    }

    fn enter(_: State, _: &mut Row, _: i64) {}
}

/// What steps answer, and which were called.
#[derive(Debug, Default)]
struct Script {
    answers: Mutex<HashMap<&'static str, VecDeque<Outcome<Event>>>>,
    called: Mutex<Vec<&'static str>>,
    /// While somebody has it, steps that were called wait.
    hold: tokio::sync::RwLock<()>,
}

impl Script {
    fn say(&self, step: &'static str, answers: impl IntoIterator<Item = Outcome<Event>>) {
        self.answers.lock().unwrap().entry(step).or_default().extend(answers);
    }

    /// What was called since it was last asked.
    fn called(&self) -> Vec<&'static str> {
        std::mem::take(&mut self.called.lock().unwrap())
    }

    fn run(&self, step: &'static str, rows: &[Row]) -> Outcomes<Demo> {
        self.called.lock().unwrap().push(step);
        let mut answers = self.answers.lock().unwrap();
        let mut answer =
            || answers.get_mut(step).and_then(VecDeque::pop_front).unwrap_or(Outcome::Done(Patch::default()));
        rows.iter().map(|_| answer()).collect()
    }
}

fn demo_plan() -> Plan<Demo> {
    async fn run(step: &'static str, script: Arc<Script>, rows: Vec<Row>) -> Outcomes<Demo> {
        let outcomes = script.run(step, &rows);
        let _go_on = script.hold.read().await;
        outcomes
    }
    Plan::builder(POLICY)
        .step("first")
        .action(|s, r| run("first", s, r))
        .compensation("undo first", |s, r| run("undo first", s, r))
        .step("second")
        .action(|s, r| run("second", s, r))
        .compensation("undo second", |s, r| run("undo second", s, r))
        .pivot("pivot")
        .action(|s, r| run("pivot", s, r))
        .forward("last")
        .action(|s, r| run("last", s, r))
        .build()
}

struct World {
    engine: Arc<Engine<Demo>>,
    script: Arc<Script>,
    store: SharedStore,
    now: Arc<AtomicI64>,
    _db: TestDatabase,
}

impl World {
    async fn new() -> Self {
        let db = mesh::testing::sqlite().await;
        migrations::up(migrations::Service::Coordinator, &db.connection).await.unwrap();
        let store: SharedStore = Arc::new(SqlStore::new(db.connection.clone()));
        let (clock, now) = Clock::manual(1_000_000);
        let script = Arc::new(Script::default());
        let engine = Arc::new(Engine::new(demo_plan(), script.clone(), store.clone(), clock, LIMITS));
        Self { engine, script, store, now, _db: db }
    }

    /// A saga that has just begun, stored.
    async fn begin(&self) -> Row {
        let buyer = BuyerId::parse("alice").unwrap();
        let id = OrderId::derive(&buyer, &RequestId::random());
        let row = Row { state: "START".to_owned(), version: 0, kind: "demo".to_owned(), ..new_row(id) };
        let (row, entry) = self.engine.take(&row, Event::Begun, &Patch::default()).unwrap();
        self.store.insert(vec![(row.clone(), entry)]).await.unwrap();
        row
    }

    async fn drive(&self, row: Row) -> Row {
        self.engine.drive(vec![row]).await.pop().unwrap()
    }

    async fn stored(&self, row: &Row) -> Row {
        self.store.load(&[row.saga_id]).await.unwrap().remove(&row.saga_id).unwrap()
    }

    async fn recover(&self) {
        self.engine.recover(Direction::Forward).await.unwrap();
        self.engine.recover(Direction::Backward).await.unwrap();
    }

    fn pass(&self, ms: i64) {
        self.now.fetch_add(ms, Ordering::SeqCst);
    }
}

fn unknown() -> Outcome<Event> {
    Outcome::Unknown(Error::dependency("it", "no answer"))
}

/// A "no" that means nothing to its step.
fn unexpected() -> Outcome<Event> {
    Outcome::Unknown(Error::not_found("record"))
}

fn refused() -> Outcome<Event> {
    Outcome::Refused(Event::Refused, Patch::default())
}

#[tokio::test]
async fn steps_run_in_order_to_the_end_and_the_log_replays() {
    let world = World::new().await;
    let row = world.begin().await;
    let after = world.drive(row).await;
    assert_eq!((after.state.as_str(), after.version, after.next_attempt_at), ("DONE", 3, None));
    assert_eq!(world.script.called(), ["first", "second", "pivot", "last"]);
    assert_eq!(world.stored(&after).await, after);
    let log = world.store.log(after.saga_id).await.unwrap();
    assert_eq!(replay::<Demo>(&log), Ok(State::Done));
    assert_eq!(
        replay::<Demo>(&log[1..]),
        Err(BrokenLog::Illegal(IllegalTransition::new(State::Start, Event::Decided)))
    );
}

#[tokio::test]
async fn a_refusal_undoes_what_stands_before_the_pivot_last_step_first() {
    let world = World::new().await;
    world.script.say("pivot", [refused()]);
    let after = world.drive(world.begin().await).await;
    assert_eq!(after.state, "UNDONE");
    assert_eq!(world.script.called(), ["first", "second", "pivot", "undo second", "undo first"]);
}

#[tokio::test]
async fn an_unknown_outcome_is_asked_again_and_nothing_is_undone() {
    let world = World::new().await;
    world.script.say("second", [unknown(), Outcome::InProgress]);
    let after = world.drive(world.begin().await).await;
    assert_eq!((after.state.as_str(), after.attempts, after.stuck), ("BUILDING", 1, false));
    assert_eq!(after.next_attempt_at, Some(1_000_100));
    assert!(after.last_error.contains("no answer"), "{}", after.last_error);
    assert_eq!(world.script.called(), ["first", "second"]);
    world.recover().await;
    assert_eq!(world.script.called(), [""; 0], "not before its time");
    world.pass(100);
    world.recover().await;
    assert_eq!(world.stored(&after).await.attempts, 2);
    world.pass(200);
    world.recover().await;
    assert_eq!(world.stored(&after).await.state, "DONE");
}

#[tokio::test]
async fn a_step_that_uses_up_its_attempts_is_stuck_until_an_operator_helps() {
    let world = World::new().await;
    world.script.say("last", [unexpected(), unexpected(), unexpected()]);
    let row = world.drive(world.begin().await).await;
    for _ in 0..5 {
        world.pass(10_000);
        world.recover().await;
    }
    let stuck = world.stored(&row).await;
    assert_eq!((stuck.state.as_str(), stuck.stuck, stuck.next_attempt_at), ("DECIDED", true, None));
    assert_eq!(world.store.count_stuck().await.unwrap(), 1);
    assert!(world.store.retry(row.saga_id, world.now.load(Ordering::SeqCst)).await.unwrap());
    assert!(!world.store.retry(row.saga_id, 0).await.unwrap(), "not stuck any more");
    // Whoever would give up on what another has just put back to work.
    let guard = Guard::Stuck(stuck.version);
    let late = Change { saga_id: row.saga_id, event: Event::Finished, patch: Patch::default(), guard, seen: None };
    assert!(world.engine.apply(vec![late]).await.unwrap()[0].is_err());
    world.recover().await;
    assert_eq!(world.stored(&row).await.state, "DONE");
}

#[tokio::test]
async fn what_may_pass_by_itself_is_reported_stuck_and_goes_on() {
    for answer in [unknown(), Outcome::InProgress] {
        let world = World::new().await;
        world.script.say("last", vec![answer; 5]);
        let row = world.drive(world.begin().await).await;
        for _ in 0..4 {
            world.pass(10_000);
            world.recover().await;
        }
        let stuck = world.stored(&row).await;
        assert!(stuck.stuck && stuck.last_error.starts_with("last: "), "{stuck:?}");
        world.pass(10_000);
        world.recover().await;
        let done = world.stored(&row).await;
        assert_eq!((done.state.as_str(), done.stuck), ("DONE", false));
    }
}

#[tokio::test]
async fn a_compensation_is_reported_stuck_and_goes_on() {
    let world = World::new().await;
    world.script.say("pivot", [refused()]);
    world.script.say("undo first", (0..5).map(|_| unexpected()));
    let row = world.drive(world.begin().await).await;
    for _ in 0..4 {
        world.pass(10_000);
        world.recover().await;
    }
    let stuck = world.stored(&row).await;
    assert!(stuck.stuck && stuck.next_attempt_at.is_some(), "{stuck:?}");
    world.pass(10_000);
    world.recover().await;
    let undone = world.stored(&row).await;
    assert_eq!((undone.state.as_str(), undone.stuck), ("UNDONE", false));
}

#[tokio::test]
async fn what_a_dead_engine_left_is_taken_up_when_its_lease_is_over() {
    let world = World::new().await;
    let row = world.begin().await;
    world.recover().await;
    assert_eq!(world.script.called(), [""; 0], "somebody holds the lease");
    world.pass(1_001);
    world.recover().await;
    assert_eq!(world.stored(&row).await.state, "DONE");
}

#[tokio::test]
async fn a_saga_is_left_alone_until_the_last_who_works_on_it_is_done() {
    let world = World::new().await;
    let row = world.begin().await;
    let hold = world.script.hold.write().await;
    let drives = [(); 2].map(|()| {
        let (engine, row) = (world.engine.clone(), row.clone());
        tokio::spawn(async move { engine.drive(vec![row]).await })
    });
    eventually("both are at it", async || (world.script.called.lock().unwrap().len() == 2).then_some(())).await;
    let [first, second] = drives;
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    world.pass(1_001);
    // It would wait for the step as well.
    tokio::time::timeout(Duration::from_secs(5), world.recover()).await.expect("nothing is taken up");
    drop(hold);
    assert_eq!(second.await.unwrap()[0].state, "DONE");
    assert_eq!(world.script.called(), ["first", "first", "second", "pivot", "last"]);
}

/// Or nobody would hear of a step that always takes longer than a lease.
#[tokio::test]
async fn whoever_cannot_finish_within_its_lease_says_so_while_the_turn_is_its_own() {
    let mut world = World::new().await;
    let limits = Limits { lease: Duration::from_millis(50), ..LIMITS };
    let (clock, _) = Clock::manual(1_000_000);
    world.engine = Arc::new(Engine::new(demo_plan(), world.script.clone(), world.store.clone(), clock, limits));
    let row = world.begin().await;
    let _hold = world.script.hold.write().await;
    let after = world.drive(row).await;
    let stored = world.stored(&after).await;
    assert_eq!((stored.attempts, stored.next_attempt_at), (1, Some(1_000_100)));
    assert!(stored.last_error.contains("first took over"), "{}", stored.last_error);
}

#[tokio::test]
async fn an_outcome_that_comes_too_late_changes_nothing() {
    let world = World::new().await;
    let row = world.begin().await;
    let change = |event, guard| Change { saga_id: row.saga_id, event, patch: Patch::default(), guard, seen: None };
    let verdicts = world
        .engine
        .apply(vec![
            change(Event::Refused, Guard::Version(1)),
            change(Event::Decided, Guard::Version(1)),
            change(Event::Undone, Guard::None),
            change(Event::Finished, Guard::None),
        ])
        .await
        .unwrap();
    let states: Vec<_> = verdicts
        .iter()
        .map(|v| v.as_ref().map(|row| row.state.clone()).map_err(|r| r.current.clone().unwrap().state))
        .collect();
    let expected = [Ok("UNDOING"), Err("UNDOING"), Ok("UNDONE"), Err("UNDONE")];
    assert_eq!(states, expected.map(|s| s.map(str::to_owned).map_err(str::to_owned)));
}

/// What the caller has seen spares reading, and decides nothing: not what has moved on, nor whether a saga is stuck.
#[tokio::test]
async fn what_was_seen_counts_only_while_it_is_so() {
    let world = World::new().await;
    let (one, two) = (world.begin().await, world.begin().await);
    let change = |row: &Row, event, guard| Change {
        saga_id: row.saga_id,
        event,
        patch: Patch::default(),
        guard,
        seen: Some(row.clone()),
    };
    let states = |verdicts: Vec<Verdict>| -> Vec<Result<String, String>> {
        let seen = |v: Verdict| v.map(|row| row.state).map_err(|rejected| rejected.current.unwrap().state);
        verdicts.into_iter().map(seen).collect()
    };
    let first = vec![
        change(&one, Event::Decided, Guard::Version(1)),
        change(&one, Event::Refused, Guard::None),
        change(&two, Event::Finished, Guard::None),
        change(&two, Event::Decided, Guard::Stuck(1)),
    ];
    let expected = [Ok("DECIDED"), Err("DECIDED"), Err("BUILDING"), Err("BUILDING")];
    let expected = expected.map(|s| s.map(str::to_owned).map_err(str::to_owned));
    assert_eq!(states(world.engine.apply(first).await.unwrap()), expected);
    // The one has moved on since it was seen, the other has not.
    let second = vec![change(&two, Event::Decided, Guard::Version(1)), change(&one, Event::Refused, Guard::Version(1))];
    let expected = [Ok("DECIDED".to_owned()), Err("DECIDED".to_owned())];
    assert_eq!(states(world.engine.apply(second).await.unwrap()), expected);
    assert_eq!(world.stored(&two).await.version, 2);
}

#[tokio::test]
async fn a_step_for_nobody_calls_nobody() {
    let script = Arc::new(Script::default());
    assert!(demo_plan().action("first").run(&script, &[]).await.is_empty());
    assert!(script.called.lock().unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_step_that_hangs_has_an_unknown_outcome() {
    async fn hang(_: Arc<Script>, _: Vec<Row>) -> Outcomes<Demo> {
        std::future::pending().await
    }
    let plan = Plan::<Demo>::builder(POLICY).pivot("pivot").action(hang).timeout(Duration::from_secs(1)).build();
    let buyer = BuyerId::parse("alice").unwrap();
    let rows = [new_row(OrderId::derive(&buyer, &RequestId::random()))];
    for (until, takes) in [(HOUR, Duration::from_secs(1)), (Duration::from_millis(10), Duration::from_millis(10))] {
        let began = Instant::now();
        let outcomes = plan.action("pivot").run_until(began + until, &Arc::new(Script::default()), &rows).await;
        assert!(matches!(outcomes[..], [Outcome::Unknown(_)]));
        assert_eq!(began.elapsed().as_millis(), takes.as_millis(), "or a little more");
    }
}

#[test]
fn the_planner_leaves_what_is_not_to_be_done() {
    let buyer = BuyerId::parse("alice").unwrap();
    let row = |state: &str| {
        let id = OrderId::derive(&buyer, &RequestId::random());
        Row { state: state.to_owned(), ..new_row(id) }
    };
    let (building, undoing, running) = (row("BUILDING"), row("UNDOING"), row("BUILDING"));
    let (done, foreign) = (row("DONE"), row("PONDERING"));
    let due = vec![building.clone(), running.clone(), done.clone(), foreign.clone(), undoing.clone()];
    let decisions = recovery::decide::<Demo>(due, |id| id == running.saga_id);
    assert_eq!(decisions.run[&State::Building], [building]);
    assert_eq!(decisions.run[&State::Undoing], [undoing]);
    assert_eq!(decisions.left, [(running, Left::Running), (done, Left::Resting), (foreign, Left::Foreign)]);
}

#[test]
fn delays_double_up_to_their_cap() {
    let delays: Vec<_> = [1, 2, 3, 4, 5, 1_000_000].map(|n| POLICY.retry.delay(n).as_millis()).into();
    assert_eq!(delays, [100, 200, 400, 800, 1_000, 1_000]);
}
