//! The clock as a value, so that a test can hold it still or let it run on tokio's paused time.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::time::Instant;

/// Tells the wall time. Cheap to clone.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> i64 + Send + Sync>);

impl Clock {
    /// The machine's clock.
    pub fn system() -> Self {
        Self(Arc::new(system_ms))
    }

    /// Starts at the machine's time and then runs with tokio's: paused when tokio's is, and never backwards.
    pub fn tokio() -> Self {
        Self::tokio_from(system_ms())
    }

    /// Starts at `base_ms` and then runs with tokio's time.
    pub fn tokio_from(base_ms: i64) -> Self {
        let start = Instant::now();
        Self(Arc::new(move || base_ms + start.elapsed().as_millis() as i64))
    }

    /// Stands still at `now_ms` until the returned handle is set.
    pub fn manual(now_ms: i64) -> (Self, Arc<AtomicI64>) {
        let now = Arc::new(AtomicI64::new(now_ms));
        let read = now.clone();
        (Self(Arc::new(move || read.load(Ordering::SeqCst))), now)
    }

    /// Unix time in milliseconds.
    pub fn now_ms(&self) -> i64 {
        (self.0)()
    }

    /// How long until `at_ms`; zero when it has passed.
    pub fn until(&self, at_ms: i64) -> Duration {
        Duration::from_millis(at_ms.saturating_sub(self.now_ms()).max(0) as u64)
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Clock").field(&self.now_ms()).finish()
    }
}

fn system_ms() -> i64 {
    // Before 1970 there were no flash sales.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as i64)
}
