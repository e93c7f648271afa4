//! Natural batching: while one call is in flight the next callers queue, and when it returns they go together.
//!
//! No timer, so nothing is added when it is quiet; the busier it gets, the larger the batches. Almost all the cost of
//! an order is per call, and this is the one place where calls become batches.
//!
//! ```text
//!   submit ──┐                    ┌── lane 1: call([a])        one in flight …
//!   submit ──┼──> bounded queue ──┤
//!   submit ──┘                    └── lane 1: call([b, c, d])  … the rest together
//! ```
//!
//! Promises: one result per item, in order of the call's items; a batch never exceeds `max_items`; a full queue
//! refuses at once instead of waiting (a limit that queues is not protection); an item whose submitter went away
//! before its batch started is not called for. Once a batch started, dropping a submitter cancels nothing.
//!
//! Calls in flight beside each other hide round trips in a rush, and make every batch small when it is quieter, which costs
//! more CPU than it saves time. [`Limits::overlap_from`] has both: a large batch has another begun beside it at once, a small
//! one only when it takes long.

use std::{
    future::Future,
    panic::AssertUnwindSafe,
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use futures::FutureExt;
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::TaskTracker;

/// How large, how many at once, how many waiting.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Items in one call.
    pub max_items: usize,
    /// Calls in flight. One gives the largest batches; a second hides the round trip.
    pub in_flight: usize,
    /// Items waiting; beyond it they are refused.
    pub queue: usize,
    /// Items that a batch must have for another to be begun beside it at once.
    pub overlap_from: usize,
    /// Beside a smaller batch another is begun after this. One that hangs, because the service that it came to does, must
    /// not hold up those who come after.
    pub longest_turn: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl Limits {
    /// What most batches take.
    pub const DEFAULT: Self =
        Self { max_items: 512, in_flight: 2, queue: 16_384, overlap_from: 0, longest_turn: Duration::from_millis(100) };

    /// Does the work of a batch with so many items, and ends its turn: at once where it is large, otherwise when it is done
    /// or takes too long.
    pub async fn in_turn<T>(&self, turn: impl Sized, items: usize, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        if items < self.overlap_from
            && let Ok(done) = tokio::time::timeout(self.longest_turn, &mut work).await
        {
            return done;
        }
        drop(turn);
        work.await
    }
}

/// Why an item was not called for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Too many are waiting. Nothing was taken (I9).
    #[error("too many are waiting")]
    Full,
    /// The batcher has stopped, or its call panicked. The effect is unknown.
    #[error("stopped")]
    Stopped,
}

impl From<Refused> for proto::Error {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Full => proto::Error::new(proto::Reason::Overloaded, "too many requests are waiting"),
            Refused::Stopped => proto::Error::new(proto::Reason::DependencyDown, "shutting down"),
        }
    }
}

struct Item<T, R> {
    value: T,
    span: tracing::Span,
    reply: oneshot::Sender<R>,
}

type Call<T, R> = Arc<dyn Fn(Vec<T>) -> Pin<Box<dyn Future<Output = Vec<R>> + Send>> + Send + Sync>;

/// Makes batches of single submissions. Cheap to clone.
pub struct Batcher<T, R> {
    queue: mpsc::Sender<Item<T, R>>,
}

impl<T, R> Clone for Batcher<T, R> {
    fn clone(&self) -> Self {
        Self { queue: self.queue.clone() }
    }
}

impl<T, R> std::fmt::Debug for Batcher<T, R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Batcher").field("waiting", &(self.queue.max_capacity() - self.queue.capacity())).finish()
    }
}

impl<T: Send + 'static, R: Send + 'static> Batcher<T, R> {
    /// Starts `limits.in_flight` workers on `tasks`; they end when the last clone is dropped and the queue is empty.
    /// `call` must answer one result per item, in order. `name` labels the batch-size metric.
    pub fn start<F, Fut>(name: &'static str, limits: Limits, tasks: &TaskTracker, call: F) -> Self
    where
        F: Fn(Vec<T>) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Vec<R>> + Send + 'static,
    {
        let (queue, items) = mpsc::channel(limits.queue);
        let items = Arc::new(tokio::sync::Mutex::new(items));
        let call: Call<T, R> = Arc::new(move |batch| Box::pin(call(batch)));
        for _ in 0..limits.in_flight.max(1) {
            tasks.spawn(work(name, limits, items.clone(), call.clone()));
        }
        Self { queue }
    }

    /// Submits one item and waits for its result.
    pub async fn submit(&self, value: T) -> Result<R, Refused> {
        let (reply, result) = oneshot::channel();
        let item = Item { value, span: tracing::Span::current(), reply };
        self.queue.try_send(item).map_err(|e| match e {
            mpsc::error::TrySendError::Full(_) => Refused::Full,
            mpsc::error::TrySendError::Closed(_) => Refused::Stopped,
        })?;
        result.await.map_err(|_| Refused::Stopped)
    }
}

/// One worker: take what waits, call, answer. Workers take turns with the lock.
async fn work<T: Send + 'static, R: Send + 'static>(
    name: &'static str,
    limits: Limits,
    items: Arc<tokio::sync::Mutex<mpsc::Receiver<Item<T, R>>>>,
    call: Call<T, R>,
) {
    let sizes = metrics::histogram!("seckill_batch_size", "batch" => name);
    let max_items = limits.max_items.max(1);
    let mut taken = Vec::with_capacity(max_items);
    loop {
        let mut turn = items.lock().await;
        if turn.recv_many(&mut taken, max_items).await == 0 {
            return;
        }
        let mut values = Vec::with_capacity(taken.len());
        let mut replies = Vec::with_capacity(taken.len());
        // The batch belongs to many traces: it is a span of its own, linked to each submitter's.
        let span = tracing::info_span!("batch", batch = name, items = tracing::field::Empty);
        for item in taken.drain(..).filter(|item| !item.reply.is_closed()) {
            span.follows_from(&item.span);
            values.push(item.value);
            replies.push(item.reply);
        }
        if values.is_empty() {
            continue;
        }
        span.record("items", values.len());
        sizes.record(values.len() as f64);
        let expected = values.len();
        // A panic in one call fails that batch and not every later one. Caught here, since a task of its own would be two
        // more waits for a thread, before the call and after it, of everybody in the batch.
        let calling = tracing::Instrument::instrument(async { call(values).await }, span);
        let called = limits.in_turn(turn, expected, AssertUnwindSafe(calling).catch_unwind()).await;
        match called {
            // Whose result is whose cannot be told: every outcome is unknown, as after a panic.
            Ok(results) if results.len() != expected => {
                tracing::error!(batch = name, expected, results = results.len(), "a batch's call lost count");
            }
            Ok(results) => {
                for (reply, result) in replies.into_iter().zip(results) {
                    // Nobody waits any more: the effect stands, the answer is found by retrying.
                    let _ = reply.send(result);
                }
            }
            Err(_) => tracing::error!(batch = name, "a batch's call panicked"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    type Gated = (Batcher<u32, u32>, Arc<tokio::sync::Semaphore>, Arc<Mutex<Vec<usize>>>);

    /// A batcher whose call waits for a permit before it answers, and notes its batches' sizes.
    fn gated(limits: Limits) -> Gated {
        let gate = Arc::new(tokio::sync::Semaphore::new(0));
        let sizes = Arc::new(Mutex::new(Vec::new()));
        let (call_gate, call_sizes) = (gate.clone(), sizes.clone());
        let batcher = Batcher::start("test", limits, &TaskTracker::new(), move |items: Vec<u32>| {
            let (gate, sizes) = (call_gate.clone(), call_sizes.clone());
            async move {
                sizes.lock().unwrap().push(items.len());
                gate.acquire().await.unwrap().forget();
                items.into_iter().map(|i| i * 2).collect()
            }
        });
        (batcher, gate, sizes)
    }

    #[tokio::test]
    async fn whoever_comes_while_a_call_is_in_flight_goes_together() {
        let (batcher, gate, sizes) = gated(Limits { max_items: 3, in_flight: 1, queue: 100, ..Limits::default() });
        let submit = |i| {
            tokio::spawn({
                let b = batcher.clone();
                async move { b.submit(i).await }
            })
        };
        let first = submit(0);
        while sizes.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
        let rest: Vec<_> = (1..=4).map(submit).collect();
        tokio::task::yield_now().await;
        gate.add_permits(10);
        assert_eq!(first.await.unwrap(), Ok(0));
        for (i, task) in (1..).zip(rest) {
            assert_eq!(task.await.unwrap(), Ok(i * 2));
        }
        assert_eq!(*sizes.lock().unwrap(), [1, 3, 1]);
    }

    #[tokio::test(start_paused = true)]
    async fn only_beside_a_large_batch_another_is_begun_at_once() {
        let limits = Limits { max_items: 3, overlap_from: 3, ..Limits::default() };
        let (batcher, gate, sizes) = gated(limits);
        let submit = |i| {
            tokio::spawn({
                let b = batcher.clone();
                async move { b.submit(i).await }
            })
        };
        let settled = async || {
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
            sizes.lock().unwrap().clone()
        };
        let mut tasks = vec![submit(0)];
        assert_eq!(settled().await, [1]);
        tasks.extend((1..5).map(submit));
        assert_eq!(settled().await, [1], "they wait for each other, and go together");
        gate.add_permits(1);
        assert_eq!(settled().await, [1, 3, 1], "the large one keeps nobody waiting");
        tasks.extend((5..7).map(submit));
        gate.add_permits(1);
        assert_eq!(settled().await, [1, 3, 1]);
        // One of the two still hangs: after a while it holds up nobody.
        tokio::time::sleep(limits.longest_turn).await;
        assert_eq!(settled().await, [1, 3, 1, 2]);
        gate.add_permits(10);
        for (i, task) in (0..).zip(tasks) {
            assert_eq!(task.await.unwrap(), Ok(i * 2));
        }
    }

    #[tokio::test]
    async fn e46_a_full_queue_refuses_at_once() {
        let (batcher, gate, sizes) = gated(Limits { max_items: 1, in_flight: 1, queue: 1, ..Limits::default() });
        let running = tokio::spawn({
            let b = batcher.clone();
            async move { b.submit(1).await }
        });
        while sizes.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
        let waiting = tokio::spawn({
            let b = batcher.clone();
            async move { b.submit(2).await }
        });
        tokio::task::yield_now().await;
        assert_eq!(batcher.submit(3).await, Err(Refused::Full));
        gate.add_permits(10);
        assert_eq!(running.await.unwrap(), Ok(2));
        assert_eq!(waiting.await.unwrap(), Ok(4));
    }

    #[tokio::test]
    async fn a_call_that_panics_or_loses_count_fails_its_batch_only() {
        let batcher = Batcher::start("test", Limits::default(), &TaskTracker::new(), |items: Vec<u32>| async move {
            assert!(!items.contains(&13), "unlucky");
            items.into_iter().filter(|i| *i != 14).collect()
        });
        for bad in [13, 14, 13, 14] {
            assert_eq!(batcher.submit(bad).await, Err(Refused::Stopped));
        }
        assert_eq!(batcher.submit(7).await, Ok(7));
    }
}
