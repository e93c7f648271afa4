//! What the rush came to: outcomes by reason, rates, latencies.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use hdrhistogram::Histogram;
use tokio::time::Instant;

/// Counts and latencies, written by all buyers.
#[derive(Debug)]
pub struct Tally(Mutex<Inner>);

#[derive(Debug)]
struct Inner {
    refused: BTreeMap<String, u64>,
    retried: BTreeMap<String, u64>,
    not_paid: BTreeMap<String, u64>,
    ended: BTreeMap<String, u64>,
    gave_up: u64,
    accepted: Flow,
    locked: Flow,
    paid: Histogram<u64>,
    refusals: Histogram<u64>,
    open: Vec<(String, u32)>,
}

/// Things that happened over time, and how long each took.
#[derive(Debug)]
struct Flow {
    /// When each happened, since the start.
    at: Vec<Duration>,
    latency: Histogram<u64>,
}

impl Flow {
    fn new() -> Self {
        Self { at: Vec::new(), latency: histogram() }
    }

    fn note(&mut self, start: Instant, since: Instant) {
        self.at.push(start.elapsed());
        record(&mut self.latency, since);
    }

    /// How many a second, over the time in which the first `count` of them happened.
    fn rate(&self, count: usize) -> f64 {
        let mut at = self.at.clone();
        at.sort_unstable();
        match at.get(..count.min(at.len())) {
            Some([.., last]) if !last.is_zero() => count.min(at.len()) as f64 / last.as_secs_f64(),
            _ => 0.0,
        }
    }
}

/// One minute is longer than any answer may take.
fn histogram() -> Histogram<u64> {
    Histogram::new_with_max(60_000_000, 3).expect("bounds are constants in range")
}

fn record(histogram: &mut Histogram<u64>, since: Instant) {
    histogram.saturating_record(since.elapsed().as_micros() as u64);
}

impl Default for Tally {
    fn default() -> Self {
        Self(Mutex::new(Inner {
            refused: BTreeMap::new(),
            retried: BTreeMap::new(),
            not_paid: BTreeMap::new(),
            ended: BTreeMap::new(),
            gave_up: 0,
            accepted: Flow::new(),
            locked: Flow::new(),
            paid: histogram(),
            refusals: histogram(),
            open: Vec::new(),
        }))
    }
}

impl Tally {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An order was accepted.
    pub fn accepted(&self, start: Instant, sent: Instant) {
        self.lock().accepted.note(start, sent);
    }

    /// An order's unit is held, as its buyer was told.
    pub fn locked(&self, start: Instant, placed: Instant) {
        self.lock().locked.note(start, placed);
    }

    /// A purchase was refused.
    pub fn refused(&self, reason: &str, sent: Instant) {
        let mut inner = self.lock();
        *inner.refused.entry(reason.to_owned()).or_default() += 1;
        record(&mut inner.refusals, sent);
    }

    /// A later request had to be sent again.
    pub fn retried(&self, reason: &str) {
        *self.lock().retried.entry(reason.to_owned()).or_default() += 1;
    }

    /// A charge was answered with PAID.
    pub fn paid(&self, sent: Instant) {
        record(&mut self.lock().paid, sent);
    }

    /// A charge was refused.
    pub fn not_paid(&self, reason: &str) {
        *self.lock().not_paid.entry(reason.to_owned()).or_default() += 1;
    }

    /// An order reached a terminal state.
    pub fn ended(&self, state: &str) {
        *self.lock().ended.entry(state.to_owned()).or_default() += 1;
    }

    /// A buyer lost patience before it got anything.
    pub fn gave_up(&self) {
        self.lock().gave_up += 1;
    }

    /// A buyer left an order to its fate.
    pub fn left_open(&self, order: String, buyer: u32) {
        self.lock().open.push((order, buyer));
    }

    /// The orders left open, which are asked for at the end.
    pub fn take_open(&self) -> Vec<(String, u32)> {
        std::mem::take(&mut self.lock().open)
    }

    /// Orders that ended in this state.
    pub fn count(&self, state: &str) -> u64 {
        self.lock().ended.get(state).copied().unwrap_or_default()
    }

    /// One line for the terminal while it runs.
    pub fn progress(&self) -> String {
        let inner = self.lock();
        let refused: u64 = inner.refused.values().sum();
        format!(
            "accepted {}, locked {}, paid {}, refused {refused}",
            inner.accepted.at.len(),
            inner.locked.at.len(),
            inner.paid.len(),
        )
    }

    /// The whole story. `stock` bounds the first wave, over which the rates are taken.
    pub fn report(&self, stock: usize) -> String {
        let inner = self.lock();
        let mut text = String::new();
        text.push_str("orders by how they ended\n");
        text.push_str(&rows(&inner.ended));
        text.push_str("refusals by reason (an answer each; buyers try again where it may help)\n");
        text.push_str(&rows(&inner.refused));
        if inner.gave_up > 0 {
            text.push_str(&format!("  {:<28} {:>9}\n", "buyers who lost patience", inner.gave_up));
        }
        if !inner.not_paid.is_empty() {
            text.push_str("charges refused\n");
            text.push_str(&rows(&inner.not_paid));
        }
        if !inner.retried.is_empty() {
            text.push_str("reads, payments and cancels sent again\n");
            text.push_str(&rows(&inner.retried));
        }
        let wave = stock.min(inner.accepted.at.len());
        let (accepted, locked) = (inner.accepted.rate(wave), inner.locked.rate(wave));
        text.push_str(&format!("rates over the first {wave} orders\n"));
        text.push_str(&format!("  {:<28} {accepted:>9.0} /s\n", "accepted (durable)"));
        let share = if accepted > 0.0 { 100.0 * locked / accepted } else { 0.0 };
        text.push_str(&format!("  {:<28} {locked:>9.0} /s   {share:.0} % of accepted\n", "locked in SQL"));
        text.push_str("latency as the buyer saw it      p50      p90      p99    p99.9      max\n");
        for (name, histogram) in [
            ("accepted", &inner.accepted.latency),
            ("locked, after accepted", &inner.locked.latency),
            ("paid", &inner.paid),
            ("refused", &inner.refusals),
        ] {
            text.push_str(&format!("  {name:<24}{}\n", Percentiles(histogram)));
        }
        text
    }
}

struct Percentiles<'a>(&'a Histogram<u64>);

impl fmt::Display for Percentiles<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return write!(f, "        -");
        }
        for quantile in [0.5, 0.9, 0.99, 0.999, 1.0] {
            let ms = self.0.value_at_quantile(quantile) as f64 / 1000.0;
            write!(f, " {ms:>6.1}ms")?;
        }
        Ok(())
    }
}

fn rows(counts: &BTreeMap<String, u64>) -> String {
    if counts.is_empty() {
        return "  none\n".into();
    }
    counts.iter().map(|(name, count)| format!("  {name:<28} {count:>9}\n")).collect()
}
