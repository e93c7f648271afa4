//! The sweep of orphan grants (E11): a permit whose order never reached the ledger goes back.
//!
//! A grant is an orphan when it is older than the grace, the funnel has provably passed everything that was in the
//! stream when it became so, and there is no hold. The proof is a barrier: the stream's end at some moment. Once the
//! funnel has settled everything up to it, every order that was published by that moment has had its lock. The
//! tombstone and a lock that is later still race on the hold's key, so exactly one wins.

use std::{sync::Arc, time::Duration};

use proto::{SaleId, error::Result, subjects};
use tokio::sync::Mutex;

use super::Engine;
use crate::{
    domain::{ledger::Swept, permits::Grant},
    store::{Operation, Outcome},
};

const EVERY: Duration = Duration::from_secs(1);

/// Grants looked at in one go, and in one transaction.
const LIMIT: usize = 4000;
const BATCH: usize = 1000;

/// The stream's end at a moment.
#[derive(Clone, Copy, Debug)]
struct Barrier {
    sequence: u64,
    at: i64,
}

impl Engine {
    pub(super) fn start_sweep(&self) {
        let barrier = Arc::new(Mutex::new(None));
        self.spawn_loop(
            "sweep",
            EVERY,
            |_| None,
            move |engine| {
                let barrier = barrier.clone();
                async move {
                    if let Err(error) = engine.sweep(&mut *barrier.lock().await).await {
                        tracing::warn!(%error, "sweeping grants failed");
                    }
                }
            },
        );
    }

    /// Until when an order of this grant that is in the stream is locked before the sweep looks at it: a barrier that comes
    /// after the grace lies behind it. Half of the grace is left for clocks that differ.
    pub(crate) fn kept_until(&self, grant: &Grant) -> i64 {
        grant.at.saturating_add(i64::try_from(self.0.config.grant_grace.as_millis() / 2).unwrap_or(i64::MAX))
    }

    async fn sweep(&self, barrier: &mut Option<Barrier>) -> Result<()> {
        if let Some(Barrier { sequence, at }) = *barrier {
            // Kept until the funnel has passed it: under load the end of the stream is always a little ahead.
            if !self.funnel_has_passed(sequence).await? {
                return Ok(());
            }
            let before = at - i64::try_from(self.0.config.grant_grace.as_millis()).unwrap_or(i64::MAX);
            for record in self.0.catalog.live(at) {
                if let Err(error) = self.sweep_of(&record.sale.id, before).await {
                    tracing::warn!(sale = %record.sale.id, %error, "sweeping a sale's grants failed");
                }
            }
        }
        let at = self.0.clock.now_ms();
        let sequence = self.0.bus.last_sequence(subjects::ORDERS).await?;
        *barrier = Some(Barrier { sequence, at });
        Ok(())
    }

    /// Whether every order up to this sequence has had its lock. Without a funnel only an empty stream is passed.
    pub(super) async fn funnel_has_passed(&self, sequence: u64) -> Result<bool> {
        let progress = self.0.bus.progress(subjects::ORDERS, subjects::FUNNEL).await?;
        Ok(progress.map_or(sequence == 0, |progress| progress.settled_through >= sequence))
    }

    async fn sweep_of(&self, sale: &SaleId, before: i64) -> Result<()> {
        let Some(pending) = self.0.permits.pending(sale, before, LIMIT).await? else { return Ok(()) };
        for chunk in pending.chunks(BATCH) {
            let items = chunk.iter().map(|pending| (sale.clone(), Operation::Sweep(pending.clone()))).collect();
            let results = self.apply(items).await?;
            let (mut persisted, mut epoch) = (Vec::new(), 0);
            for (pending, result) in chunk.iter().zip(results) {
                match result? {
                    Outcome::Swept(Swept::Persisted) => {
                        epoch = pending.grant.epoch;
                        persisted.push(pending.hold);
                    }
                    Outcome::Swept(Swept::Orphan) => metrics::counter!("seckill_orphan_grants_total").increment(1),
                    _ => {}
                }
            }
            // Pending grants are all of one epoch: the permits'.
            if !persisted.is_empty() {
                self.0.permits.persisted(sale, epoch, persisted).await?;
            }
        }
        Ok(())
    }
}
