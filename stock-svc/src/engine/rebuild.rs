//! Rebuilding a sale's permits from the ledger, in five steps whose order matters:
//!
//! 1. SQL: allocate an epoch. The fence stays where it is.
//! 2. Permits: claim it. Admission is closed from here.
//! 3. Let the funnel pass the stream's end, so that every accepted order has its unit before stock is offered anew.
//! 4. SQL, one transaction: move the fence, read the snapshot.
//! 5. Permits: open with the snapshot, only if the claim still stands.
//!
//! Whoever loses its claim to a newer epoch stops; two rebuilders at once end in one opening (E15).

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use proto::{SaleId, error::Result, subjects};
use tokio::{
    sync::{Semaphore, watch},
    time::Instant,
};

use super::Engine;
use crate::domain::permits::{Claimed, Opening, Phase};

/// Rebuilds that work on the database at once; the connections are for buyers.
const AT_ONCE: usize = 4;

/// Holds put back in one call.
const LOAD: usize = 2000;

/// How often the funnel is asked where it is.
const POLL: Duration = Duration::from_millis(20);
const CLAIM_CHECK: Duration = Duration::from_secs(1);

/// The rebuilds under way in this process.
#[derive(Debug)]
pub(super) struct Rebuilds {
    running: Mutex<HashMap<SaleId, watch::Receiver<()>>>,
    slots: Semaphore,
}

impl Default for Rebuilds {
    fn default() -> Self {
        Self { running: Mutex::default(), slots: Semaphore::new(AT_ONCE) }
    }
}

impl Engine {
    /// Starts a rebuild in the background, unless one is under way here.
    pub(super) fn trigger_rebuild(&self, sale: &SaleId) {
        drop(self.begin_rebuild(sale));
    }

    /// Rebuilds, or joins the rebuild under way, and waits up to `patience` for its end.
    pub(super) async fn rebuild_within(&self, sale: &SaleId, patience: Duration) {
        let mut running = self.begin_rebuild(sale);
        // The sender is dropped at the end, whatever it was; the header tells.
        let _ = tokio::time::timeout(patience, running.changed()).await;
    }

    fn begin_rebuild(&self, sale: &SaleId) -> watch::Receiver<()> {
        let mut running = self.0.rebuilds.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(running) = running.get(sale) {
            return running.clone();
        }
        let (end, ended) = watch::channel(());
        running.insert(sale.clone(), ended.clone());
        let (engine, sale) = (self.clone(), sale.clone());
        self.0.life.spawn(async move {
            let outcome = tokio::select! {
                outcome = engine.rebuild(&sale) => outcome,
                () = engine.0.life.stopping() => Ok(false),
            };
            let label = match &outcome {
                Ok(true) => "opened",
                Ok(false) => "overtaken",
                Err(error) => {
                    tracing::warn!(%sale, %error, "rebuilding permits failed");
                    "failed"
                }
            };
            metrics::counter!("seckill_rebuilds_total", "outcome" => label).increment(1);
            let mut running = engine.0.rebuilds.running.lock().unwrap_or_else(PoisonError::into_inner);
            running.remove(&sale);
            drop(end);
        });
        ended
    }

    /// The five steps. False when another rebuild has overtaken this one.
    async fn rebuild(&self, sale: &SaleId) -> Result<bool> {
        let Some((epoch, is_first)) = self.claim(sale).await? else { return Ok(false) };
        // Before the first permits nobody was granted anything, hence nothing is on its way.
        if !is_first && !self.drain(sale, epoch).await? {
            return Ok(false);
        }
        let _slot = self.0.rebuilds.slots.acquire().await;
        let Some(fenced) = self.0.store.fence(sale, epoch).await? else { return Ok(false) };
        for chunk in fenced.held.chunks(LOAD) {
            if !self.0.permits.load(sale, epoch, chunk.to_vec()).await? {
                return Ok(false);
            }
        }
        let opening = Opening {
            epoch,
            available: fenced.snapshot.available,
            snapshot_seq: fenced.snapshot.release_seq,
            facts: fenced.facts,
        };
        let opened = self.0.permits.open(sale, &opening).await?;
        if opened {
            tracing::info!(%sale, epoch, permits = opening.available, held = fenced.held.len(), "permits opened");
            // Releases that came meanwhile wait in the outbox.
            self.0.refunds.notify_one();
            self.0.signals.became_available(sale);
        }
        Ok(opened)
    }

    /// Steps 1 and 2: the epoch, and whether it is the sale's first. None when a newer claim stands.
    async fn claim(&self, sale: &SaleId) -> Result<Option<(i64, bool)>> {
        let _slot = self.0.rebuilds.slots.acquire().await;
        let server = self.0.permits.fingerprint().await?;
        let mut above = 0;
        loop {
            let epoch = self.0.store.allocate_epoch(sale, above).await?;
            // Its facts are told again when it opens; these only fill the header.
            let facts = self.0.store.standing(sale).await?.record.facts();
            match self.0.permits.claim(sale, epoch, &facts, &server).await? {
                Claimed::Yes => {
                    tracing::info!(%sale, epoch, "permits claimed for a rebuild");
                    let fence = self.0.store.standing(sale).await?.record.ledger.epoch;
                    return Ok(Some((epoch, fence == 0)));
                }
                Claimed::No(there) => {
                    let header = self.0.permits.header(sale).await?;
                    if header.is_some_and(|header| header.phase == Phase::Rebuilding) || above > 0 {
                        return Ok(None);
                    }
                    // Open and ahead of everything allocated: the ledger was put back from the past.
                    above = there;
                }
            }
        }
    }

    /// Step 3. False when the claim was lost meanwhile. There is no giving up: opening early would sell the units of
    /// accepted orders again.
    async fn drain(&self, sale: &SaleId, epoch: i64) -> Result<bool> {
        let started = Instant::now();
        let (mut warned, mut checked) = (false, started);
        let mut end = None;
        loop {
            // The bus may be away for a while, too.
            let passed = match end {
                None => self.0.bus.last_sequence(subjects::ORDERS).await.map(|last| end = Some(last)).map(|()| false),
                Some(end) => match self.funnel_has_passed(end).await {
                    Ok(true) => return Ok(true),
                    Ok(false) => Ok(false),
                    Err(error) => {
                        tracing::debug!(%error, "asking for the funnel's progress failed");
                        Ok(false)
                    }
                },
            };
            if let Err(error) = passed {
                tracing::debug!(%error, "asking for the stream's end failed");
            }
            if checked.elapsed() >= CLAIM_CHECK {
                checked = Instant::now();
                let header = self.0.permits.header(sale).await?;
                if header.is_none_or(|header| header.epoch != epoch || header.phase != Phase::Rebuilding) {
                    return Ok(false);
                }
            }
            if !warned && started.elapsed() >= self.0.config.rebuild_drain_timeout {
                warned = true;
                tracing::warn!(%sale, epoch, "a rebuild still waits for the funnel to lock the orders accepted before");
            }
            tokio::time::sleep(POLL).await;
        }
    }
}
