//! The embedded bus: streams in one SQLite file, signals in this process.
//!
//! - **One writer.** Publishes, fetches and settlements of everybody queue in one [`Batcher`]; what came together shares
//!   a transaction and its sync to disk, which costs more than all the rest. Reads take turns with it.
//! - **One way there and back.** The file has a thread of its own, which runs a transaction from its first statement to its
//!   last. A buyer waits for it, and on a busy machine every further switch between threads waits for a core.
//! - **Durable**: WAL with `synchronous=FULL`. What was published or settled survives the loss of power.
//! - **One process**: the file is locked while a bus has it. Another that opens it waits a little and is then refused.
//! - **A restart** makes everything pending due at once, whatever delay it had; attempts are kept.
//! - Subjects are kept in memory: they should be kinds of messages, not one for each.
//! - Duplicates are found for two minutes, over a restart too.

mod queue;
mod recent;

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    fs::{File, TryLockError},
    io,
    panic::{self, AssertUnwindSafe},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::{
    runtime::Handle,
    sync::{Notify, broadcast, oneshot},
    time::{Instant, sleep, sleep_until},
};
use tokio_util::task::TaskTracker;

use self::queue::{Fetched, Queue};
use super::{
    Bus, Consumer, ConsumerSpec, DeadLetter, Delivery, Error, Message, Progress, Published, SIGNALS_KEPT, Settlement,
    StreamSpec,
};
use crate::{
    batch::{Batcher, Limits},
    clock::Clock,
};

/// How long to wait for another process to let go of the file: one that was just killed, usually.
const LOCK_WAIT: Duration = Duration::from_secs(5);

/// Calls, not messages: a few dozen batches fill a transaction. One in flight, because there is one thread.
const LIMITS: Limits = Limits { max_items: 64, in_flight: 1, queue: 4_096, ..Limits::DEFAULT };

/// The embedded bus. See the module.
pub struct SqliteBus {
    core: Arc<Core>,
    calls: Calls,
    signals: Mutex<HashMap<&'static str, broadcast::Sender<Bytes>>>,
}

type Calls = Batcher<Call, Result<Outcome, Error>>;

/// Something to do with the queue, on its thread.
type Job = Box<dyn FnOnce(&mut Queue) + Send>;

struct Core {
    /// To the queue's thread, which ends with the last sender.
    jobs: mpsc::Sender<Job>,
    /// By consumer: rung when there may be something to fetch.
    bells: Mutex<HashMap<i64, Arc<Notify>>>,
}

enum Call {
    Publish(&'static str, Vec<Message>),
    Settle(i64, Vec<(Delivery, Settlement)>),
    Fetch(i64, usize),
}

enum Outcome {
    Published(Vec<Result<Published, Error>>),
    Settled,
    Fetched(Fetched),
}

impl SqliteBus {
    /// Opens the file at `path`, made where it is missing. Ends when it and its consumers are dropped; then `tasks` is
    /// empty of its work.
    pub async fn open(path: &Path, clock: Clock, tasks: &TaskTracker) -> Result<Self, Error> {
        let lock = lock(path).await.map_err(|e| unavailable("open", e))?;
        Self::start(Some(path.to_owned()), Some(lock), clock, tasks).await
    }

    /// Whether another process has the file at `path` open as its bus.
    pub fn is_in_use(path: &Path) -> io::Result<bool> {
        match lock_file(path)?.try_lock() {
            Ok(()) => Ok(false),
            Err(TryLockError::WouldBlock) => Ok(true),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// A bus that forgets everything when it is dropped.
    pub async fn in_memory(clock: Clock, tasks: &TaskTracker) -> Result<Self, Error> {
        Self::start(None, None, clock, tasks).await
    }

    async fn start(
        path: Option<PathBuf>,
        lock: Option<File>,
        clock: Clock,
        tasks: &TaskTracker,
    ) -> Result<Self, Error> {
        let (jobs, queued) = mpsc::channel::<Job>();
        let (tell, opened) = oneshot::channel();
        let (token, runtime) = (tasks.token(), Handle::current());
        let work = move || {
            // Dropped from the last to the first: who waits for the tasks finds the file closed and free.
            let (_token, _lock) = (token, lock);
            // For its clock, which a test may have stopped.
            let _context = runtime.enter();
            let mut queue = match Queue::open(path.as_deref(), clock) {
                Ok(queue) => queue,
                Err(error) => return drop(tell.send(Err(error))),
            };
            if tell.send(Ok(())).is_err() {
                return;
            }
            for job in queued {
                // Whoever asked learns it from the answer that never comes. The transaction was taken back while the
                // stack unwound, and the queue knows.
                if panic::catch_unwind(AssertUnwindSafe(|| job(&mut queue))).is_err() {
                    tracing::error!("a call of the bus panicked");
                }
            }
        };
        thread::Builder::new().name("bus".to_owned()).spawn(work).map_err(|e| unavailable("open", e))?;
        opened.await.map_err(|e| unavailable("open", e))?.map_err(|e| unavailable("open", e))?;

        let core = Arc::new(Core { jobs, bells: Mutex::default() });
        let calls = Batcher::start("bus", LIMITS, tasks, {
            let core = core.clone();
            move |calls| core.clone().run_all(calls)
        });
        Ok(Self { core, calls, signals: Mutex::default() })
    }

    fn channel(&self, subject: &'static str) -> broadcast::Sender<Bytes> {
        let mut signals = self.signals.lock().unwrap_or_else(PoisonError::into_inner);
        signals.entry(subject).or_insert_with(|| broadcast::Sender::new(SIGNALS_KEPT)).clone()
    }
}

impl Core {
    /// Has the queue for itself, to the end even if the caller goes away.
    async fn with<T: Send + 'static>(
        &self,
        operation: &'static str,
        work: impl FnOnce(&mut Queue) -> queue::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        let (tell, done) = oneshot::channel();
        // Nobody waits any more: then nobody is told.
        let job = Box::new(move |queue: &mut Queue| drop(tell.send(work(queue))));
        self.jobs.send(job).map_err(|_| unavailable(operation, Stopped))?;
        done.await.map_err(|_| unavailable(operation, Stopped))?.map_err(|e| unavailable(operation, e))
    }

    /// Runs calls in one transaction: either all of them happen or none.
    async fn run_all(self: Arc<Self>, calls: Vec<Call>) -> Vec<Result<Outcome, Error>> {
        let count = calls.len();
        let core = self.clone();
        match self.with("transaction", move |queue| core.run_now(queue, calls)).await {
            Ok(outcomes) => outcomes.into_iter().map(Ok).collect(),
            Err(error) => {
                let error = Arc::new(error);
                (0..count).map(|_| Err(unavailable("transaction", error.clone()))).collect()
            }
        }
    }

    /// On the queue's thread. Publishes first, so that the fetches find it. Publishes to one stream go together, and so do
    /// the settlements of one consumer.
    fn run_now(&self, queue: &mut Queue, calls: Vec<Call>) -> queue::Result<Vec<Outcome>> {
        let mut publishes: BTreeMap<&'static str, Vec<(usize, Vec<Message>)>> = BTreeMap::new();
        let mut settlements: BTreeMap<i64, Vec<(Delivery, Settlement)>> = BTreeMap::new();
        let mut fetches = Vec::new();
        let mut outcomes = Vec::with_capacity(calls.len());
        for (place, call) in calls.into_iter().enumerate() {
            match call {
                Call::Publish(stream, messages) => publishes.entry(stream).or_default().push((place, messages)),
                Call::Settle(consumer, some) => settlements.entry(consumer).or_default().extend(some),
                Call::Fetch(consumer, max) => fetches.push((place, consumer, max)),
            }
            outcomes.push(Outcome::Settled);
        }

        let mut session = queue.begin()?;
        for (stream, calls) in publishes {
            let places: Vec<_> = calls.iter().map(|(place, messages)| (*place, messages.len())).collect();
            let messages = calls.into_iter().flat_map(|(_, messages)| messages).collect();
            let mut results = session.publish(stream, messages)?.into_iter();
            for (place, len) in places {
                outcomes[place] = Outcome::Published(results.by_ref().take(len).collect());
            }
        }
        for (consumer, settlements) in settlements {
            session.settle(consumer, settlements)?;
        }
        for (place, consumer, max) in fetches {
            outcomes[place] = Outcome::Fetched(session.fetch(consumer, max)?);
        }
        self.ring(session.commit()?);
        Ok(outcomes)
    }

    fn bell(&self, consumer: i64) -> Arc<Notify> {
        self.bells.lock().unwrap_or_else(PoisonError::into_inner).entry(consumer).or_default().clone()
    }

    fn ring(&self, consumers: impl IntoIterator<Item = i64>) {
        for consumer in consumers {
            self.bell(consumer).notify_waiters();
        }
    }
}

#[async_trait]
impl Bus for SqliteBus {
    async fn ensure_stream(&self, spec: &StreamSpec) -> Result<(), Error> {
        let spec = spec.clone();
        let ensure = move |queue: &mut Queue| {
            let mut session = queue.begin()?;
            session.ensure_stream(&spec)?;
            session.commit().map(drop)
        };
        self.core.with("ensure a stream", ensure).await
    }

    async fn publish(&self, stream: &'static str, messages: Vec<Message>) -> Vec<Result<Published, Error>> {
        let count = messages.len();
        let error = match submit(&self.calls, "publish", Call::Publish(stream, messages)).await {
            Ok(Outcome::Published(results)) => return results,
            Ok(_) => unreachable!("a publish is answered as one"),
            Err(error) => Arc::new(error),
        };
        (0..count).map(|_| Err(unavailable("publish", error.clone()))).collect()
    }

    async fn consumer(&self, spec: ConsumerSpec) -> Result<Arc<dyn Consumer>, Error> {
        let (core, stream) = (self.core.clone(), spec.stream);
        let open = move |queue: &mut Queue| {
            let mut session = queue.begin()?;
            let id = session.open_consumer(&spec)?;
            core.ring(session.commit()?);
            Ok(id)
        };
        let Some(id) = self.core.with("open a consumer", open).await? else {
            let message = format!("there is no stream {stream}");
            return Err(Error::Refused { operation: "open a consumer", message });
        };
        Ok(Arc::new(SqliteConsumer { id, bell: self.core.bell(id), calls: self.calls.clone() }))
    }

    async fn consumers(&self, stream: &'static str) -> Result<Vec<String>, Error> {
        self.core.with("list consumers", move |queue| queue.consumers(stream)).await
    }

    async fn progress(&self, stream: &'static str, consumer: &str) -> Result<Option<Progress>, Error> {
        let consumer = consumer.to_owned();
        self.core.with("ask for progress", move |queue| queue.progress(stream, &consumer)).await
    }

    async fn last_sequence(&self, stream: &'static str) -> Result<u64, Error> {
        self.core.with("ask for the last", move |queue| queue.last_sequence(stream)).await
    }

    async fn read(&self, stream: &'static str, sequence: u64) -> Result<Option<Message>, Error> {
        self.core.with("read", move |queue| queue.message(stream, sequence)).await
    }

    async fn dead_letters(&self, after: Option<&str>, limit: usize) -> Result<Vec<DeadLetter>, Error> {
        let after = after.map(str::to_owned);
        self.core.with("list dead letters", move |queue| queue.dead_letters(after.as_deref(), limit)).await
    }

    async fn redrive(&self, id: &str) -> Result<Option<DeadLetter>, Error> {
        let (core, id) = (self.core.clone(), id.to_owned());
        let redrive = move |queue: &mut Queue| {
            let mut session = queue.begin()?;
            let letter = session.redrive(&id)?;
            core.ring(session.commit()?);
            Ok(letter)
        };
        self.core.with("redrive", redrive).await?.transpose()
    }

    async fn signal(&self, subject: &'static str, payload: Bytes) -> Result<(), Error> {
        // Nobody listens: then nobody hears.
        let _ = self.channel(subject).send(payload);
        Ok(())
    }

    async fn listen(&self, subject: &'static str) -> Result<broadcast::Receiver<Bytes>, Error> {
        Ok(self.channel(subject).subscribe())
    }
}

struct SqliteConsumer {
    id: i64,
    bell: Arc<Notify>,
    calls: Calls,
}

#[async_trait]
impl Consumer for SqliteConsumer {
    async fn fetch(&self, max: usize, wait: Duration) -> Result<Vec<Delivery>, Error> {
        let deadline = Instant::now() + wait;
        loop {
            // Before looking, so that nothing falls between looking and waiting.
            let mut bell = std::pin::pin!(self.bell.notified());
            bell.as_mut().enable();
            let asked_at = Instant::now();
            let Outcome::Fetched(fetched) = submit(&self.calls, "fetch", Call::Fetch(self.id, max)).await? else {
                unreachable!("a fetch is answered as one")
            };
            if !fetched.deliveries.is_empty() || asked_at >= deadline {
                return Ok(fetched.deliveries);
            }
            if !fetched.buried {
                let until = fetched.next_due.map_or(deadline, |due| due.min(deadline));
                tokio::select! {
                    () = bell => {}
                    () = sleep_until(until) => {}
                }
            }
        }
    }

    async fn settle(&self, settlements: Vec<(Delivery, Settlement)>) -> Result<(), Error> {
        submit(&self.calls, "settle", Call::Settle(self.id, settlements)).await.map(drop)
    }
}

impl fmt::Debug for SqliteBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqliteBus").field("calls", &self.calls).finish_non_exhaustive()
    }
}

impl fmt::Debug for SqliteConsumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqliteConsumer").field("id", &self.id).finish_non_exhaustive()
    }
}

async fn submit(calls: &Calls, operation: &'static str, call: Call) -> Result<Outcome, Error> {
    calls.submit(call).await.map_err(|e| unavailable(operation, e))?
}

/// Takes the lock beside the file. The system lets go of it when the process dies, however it dies.
async fn lock(path: &Path) -> io::Result<File> {
    let file = lock_file(path)?;
    let give_up = Instant::now() + LOCK_WAIT;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(error)) => return Err(error),
            Err(TryLockError::WouldBlock) if Instant::now() >= give_up => {
                let message = format!("{} is in use by another process", path.display());
                return Err(io::Error::new(io::ErrorKind::ResourceBusy, message));
            }
            Err(TryLockError::WouldBlock) => sleep(Duration::from_millis(20)).await,
        }
    }
}

fn lock_file(path: &Path) -> io::Result<File> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    File::options().create(true).truncate(false).write(true).open(name)
}

/// The queue's thread has ended, or what was asked of it panicked.
#[derive(Debug, thiserror::Error)]
#[error("the bus has stopped, or the call panicked")]
struct Stopped;

fn unavailable(operation: &'static str, source: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::Unavailable { operation, source: Box::new(source) }
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;
    use crate::bus::{
        Headers, SharedBus,
        contract::{Storage, bus_contract},
    };

    async fn file() -> Option<Storage> {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        Some(Box::new(move || {
            let dir = dir.clone();
            Box::pin(async move {
                let path = dir.path().join("bus.db");
                Arc::new(SqliteBus::open(&path, Clock::tokio(), &TaskTracker::new()).await.unwrap()) as SharedBus
            })
        }))
    }

    bus_contract!(file);

    const STREAM: StreamSpec = StreamSpec { name: "S", subjects: Vec::new(), max_age: Duration::from_secs(86_400) };

    async fn lane(bus: &SqliteBus) -> Arc<dyn Consumer> {
        bus.ensure_stream(&StreamSpec { subjects: vec![">"], ..STREAM }).await.unwrap();
        let spec = ConsumerSpec {
            stream: "S",
            name: "lane".into(),
            filter: ">".into(),
            ack_wait: Duration::from_secs(3_600),
            max_attempts: None,
            max_pending: 100,
        };
        bus.consumer(spec).await.unwrap()
    }

    fn message(n: u64) -> Message {
        Message { subject: "a".into(), id: n.to_string(), headers: Headers::new(), payload: Bytes::new() }
    }

    #[tokio::test(start_paused = true)]
    async fn delays_run_on_tokios_clock() {
        let bus = SqliteBus::in_memory(Clock::tokio(), &TaskTracker::new()).await.unwrap();
        let lane = lane(&bus).await;
        bus.publish("S", vec![message(1)]).await;
        let first = lane.fetch(1, Duration::ZERO).await.unwrap();
        let naked = Instant::now();
        let delay = Duration::from_secs(900);
        lane.settle(vec![(first[0].clone(), Settlement::Nak(delay))]).await.unwrap();
        assert_eq!(lane.fetch(1, Duration::from_secs(3_600)).await.unwrap().len(), 1);
        assert!((delay..delay + Duration::from_secs(1)).contains(&naked.elapsed()));
    }

    #[tokio::test]
    async fn a_restart_makes_everything_pending_due_at_once() {
        let dir = tempfile::tempdir().unwrap();
        for attempt in 1..=2 {
            let tasks = TaskTracker::new();
            let bus = SqliteBus::open(&dir.path().join("bus.db"), Clock::system(), &tasks).await.unwrap();
            let lane = lane(&bus).await;
            bus.publish("S", vec![message(1)]).await;
            let delivery = lane.fetch(1, Duration::from_secs(10)).await.unwrap().remove(0);
            assert_eq!(delivery.attempt, attempt);
            lane.settle(vec![(delivery, Settlement::Nak(Duration::from_secs(3_600)))]).await.unwrap();
            drop((bus, lane));
            tasks.close();
            tasks.wait().await;
        }
    }

    #[tokio::test]
    async fn a_failed_transaction_leaves_nothing_and_keeps_the_delays() {
        let bus = SqliteBus::in_memory(Clock::tokio(), &TaskTracker::new()).await.unwrap();
        let lane = lane(&bus).await;
        bus.publish("S", vec![message(1)]).await;
        let first = lane.fetch(1, Duration::ZERO).await.unwrap();
        lane.settle(vec![(first[0].clone(), Settlement::Nak(Duration::from_secs(3_600)))]).await.unwrap();
        let uncommitted = bus.core.with("fail", |queue| {
            let mut session = queue.begin()?;
            session.publish("S", vec![message(2)])?;
            Ok(session.fetch(1, 10)?.deliveries.len())
        });
        assert_eq!(uncommitted.await.unwrap(), 1);
        assert_eq!(bus.last_sequence("S").await.unwrap(), 1);
        assert!(lane.fetch(10, Duration::from_millis(50)).await.unwrap().is_empty());
        let published = bus.publish("S", vec![message(3)]).await.remove(0).unwrap();
        assert_eq!(published, Published { sequence: 2, duplicate: false });
        assert_eq!(lane.fetch(10, Duration::from_secs(10)).await.unwrap()[0].id, "3");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_published_after_sqlite_has_rolled_back_by_itself_is_on_disk() {
        let dir = tempfile::tempdir().unwrap();
        let (path, tasks) = (dir.path().join("bus.db"), TaskTracker::new());
        let bus = SqliteBus::open(&path, Clock::tokio(), &tasks).await.unwrap();
        drop(lane(&bus).await);
        for rolls_back in [true, false] {
            let uncommitted = bus.core.with("fail", move |queue| {
                let mut session = queue.begin()?;
                session.publish("S", vec![message(1)])?;
                if rolls_back {
                    session.roll_back_as_when_there_is_no_room();
                }
                Ok(())
            });
            uncommitted.await.unwrap();
        }
        bus.publish("S", vec![message(2)]).await.remove(0).unwrap();
        drop(bus);
        tasks.close();
        tasks.wait().await;
        let bus = SqliteBus::open(&path, Clock::tokio(), &TaskTracker::new()).await.unwrap();
        assert_eq!(bus.last_sequence("S").await.unwrap(), 1);
    }

    #[tokio::test]
    async fn what_panics_fails_alone_and_leaves_nothing() {
        let bus = SqliteBus::in_memory(Clock::tokio(), &TaskTracker::new()).await.unwrap();
        drop(lane(&bus).await);
        let panics = bus.core.with::<()>("panic", |queue| {
            let mut session = queue.begin()?;
            session.publish("S", vec![message(1)])?;
            panic!("as tested")
        });
        assert!(matches!(panics.await, Err(Error::Unavailable { .. })));
        assert_eq!(bus.publish("S", vec![message(2)]).await.remove(0).unwrap().sequence, 1);
    }

    #[tokio::test]
    async fn what_was_driven_again_is_heard_of_though_who_asked_for_it_went_away() {
        let bus = SqliteBus::in_memory(Clock::tokio(), &TaskTracker::new()).await.unwrap();
        let lane = lane(&bus).await;
        bus.publish("S", vec![message(1)]).await;
        let first = lane.fetch(1, Duration::ZERO).await.unwrap().remove(0);
        lane.settle(vec![(first, Settlement::DeadLetter("as tested".into()))]).await.unwrap();
        let letter = bus.dead_letters(None, 1).await.unwrap().remove(0);

        let mut fetch = lane.fetch(1, Duration::from_secs(3_600));
        assert!(timeout(Duration::from_millis(50), &mut fetch).await.is_err(), "there is nothing yet");
        let _went_away = timeout(Duration::ZERO, bus.redrive(&letter.id)).await;
        assert_eq!(timeout(Duration::from_secs(10), fetch).await.expect("the bell rang").unwrap().len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_file_in_use_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bus.db");
        let _bus = SqliteBus::open(&path, Clock::tokio(), &TaskTracker::new()).await.unwrap();
        let error = SqliteBus::open(&path, Clock::tokio(), &TaskTracker::new()).await.unwrap_err();
        assert!(std::error::Error::source(&error).unwrap().to_string().contains("in use"));
    }
}
