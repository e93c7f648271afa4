//! Reconciliation: the permits beside the ledger, once a second, for what faults have left.
//!
//! [`crate::domain::reconcile`] says what is wrong. What is too much is clamped at once; what is too little is raised when
//! that is so twice in a row.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures::StreamExt;
use proto::{
    SaleId,
    error::Result,
    v1::{SaleState, StockReconciliation, stock_reconciliation::Finding},
};
use tokio::sync::Mutex;

use super::{AT_ONCE, Engine};
use crate::{
    domain::{
        ledger::Ledger,
        permits::{Header, Phase},
        reconcile::{excess, shortage},
    },
    store::{Counted, Record, Standing},
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
        if let Some(excess) = excess(&before, &record.ledger) {
            let taken = self.0.permits.clamp(sale, before.epoch, before.version, excess).await?;
            tracing::warn!(%sale, excess, ?taken, "more permits than stock: clamped");
            metrics::counter!("seckill_clamped_total").increment(1);
            return Ok(None);
        }
        let Some(after) = self.open_header(sale).await? else { return Ok(None) };
        let seen = shortage(&record.ledger, outbox_is_empty, &after).map(|raise| (raise.epoch, raise.version));
        match seen {
            Some(seen) if short_before == Some(seen) => self.raise(sale, seen).await.map(|()| None),
            seen => Ok(seen),
        }
    }

    /// What a round would find of one sale now, and whether the ledger adds up. Changes nothing.
    pub(crate) async fn reconciliation(&self, sale: &SaleId) -> Result<StockReconciliation> {
        let counted = self.0.store.count_holds(sale).await?;
        let before = self.open_header(sale).await?;
        let Standing { record, outbox_is_empty } = self.0.store.standing(sale).await?;
        let after = self.open_header(sale).await?;
        let (finding, units) = finding(&counted, before.as_ref(), &record.ledger, outbox_is_empty, after.as_ref());
        Ok(StockReconciliation {
            stock: Some(self.get_stock(sale).await?),
            locked_in_holds: counted.locked_in_holds,
            sold_in_holds: counted.sold_in_holds,
            outbox_is_empty,
            finding: finding.into(),
            units,
        })
    }

    /// Decides once more with the ledger standing still, so that stock that is being withdrawn is not offered again.
    async fn raise(&self, sale: &SaleId, seen: (i64, i64)) -> Result<()> {
        let (engine, id) = (self.clone(), sale.clone());
        let work = Arc::new(move |standing: Standing| -> futures::future::BoxFuture<'static, Result<()>> {
            let (engine, sale) = (engine.clone(), id.clone());
            Box::pin(async move {
                let Some(header) = engine.open_header(&sale).await? else { return Ok(()) };
                let raise = shortage(&standing.record.ledger, standing.outbox_is_empty, &header);
                let Some(raise) = raise.filter(|raise| (raise.epoch, raise.version) == seen) else { return Ok(()) };
                if engine.0.permits.raise(&sale, &raise).await? {
                    tracing::warn!(%sale, missing = raise.missing, "fewer permits than stock with nothing on its way: raised");
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

/// What the books say beside each other, and by how many units. The permits are read around the ledger, see
/// [`crate::domain::reconcile`].
fn finding(
    counted: &Counted,
    before: Option<&Header>,
    ledger: &Ledger,
    outbox_is_empty: bool,
    after: Option<&Header>,
) -> (Finding, i64) {
    let broken = (counted.locked_in_holds - counted.held).abs() + (counted.sold_in_holds - counted.sold).abs();
    if broken > 0 {
        return (Finding::LedgerBroken, broken);
    }
    let current = |header: &&Header| header.epoch == ledger.epoch;
    let (Some(before), Some(after)) = (before.filter(current), after.filter(current)) else {
        return (Finding::NoPermits, ledger.available);
    };
    let missing = ledger.offerable() - after.offered();
    match (excess(before, ledger), shortage(ledger, outbox_is_empty, after)) {
        (Some(excess), _) => (Finding::Excess, excess),
        (None, Some(raise)) => (Finding::Short, raise.missing),
        (None, None) if missing > 0 => (Finding::OnItsWay, missing),
        (None, None) => (Finding::Consistent, 0),
    }
}
