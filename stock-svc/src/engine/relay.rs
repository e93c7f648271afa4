//! The relay: the outbox's refunds reach the permits, in order, in batches, at least once. Permits follow the ledger and
//! are never first (E12).

use std::{collections::BTreeMap, time::Duration};

use proto::SaleId;

use super::Engine;
use crate::{domain::permits::Refunded, store::Outgoing};

/// It is woken; this is the net for what another process wrote and did not relay.
const EVERY: Duration = Duration::from_millis(200);

const BATCH: u64 = 1000;

impl Engine {
    pub(super) fn start_relay(&self) {
        self.spawn_loop(
            "relay",
            EVERY,
            |inner| Some(&inner.refunds),
            |engine| async move {
                if let Err(error) = engine.relay().await {
                    tracing::warn!(%error, "relaying refunds failed");
                }
            },
        );
    }

    /// Relays everything that can be. A sale whose permits are lost or rebuilding holds up no other.
    async fn relay(&self) -> proto::error::Result<()> {
        let (mut after, mut put_off) = (0, Vec::new());
        loop {
            let page = self.0.store.outbox(after, &put_off, BATCH).await?;
            let Some(last) = page.last() else { return Ok(()) };
            after = last.id;
            let is_last = (page.len() as u64) < BATCH;
            let mut by_sale: BTreeMap<SaleId, Vec<Outgoing>> = BTreeMap::new();
            for outgoing in page {
                by_sale.entry(outgoing.sale.clone()).or_default().push(outgoing);
            }
            let mut relayed = Vec::new();
            for (sale, refunds) in by_sale {
                let (done, all) = self.relay_of(&sale, refunds).await;
                relayed.extend(done);
                if !all {
                    put_off.push(sale);
                }
            }
            self.0.store.forget_outgoing(&relayed).await?;
            if is_last {
                return Ok(());
            }
        }
    }

    /// One sale's refunds: the ids that are done with, and whether that is all of them.
    async fn relay_of(&self, sale: &SaleId, outgoing: Vec<Outgoing>) -> (Vec<i64>, bool) {
        let refunds = outgoing.iter().map(|o| o.refund.clone()).collect();
        let batch = match self.0.permits.refund(sale, refunds).await {
            Ok(batch) => batch,
            Err(error) => {
                tracing::warn!(%sale, %error, "refunding permits failed");
                return (Vec::new(), false);
            }
        };
        let now = self.0.clock.now_ms();
        let delay = metrics::histogram!("seckill_release_to_refund_seconds");
        let mut done = Vec::with_capacity(outgoing.len());
        for (outgoing, refunded) in outgoing.iter().zip(&batch.results) {
            match refunded {
                Refunded::Applied => {
                    delay.record((now - outgoing.create_at) as f64 / 1000.0);
                    done.push(outgoing.id);
                }
                Refunded::Ignored => done.push(outgoing.id),
                Refunded::Deferred => {}
            }
        }
        if batch.before == 0 && batch.after > 0 {
            self.0.signals.became_available(sale);
        }
        // The permits of a sale that is long over come back no more.
        if done.len() < outgoing.len() && self.is_over(sale).await {
            return (outgoing.iter().map(|o| o.id).collect(), true);
        }
        let all = done.len() == outgoing.len();
        (done, all)
    }

    async fn is_over(&self, sale: &SaleId) -> bool {
        let now = self.0.clock.now_ms();
        if self.0.catalog.get(sale).is_some_and(|record| record.sale.is_live(now)) {
            return false;
        }
        let stored = self.0.store.sales(std::slice::from_ref(sale)).await;
        stored.is_ok_and(|found| found.iter().all(|record| !record.sale.is_live(now)))
    }
}
