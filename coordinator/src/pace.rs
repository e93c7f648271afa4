//! The pace of accepting: no more orders wait for the funnel than it is through with in a moment.
//!
//! The stream would take orders faster than the databases lock them, and on shared cores every order taken slows down
//! the locking of those before it. So whoever comes while the backlog is full waits a little, before anything is taken
//! for it (I9), and is told to come again when a little was not enough: with a database away, that is everybody (E21).
//!
//! The backlog is the bus's own count, read every so often; in between, what is accepted here is counted. With several
//! coordinators each allows as much, so the bound is theirs together only in order of magnitude. What the funnel has in
//! hand or has put back for a moment is not counted: orders of one sale whose permits are being rebuilt must not hold up
//! the others, and the consumer's limit of unsettled messages bounds them.

use std::{sync::Arc, time::Duration};

use mesh::{bus::SharedBus, lifecycle::Lifecycle};
use proto::subjects;
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout_at},
};

/// How often the backlog is read. The funnel does a few hundred orders in this time.
const EVERY: Duration = Duration::from_millis(50);

/// Orders of one call that wait for room together: few enough for the first to be let in while the last still wait.
const STEP: usize = 64;

/// Who has waited for so long had better let another go first.
const PATIENCE: Duration = Duration::from_secs(1);

/// See the module. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Pace {
    /// Orders that may be accepted until the backlog is read again.
    room: Arc<Semaphore>,
    /// Who waits for room is let in by so many at once.
    step: usize,
}

impl Pace {
    /// Reads the backlog for as long as the role lives. `most` orders may wait.
    pub fn start(bus: SharedBus, most: usize, life: &Lifecycle) -> Self {
        let pace = Self { room: Arc::new(Semaphore::new(most)), step: most.min(STEP) };
        let room = pace.room.clone();
        let waiting = metrics::gauge!("seckill_funnel_waiting");
        life.spawn_periodic("pace", EVERY, move || {
            let (bus, room, gauge) = (bus.clone(), room.clone(), waiting.clone());
            async move {
                let backlog = match bus.progress(subjects::ORDERS, subjects::FUNNEL).await {
                    Ok(progress) => progress.map_or(0, |progress| progress.waiting as usize),
                    // Then nothing can be published either, and that has an answer of its own.
                    Err(error) => {
                        tracing::debug!(%error, "the backlog cannot be read");
                        0
                    }
                };
                gauge.set(backlog as f64);
                make_room(&room, most.saturating_sub(backlog));
            }
        });
        pace
    }

    /// Waits for room for so many orders, and answers for how many there was: the others are refused. First come, first
    /// served.
    pub async fn pass(&self, orders: usize) -> usize {
        let until = Instant::now() + PATIENCE;
        let mut passed = 0;
        while passed < orders {
            let step = self.step.min(orders - passed);
            match timeout_at(until, self.room.acquire_many(step as u32)).await {
                // Used up; reading the backlog makes new room.
                Ok(Ok(permits)) => {
                    permits.forget();
                    passed += step;
                }
                // Never closed.
                Ok(Err(_)) => return orders,
                Err(_) => break,
            }
        }
        passed
    }
}

/// Sets the room that is left. Those who wait already go first.
fn make_room(room: &Semaphore, wanted: usize) {
    let left = room.available_permits();
    if wanted > left {
        room.add_permits(wanted - left);
    } else {
        room.forget_permits(left - wanted);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn e46_who_finds_no_room_waits_a_little_and_is_refused() {
        let pace = Pace { room: Arc::new(Semaphore::new(1)), step: 1 };
        assert_eq!(pace.pass(1).await, 1);
        let waiting = tokio::spawn({
            let pace = pace.clone();
            async move { pace.pass(3).await }
        });
        tokio::task::yield_now().await;
        make_room(&pace.room, 2);
        assert_eq!(waiting.await.unwrap(), 2, "there was room for two of three");
        assert_eq!(pace.pass(1).await, 0);
    }

    #[test]
    fn room_is_what_the_backlog_leaves() {
        let room = Semaphore::new(10);
        for wanted in [3, 0, 7] {
            make_room(&room, wanted);
            assert_eq!(room.available_permits(), wanted);
        }
    }
}
