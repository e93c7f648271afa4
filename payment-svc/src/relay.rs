//! Brings stored announcements to the bus: oldest first, at least once, until the bus has them.
//!
//! An announcement is written with the outcome that it tells of, in one transaction; so neither a crash nor a bus that
//! is away loses one. The bus drops what it gets twice, by payment and state.

use std::{sync::Arc, time::Duration};

use mesh::{
    bus::{Headers, Message, SharedBus},
    lifecycle::Lifecycle,
};
use proto::{error::Result, subjects};
use tokio::sync::Notify;

use crate::store::Store;

/// Messages published at once.
const BATCH: u64 = 512;

/// How long announcements wait at most for a wake-up that was lost, or for a bus that was away.
const EVERY: Duration = Duration::from_secs(1);

/// Between two rounds: each is three round trips, however few announcements it brings, and nobody waits for one who is
/// not told sooner by an answer.
const PACE: Duration = Duration::from_millis(50);

/// Wakes the relay. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Relay(Arc<Notify>);

impl Relay {
    /// There may be something to announce.
    pub(crate) fn wake(&self) {
        self.0.notify_one();
    }
}

/// Runs until the soft stop, and then once more.
pub(crate) fn start(store: Arc<dyn Store>, bus: SharedBus, life: &Lifecycle) -> Relay {
    let wake = Arc::new(Notify::new());
    let (woken, stopping) = (wake.clone(), life.soft_token());
    life.spawn_essential("payment relay", async move {
        let mut last = false;
        while !last {
            if let Err(error) = announce(store.as_ref(), &bus).await {
                tracing::warn!(%error, "outcomes of payments were not announced yet");
            }
            let next = async {
                tokio::time::sleep(PACE).await;
                // An error only says that it was not woken by then.
                let _ = tokio::time::timeout(EVERY, woken.notified()).await;
            };
            tokio::select! {
                biased;
                () = stopping.cancelled() => last = true,
                () = next => {}
            }
        }
    });
    Relay(wake)
}

/// Announces until nothing is left.
async fn announce(store: &dyn Store, bus: &SharedBus) -> Result<()> {
    loop {
        let announcements = store.announcements(BATCH).await?;
        if announcements.is_empty() {
            return Ok(());
        }
        let messages = announcements.iter().map(|a| Message {
            subject: subjects::PAYMENTS_SETTLED.to_owned(),
            id: a.message_id.clone(),
            headers: a.traceparent.iter().map(|t| ("traceparent".to_owned(), t.clone())).collect::<Headers>(),
            payload: a.payload.clone(),
        });
        let results = bus.publish(subjects::PAYMENTS, messages.collect()).await;
        let (mut published, mut failed) = (Vec::with_capacity(results.len()), None);
        for (announcement, result) in announcements.iter().zip(results) {
            match result {
                Ok(_) => published.push(announcement.seq),
                Err(error) => failed = Some(error),
            }
        }
        metrics::counter!("seckill_payment_announcements_total").increment(published.len() as u64);
        store.forget(published).await?;
        if let Some(error) = failed {
            return Err(error.into());
        }
    }
}
