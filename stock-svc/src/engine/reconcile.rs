//! Reconciliation: the permits beside the ledger, once a second, for what faults have left.
//!
//! It compares the two sums of [`crate::domain`], which no purchase on its way disturbs. The ledger's only grows within
//! an epoch, but for withdrawn stock, which the permits gave up before. So permits read *before* the ledger that exceed
//! it are too many for certain and are clamped at once; permits read *after* a ledger whose outbox is empty that fall
//! short are too few for certain, and are raised when that is so twice in a row. Permits are never set to A.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures::StreamExt;
use proto::{SaleId, error::Result, v1::SaleState};
use tokio::sync::Mutex;

use super::{AT_ONCE, Engine};
use crate::{
    domain::permits::{Header, Phase, Raise},
    store::{Record, Standing},
};

const EVERY: Duration = Duration::from_secs(1);

/// Permits that fell short when last looked at: by sale, the epoch and version they had.
type Short = HashMap<SaleId, (i64, i64)>;

impl Engine {
    pub(super) fn start_reconcile(&self) {
        let short = Arc::new(Mutex::new(Short::new()));
        self.spawn_loop(
            "reconcile",
            EVERY,
            |_| None,
            move |engine| {
                let short = short.clone();
                async move {
                    let mut short = short.lock().await;
                    *short = engine.reconcile(&short).await;
                }
            },
        );
    }

    async fn reconcile(&self, before: &Short) -> Short {
        let live = self.0.catalog.live(self.0.clock.now_ms());
        futures::stream::iter(live)
            .map(|record| async move {
                let sale = &record.sale.id;
                let found = self.reconcile_of(&record, before.get(sale).copied()).await;
                let short = found.unwrap_or_else(|error| {
                    tracing::debug!(%sale, %error, "reconciling failed");
                    None
                });
                short.map(|short| (sale.clone(), short))
            })
            .buffer_unordered(AT_ONCE)
            .filter_map(std::future::ready)
            .collect()
            .await
    }

    /// What is short now, if it is.
    async fn reconcile_of(&self, known: &Record, short_before: Option<(i64, i64)>) -> Result<Option<(i64, i64)>> {
        let sale = &known.sale.id;
        let Some(before) = self.open_header(sale).await? else { return Ok(None) };
        if known.ledger.epoch == before.epoch && known.ledger.offerable() == before.offered() {
            self.gauge(known, &before);
            return Ok(None);
        }
        let Standing { record, outbox_is_empty } = self.0.store.standing(sale).await?;
        self.gauge(&record, &before);
        if record.ledger.epoch != before.epoch {
            return Ok(None);
        }
        let excess = before.offered() - record.ledger.offerable();
        if excess > 0 {
            let taken = self.0.permits.clamp(sale, before.epoch, before.version, excess).await?;
            tracing::warn!(%sale, excess, ?taken, "more permits than stock: clamped");
            metrics::counter!("seckill_clamped_total").increment(1);
            return Ok(None);
        }
        let Some(after) = self.open_header(sale).await? else { return Ok(None) };
        let seen = (after.epoch, after.version);
        let is_short =
            outbox_is_empty && record.ledger.epoch == after.epoch && after.offered() < record.ledger.offerable();
        if is_short && short_before == Some(seen) {
            self.raise(sale, seen).await?;
            return Ok(None);
        }
        Ok(is_short.then_some(seen))
    }

    /// Decides once more with the ledger standing still, so that stock that is being withdrawn is not offered again.
    async fn raise(&self, sale: &SaleId, (epoch, version): (i64, i64)) -> Result<()> {
        let (engine, id) = (self.clone(), sale.clone());
        let work = Arc::new(move |standing: Standing| -> futures::future::BoxFuture<'static, Result<()>> {
            let (engine, sale) = (engine.clone(), id.clone());
            Box::pin(async move {
                let ledger = standing.record.ledger;
                let Some(header) = engine.open_header(&sale).await? else { return Ok(()) };
                let missing = ledger.offerable() - header.offered();
                if !standing.outbox_is_empty || ledger.epoch != epoch || header.epoch != epoch || missing <= 0 {
                    return Ok(());
                }
                let raise = Raise { epoch, version, missing, release_seq: ledger.release_seq };
                if engine.0.permits.raise(&sale, &raise).await? {
                    tracing::warn!(%sale, missing, "fewer permits than stock with nothing on its way: raised");
                    metrics::counter!("seckill_raised_total").increment(1);
                    engine.0.signals.became_available(&sale);
                }
                Ok(())
            })
        });
        self.0.store.under_lock(sale, work).await
    }

    async fn open_header(&self, sale: &SaleId) -> Result<Option<Header>> {
        Ok(self.0.permits.header(sale).await?.filter(|header| header.phase == Phase::Open))
    }

    /// Only for sales that run, so that labels stay few.
    fn gauge(&self, record: &Record, header: &Header) {
        if record.ledger.epoch == header.epoch && record.sale.state(self.0.clock.now_ms()) == SaleState::Open {
            let slack = record.ledger.offerable() - header.offered();
            metrics::gauge!("seckill_slack", "sale" => record.sale.id.to_string()).set(slack as f64);
        }
    }
}
