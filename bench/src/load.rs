//! The load: visitors who come on a schedule, and what became of each.
//!
//! Open loop: a visit has the time at which it should begin, and its latency is counted from then, whether or not a
//! connection was free (no coordinated omission). Saturating load is the exception: the next visit begins when the last
//! one has ended, which finds the peak; its latencies say little.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use hdrhistogram::Histogram;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};

use crate::wire::Connection;

/// No answer within this is no answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// When visits begin.
#[derive(Clone, Copy, Debug)]
pub enum Pace {
    /// As fast as the connections allow.
    Saturating,
    /// So many a second, whatever comes of them.
    PerSecond(f64),
    /// This many, all at once; ends when all have been.
    AtOnce(u64),
}

/// How much load.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// When visits begin.
    pub pace: Pace,
    /// Connections, each with one visit at a time.
    pub connections: usize,
    /// Cut off.
    pub warm_up: Duration,
    /// Counted.
    pub length: Duration,
}

/// What became of a visit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// What the scenario is about.
    Good,
    /// Told no, in this documented way.
    Refused(String),
}

/// What a visitor does.
pub trait Visit: Send + Sync + 'static {
    /// The `n`th visit. An error is an answer that nobody documented, or none.
    fn visit(&self, connection: &mut Connection, n: u64) -> impl Future<Output = io::Result<Outcome>> + Send;
}

/// What was counted.
#[derive(Clone, Debug)]
pub struct Counted {
    /// For how long.
    pub length: Duration,
    /// Latencies of good visits, in microseconds from the intended start.
    pub latency: Histogram<u64>,
    /// Refusals by reason.
    pub refused: BTreeMap<String, u64>,
    /// Errors by text.
    pub failed: BTreeMap<String, u64>,
    /// Good visits in each second, warm-up included, and their latencies.
    pub seconds: BTreeMap<u64, Histogram<u64>>,
}

impl Counted {
    /// Good visits a second.
    pub fn rate(&self) -> f64 {
        self.latency.len() as f64 / self.length.as_secs_f64()
    }

    /// A latency in milliseconds.
    pub fn quantile(&self, quantile: f64) -> f64 {
        self.latency.value_at_quantile(quantile) as f64 / 1000.0
    }
}

/// A minute, to three digits.
fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000, 3).expect("sound bounds")
}

struct Shared {
    load: Load,
    start: Instant,
    next: AtomicU64,
    counted: Mutex<Counted>,
}

/// Runs the load against a server. `first` numbers the visits, so that no two runs have the same visitors.
pub async fn run<V: Visit>(load: Load, address: SocketAddr, first: u64, visit: Arc<V>) -> Counted {
    let counted = Counted {
        length: load.length,
        latency: histogram(),
        refused: BTreeMap::new(),
        failed: BTreeMap::new(),
        seconds: BTreeMap::new(),
    };
    let shared =
        Arc::new(Shared { load, start: Instant::now(), next: AtomicU64::new(0), counted: Mutex::new(counted) });
    let mut workers = JoinSet::new();
    for _ in 0..load.connections {
        let (shared, visit) = (shared.clone(), visit.clone());
        workers.spawn(async move { shared.work(Connection::new(address), first, &*visit).await });
    }
    workers.join_all().await;
    let mut counted = shared.counted.lock().unwrap_or_else(PoisonError::into_inner).clone();
    if let Pace::AtOnce(_) = load.pace {
        counted.length = shared.start.elapsed();
    }
    counted
}

impl Shared {
    async fn work<V: Visit>(&self, mut connection: Connection, first: u64, visit: &V) {
        loop {
            let n = self.next.fetch_add(1, Relaxed);
            let intended = match self.load.pace {
                Pace::Saturating => Instant::now(),
                Pace::PerSecond(rate) => self.start + Duration::from_secs_f64(n as f64 / rate),
                Pace::AtOnce(count) if n >= count => break,
                Pace::AtOnce(_) => self.start,
            };
            let since = intended - self.start;
            let bounded = !matches!(self.load.pace, Pace::AtOnce(_));
            if bounded && since >= self.load.warm_up + self.load.length {
                break;
            }
            sleep_until(intended).await;
            let outcome = timeout(PATIENCE, visit.visit(&mut connection, first + n)).await;
            let outcome = outcome.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
            if outcome.is_err() {
                connection.reset();
            }
            let latency = intended.elapsed().as_micros().try_into().unwrap_or(u64::MAX);
            let counts = !bounded || since >= self.load.warm_up;
            // One lock for all: a histogram per connection would be most of this program's memory.
            let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
            match outcome {
                Ok(Outcome::Good) => {
                    counted.seconds.entry(since.as_secs()).or_insert_with(histogram).saturating_record(latency);
                    if counts {
                        counted.latency.saturating_record(latency);
                    }
                }
                Ok(Outcome::Refused(reason)) if counts => *counted.refused.entry(reason).or_default() += 1,
                Err(error) if counts => *counted.failed.entry(error.to_string()).or_default() += 1,
                Ok(Outcome::Refused(_)) | Err(_) => {}
            }
        }
    }
}
